"""Pretraining on volumes of 10 thick slices with anisotropic plans: a whole step of every method."""

from __future__ import annotations

from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch

from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

SLICES = 10
PROJECTOR = {"batch_size": 2, "projector_hidden": 8, "projector_dim": 4}
HEAD = {"batch_size": 2, "head_hidden": 8, "head_dim": 8}
METHODS = {
    "STC3D": (STC3D, replace(STC3DConfig(), dense_dim=4, dense_points=8, **PROJECTOR)),
    "VoCo": (VoCo, replace(VoCoConfig(), **PROJECTOR)),
    "PiMPiC": (PiMPiC, replace(PiMPiCConfig(), batch_size=2, patches=4, projector_dim=8)),
    "vox2vec": (Vox2Vec, replace(Vox2VecConfig(), points=16, **HEAD)),
    "Alice": (Alice, replace(AliceConfig(), head_bottleneck=8, decoder_width=8, **HEAD)),
}


@pytest.fixture
def thick_slices(nnunet):
    """The cases of ``nnunet`` as scans of a few slices of 6 mm; returns the folder."""
    rng = np.random.default_rng(0)
    for index, file in enumerate(sorted(nnunet.glob("*.b2nd"))):
        file.unlink()
        image = rng.normal(size=(1, SLICES, 36 + index, 40)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(file))
    return nnunet


@pytest.fixture
def anisotropic_plans(tiny_plans):
    """Function ``(slices) -> plans`` whose patch and first stages are flat."""

    def make(slices: int):
        plans = tiny_plans(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
        plans["configurations"]["3d_fullres"] |= {"patch_size": [slices, 64, 64], "spacing": [6.0, 1.0, 1.0]}
        return plans

    return make


def trainer_class(method, settings) -> type[PretrainTrainer]:
    class Trainer(PretrainTrainer):
        method_class = method
        config = settings
        epochs = steps_per_epoch = validation_steps = 1

    return Trainer


@pytest.mark.parametrize("patch", [8, 20])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_flat_volumes(make_trainer, anisotropic_plans, thick_slices, name, patch):
    """Views of 4 or 8 slices fit into the volumes, views of 10 are all there is, views of 20 more than that."""
    trainer = make_trainer(trainer_class(*METHODS[name]), anisotropic_plans(patch))
    trainer.on_train_start()
    shape = tuple(int(n * trainer.config.view_share) for n in (patch, 64, 64))
    assert trainer.config.view_shape == shape
    trainer.on_train_epoch_start()
    loaded = next(trainer.dataloader_train)
    assert loaded.batch.views.shape[-3:] == shape and loaded.batch.views.std() > 0.1
    before = {key: value.clone() for key, value in trainer.method.network.encoder.state_dict().items()}
    result = trainer.train_step(loaded)
    assert np.isfinite(result["loss"])
    after = trainer.method.network.encoder.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])


def test_slices_that_are_too_few_are_named_before_anything_is_made(make_trainer, anisotropic_plans, thick_slices):
    trainer = make_trainer(trainer_class(*METHODS["vox2vec"]), anisotropic_plans(48))
    trainer.initialize()
    with pytest.raises(
        ValueError, match=r"(?s)6 case.*\(12, 16, 16\).*views of \(24, 32, 32\), got shape \(10, 36, 40"
    ):
        trainer.get_dataloaders()
    assert not thick_slices.with_name(f"{thick_slices.name}_body").exists()
