"""Plans of transformers from the plans that nnU-Net writes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.prepare import transformer_plans
from nnssl_stc3d.prepare.transformer_plans import derive_transformer_plans, write_transformer_plans


def configuration_of(plans):
    return plans["configurations"]["3d_fullres"]


@pytest.fixture
def with_monai(monkeypatch):
    """Plans can be written where MONAI is; these tests do not use it."""
    monkeypatch.setattr(transformer_plans.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_primus_is_the_network_of_nnunets_own_trainers(tiny_plans, size):
    plans = derive_transformer_plans(tiny_plans(), "new", "primus", size=size)
    architecture = configuration_of(plans)["architecture"]
    configuration = PlansManager(json.loads(json.dumps(plans))).get_configuration("3d_fullres")
    trainer = getattr(primus_trainers, f"nnUNet_Primus_{size}_Trainer")
    # Without memory for the weights.
    with torch.device("meta"):
        theirs = trainer.build_network_architecture(None, configuration, 2, 3)
        ours = get_network_from_plans(architecture["network_class_name"], architecture["arch_kwargs"], [], 2, 3)
    assert isinstance(ours, Primus)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    rates = [[getattr(block.drop_path1, "drop_prob", 0) for block in n.eva.blocks] for n in (ours, theirs)]
    assert rates[0] == rates[1] and max(rates[0]) == pytest.approx(0.2)


def test_everything_but_the_network_stays(tiny_plans, with_monai):
    plans = tiny_plans()
    configuration_of(plans)["next_stage"] = "3d_cascade_fullres"
    before = copy.deepcopy(plans)
    derived = derive_transformer_plans(plans, "new", "swin-unetr", patch_size=(32, 64, 64))
    assert plans == before and derived["plans_name"] == "new"
    written = configuration_of(derived)
    assert written["architecture"]["network_class_name"] == "nnssl_stc3d.modules.swin_unetr.PlansSwinUNETR"
    assert written["patch_size"] == [32, 64, 64] and "next_stage" not in written
    for key in ("data_identifier", "spacing", "normalization_schemes", "batch_size"):
        assert written[key] == configuration_of(plans)[key]


def test_the_positions_of_primus_are_those_of_the_patch(tiny_plans):
    derived = derive_transformer_plans(tiny_plans(), "new", "primus", patch_size=(16, 24, 32))
    assert configuration_of(derived)["architecture"]["arch_kwargs"]["input_shape"] == [16, 24, 32]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("primus", {"patch_size": (20, 64, 3)}, r"multiples of 8, got \(20, 64, 3\).*\(16, 64, 8\) or \(24, 64, 8\)"),
        ("primus", {"patch_size": (0, 8, 8)}, "three positive numbers"),
        ("primus", {"size": "XL"}, "one of S, B, M, L, got 'XL'"),
        ("swin-unetr", {"patch_size": (112, 160, 128)}, r"multiples of 32.*\(96, 160, 128\) or \(128, 160, 128\)"),
        ("swin-unetr", {"patch_size": (32, 32, 32)}, "leaves a single voxel"),
        ("swin-unetr", {"patch_size": (64, 64, 64), "size": "S"}, "Only primus comes in sizes"),
        ("vit", {}, "Expected primus or swin-unetr, got 'vit'"),
    ],
)
def test_what_does_not_suit_the_network_is_refused(tiny_plans, with_monai, network, options, message):
    with pytest.raises(ValueError, match=message):
        derive_transformer_plans(tiny_plans(), "new", network, **options)


def test_without_monai_no_plans_are_written(tiny_plans, monkeypatch, tmp_path):
    monkeypatch.setattr(transformer_plans.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    with pytest.raises(ValueError, match=r"MONAI, which is not installed.*pip install 'nnssl_stc3d\[monai\]'"):
        write_transformer_plans(tmp_path, "nnUNetPlans", "new", "swin-unetr", patch_size=(64, 64, 64))
    assert not (tmp_path / "new.json").exists()


def test_plans_are_written_beside_their_source(tiny_plans, tmp_path):
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    file = write_transformer_plans(tmp_path, "nnUNetPlans", "new", "primus")
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(
        json.dumps(derive_transformer_plans(tiny_plans(), "new", "primus"))
    )
    with pytest.raises(ValueError, match="exists"):
        write_transformer_plans(tmp_path, "nnUNetPlans", "new", "primus")
