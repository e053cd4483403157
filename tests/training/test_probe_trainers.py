"""Probes train a head and nothing else; the frozen start thaws the encoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnssl_stc3d.modules.probe import ProbeNetwork
from nnssl_stc3d.prepare.transformer_plans import derive_transformer_plans
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.probe_trainer import ProbeTrainer
from nnssl_stc3d.training.schedule import Thaw

BATCH_NORM = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}


class Short:
    epochs = 2
    steps_per_epoch = 40
    validation_steps = 1
    learning_rate = 1e-2
    warmup_steps = 0


class Linear(Short, ProbeTrainer):
    pass


class Nonlinear(Short, ProbeTrainer):
    head = "nonlinear"


class LinearDecoder(Short, ProbeTrainer):
    pyramid = "decoder"


class NonlinearDecoder(Short, ProbeTrainer):
    head = "nonlinear"
    pyramid = "decoder"


PROBES = (Linear, Nonlinear, LinearDecoder, NonlinearDecoder)


@pytest.fixture(autouse=True)
def stock_loader(monkeypatch):
    # What the test process imported must not be changed for the tests that follow.
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)


@pytest.fixture(params=["PlainConvUNet", "ResidualEncoderUNet", "VoxelFPN"])
def plans(request, tiny_plans):
    """Plans of each supported network, with normalisation whose statistics could change."""
    if request.param == "VoxelFPN":
        changed = tiny_plans("ResidualEncoderUNet", **BATCH_NORM)
        changed["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = (
            "nnssl_stc3d.modules.fpn.VoxelFPN"
        )
        return changed
    return tiny_plans(request.param, **BATCH_NORM)


def batch() -> dict[str, torch.Tensor]:
    """Patches in which the brightness of a voxel says its class."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 4, 4, 4), generator=generator).repeat_interleave(4, 2)
    target = target.repeat_interleave(4, 3).repeat_interleave(4, 4)
    return {"data": 2.0 * target.float() - 2 + 0.1 * torch.randn(target.shape, generator=generator), "target": target}


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def steps(trainer, count: int = 3) -> list[float]:
    trainer.on_train_epoch_start()
    return [float(trainer.train_step(batch())["loss"]) for _ in range(count)]


@pytest.mark.parametrize("probe", PROBES)
def test_only_the_head_is_trained_and_the_backbone_stays_bit_equal(make_trainer, plans, probe):
    trainer = make_trainer(probe, plans, fold=0)
    trainer.initialize()
    backbone, head = state(trainer.network.backbone), state(trainer.network.head)
    assert any("running_mean" in name for name in backbone)
    steps(trainer)
    trainer.on_validation_epoch_start()
    trainer.validation_step(batch())
    steps(trainer, 1)
    after = trainer.network.backbone.state_dict()
    assert set(after) == set(backbone) and all(torch.equal(after[name], value) for name, value in backbone.items())
    assert not all(torch.equal(v, head[k]) for k, v in trainer.network.head.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in trainer.network.backbone.parameters())
    assert all(p.grad is not None for p in trainer.network.head.parameters())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.network.head.parameters()}
    assert len(trainer.optimizer.state) == len(optimised)
    assert not any(m.training for m in trainer.network.backbone.modules())
    assert all(m.training for m in trainer.network.head.modules())


def test_a_compiled_network_is_frozen_as_well(make_trainer):
    trainer = make_trainer(Linear, fold=0)
    trainer.initialize()
    trainer.network = torch.compile(trainer.network)
    trainer.on_train_epoch_start()
    assert not any(m.training for m in trainer.network.backbone.modules()) and trainer.network.head.training


@pytest.mark.parametrize("probe", [Linear, Nonlinear])
def test_the_loss_falls_where_features_separate_the_classes(make_trainer, probe):
    trainer = make_trainer(probe, fold=0)
    trainer.initialize()
    losses = steps(trainer, 40)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("probe", PROBES)
def test_prediction_builds_the_same_network_from_the_class(make_trainer, plans, probe):
    trainer = make_trainer(probe, plans, fold=0)
    trainer.initialize()
    steps(trainer, 1)
    manager = PlansManager(plans)
    built = probe.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 3, False)
    built.load_state_dict(trainer.network.state_dict())
    images = batch()["data"]
    trainer.network.eval()
    assert torch.equal(built.eval()(images), trainer.network(images))
    assert built(images).shape == (2, 3, 16, 16, 16)


