"""FPN plans from the plans that nnU-Net writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.prepare.fpn_plans import derive_fpn_plans, write_fpn_plans


def test_any_unet_plan_becomes_a_plan_of_the_same_levels(tiny_plans, tiny_network, architecture):
    plans = tiny_plans(architecture)
    before = copy.deepcopy(plans)
    derived = derive_fpn_plans(plans, "nnUNetFPNPlans")
    assert plans == before
    network = tiny_network(derived, classes=2)
    assert isinstance(network, VoxelFPN) and network.encoder.output_channels == [4, 8, 8]
    assert network(torch.zeros(1, 1, 16, 16, 16))[0].shape == (1, 2, 16, 16, 16)
    assert derived["plans_name"] == "nnUNetFPNPlans"
    for key in ("data_identifier", "patch_size", "spacing", "normalization_schemes"):
        assert derived["configurations"]["3d_fullres"][key] == plans["configurations"]["3d_fullres"][key]


def test_the_papers_network(tiny_plans, tiny_network):
    deep = {
        "n_stages": 6,
        "features_per_stage": [4] * 6,
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4],
        "n_conv_per_stage": [2] * 6,
        "n_conv_per_stage_decoder": [2] * 5,
    }
    network = tiny_network(derive_fpn_plans(tiny_plans(**deep), "paper", paper=True, head="linear"), classes=2)
    assert sum(network.encoder.output_channels) == 1008 and network.encoder.strides[1] == [1, 2, 2]
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in network.modules())
    with pytest.raises(ValueError, match="paper's FPN has 6 levels, 3d_fullres of nnUNetPlans has 3 stages"):
        derive_fpn_plans(tiny_plans(), "paper", paper=True)


def test_plans_are_written_beside_their_source(tiny_plans, tmp_path):
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    file = write_fpn_plans(tmp_path)
    assert file == tmp_path / "nnUNetFPNPlans.json"
    assert json.loads(file.read_text(encoding="utf-8")) == derive_fpn_plans(tiny_plans(), "nnUNetFPNPlans")
    with pytest.raises(ValueError, match="exists"):
        write_fpn_plans(tmp_path)
    assert write_fpn_plans(tmp_path, overwrite=True) == file
    for name, message in (("nnUNetPlans", "name of their own"), ("a__b", "plain name"), ("../a", "plain name")):
        with pytest.raises(ValueError, match=message):
            write_fpn_plans(tmp_path, target=name)


def test_plans_without_stages_are_refused(tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {"embed_dim": 4}
    with pytest.raises(NotImplementedError, match="got dynamic_network_architectures.architectures.unet.PlainConvUNet"):
        derive_fpn_plans(plans, "fpn")
