"""A preprocessed dataset without nnU-Net's preprocessing, and trainers on it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from nnssl_stc3d.methods.alice import Alice, AliceConfig
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

logging.getLogger("matplotlib").setLevel(logging.WARNING)

CONFIG = replace(
    STC3DConfig(), batch_size=2, grid=(1, 2, 2), projector_hidden=8, projector_dim=4, dense_dim=4, dense_points=8
)

METHODS = {
    "stc3d": (STC3D, STC3DConfig()),
    "stc3d paper": (STC3D, STC3DConfig.paper()),
    "voco": (VoCo, VoCoConfig()),
    "pimpic": (PiMPiC, PiMPiCConfig()),
    "vox2vec": (Vox2Vec, Vox2VecConfig(points=64)),
    "alice": (Alice, AliceConfig()),
}


class TinyTrainer(PretrainTrainer):
    """The default method, a few steps long."""

    method_class = STC3D
    config = CONFIG
    epochs = 2
    steps_per_epoch = 2
    validation_steps = 1


@pytest.fixture(autouse=True)
def _stock_loader(monkeypatch):
    """A trainer that is initialised replaces nnU-Net's loader for one load, which most tests never make."""
    from nnunetv2.run import run_training

    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)


@pytest.fixture
def nnunet(tmp_path, monkeypatch, tiny_plans, tiny_dataset_json) -> Path:
    """Folders of nnU-Net with six preprocessed cases of ``tiny_plans``; returns the folder of the cases."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plans = tiny_plans()
    base = tmp_path / "nnUNet_preprocessed" / plans["dataset_name"]
    folder = base / plans["configurations"]["3d_fullres"]["data_identifier"]
    folder.mkdir(parents=True)
    (base / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    (base / "dataset_fingerprint.json").write_text("{}")
    rng = np.random.default_rng(0)
    for case in range(6):
        for suffix in ("", "_seg"):
            image = rng.normal(size=(1, 20, 22, 24)).astype(np.float32)
            blosc2.asarray(image, urlpath=str(folder / f"case_{case}{suffix}.b2nd"))
        (folder / f"case_{case}.pkl").touch()
    return folder


@pytest.fixture
def make_trainer(nnunet, tiny_plans, tiny_dataset_json) -> Callable[..., Any]:
    """Function that makes a trainer; its parameters have the defaults of ``make``."""

    def make(trainer=TinyTrainer, plans=None, configuration="3d_fullres", fold="all", channels=1, device="cpu"):
        torch.manual_seed(0)
        # nnUNetv2_train puts this key into the plans and the trainer takes it out again.
        plans = {**(plans or tiny_plans()), "continue_training": False}
        for settings in plans["configurations"].values():
            settings.setdefault("batch_dice", False)
        return trainer(plans, configuration, fold, tiny_dataset_json(channels), torch.device(device))

    return make


@pytest.fixture
def tiny_trainer() -> type[PretrainTrainer]:
    """The trainer class that ``make_trainer`` makes."""
    return TinyTrainer


@pytest.fixture(params=list(METHODS))
def any_method_trainer(request, tiny_trainer) -> type[PretrainTrainer]:
    """A trainer class of each method, with its own configuration but small batches."""
    method, settings = METHODS[request.param]

    class Trainer(tiny_trainer):
        method_class = method
        config = replace(settings, batch_size=2, warmup_steps=0)

    return Trainer
