"""Finetunings that are interrupted and continue: what they end with, and what they leave on disk."""

from __future__ import annotations

import json
import logging
import random

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnssl_stc3d.trainers.finetune import STC3DFinetuneTrainer, STC3DFrozenStartTrainer
from nnssl_stc3d.trainers.probe import STC3DLinearProbeTrainer
from nnunetv2.run import run_training
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.evaluation.benchmark.continuing import ContinuingTrainer

logging.getLogger("matplotlib").setLevel(logging.WARNING)
EPOCHS, STEPS = 3, 2


@pytest.fixture
def make_trainer(tmp_path, monkeypatch, tiny_plans, tiny_dataset_json):
    """Makes a trainer in a process that the benchmark has seeded."""
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = {**tiny_plans(dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.2}), "continue_training": False}
    plans["configurations"]["3d_fullres"]["batch_dice"] = False
    base = tmp_path / "nnUNet_preprocessed" / plans["dataset_name"]
    folder = base / plans["configurations"]["3d_fullres"]["data_identifier"]
    folder.mkdir(parents=True)
    (base / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    (base / "dataset_fingerprint.json").write_text("{}")
    rng = np.random.default_rng(0)
    for case in range(5):
        image = rng.normal(size=(1, 20, 22, 24)).astype(np.float32)
        labels = np.digitize(image, [0.5, 1.0]).astype(np.int8)
        blosc2.asarray(image, urlpath=str(folder / f"case_{case}.b2nd"))
        blosc2.asarray(labels, urlpath=str(folder / f"case_{case}_seg.b2nd"))
        locations = {label: np.argwhere(labels == label)[:100] for label in (1, 2)}
        write_pickle({"class_locations": locations}, str(folder / f"case_{case}.pkl"))

    def make(parent, results):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / results))
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        kind = type(f"Continuing{parent.__name__}", (ContinuingTrainer, parent), {})
        trainer = kind(dict(plans), "3d_fullres", 0, tiny_dataset_json(), torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, STEPS, 1
        return trainer

    return make


def interrupt(trainer, at):
    """Trains until before a step, counted from 0."""
    step, done = trainer.train_step, []

    def train_step(batch):
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(step(batch))
        return done[-1]

    trainer.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()


def final(trainer):
    """The final checkpoint without what differs between equal runs."""
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    log = {k: v for k, v in checkpoint["logging"].items() if "timestamps" not in k}
    return checkpoint["network_weights"], checkpoint["optimizer_state"], checkpoint["current_epoch"], log


@pytest.mark.parametrize(
    "parent", [nnUNetTrainer, STC3DFinetuneTrainer, STC3DFrozenStartTrainer, STC3DLinearProbeTrainer]
)
def test_a_continued_finetuning_ends_as_an_uninterrupted_one(make_trainer, parent):
    whole = make_trainer(parent, "whole")
    whole.run_training()
    first = make_trainer(parent, "interrupted")
    interrupt(first, at=STEPS + 1)
    latest = f"{first.output_folder}/checkpoint_latest.pth"
    assert torch.load(latest, weights_only=False)["current_epoch"] == 1
    second = make_trainer(parent, "interrupted")
    second.load_checkpoint(latest)
    second.run_training()
    (weights, optimiser, epoch, log), again = final(whole), final(second)
    assert epoch == again[2] == EPOCHS and log == again[3] and len(log["train_losses"]) == EPOCHS
    assert weights.keys() == again[0].keys() and all(torch.equal(weights[key], again[0][key]) for key in weights)
    for number, state in optimiser["state"].items():
        for key, value in state.items():
            assert value is None or torch.equal(value, again[1]["state"][number][key])
    assert optimiser["param_groups"] == again[1]["param_groups"]


def test_epochs_draw_differently_and_so_do_seeds(make_trainer):
    trainer = make_trainer(STC3DFinetuneTrainer, "drawn")
    trainer.initialize()
    drawn = []
    for seed, epoch in ((3, 0), (3, 1), (4, 1), (3, 1)):
        trainer.seed_of_run, trainer.current_epoch = seed, epoch
        trainer.on_train_epoch_start()
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[1] == drawn[3] and all(len({d[i] for d in drawn}) == 3 for i in range(3))


def test_loader_workers_of_a_continued_finetuning_begin_elsewhere(make_trainer, monkeypatch):
    """nnU-Net forks them in on_train_start, with the generators of the process."""
    states = []
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: states.append(torch.get_rng_state()))
    for epoch in (0, 2, 0):
        trainer = make_trainer(nnUNetTrainer, "workers")
        trainer.initialize()
        trainer.current_epoch = epoch
        trainer.on_train_start()
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])


@pytest.mark.parametrize("parent", [nnUNetTrainer, STC3DFinetuneTrainer])
def test_a_checkpoint_is_whole_before_it_takes_its_name(make_trainer, parent, request, tmp_path):
    trainer = make_trainer(parent, "saved")
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