@pytest.mark.parametrize("pyramid", ["encoder", "decoder"])
def test_a_linear_head_is_a_linear_classifier_of_the_concatenated_features(make_trainer, tiny_plans, pyramid):
    """vox2vec 3.4, voxel by voxel, with strides that differ between axes."""
    plans = tiny_plans(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    network = make_trainer(Linear if pyramid == "encoder" else LinearDecoder, plans, fold=0)
    network.initialize()
    network = network.network.eval()
    images = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    skips = network.backbone.encoder(images)
    levels = [skips[-1]]
    for index, skip in enumerate(reversed(skips[:-1])):
        if pyramid == "encoder":
            levels.append(skip)
        else:
            decoder = network.backbone.decoder
            joined = torch.cat((decoder.transpconvs[index](levels[-1]), skip), dim=1)
            levels.append(decoder.stages[index](joined))
    strides = [(2, 4, 4), (1, 2, 2), (1, 1, 1)]
    weight = torch.cat([conv.weight.flatten(1) for conv in network.head.levels], dim=1)
    bias = sum(conv.bias for conv in network.head.levels)
    expected = torch.empty(3, 4, 8, 8)
    with torch.no_grad():
        for z, y, x in itertools.product(range(4), range(8), range(8)):
            vectors = [f[0, :, z // a, y // b, x // c] for f, (a, b, c) in zip(levels, strides)]
            expected[:, z, y, x] = weight @ torch.cat(vectors) + bias
        torch.testing.assert_close(network(images)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_nonlinear_head_is_a_decoder_of_kernels_of_one(make_trainer):
    trainer = make_trainer(Nonlinear, fold=0)
    trainer.initialize()
    convolutions = [m for m in trainer.network.head.modules() if isinstance(m, nn.Conv3d)]
    assert len(convolutions) > 6 and all(m.kernel_size == (1, 1, 1) for m in convolutions)
    linear = make_trainer(Linear, fold=0)
    linear.initialize()
    # Channels of the pyramid plus one bias for each level, for three classes.
    assert sum(p.numel() for p in linear.network.head.parameters()) == 3 * (4 + 8 + 8 + 3)


@pytest.fixture
def without_data(monkeypatch):
    """Lets a training start without loaders."""
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)


def log_of(trainer) -> str:
    return open(trainer.log_file, encoding="utf-8").read()


@pytest.mark.parametrize("probe", [Linear, LinearDecoder])
def test_pretrained_weights_become_the_backbone(
    make_trainer, plans, pretraining_checkpoint, tmp_path, probe, without_data
):
    trainer = make_trainer(probe, plans, fold=0)
    trainer.initialize()
    checkpoint = pretraining_checkpoint(plans)
    torch.save(checkpoint, tmp_path / "pretrained.pth")
    run_training.load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    backbone = state(trainer.network.backbone)
    assert all(torch.equal(value, checkpoint["network_weights"][name]) for name, value in backbone.items())
    assert any(name.startswith("decoder.stages") for name in backbone) == (probe is LinearDecoder)
    assert "0 adapted, 0 fresh" in log_of(trainer)
    trainer.on_train_start()
    assert "Probing: a linear head" in log_of(trainer) and "RANDOM" not in log_of(trainer)


def test_without_weights_the_log_says_that_features_are_random(make_trainer, without_data):
    trainer = make_trainer(Linear, fold=0)
    trainer.initialize()
    trainer.on_train_start()
    assert "features of a RANDOM network" in log_of(trainer)


def test_a_checkpoint_without_the_decoder_that_is_probed_is_refused(
    make_trainer, without_data, tiny_plans, pretraining_checkpoint, tmp_path
):
    torch.save(pretraining_checkpoint(tiny_plans(), transfers=("encoder",)), tmp_path / "pretrained.pth")
    encoder = make_trainer(Linear, fold=0)
    encoder.initialize()
    run_training.load_pretrained_weights(encoder.network, str(tmp_path / "pretrained.pth"))
    assert not encoder.backbone_is_random
    decoder = make_trainer(LinearDecoder, fold=0)
    decoder.initialize()
    refusal = "reads the encoder and decoder.*carries only the encoder.*LinearProbe"
    with pytest.raises(ValueError, match=refusal):
        run_training.load_pretrained_weights(decoder.network, str(tmp_path / "pretrained.pth"))
    # A probe of the encoder, and so a classifier, has no decoder either.
    encoder.on_train_start()
    encoder.save_checkpoint(str(tmp_path / "probe.pth"))
    decoder = make_trainer(LinearDecoder, fold=0)
    decoder.initialize()
    with pytest.raises(ValueError, match=refusal):
        run_training.load_pretrained_weights(decoder.network, str(tmp_path / "probe.pth"))


def test_other_plans_are_refused_as_in_finetuning_and_untrained_stages_named(
    make_trainer, tiny_plans, pretraining_checkpoint, tmp_path, monkeypatch
):
    shallow = tiny_plans(
        n_stages=2, features_per_stage=[4, 8], kernel_sizes=[[3, 3, 3]] * 2, strides=[[1, 1, 1], [2, 2, 2]],
        n_conv_per_stage=[2, 2], n_conv_per_stage_decoder=[1],
    )  # fmt: skip
    torch.save(pretraining_checkpoint(shallow), tmp_path / "pretrained.pth")
    trainer = make_trainer(Linear, fold=0)
    trainer.initialize()
    with pytest.raises(ValueError, match="stages: pretrained with 2, this network has 3"):
        run_training.load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    monkeypatch.setenv("NNSSL_STC3D_ADAPT", "depth")
    trainer = make_trainer(Linear, fold=0)
    trainer.initialize()
    run_training.load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    assert "are random and stay so, such as encoder.stages.2" in log_of(trainer)


@pytest.mark.parametrize("probe", [Linear, Nonlinear])
def test_a_probe_continues_where_it_stopped(make_trainer, tmp_path, probe):
    trainer = make_trainer(probe, fold=0)
    trainer.initialize()
    steps(trainer)
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    trainer.current_epoch = 1
    expected = steps(trainer)
    torch.manual_seed(7)
    resumed = make_trainer(probe, fold=0)
    resumed.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1 and not resumed.backbone_is_random
    assert steps(resumed) == pytest.approx(expected, rel=1e-5)
    for name, value in trainer.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value)


def test_networks_without_a_pyramid_are_refused(tiny_plans):
    with pytest.raises(NotImplementedError, match="probing supports PlainConvUNet and ResidualEncoderUNet, got Linear"):
        ProbeNetwork(nn.Linear(1, 1), None, 3, "linear", "encoder")


def test_unknown_heads_and_pyramids_are_refused(make_trainer):
    for changes, message in (
        ({"head": "deep"}, "head must be one of"),
        ({"pyramid": "both"}, "pyramid must be one of"),
    ):
        trainer = make_trainer(type("Odd", (Linear,), changes), fold=0)
        with pytest.raises(ValueError, match=message):
            trainer.initialize()


class FrozenStart(Short, FinetuneTrainer):
    frozen_share = 0.5
    thaw_steps = 4


def test_a_frozen_start_keeps_the_encoder_bit_equal_and_then_trains_it(make_trainer, plans):
    trainer = make_trainer(FrozenStart, plans, fold=0)
    trainer.initialize()
    scales = trainer._get_deep_supervision_scales()
    monitored = batch()
    monitored["target"] = [
        nn.functional.interpolate(monitored["target"].float(), scale_factor=tuple(scale)) for scale in scales
    ]
    encoder, decoder = state(trainer.network.encoder), state(trainer.network.decoder.stages)

    def run(epoch: int) -> None:
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer.train_step(monitored)

    run(0)
    assert all(torch.equal(v, encoder[k]) for k, v in trainer.network.encoder.state_dict().items())
    assert not all(torch.equal(v, decoder[k]) for k, v in trainer.network.decoder.stages.state_dict().items())
    assert "stays as it is for 1 of 2 epochs" in log_of(trainer)
    run(1)
    after = trainer.network.encoder.state_dict()
    assert not all(torch.equal(after[k], v) for k, v in encoder.items() if k.endswith("weight"))
    # BatchNorm's statistics move again, too.
    assert not any(torch.equal(after[k], v) for k, v in encoder.items() if k.endswith("running_mean"))


def test_the_encoder_thaws_exponentially():
    """vox2vec 4.2: frozen for 15000 of 45000 batches, then from 3e-5 to 3e-4 in 1200."""
    thaw = Thaw(15000, 1200)
    assert thaw.factor(14999) == 0
    assert thaw.factor(15000) == pytest.approx(0.1)
    assert thaw.factor(15600) == pytest.approx(10**-0.5)
    assert thaw.factor(16200) == 1 and thaw.factor(40000) == 1


def test_finetuning_is_not_frozen_by_default(make_trainer):
    trainer = make_trainer(FinetuneTrainer, fold=0)
    trainer.initialize()
    (group,) = trainer.optimizer.param_groups
    assert trainer.frozen_epochs == 0 and "thaws" not in group and "Frozen start" not in log_of(trainer)


@pytest.fixture
def primus_plans(tiny_plans):
    plans = derive_transformer_plans(tiny_plans(), "transformer", "primus", patch_size=(16, 16, 16))
    smaller = {"embed_dim": 24, "eva_depth": 1, "eva_numheads": 1, "drop_path_rate": 0.0}
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(smaller)
    return plans


def test_transformers_start_frozen_but_are_not_probed(make_trainer, primus_plans):
    trainer = make_trainer(FrozenStart, primus_plans, fold=0)
    trainer.initialize()
    rest, encoder = trainer.optimizer.param_groups
    network = trainer.network
    expected = {id(p) for part in (network.eva, network.down_projection) for p in part.parameters()}
    assert encoder["thaws"] and {id(p) for p in encoder["params"]} == expected
    assert len(rest["params"]) + len(encoder["params"]) == len(list(network.parameters()))
    probe = make_trainer(Linear, primus_plans, fold=0)
    with pytest.raises(NotImplementedError, match="probing supports PlainConvUNet.*got PlansPrimus"):
        probe.initialize()
