"""``nnssl_stc3d embed``: what it refuses before it computes anything. Whole runs are in ``tests/integration``."""

from __future__ import annotations

import json

import pytest
import torch

from nnssl_stc3d.cli.main import main


@pytest.fixture
def dataset(tmp_path, monkeypatch, tiny_plans):
    folder = tmp_path / "Dataset801_Unlabelled"
    (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.delenv("NNSSL_STC3D_DEBUG", raising=False)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tiny_plans, pretraining_checkpoint):
    """Function ``(name="STC3D", **changes) -> file``."""

    def write(name: str = "STC3D", **changes):
        content = pretraining_checkpoint(tiny_plans()) | changes
        content["method"]["name"] = name
        torch.save(content, tmp_path / "checkpoint_final.pth")
        return str(tmp_path / "checkpoint_final.pth")

    return write


def refused(capsys, *arguments: str) -> str:
    assert main(["embed", *arguments]) == 1
    return capsys.readouterr().err


def test_a_variable_that_is_not_set(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert "nnUNet_preprocessed is not set" in refused(capsys, "x.pth", "-d", "801")


def test_a_dataset_or_plans_that_are_not_there(dataset, capsys):
    assert "found 0" in refused(capsys, "x.pth", "-d", "802")
    message = refused(capsys, "x.pth", "-d", "801", "-p", "otherPlans")
    assert "otherPlans.json, found nnUNetPlans" in message and "-p" in message


def test_a_checkpoint_that_is_not_there_or_no_pretraining(dataset, checkpoint, capsys):
    assert "x.pth is not there" in refused(capsys, "x.pth", "-d", "801")
    assert "contrasts voxels (vox2vec, STC3D), got one of VoCo" in refused(capsys, checkpoint("VoCo"), "-d", "801")


def test_a_folder_of_several_checkpoints(dataset, tmp_path, capsys):
    for fold in ("fold_0", "fold_1"):
        (tmp_path / "model" / fold).mkdir(parents=True)
        (tmp_path / "model" / fold / "checkpoint_final.pth").touch()
    assert "expected one checkpoint" in refused(capsys, str(tmp_path / "model"), "-d", "801")


def test_a_configuration_of_slices(dataset, capsys, tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["2d"] = plans["configurations"]["3d_fullres"] | {"patch_size": [16, 16], "spacing": [1, 1]}
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert "embed supports 3D configurations, 2d has patches of 2" in refused(capsys, "x.pth", "-d", "801", "-c", "2d")


def test_a_width_of_nothing(dataset, capsys):
    assert "--width must be positive, got 0" in refused(capsys, "x.pth", "-d", "801", "--width", "0")
