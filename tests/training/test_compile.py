"""What torch.compile captures of every training computes what it computes without.

nnU-Net compiles on GPUs only; here its decision is overruled, and a backend that needs no compiler runs the graphs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl_stc3d.methods.base import compile_in_place
from nnssl_stc3d.modules.feature_pyramid import decoder_features
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


def test_networks_as_deep_as_real_ones_are_compiled_whole(compiled):
    """Torch keeps 8 versions of a function by default, and runs what comes after uncompiled, without a word."""
    depth, pooled = 7, 3
    network = PlainConvUNet(
        input_channels=1, n_stages=depth, features_per_stage=list(range(4, 4 + depth)), conv_op=nn.Conv3d,
        strides=[[1, 1, 1], *[[2, 2, 2]] * pooled, *[[1, 1, 1]] * (depth - 1 - pooled)], kernel_sizes=3, num_classes=2,
        n_conv_per_stage=1, n_conv_per_stage_decoder=1, norm_op=nn.InstanceNorm3d, nonlin=nn.LeakyReLU,
        deep_supervision=True,
    )  # fmt: skip
    images = torch.randn(2, 1, 16, 16, 16)
    expected = [features.mean() for features in decoder_features(network.decoder, network.encoder(images))]
    captured = compiled()
    compile_in_place(network.encoder, *network.decoder.stages)
    for training in (True, False):
        network.train(training)
        found = [features.mean() for features in decoder_features(network.decoder, network.encoder(images))]
        torch.testing.assert_close(found, expected)
    # The encoder and each stage of the decoder, in both modes.
    assert captured["stats"]["unique_graphs"] == 2 * depth


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
