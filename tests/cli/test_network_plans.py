"""The network-plans command."""

from __future__ import annotations

import json

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.prepare.fpn_plans import FPN_CLASS

DEEP = {
    "n_stages": 6,
    "features_per_stage": [4] * 6,
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_conv_per_stage": [2] * 6,
    "n_conv_per_stage_decoder": [2] * 5,
}


@pytest.fixture
def preprocessed(tiny_plans, tmp_path, monkeypatch):
    folder = tmp_path / "Dataset801_X"
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans(**DEEP)))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("network", "name", "features"),
    [("fpn", "nnUNetFPNPlans", [4] * 6), ("fpn-paper", "nnUNetFPNPaperPlans", [16, 32, 64, 128, 256, 512])],
)
def test_writes_plans_that_nnunet_reads(preprocessed, network, name, features, capsys):
    assert main(["network-plans", "-d", "801", "--network", network]) == 0
    configuration = PlansManager(str(preprocessed / f"{name}.json")).get_configuration("3d_fullres")
    assert configuration.network_arch_class_name == FPN_CLASS
    assert configuration.network_arch_init_kwargs["features_per_stage"] == features
    assert f"-p {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "name"), [(None, "nnUNetPrimusSPlans"), ("B", "nnUNetPrimusBPlans")])
def test_a_transformer_in_its_sizes(preprocessed, size, name, capsys):
    command = ["network-plans", "-d", "801", "--network", "primus", "--patch-size", "32", "16", "24"]
    assert main([*command, *(["--size", size] if size else [])]) == 0
    configuration = PlansManager(str(preprocessed / f"{name}.json")).get_configuration("3d_fullres")
    assert configuration.network_arch_class_name == "nnssl_stc3d.modules.primus.PlansPrimus"
    assert configuration.patch_size == [32, 16, 24] == configuration.network_arch_init_kwargs["input_shape"]
    assert f"embed_dim {792 if size else 396}, patch [32, 16, 24]" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--size", "B"], ["--patch-size", "8", "8", "8"]])
def test_options_of_transformers_are_refused_for_others(preprocessed, options, capsys):
    assert main(["network-plans", "-d", "801", "--network", "fpn", *options]) == 1
    assert "are for transformers, got --network fpn" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(preprocessed, capsys):
    file = preprocessed / "mine.json"
    file.write_text("{}")
    command = ["network-plans", "-d", "801", "--network", "fpn", "-o", "mine"]
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "{}"
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["plans_name"] == "mine"


def test_too_few_stages_are_named(preprocessed, tiny_plans, capsys):
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    assert main(["network-plans", "-d", "801", "--network", "fpn-paper"]) == 1
    assert "3d_fullres of nnUNetPlans has 3 stages" in capsys.readouterr().err
