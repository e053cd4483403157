"""A folder of mixed formats through ``nnssl_stc3d prepare`` and nnU-Net's own planning and preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

DATASET = "Dataset905_Prepared"


def torso(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    image = np.where(x**2 + y**2 < 0.6, 60.0, -1000.0)
    image[x**2 + y**2 + z**2 < 0.2] = 150
    return (image + rng.normal(0, 12, shape)).astype(np.int16)


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float], flip: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, -1) if flip else (1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path), path.name.endswith("gz"))


@pytest.fixture(scope="module")
def prepared(workspace, tmp_path_factory, dicom_series) -> Path:
    """The dataset that was written; the scans lie elsewhere."""
    scans = tmp_path_factory.mktemp("scans")
    write(scans / "a.nii.gz", torso(0, (24, 30, 32)), (1.0, 1.0, 4.0))
    write(scans / "two" / "b.nii.gz", torso(1, (26, 28, 30)), (1.0, 1.0, 4.0), flip=True)
    write(scans / "two" / "c.nrrd", torso(2, (22, 32, 32)), (1.1, 1.1, 4.5))
    write(scans / "d.mhd", torso(3, (24, 28, 34)), (1.0, 1.0, 4.0))
    np.savez(scans / "e.npz", image=torso(4, (24, 30, 30)), spacing=np.array([4.0, 1.0, 1.0]))
    dicom_series(scans / "patient" / "series", torso(5, (25, 30, 30)), (1.0, 1.0, 4.0))
    (scans / "readme.txt").write_text("not a scan")
    run = workspace.run("nnssl_stc3d", "prepare", "-i", scans, "-d", 905, "-n", "Prepared", "--modality", "CT").ok()
    assert "added 6 cases (2 linked, 4 converted)" in run.output
    return workspace.root / "nnUNet_raw" / DATASET


def test_nnunet_accepts_what_was_written(workspace, prepared):
    run = workspace.run(
        "nnUNetv2_plan_and_preprocess", "-d", 905, "-c", "3d_fullres", "-np", 1, "-npfp", 1,
        "--verify_dataset_integrity", nnUNet_n_proc_DA="1",
    ).ok()  # fmt: skip
    assert "verify_dataset_integrity Done" in run.output and "Warning" not in run.output
    folder = workspace.preprocessed(DATASET)
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    # Statistics are taken inside the body: far from the -1000 HU of the air around it.
    values = plans["foreground_intensity_properties_per_channel"]["0"]
    assert 50 < values["mean"] < 110 and values["percentile_00_5"] > -100
    assert len(list((folder / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"))) == 6


def test_another_run_changes_nothing(workspace, prepared):
    before = {f: f.lstat().st_mtime_ns for f in prepared.rglob("*")}
    scans = (prepared / "imagesTr" / "a_0000.nii.gz").resolve().parent
    run = workspace.run("nnssl_stc3d", "prepare", "-i", scans, "-d", 905, "-n", "Prepared", "--modality", "CT").ok()
    assert "6 written before" in run.output and {f: f.lstat().st_mtime_ns for f in prepared.rglob("*")} == before


def test_from_a_folder_of_scans_to_a_prediction(workspace, prepared, tmp_path):
    """The target has another spacing and two channels: the pretraining gets its plans, the weights an adapted stem."""
    target, plans, aligned = "Dataset902_TinyMR", "tinyAniso", "tinyAnisoAligned"
    run = workspace.run(
        "nnssl_stc3d", "align-plans", "--pretrain", 905, "--target", 902, "-p", plans, "-o", aligned, "-np", 1,
        nnUNet_n_proc_DA="1",
    ).ok()  # fmt: skip
    assert f"-plans_name {aligned}" in run.output and "-pretrained_weights" in run.output
    own, other = (
        json.loads((workspace.preprocessed(dataset) / f"{name}.json").read_text(encoding="utf-8"))["configurations"][
            "3d_fullres"
        ]
        for dataset, name in ((DATASET, aligned), (target, plans))
    )
    assert own["spacing"] == other["spacing"] == [5.0, 1.0, 1.0]
    assert own["architecture"] == other["architecture"] and own["normalization_schemes"] == ["CTNormalization"]
    workspace.run(
        "nnUNetv2_preprocess", "-d", 905, "-plans_name", aligned, "-c", "3d_fullres", "-np", 1, nnUNet_n_proc_DA="1"
    ).ok()
    pretrained = workspace.train(DATASET, "all", "OneStepPretrainTrainer", aligned).ok()
    # A fold that no other test trains.
    finetuned = workspace.train(
        target, 1, "ShortFinetuneTrainer", plans, "-pretrained_weights", pretrained.folder / "checkpoint_final.pth"
    ).ok()
    log = next(finetuned.folder.glob("training_log_*")).read_text(encoding="utf-8")
    assert "1 -> 2" in log, log[-3000:]

    images = sorted((workspace.root / "nnUNet_raw" / target / "imagesTr").glob("*_000[01].nii.gz"))[:2]
    (tmp_path / "in").mkdir()
    for image in images:
        (tmp_path / "in" / image.name).symlink_to(image)
    workspace.predict(target, 1, "ShortFinetuneTrainer", plans, tmp_path / "in", tmp_path / "out").ok()
    (prediction,) = (tmp_path / "out").glob("*.nii.gz")
    predicted, image = sitk.ReadImage(str(prediction)), sitk.ReadImage(str(images[0]))
    assert predicted.GetSize() == image.GetSize() and predicted.GetSpacing() == image.GetSpacing()
    assert sitk.GetArrayViewFromImage(predicted).max() <= 2
