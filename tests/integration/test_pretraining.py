"""``nnUNetv2_train ... -tr <a pretraining trainer>``: what it reads, writes and refuses to do."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nnssl_stc3d.methods.base import config_from_dict
from nnssl_stc3d.methods.stc3d import STC3DConfig
from nnssl_stc3d.training.monitors import MONITORS

SAVED = ("plain", "resenc_paper", "anisotropic")
ALL = (*SAVED, "not_saved")
TERMS = {
    "plain": ("dense", "stages", "voxel_retrieval"),
    "resenc_paper": ("pred", "reg", "info_nce", "position_accuracy"),
}


def log_of(folder: Path) -> str:
    (file,) = folder.glob("training_log_*.txt")
    return file.read_text(encoding="utf-8")


def final(folder: Path) -> dict:
    return torch.load(folder / "checkpoint_final.pth", weights_only=True)


def cases_of(folder: Path) -> set[str]:
    return {c for line in (folder / "steps.txt").read_text(encoding="utf-8").splitlines() for c in json.loads(line)[1]}


@pytest.mark.parametrize("name", ALL)
def test_figures_and_summary_are_written(pretrained, name):
    folder = pretrained[name].folder
    for figure in ("views.png", "progress.png"):
        image = plt.imread(folder / figure)
        assert min(image.shape[:2]) > 200 and image.std() > 0.01
    summary = json.loads((folder / "pretraining_summary.json").read_text(encoding="utf-8"))
    assert summary["method"] == "STC3D"
    assert np.isfinite(summary["last"]["train_losses"]) and np.isfinite(summary["last"]["val_losses"])
    assert set(MONITORS) <= set(summary["last"])
    assert not any("dice" in key for key in summary["last"])
    assert not (folder / "validation").exists()


@pytest.mark.parametrize("name", sorted(TERMS))
def test_every_term_and_monitor_is_in_the_log_of_every_epoch(pretrained, name):
    log = log_of(pretrained[name].folder)
    epochs = {"plain": 3, "resenc_paper": 1}[name]
    keys = [f"{split}_{t}" for split in ("train", "val") for t in (*TERMS[name], "losses")]
    for key in (*keys, *MONITORS):
        assert log.count(f" {key} ") + log.count(f" {key}:") == epochs, key
    assert "Pretraining has no segmentation to validate" in log and "STC3DFinetuneTrainer" in log
    assert "Dice" not in log


@pytest.mark.parametrize("name", SAVED)
def test_the_checkpoint_loads_safely_and_says_what_it_is(pretrained, workspace, name):
    checkpoint = final(pretrained[name].folder)
    assert checkpoint["current_epoch"] == {"plain": 3}.get(name, 1)
    assert checkpoint["method"]["name"] == "STC3D"
    config = config_from_dict(STC3DConfig, checkpoint["method"]["config"])
    assert config.view_shape is not None
    assert checkpoint["method"]["transfers"] == (["encoder"] if name == "resenc_paper" else ["encoder", "decoder"])
    plans_name = checkpoint["plans"]["plans_name"]
    dataset = checkpoint["plans"]["dataset_name"]
    assert checkpoint["plans"] == json.loads(
        (workspace.preprocessed(dataset) / f"{plans_name}.json").read_text(encoding="utf-8")
    )
    assert checkpoint["dataset_json"] == json.loads(
        (workspace.preprocessed(dataset) / "dataset.json").read_text(encoding="utf-8")
    )
    assert checkpoint["configuration"] == "3d_fullres"
    assert {"nnssl_stc3d", "nnunetv2", "torch", "python"} <= set(checkpoint["versions"])
    assert all(v.device.type == "cpu" for v in checkpoint["network_weights"].values())


@pytest.mark.parametrize(("name", "channels"), [("plain", 1), ("resenc_paper", 1), ("anisotropic", 2)])
def test_the_adaptation_plan_points_at_existing_weights(pretrained, name, channels):
    checkpoint = final(pretrained[name].folder)
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    assert plan["pretrain_num_input_channels"] == channels
    for key in (plan["key_to_encoder"], plan["key_to_stem"], *plan["keys_to_in_proj"]):
        assert any(k.startswith(f"{key}.") for k in weights), key
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1] == channels
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == ([5.0, 1.0, 1.0] if channels == 2 else [1.0, 1.0, 1.0])


def test_the_data_are_what_the_names_say(pretrained):
    """Guards the tests themselves: an anisotropic patch, two channels, views larger than a volume."""
    checkpoint = final(pretrained["anisotropic"].folder)
    patch = checkpoint["plans"]["configurations"]["3d_fullres"]["patch_size"]
    assert max(patch) > 3 * patch[0] and len(checkpoint["dataset_json"]["channel_names"]) == 2
    assert final(pretrained["resenc_paper"].folder)["method"]["config"]["view_shape"] == [32, 32, 32]


def test_fold_all_reads_all_cases(pretrained):
    assert cases_of(pretrained["plain"].folder) == {f"case_{i}" for i in range(6)}


def test_a_fold_trains_on_its_training_cases_only(pretrained, workspace):
    from_splits = json.loads(
        (workspace.preprocessed("Dataset901_TinyCT") / "splits_final.json").read_text(encoding="utf-8")
    )[0]
    folder = pretrained["resenc_paper"].folder
    assert folder.name == "fold_0"
    seen = cases_of(folder)
    assert seen and seen <= set(from_splits["train"]) and not seen & set(from_splits["val"])
    assert "This split has 4 training and 2 validation cases" in log_of(folder)


def test_no_checkpoint_is_written_when_that_is_disabled(pretrained):
    assert not list(pretrained["not_saved"].folder.rglob("*.pth*"))
    assert "checkpointing is disabled" in pretrained["not_saved"].output
    assert "Epoch 0" in pretrained["not_saved"].output


def test_a_finished_run_leaves_only_what_is_useful(pretrained):
    names = {f.name for f in pretrained["plain"].folder.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= names
    assert "checkpoint_latest.pth" not in names and not any(n.endswith(".tmp") for n in names)


def test_nothing_is_written_beside_the_preprocessed_cases(pretrained, workspace):
    """nnU-Net infers the format of a dataset from the files in this folder."""
    for dataset in ("Dataset901_TinyCT", "Dataset902_TinyMR"):
        folder = workspace.preprocessed(dataset) / "nnUNetPlans_3d_fullres"
        assert {f.suffix for f in folder.iterdir()} == {".b2nd", ".pkl"}


def test_compiling_is_declined_on_the_cpu_as_nnunet_does(pretrained):
    assert "INFO: torch.compile disabled because device is CPU" in pretrained["plain"].output
    assert "Using torch.compile" not in pretrained["plain"].output


def test_wandb_gets_the_configuration_and_every_value(pretrained, wandb_record):
    entries = [json.loads(line) for line in wandb_record.read_text(encoding="utf-8").splitlines()]
    assert entries[0][0] == "init" and entries[0][1]["mode"] == "offline"
    config = {k: v for entry in entries if entry[0] == "config" for k, v in entry[1].items()}
    assert config["method"] == "STC3D" and config["hparas"]["temperature"] == 0.1
    logged: dict[str, dict[int, float]] = {}
    for kind, *entry in entries:
        if kind == "log":
            for key, value in entry[0].items():
                logged.setdefault(key, {})[entry[1]] = value
    saved = final(pretrained["plain"].folder)["logging"]
    assert set(logged) == set(saved)
    for key, values in saved.items():
        assert [logged[key][epoch] for epoch in range(3)] == pytest.approx(values), key


def test_the_loss_goes_down(pretrained):
    losses = final(pretrained["plain"].folder)["logging"]["val_losses"]
    assert losses[-1] < losses[0]
