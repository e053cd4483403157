"""STC3D's options: checked and saved as they are."""

from __future__ import annotations

import pytest

from nnssl_stc3d.methods.stc3d import STC3DConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cropping": "corner"}, "cropping must be one of 'random', 'center', 'edge', got 'corner'"),
        ({"pred_form": "eq3"}, "pred_form must be one of 'official', 'paper', got 'eq3'"),
        ({"reg_form": "eq10"}, "reg_form must be one of 'discrepancy', 'overlap_weighted', 'eq12', got 'eq10'"),
        ({"info_nce_on": "voxels"}, "info_nce_on must be one of 'views', 'bins', got 'voxels'"),
        ({"descriptor_stages": "decoder"}, "descriptor_stages must be one of 'encoder', 'bottleneck', got 'decoder'"),
        ({"dense_pyramid": "all"}, "dense_pyramid must be one of 'decoder', 'encoder', 'both', got 'all'"),
        ({"dense_negatives": "region"}, "dense_negatives must be one of 'batch', 'volume', got 'region'"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"dense_temperature": -1}, "dense_temperature must be positive, got -1"),
        ({"base_scale": 0}, "base_scale must be positive, got 0"),
        ({"region_scale": 0}, "region_scale must be positive, got 0"),
        ({"regions": 0}, "regions must be positive, got 0"),
        ({"dense_points": 0}, "dense_points must be positive, got 0"),
        ({"reg_margin": 0}, "reg_margin must be positive, got 0"),
        ({"pred_weight": -1}, "pred_weight must not be negative, got -1"),
        ({"dense_weight": -1}, "dense_weight must not be negative, got -1"),
        ({"stage_weight": -1}, "stage_weight must not be negative, got -1"),
        ({"view_share": 0}, r"view_share is a share of the patch in \(0, 1\], got 0"),
        ({"view_share": 1.5}, r"view_share is a share of the patch in \(0, 1\], got 1.5"),
        ({"views_per_region": 1}, r"views_per_region must be at least 2 \(positive pairs\), got 1"),
        ({"grid": (4, 4)}, r"grid must be three positive numbers \(Z, Y, X\), got \(4, 4\)"),
        ({"bins": (2, 0, 2)}, r"bins must be three positive numbers \(Z, Y, X\), got \(2, 0, 2\)"),
        ({"grid": (1, 1, 1), "pred_weight": 1}, r"need at least 2 bases, got grid \(1, 1, 1\)"),
        ({"dense_weight": 0, "stage_weight": 0}, "all loss weights are 0"),
        ({"optimizer": "lars"}, "optimizer must be one of"),
        ({"info_nce_weight": 1, "batch_size": 1}, "2 volumes or 2 regions a volume, got 1 and 1. Raise regions"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        STC3DConfig(**values)


@pytest.mark.parametrize(
    ("options", "enough"),
    [
        ({"info_nce_weight": 1.0}, False),
        ({"info_nce_weight": 1.0, "regions": 2}, True),
        ({"info_nce_weight": 1.0, "info_nce_on": "bins"}, True),
        ({"info_nce_weight": 1.0, "info_nce_on": "bins", "bins": (1, 1, 1)}, False),
        ({}, True),
    ],
)
def test_a_gpu_needs_negatives_of_its_own(options, enough):
    config = STC3DConfig(**options)
    config.check_share(2)
    if enough:
        config.check_share(1)
    else:
        with pytest.raises(ValueError, match="needs negatives on every GPU: .* got 1 and 1. .* fewer GPUs"):
            config.check_share(1)


def test_one_base_is_enough_when_no_loss_looks_at_bases():
    assert not STC3DConfig(grid=(1, 1, 1), reg_weight=1, reg_form="eq12").needs_bases


@pytest.mark.parametrize(
    "config",
    [
        STC3DConfig(),
        STC3DConfig.paper(),
        STC3DConfig(
            view_shape=(8, 8, 8),
            transforms=TransformRanges(quarter_turns=0.5, scaling=(0.5, 1.0)),
            region_scale=None,
            bins=(1, 2, 3),
        ),
    ],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


def test_the_paper_reading():
    paper = STC3DConfig.paper()
    assert paper.grid == (1, 4, 4) and paper.bins == (1, 1, 1) and paper.region_scale is None
    assert paper.view_share == 0.5 and paper.regions == 2
    assert paper.dense_weight == paper.stage_weight == 0 and paper.info_nce_weight > 0 and paper.info_nce_on == "views"
    assert paper.pred_weight > 0 and paper.reg_weight > 0
    assert (paper.optimizer, paper.learning_rate, paper.weight_decay) == ("adamw", 1e-3, 1e-2)
    assert (paper.warmup_steps, paper.batch_size, paper.schedule, paper.momentum) == (100, 4, "cosine", 0.9)
