"""What torch.compile captures of every training computes what it computes without.

nnU-Net compiles on GPUs only; here its decision is overruled, and a backend that needs no compiler runs the graphs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.probe_trainer import ProbeTrainer


@pytest.fixture
def compiled(monkeypatch):
    """Function that has all trainers that follow compiled; returns what has been captured since, as it grows."""

    def switch_on():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
        return torch._dynamo.utils.counters

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield switch_on
    torch._dynamo.reset()


def pretrained(trainer) -> list[float]:
    """Losses of two steps, and one in evaluation."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    torch.manual_seed(0)
    losses = [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(2)]
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        losses.append(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    return [float(loss) for loss in losses]


def test_pretraining(make_trainer, any_method_trainer, compiled):
    trainer = make_trainer(any_method_trainer)
    expected, names = pretrained(trainer), list(trainer.method.state_dict())
    captured = compiled()
    trainer = make_trainer(any_method_trainer)
    assert pretrained(trainer) == pytest.approx(expected, rel=1e-4)
    assert captured["stats"]["calls_captured"] > 0 and not captured["graph_break"]
    assert list(trainer.method.state_dict()) == names


class FrozenStart(FinetuneTrainer):
    epochs = 2
    frozen_share = 0.5


class Nonlinear(ProbeTrainer):
    head = "nonlinear"


def finetuned(trainer) -> list[float]:
    """Losses of one step in each of two epochs; a frozen encoder thaws between them."""
    trainer.initialize()
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, 1, 16, 16, 16, generator=generator)
    target = torch.randint(0, 3, (2, 1, 16, 16, 16), generator=generator).float()
    if trainer.enable_deep_supervision:
        scales = trainer._get_deep_supervision_scales()
        target = [nn.functional.interpolate(target, scale_factor=tuple(scale)) for scale in scales]
    losses = []
    for trainer.current_epoch in (0, 1):
        trainer.on_train_epoch_start()
        losses += [float(trainer.train_step({"data": data, "target": target})["loss"]) for _ in range(2)]
    return losses


@pytest.mark.parametrize("trainer", [FinetuneTrainer, FrozenStart, ProbeTrainer, Nonlinear])
def test_finetuning(make_trainer, compiled, trainer):
    expected = finetuned(make_trainer(trainer, fold=0))
    captured = compiled()
    assert finetuned(make_trainer(trainer, fold=0)) == pytest.approx(expected, rel=1e-4)
    assert captured["stats"]["calls_captured"] > 0 and not captured["graph_break"]
