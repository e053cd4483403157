"""``nnssl_stc3d classify``: what it refuses, and the average over folds. Whole runs are in ``tests/integration``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.evaluation.classification import Classifier, find_scans
from nnssl_stc3d.training.classify_trainer import build_classifier


@pytest.fixture
def model(tmp_path, tiny_plans, tiny_dataset_json):
    """Results of two folds."""
    folder = tmp_path / "model"
    folder.mkdir()
    plans = tiny_plans()
    (folder / "plans.json").write_text(json.dumps(plans))
    record = {"classification": {"classes": ["healthy", "sick"]}}
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json() | record))
    manager = PlansManager(plans)
    for fold in range(2):
        torch.manual_seed(fold)
        network = build_classifier(manager, manager.get_configuration("3d_fullres"), 1, 2)
        torch.nn.init.normal_(network.head.weight)
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {"network_weights": network.state_dict(), "init_args": {"configuration": "3d_fullres"}}
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for case in ("b", "a"):
        (folder / f"{case}_0000.nii.gz").touch()
    return folder


def refused(capsys, *arguments: object) -> str:
    assert main(["classify", *map(str, arguments), "--device", "cpu"]) == 1
    return capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys, model, scans, monkeypatch):
    monkeypatch.delenv("NNSSL_STC3D_DEBUG", raising=False)
    out = tmp_path / "out.csv"
    assert "plans.json. Give the folder STC3DClassify" in refused(capsys, scans, "-i", scans, "-o", out)
    assert "expected" in refused(capsys, model, "-i", scans, "-o", out, "-f", "7").lower()
    assert "found none. Has the training" in refused(capsys, model, "-i", scans, "-o", out, "-chk", "other.pth")
    labels = tmp_path / "labels.csv"
    labels.write_text("case,label\na,unwell\n")
    message = refused(capsys, model, "-i", scans, "-o", out, "--labels", labels)
    assert "has the class unwell, the model knows healthy, sick" in message
    assert "Create it first" in refused(capsys, model, "-i", scans, "-o", tmp_path / "no" / "out.csv")
    out.touch()
    assert "--overwrite" in refused(capsys, model, "-i", scans, "-o", out)
    (model / "dataset.json").write_text("{}")
    assert "it names no classes" in refused(capsys, model, "-i", scans, "-o", tmp_path / "other.csv")


def test_scans_need_all_their_channels(scans):
    assert list(find_scans(scans, ".nii.gz", 1)) == ["a", "b"]
    with pytest.raises(ValueError, match="2 channels of every scan, but .*a_0001.nii.gz is missing"):
        find_scans(scans, ".nii.gz", 2)
    with pytest.raises(ValueError, match="CASE_0000.mha in .*found none"):
        find_scans(scans, ".mha", 1)


def test_probabilities_of_the_folds_are_averaged(model, scans, monkeypatch):
    volume = np.random.default_rng(0).normal(size=(1, 16, 20, 16)).astype(np.float32)

    class Preprocessor:
        def __init__(self, verbose):
            pass

        def run_case(self, files, *_):
            return volume, None, {}

    found = {}
    for folds in (None, ["0"], ["1"]):
        classifier = Classifier(model, folds, "checkpoint_final.pth", torch.device("cpu"))
        assert classifier.classes == ["healthy", "sick"]
        monkeypatch.setattr(type(classifier.configuration), "preprocessor_class", Preprocessor)
        found[str(folds)] = classifier([scans / "a_0000.nii.gz"])
    both, first, second = found.values()
    np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-5)
    assert abs(first[0] - second[0]) > 1e-3 and both.sum() == pytest.approx(1)


def test_weights_that_do_not_fit_are_refused(model):
    record = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    record["classification"]["classes"] = ["a", "b", "c"]
    (model / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="do not fit the plans and classes"):
        Classifier(model, None, "checkpoint_final.pth", torch.device("cpu"))
