"""vox2vec through nnU-Net's commands: pretraining, finetuning and prediction, on a U-Net and on the paper's FPN."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl_stc3d.methods.base import config_from_dict
from nnssl_stc3d.methods.vox2vec import Vox2VecConfig
from nnssl_stc3d.prepare.fpn_plans import write_fpn_plans

CT, MR = "Dataset901_TinyCT", "Dataset902_TinyMR"
PLAIN, ANISOTROPIC, FPN = "tinyPlain", "tinyAniso", "tinyAnisoFPN"
FOLD = 0
RUNS = ("unet", "fpn")


@pytest.fixture(scope="module")
def pretrained(workspace) -> dict:
    """The U-Net on one-channel CT; the FPN on two-channel MR with anisotropic plans, and the same form on a U-Net."""
    write_fpn_plans(workspace.preprocessed(MR), ANISOTROPIC, FPN)
    return workspace.side_by_side(
        unet=lambda: workspace.train(CT, "all", "ShortVox2VecTrainer", PLAIN, nnUNet_n_proc_DA="1"),
        fpn=lambda: workspace.train(MR, "all", "ShortVox2VecFPNTrainer", FPN),
        refused=lambda: workspace.train(MR, "all", "ShortVox2VecFPNTrainer", ANISOTROPIC),
    )


@pytest.fixture(scope="module")
def finetuned(workspace, pretrained) -> dict:
    """nnU-Net's own trainer from both checkpoints."""
    weights = {name: pretrained[name].ok().folder / "checkpoint_final.pth" for name in RUNS}
    runs = workspace.side_by_side(
        unet=lambda: workspace.train(CT, FOLD, "ShortStockTrainer", PLAIN, "-pretrained_weights", weights["unet"]),
        fpn=lambda: workspace.train(MR, FOLD, "ShortStockTrainer", FPN, "-pretrained_weights", weights["fpn"]),
    )
    return {name: run.ok() for name, run in runs.items()}


def final(folder: Path) -> dict:
    return torch.load(folder / "checkpoint_final.pth", weights_only=True)


def log_of(folder: Path) -> str:
    (file,) = folder.glob("training_log_*.txt")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_pretraining_writes_what_every_pretraining_writes(pretrained, name):
    folder = pretrained[name].ok().folder
    summary = json.loads((folder / "pretraining_summary.json").read_text(encoding="utf-8"))
    assert summary["method"] == "vox2vec" and summary["transfers"] == ["encoder", "decoder"]
    assert {"val_losses", "val_voxel_retrieval", "effective_rank"} <= set(summary["last"])
    assert all(np.isfinite(v) for v in summary["last"].values())
    assert (folder / "views.png").is_file() and (folder / "progress.png").is_file()
    config = config_from_dict(Vox2VecConfig, final(folder)["method"]["config"])
    assert config.network == ("fpn" if name == "fpn" else "any") and config.view_shape is not None


def test_body_masks_are_made_and_the_log_says_how(pretrained, workspace):
    log = log_of(pretrained["unet"].folder)
    assert log.count("The body is above ") == 1 and "HU" in log
    assert log_of(pretrained["fpn"].folder).count("The body is brighter than Otsu's threshold") == 1
    masks = workspace.preprocessed(CT) / "nnUNetPlans_3d_fullres_body"
    assert {f.name for f in masks.iterdir()} == {f"case_{i}.npz" for i in range(6)}


def test_the_papers_form_needs_the_papers_network(pretrained):
    run = pretrained["refused"]
    assert run.returncode != 0
    assert "the plan names PlainConvUNet" in run.output and "network-plans" in run.output


@pytest.mark.parametrize("name", RUNS)
def test_stock_finetuning_starts_from_the_pretrained_encoder_and_decoder(finetuned, pretrained, name):
    source = final(pretrained[name].folder)["network_weights"]
    start = torch.load(finetuned[name].folder / "initial_weights.pt", weights_only=True)
    assert set(start) == set(source)
    moved = [key for key in start if ".seg_layers." not in key]
    assert any(key.startswith("decoder.transpconvs.") for key in moved)
    for key in moved:
        assert torch.equal(start[key], source[key]), key
    trained = torch.load(finetuned[name].folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert any(not torch.equal(trained[key], start[key]) for key in moved)
    assert (finetuned[name].folder / "validation" / "summary.json").is_file()


def test_the_fpn_predicts(finetuned, workspace):
    inputs, output = workspace.root / "nnUNet_raw" / MR / "imagesTr", workspace.root / "fpn_predictions"
    workspace.predict(MR, FOLD, "ShortStockTrainer", FPN, inputs, output).ok()
    for case in range(5):
        image = sitk.ReadImage(str(inputs / f"case_{case}_0000.nii.gz"))
        segmentation = sitk.ReadImage(str(output / f"case_{case}.nii.gz"))
        assert segmentation.GetSize() == image.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= {0, 1}
        probabilities = np.load(output / f"case_{case}.npz")["probabilities"]
        np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=1e-2)
    assert finetuned["fpn"].returncode == 0
