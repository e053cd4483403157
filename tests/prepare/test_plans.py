"""Small plans: widths, depth, patch; what they keep; what is refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.prepare.plans import (
    SmallPlansConfig,
    derive_small_plans,
    fit_patch_size,
    trainable_configuration,
    write_small_plans,
)

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]


def make_plans(residual: bool = False) -> dict:
    """Plans as nnU-Net writes them, cut down to what is read."""
    kwargs = {
        "n_stages": 5,
        "features_per_stage": [32, 64, 128, 256, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 4],
        "strides": STRIDES,
        "n_conv_per_stage_decoder": [2, 2, 2, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if residual:
        kwargs |= {"n_blocks_per_stage": [1, 3, 4, 6, 6], "n_conv_per_stage_decoder": [1, 1, 1, 1]}
    else:
        kwargs |= {"n_conv_per_stage": [2, 2, 2, 2, 2]}
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    full = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [64, 128, 128],
        "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"],
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset802_X",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "configurations": {
            "2d": {"patch_size": [128, 128], "architecture": full["architecture"]},
            "3d_lowres": {**copy.deepcopy(full), "next_stage": "3d_cascade_fullres"},
            "3d_fullres": full,
            "3d_child": {"inherits_from": "3d_fullres", "spacing": [2.0, 1.0, 1.0]},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stages", [None, 3])
def test_network_is_small_and_runs(residual, stages):
    small = SmallPlansConfig(stages=stages, max_features=32, patch_size=(16, 32, 32), batch_size=1)
    plans = derive_small_plans(make_plans(residual), "small", small=small)
    manager = PlansManager(plans).get_configuration("3d_fullres")
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=False,
    )
    assert network.encoder.output_channels == [8, 16, 32, 32, 32][: stages or 5]
    assert network(torch.zeros(1, 1, 16, 32, 32)).shape == (1, 3, 16, 32, 32)


def test_data_stay_shared_and_the_source_is_untouched():
    source = make_plans()
    before = copy.deepcopy(source)
    plans = derive_small_plans(source, "small", small=SmallPlansConfig(batch_size=3))
    assert source == before
    old, new = source["configurations"]["3d_fullres"], plans["configurations"]["3d_fullres"]
    assert plans["plans_name"] == "small" and plans["dataset_name"] == "Dataset802_X"
    for key in ("data_identifier", "spacing", "normalization_schemes", "preprocessor_name", "patch_size"):
        assert new[key] == old[key]
    assert new["batch_size"] == 3
    assert list(plans["configurations"]) == ["3d_fullres"]


def test_inherited_entries_are_resolved():
    resolved = trainable_configuration(make_plans(), "3d_child")
    assert resolved["spacing"] == [2.0, 1.0, 1.0] and resolved["patch_size"] == [64, 128, 128]
    assert "inherits_from" not in resolved
    assert "next_stage" not in derive_small_plans(make_plans(), "s", "3d_lowres")["configurations"]["3d_lowres"]


def test_unsupported_configurations_are_refused():
    with pytest.raises(NotImplementedError, match="only 3D"):
        trainable_configuration(make_plans(), "2d")
    with pytest.raises(NotImplementedError, match="cascade"):
        trainable_configuration(make_plans(), "3d_cascade_fullres")
    with pytest.raises(ValueError, match="3d_fullres"):
        trainable_configuration(make_plans(), "3d_fulres")
    circle = make_plans()
    circle["configurations"]["3d_fullres"]["inherits_from"] = "3d_child"
    with pytest.raises(ValueError, match="no usable configuration"):
        trainable_configuration(circle, "3d_fullres")
    other = make_plans()
    other["configurations"]["3d_fullres"]["architecture"] = {"network_class_name": "a.B", "arch_kwargs": {}}
    with pytest.raises(NotImplementedError, match=r"a\.B"):
        derive_small_plans(other, "small")


def test_patches_that_the_strides_do_not_divide_are_refused_with_ones_that_fit():
    with pytest.raises(ValueError, match=r"\(16, 32, 32\) and \(16, 48, 32\)"):
        derive_small_plans(make_plans(), "small", small=SmallPlansConfig(patch_size=(16, 40, 32)))
    with pytest.raises(ValueError, match="single voxel"):
        derive_small_plans(make_plans(), "small", small=SmallPlansConfig(patch_size=(8, 16, 16)))


@pytest.mark.parametrize("voxels", [20_000, 60_000, 10**9])
@pytest.mark.parametrize("stages", [None, 3])
def test_fitted_patch(voxels, stages):
    configuration = trainable_configuration(make_plans(), "3d_fullres")
    patch = np.array(fit_patch_size(configuration, voxels, stages))
    stride = np.array(STRIDES[:stages]).prod(axis=0)
    assert (patch % stride == 0).all() and (patch <= [64, 128, 128]).all()
    assert patch.prod() <= max(voxels, (2 * stride).prod())
    assert patch.prod() >= min(voxels, 64 * 128 * 128) / 3, "the patch is needlessly small"
    derived = derive_small_plans(make_plans(), "s", small=SmallPlansConfig(max_patch_voxels=voxels, stages=stages))
    assert derived["configurations"]["3d_fullres"]["patch_size"] == patch.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_features": 0}, "base 0"),
        ({"base_features": 64, "max_features": 32}, "max 32"),
        ({"batch_size": 0}, "got 0"),
        ({"stages": 1}, "two stages"),
        ({"patch_size": (8, 8, 8), "max_patch_voxels": 9}, "not both"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SmallPlansConfig(**options)


def test_files(tmp_path):
    with pytest.raises(ValueError, match="nnUNetv2_plan_and_preprocess"):
        write_small_plans(tmp_path, "nnUNetPlans", "small")
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(make_plans()))
    with pytest.raises(ValueError, match="This dataset has: nnUNetPlans"):
        write_small_plans(tmp_path, "nnUNetResEncUNetMPlans", "small")
    for name in ("nnUNetPlans", "a__b", "../x", ""):
        with pytest.raises(ValueError):
            write_small_plans(tmp_path, "nnUNetPlans", name)
    file = write_small_plans(tmp_path, "nnUNetPlans", "small")
    assert file == tmp_path / "small.json" and json.loads(file.read_text(encoding="utf-8"))["plans_name"] == "small"
    changed = SmallPlansConfig(base_features=4)
    with pytest.raises(ValueError, match="--overwrite"):
        write_small_plans(tmp_path, "nnUNetPlans", "small", small=changed)
    write_small_plans(tmp_path, "nnUNetPlans", "small", small=changed, overwrite=True)
    kwargs = json.loads(file.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [4, 8, 16, 32, 64]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        write_small_plans(tmp_path, "broken", "small2")
