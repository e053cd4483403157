"""Probes and classification through nnU-Net's own commands."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

CT, PLAIN, FOLD = "Dataset901_TinyCT", "tinyPlain", 0
PROBES = {"linear": "ShortLinearProbeTrainer", "decoder": "ShortNonlinearDecoderProbeTrainer"}


@pytest.fixture(scope="module")
def runs(workspace, pretrained):
    """A probe of either kind and a classification, from one pretraining."""
    weights = pretrained["plain"].folder / "checkpoint_final.pth"
    lines = [f"case_{i},{'odd' if i % 2 else 'even'},{0 if i < 2 else 1}" for i in range(6)]
    (workspace.preprocessed(CT) / "classification.csv").write_text("\n".join(["case,label,fold", *lines]))

    def train(trainer: str, *arguments: str):
        return workspace.train(CT, FOLD, trainer, PLAIN, "-pretrained_weights", weights, *arguments)

    finished = workspace.side_by_side(
        linear=lambda: train(PROBES["linear"], "--npz"),
        decoder=lambda: train(PROBES["decoder"]),
        classify=lambda: train("ShortClassifyTrainer"),
    )
    return {name: run.ok() for name, run in finished.items()}


@pytest.mark.parametrize("name", sorted(PROBES))
def test_a_probe_trains_its_head_and_leaves_the_pretrained_network_bit_equal(runs, pretrained, name):
    source = torch.load(pretrained["plain"].folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    start = torch.load(runs[name].folder / "initial_weights.pt", weights_only=True)
    end = torch.load(runs[name].folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    backbone = [key for key in end if key.startswith("backbone.")]
    assert any("decoder.stages" in key for key in backbone) == (name == "decoder")
    assert all(torch.equal(end[key], source[key.removeprefix("backbone.")]) for key in backbone)
    heads = [key for key in end if key.startswith("head.")]
    assert heads and not any(torch.equal(end[key], start[key]) for key in heads if key.endswith("weight"))
    assert json.loads((runs[name].folder / "validation" / "summary.json").read_text(encoding="utf-8"))[
        "foreground_mean"
    ]


def scans(workspace, tmp_path, cases):
    folder = tmp_path / "in"
    folder.mkdir()
    for case in cases:
        name = f"{case}_0000.nii.gz"
        (folder / name).symlink_to(workspace.root / "nnUNet_raw" / CT / "imagesTr" / name)
    return folder


def test_prediction_of_a_probe_equals_its_validation(workspace, runs, tmp_path):
    validation = runs["linear"].folder / "validation"
    cases = sorted(file.name.removesuffix(".npz") for file in validation.glob("*.npz"))
    output = tmp_path / "out"
    workspace.predict(CT, FOLD, PROBES["linear"], PLAIN, scans(workspace, tmp_path, cases), output).ok()
    assert cases
    for case in cases:
        expected, found = (np.load(folder / f"{case}.npz")["probabilities"] for folder in (validation, output))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert expected[1].std() > 1e-4, "the comparison would be trivial"


def test_new_scans_are_classified_as_in_the_validation(workspace, runs, tmp_path):
    folder = runs["classify"].folder
    assert json.loads((folder / "validation" / "summary.json").read_text(encoding="utf-8"))["cases"] == 2
    output, labels = tmp_path / "classes.csv", tmp_path / "labels.csv"
    labels.write_text("case,label\ncase_0,even\ncase_1,odd\n")
    arguments = ("classify", folder.parent, "-i", scans(workspace, tmp_path, ["case_0", "case_1"]), "-o", output)
    run = workspace.run("nnssl_stc3d", *arguments, "--labels", labels, "--device", "cpu").ok()
    assert "2 scans, averaged over 1 folds" in run.output and "balanced accuracy:" in run.output
    with open(output, newline="") as found, open(folder / "validation" / "predictions.csv", newline="") as expected:
        for a, b in zip(csv.DictReader(found), csv.DictReader(expected), strict=True):
            assert a["case"] == b["case"] and a["predicted"] == b["predicted"]
            assert float(a["p_even"]) == pytest.approx(float(b["p_even"]), abs=1e-4)
    refused = workspace.run("nnssl_stc3d", *arguments)
    assert refused.returncode == 1 and "--overwrite" in refused.output
