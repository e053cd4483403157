"""nnU-Net's own trainer, and the finetuning trainer, on plans that name a transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.prepare.transformer_plans import derive_transformer_plans
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer

SMALLER = {
    "primus": ((16, 16, 16), {"embed_dim": 24, "eva_depth": 1, "eva_numheads": 1, "drop_path_rate": 0.0}),
    "swin-unetr": ((32, 64, 32), {"feature_size": 12}),
}


@pytest.fixture(params=SMALLER)
def plans(request, tiny_plans):
    if request.param == "swin-unetr":
        pytest.importorskip("monai", minversion="1.5", reason="MONAI is optional: pip install 'nnssl_stc3d[monai]'")
    patch, changes = SMALLER[request.param]
    derived = derive_transformer_plans(tiny_plans(), "transformer", request.param, patch_size=patch)
    derived["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(changes)
    return derived


@pytest.mark.parametrize("trainer_class", [nnUNetTrainer, FinetuneTrainer])
def test_a_step_trains_on_the_whole_loss_and_a_prediction_is_one_tensor(make_trainer, plans, trainer_class):
    trainer = make_trainer(trainer_class, plans, fold=0)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    data = torch.randn(2, 1, *patch)
    target = torch.randint(0, 3, (2, 1, *patch)).float()
    # What nnU-Net's data loading makes of the scales.
    scales = trainer._get_deep_supervision_scales()
    assert scales and all(s == 1 for scale in scales for s in scale)
    trainer.network.eval()
    with torch.no_grad():
        (output,) = trainer.network(data)
        whole = trainer.loss.loss(output, target)
        np.testing.assert_allclose(trainer.loss([output], [target] * len(scales)), whole, rtol=1e-5)
    trainer.network.train()
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    result = trainer.train_step({"data": data, "target": [target] * len(scales)})
    assert np.isfinite(result["loss"])
    moved = {name for name, value in trainer.network.named_parameters() if not torch.equal(value, before[name])}
    assert len(moved) > len(before) / 2
    assert "tp_hard" in trainer.validation_step({"data": data, "target": [target] * len(scales)})
    # As for the final validation, and in nnUNetv2_predict.
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(data).shape == (2, 3, *patch)
