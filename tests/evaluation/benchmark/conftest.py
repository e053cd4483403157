"""A benchmark whose runs have results that are made up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.evaluation.benchmark.design import draw_split
from nnssl_stc3d.evaluation.benchmark.execution import cost_file
from nnssl_stc3d.evaluation.benchmark.methods import find_methods
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Settings, plan_runs
from nnssl_stc3d.evaluation.benchmark.workspace import Dataset, Workspace

LABELS = {"background": 0, "liver": 1, "spleen": 2}
NAME = "Dataset004_Made"


@pytest.fixture
def settings(tmp_path):
    plans = {
        "plans_name": "nnUNetPlans",
        "dataset_name": NAME,
        "configurations": {
            "3d_fullres": {"data_identifier": "x", "normalization_schemes": ["ZScoreNormalization"], "architecture": {}}
        },
    }
    dataset = Dataset(None, tmp_path / "user" / NAME, plans, "3d_fullres")
    split = draw_split([f"1.2.840.{i}" for i in range(20)], 3, 2, 0)
    workspace = Workspace(tmp_path / "benchmark")
    folder = workspace.preprocessed / NAME
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    settings = Settings(workspace, dataset, dataset, split, "cpu", True, "test", 100)
    images, truths = workspace.cases("test")
    for target in (images, truths):
        target.mkdir(parents=True)
    volume = np.zeros((6, 16, 16), np.float32)
    volume[2:5, 4:10, 4:10], volume[3, 12:14, 12:14] = 1, 2
    for case in split.test:
        sitk.WriteImage(sitk.GetImageFromArray(volume * 50), str(images / f"{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(volume.astype(np.uint8)), str(truths / f"{case}.nii.gz"))
    return settings


@pytest.fixture
def runs():
    methods = find_methods(["stc3d", "voco"])
    return plan_runs(True, dict.fromkeys(methods, 50), ["stc3d"], [5, 10], range(5), [("noise", "low")])


@pytest.fixture
def finish(settings):
    """Writes what a run leaves behind: stc3d is 5 points above scratch, voco level, and noise costs 10 points.

    The first case has no spleen, and nothing finds one there.
    """

    def write(run):
        cost = cost_file(run, settings)
        cost.parent.mkdir(parents=True, exist_ok=True)
        cost.write_text(json.dumps({"nnUNetv2_train": {"seconds": 60.0 + run.seed, "joules": None}}))
        if not isinstance(run, (Finetuning, PerturbedPrediction)):
            return
        perturbed = isinstance(run, PerturbedPrediction)
        finetuning, where = (run.finetuning, run.settings(settings)) if perturbed else (run, settings)
        folder = finetuning.predictions(where)
        folder.mkdir(parents=True)
        rng = np.random.default_rng(finetuning.seed)
        base = 0.6 + 0.01 * finetuning.labels + 0.02 * rng.normal() - 0.1 * perturbed
        jitter = np.random.default_rng([finetuning.seed, finetuning.labels, len(finetuning.method)]).normal()
        base += {"scratch": 0.0, "stc3d": 0.05, "voco": 0.0}[finetuning.method] + 0.001 * jitter
        cases = []
        for index, case in enumerate(settings.split.test):
            dice = {"1": {"Dice": base + 0.02 * index}, "2": {"Dice": base - 0.2 if index else float("nan")}}
            cases.append({"prediction_file": str(folder / f"{case}.nii.gz"), "metrics": dice})
            truth = sitk.ReadImage(str(settings.workspace.cases("test")[1] / f"{case}.nii.gz"))
            sitk.WriteImage(truth, str(folder / f"{case}.nii.gz"))
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": cases}))

    return write
