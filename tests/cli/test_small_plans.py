"""The small-plans command."""

from __future__ import annotations

import json

import pytest

from nnssl_stc3d.cli.main import main


@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    folder = tmp_path / "Dataset802_X"
    folder.mkdir()
    kwargs = {"n_stages": 3, "features_per_stage": [32, 64, 128], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "patch_size": [64, 64, 64],
        "batch_size": 2,
        "architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs": kwargs},
    }
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": configuration}}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


@pytest.mark.parametrize("dataset", ["802", "Dataset802_X"])
def test_writes_plans(preprocessed, dataset, capsys):
    assert main(["small-plans", "-d", dataset, "--patch-size", "32", "32", "16", "--batch-size", "1"]) == 0
    plans = json.loads((preprocessed / "nnUNetSmallPlans.json").read_text(encoding="utf-8"))
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [32, 32, 16]
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 16, 32]
    assert "-p nnUNetSmallPlans" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "803"], "Dataset803_*, found 0"),
        (["-d", "802", "--patch-size", "30", "32", "32"], "not divisible"),
        (["-d", "802", "-p", "Other"], "This dataset has: nnUNetPlans"),
    ],
)
def test_errors(preprocessed, arguments, message, capsys):
    assert main(["small-plans", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (preprocessed / "nnUNetSmallPlans.json").exists()


def test_ambiguous_dataset(preprocessed, capsys):
    (preprocessed.parent / "Dataset802_Y").mkdir()
    assert main(["small-plans", "-d", "802"]) == 1
    assert "found 2: Dataset802_X, Dataset802_Y" in capsys.readouterr().err
    assert main(["small-plans", "-d", "Dataset802_X"]) == 0


def test_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert main(["small-plans", "-d", "802"]) == 1
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "none"))
    assert main(["small-plans", "-d", "802"]) == 1
    assert "is not a folder" in capsys.readouterr().err
