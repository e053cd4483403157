"""The paper's configuration as plans, and what nnU-Net makes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.prepare.align import Side
from nnssl_stc3d.prepare.paper_plans import align_to_paper, paper_plans
from nnssl_stc3d.transfer.load import load_pretrained

DEEP = {
    "n_stages": 6,
    "features_per_stage": [4, 4, 8, 8, 8, 8],
    "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 5],
    "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4],
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}


def side(plans, dataset, channels=("CT",)):
    plans = json.loads(json.dumps(plans)) | {"dataset_name": dataset}
    fingerprint = {"shapes_after_crop": [(200, 300, 300)], "spacings": [(1.5, 1.0, 1.0)]}
    return Side.read(dataset, plans, "3d_fullres", {"channel_names": dict(enumerate(channels))}, fingerprint)


@pytest.fixture
def both(tiny_plans):
    pretraining, target = (side(tiny_plans(**DEEP), name) for name in ("Dataset801_U", "Dataset004_L"))
    return align_to_paper(pretraining, target, "paper")


def test_spacing_patch_and_topology(both):
    for aligned, patch in zip(both, (128, 96)):
        configuration = aligned.plans["configurations"]["3d_fullres"]
        assert configuration["spacing"] == [1.5] * 3 and configuration["patch_size"] == [patch] * 3
        kwargs = configuration["architecture"]["arch_kwargs"]
        assert kwargs["strides"] == [[1, 1, 1], *[[2, 2, 2]] * 4] and kwargs["kernel_sizes"] == [[3, 3, 3]] * 5
        assert kwargs["n_stages"] == len(kwargs["features_per_stage"]) == len(kwargs["n_conv_per_stage"]) == 5
        assert len(kwargs["n_conv_per_stage_decoder"]) == 4
        assert configuration["data_identifier"] == "paper_3d_fullres"
        assert aligned.plans["transpose_forward"] == [0, 1, 2]


def test_nnunets_normalisation_maps_the_window_to_0_1(both):
    for aligned in both:
        assert aligned.plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
        statistics = aligned.plans["foreground_intensity_properties_per_channel"]["0"]
        image = np.array([-1000, -175, 37.5, 250, 1500], np.float32)
        given = CTNormalization(use_mask_for_norm=False, intensityproperties=statistics).run(image)
        np.testing.assert_allclose(given, [0, 0, 0.5, 1, 1], atol=1e-6)


def test_the_papers_trainer_has_views_of_64(both, tiny_network):
    pretraining = both[0].plans
    network = tiny_network(pretraining)
    patch = pretraining["configurations"]["3d_fullres"]["patch_size"]
    assert STC3D.resolve(STC3DConfig.paper(), network, patch).view_shape == (64, 64, 64)


def test_weights_go_from_the_one_to_the_other(both, tiny_network, pretraining_checkpoint):
    source, labelled = (aligned.plans for aligned in both)
    report = load_pretrained(tiny_network(labelled), pretraining_checkpoint(source), labelled, "3d_fullres")
    assert not report.adapted and len(report.warnings) == 1 and report.warnings[0].startswith("patch size")


def test_shallow_plans_get_as_many_stages(tiny_plans, tiny_network, architecture):
    kwargs = paper_plans(tiny_plans(architecture), "3d_fullres")["configurations"]["3d_fullres"]["architecture"][
        "arch_kwargs"
    ]
    assert kwargs["features_per_stage"] == [4, 8, 8, 16, 32]
    blocks = kwargs.get("n_conv_per_stage", kwargs.get("n_blocks_per_stage"))
    assert len(blocks) == 5 and blocks[3:] == [2, 2] and kwargs["n_conv_per_stage_decoder"] == [1] * 4
    assert tiny_network(paper_plans(tiny_plans(architecture), "3d_fullres")).encoder.strides[-1] == [2, 2, 2]


def test_other_modalities_are_refused(tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"]
    with pytest.raises(ValueError, match="window from -175 to 250 HU is for CT, but Dataset801_U has the channels T1"):
        align_to_paper(side(plans, "Dataset801_U", ["T1"]), side(tiny_plans(), "Dataset004_L"), "paper")


def test_networks_without_stages_are_refused(tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {"embed_dim": 4}
    with pytest.raises(NotImplementedError, match="list stages, features, kernels and strides"):
        paper_plans(plans, "3d_fullres")
