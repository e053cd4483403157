"""nnU-Net's trainer around a method, in one process; whole runs are in ``tests/integration``."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.parallel import DistributedDataParallel

from nnssl_stc3d.methods.base import config_from_dict
from nnssl_stc3d.methods.stc3d import STC3DConfig
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


def started(trainer):
    trainer.on_train_start()
    return trainer


def steps(trainer, count):
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


def weights(trainer):
    return {k: v.clone() for k, v in trainer.method.state_dict().items()}


# ---- what nnU-Net expects of a trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [PretrainTrainer, FinetuneTrainer])
def test_the_constructor_is_nnunets(trainer):
    """Other parameters make nnU-Net's constructor fail, which looks each of them up among its own."""
    signature = inspect.signature(trainer.__init__)
    assert list(signature.parameters) == ["self", "plans", "configuration", "fold", "dataset_json", "device"]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())
    assert issubclass(trainer, nnUNetTrainer)


def test_variants_are_named_like_nnunets_and_differ_in_their_epochs_only(tiny_trainer):
    one, five = with_epochs(tiny_trainer, 1), with_epochs(tiny_trainer, 5)
    assert (one.__name__, one.epochs) == ("TinyTrainer_1epoch", 1)
    assert (five.__name__, five.epochs) == ("TinyTrainer_5epochs", 5)
    assert five.config is tiny_trainer.config and five.__module__ == tiny_trainer.__module__


def test_prediction_is_refused_with_the_command_that_finetunes():
    with pytest.raises(RuntimeError, match=r"(?s)Finetune it first.*nnUNetv2_train.*-pretrained_weights"):
        PretrainTrainer.build_network_architecture(None, None, 1, 2, enable_deep_supervision=False)


# ---- refusals before any work ---------------------------------------------------------------------------------------


def test_2d_is_not_supported(make_trainer, tiny_plans, tmp_path):
    plans = tiny_plans()
    plans["configurations"]["2d"] = {**plans["configurations"]["3d_fullres"], "patch_size": [32, 32]}
    with pytest.raises(NotImplementedError, match="2d has patches of 2 dimensions. Use 3d_fullres"):
        make_trainer(plans=plans, configuration="2d")
    assert not any((tmp_path / "nnUNet_results").iterdir())


def test_cascades_are_not_supported(make_trainer, tiny_plans, tmp_path):
    plans = tiny_plans()
    fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {**fullres, "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {**fullres, "previous_stage": "3d_lowres"}
    with pytest.raises(NotImplementedError, match="cascade.*3d_lowres"):
        make_trainer(plans=plans, configuration="3d_cascade_fullres")
    assert not any((tmp_path / "nnUNet_results").iterdir())
    make_trainer(plans=plans, configuration="3d_lowres")


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named(make_trainer, monkeypatch, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(RuntimeError, match=f"{variable} is not set.*export {variable}="):
        make_trainer()


def test_a_dataset_that_is_not_preprocessed(make_trainer, nnunet):
    for file in nnunet.iterdir():
        file.unlink()
    nnunet.rmdir()
    with pytest.raises(FileNotFoundError, match="nnUNetv2_preprocess -d 801 -plans_name nnUNetPlans"):
        make_trainer().initialize()


def test_an_empty_preprocessed_folder(make_trainer, nnunet):
    for file in nnunet.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no case(.|\n)*nnUNetv2_plan_and_preprocess"):
        make_trainer().on_train_start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rte": 1}, "has no option learning_rte; options are .*learning_rate"),
        ({"optimizer": "lion"}, "optimizer must be one of .*adamw.*got 'lion'"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(STC3DConfig, options)


def test_a_view_shape_that_does_not_fit_the_network_names_one_that_does(make_trainer, tiny_trainer):
    class Odd(tiny_trainer):
        config = replace(tiny_trainer.config, view_shape=(15, 16, 16))

    with pytest.raises(ValueError, match=r"view_shape \(15, 16, 16\).*nearest is \(16, 16, 16\)"):
        make_trainer(Odd).initialize()


def test_a_network_without_encoder_and_decoder_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(lambda *_: torch.nn.Conv3d(1, 1, 1)))
    with pytest.raises(NotImplementedError, match="supports PlainConvUNet and ResidualEncoderUNet, got Conv3d"):
        make_trainer().initialize()


def test_unusable_cases_are_named_before_the_first_step(make_trainer, nnunet):
    image = np.full((1, 20, 20, 20), np.nan, np.float32)
    blosc2.asarray(image, urlpath=str(nnunet / "case_3.b2nd"), mode="w")
    blosc2.asarray(np.zeros_like(image), urlpath=str(nnunet / "case_5.b2nd"), mode="w")
    with pytest.raises(ValueError, match=r"(?s)2 case\(s\).*case_3 holds NaN.*case_5 is constant"):
        make_trainer().on_train_start()


def test_cases_of_the_validation_are_looked_at_too(make_trainer, nnunet):
    trainer = make_trainer(fold=0)
    trainer.initialize()
    held_out = trainer.do_split()[1][0]
    blosc2.asarray(np.full((1, 20, 20, 20), np.inf, np.float32), urlpath=str(nnunet / f"{held_out}.b2nd"), mode="w")
    with pytest.raises(ValueError, match=f"{held_out} holds NaN or infinite values"):
        make_trainer(fold=0).on_train_start()


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture_name", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("paper", [False, True])
def test_a_step_trains_what_is_transferred_and_nothing_else(
    make_trainer, tiny_trainer, tiny_plans, architecture_name, paper
):
    class Trainer(tiny_trainer):
        config = STC3DConfig.paper() if paper else tiny_trainer.config
        config = replace(config, batch_size=2, grid=(1, 2, 2), projector_hidden=8, projector_dim=4)

    trainer = started(make_trainer(Trainer, tiny_plans(architecture_name)))
    before = weights(trainer)
    outputs = steps(trainer, 2)
    changed = {k for k, v in weights(trainer).items() if not torch.equal(v, before[k])}
    assert all(np.isfinite(v) for o in outputs for v in o.values())
    assert not any(".seg_layers." in k for k in changed)
    own_decoder = [k for k in before if k.startswith("network.decoder.") and "decoder.encoder" not in k]
    own_decoder = [k for k in own_decoder if ".seg_layers." not in k]
    assert any(k.startswith("network.encoder.") for k in changed)
    assert any(k in changed for k in own_decoder) != paper
    assert trainer.method.transfers == (("encoder",) if paper else ("encoder", "decoder"))
    state = trainer.method.network.state_dict()
    for key, value in state.items():
        if key.startswith("encoder."):
            assert torch.equal(value, state[f"decoder.{key}"]), key


def test_the_same_seed_gives_the_same_run(make_trainer):
    first, second = started(make_trainer()), started(make_trainer())
    assert steps(first, 2) == steps(second, 2)
    for key, value in weights(first).items():
        assert torch.equal(value, weights(second)[key]), key


def test_validation_repeats_its_views_and_changes_nothing(make_trainer):
    trainer = started(make_trainer())
    before = weights(trainer)
    outputs = []
    for _ in range(2):
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            outputs.append(trainer.validation_step(next(trainer.dataloader_val)))
    assert outputs[0]["loss"] == outputs[1]["loss"]
    assert all(torch.equal(v, before[k]) for k, v in weights(trainer).items())


def test_a_loss_that_is_not_finite_names_the_cases(make_trainer):
    trainer = started(make_trainer())
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    with torch.no_grad():
        next(p for p in trainer.method.network.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError) as error:
        trainer.train_step(batch)
    message = str(error.value)
    assert "the loss is not finite" in message and "epoch 0, step 0" in message and "--c" in message
    for names in batch.cases:
        assert names[0] in message


def test_weights_that_are_not_finite_after_an_epoch_are_not_saved(make_trainer):
    trainer = started(make_trainer())
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        next(p for p in trainer.method.network.encoder.parameters()).fill_(float("nan"))
        outputs = [trainer.validation_step(next(trainer.dataloader_val))]
    with pytest.raises(RuntimeError, match="validation loss is not finite after epoch 0"):
        trainer.on_validation_epoch_end(outputs)


def test_gradients_are_clipped(make_trainer, tiny_trainer, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit, *args):
        parameters = list(parameters)
        original(parameters, limit, *args)
        norms.append((limit, torch.cat([p.grad.flatten() for p in parameters]).norm()))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)

    class Clipped(tiny_trainer):
        config = replace(tiny_trainer.config, gradient_clip=1e-3)

    steps(started(make_trainer(Clipped)), 1)
    assert norms[0][0] == 1e-3 and norms[0][1] <= 1.001e-3


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({}, torch.optim.AdamW, {"weight_decay": 1e-2, "betas": (0.9, 0.999), "amsgrad": False}),
        ({"optimizer": "adam", "amsgrad": True}, torch.optim.Adam, {"amsgrad": True}),
        ({"optimizer": "sgd", "momentum": 0.99}, torch.optim.SGD, {"momentum": 0.99, "nesterov": True}),
        ({"optimizer": "sgd", "momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0, "nesterov": False}),
    ],
)
def test_the_optimiser_is_the_one_that_is_configured(make_trainer, tiny_trainer, options, kind, expected):
    class Trainer(tiny_trainer):
        config = replace(tiny_trainer.config, **options)

    trainer = make_trainer(Trainer)
    trainer.initialize()
    assert type(trainer.optimizer) is kind
    (group,) = trainer.optimizer.param_groups
    assert {k: group[k] for k in expected} == expected
    assert all(p.requires_grad for p in group["params"])


def test_the_schedule_is_the_one_that_is_configured(make_trainer, tiny_trainer):
    class Trainer(tiny_trainer):
        epochs = 100
        steps_per_epoch = 10
        config = replace(
            tiny_trainer.config, learning_rate=5e-4, warmup_steps=7, schedule="constant", weight_decay_end=0.3
        )

    trainer = make_trainer(Trainer)
    trainer.initialize()
    schedule = trainer.lr_scheduler
    assert (schedule.peak, schedule.total, schedule.warmup) == (5e-4, 1000, 7)
    assert (schedule.shape, schedule.weight_decay_end) == ("constant", 0.3)


def test_only_training_changes_intensities(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    training, validation = trainer._datasets()
    assert training.transform is not None and validation.transform is None


def test_views_depend_on_the_configured_seed_and_differ_between_training_and_validation(make_trainer, tiny_trainer):
    class Other(tiny_trainer):
        config = replace(tiny_trainer.config, seed=5)

    first, other = make_trainer(), make_trainer(Other)
    for trainer in (first, other):
        trainer.initialize()
    training, validation = first._datasets()
    assert training.seed != validation.seed
    assert other._datasets()[0].seed != training.seed


def test_one_fold_trains_on_its_training_cases_only(make_trainer, nnunet):
    trainer = make_trainer(fold=0)
    trainer.initialize()
    training, validation = trainer._datasets()
    splits = json.loads((nnunet.parent / "splits_final.json").read_text(encoding="utf-8"))
    assert training.cases.identifiers == sorted(splits[0]["train"])
    assert validation.cases.identifiers == sorted(splits[0]["val"])
    assert not set(training.cases.identifiers) & set(validation.cases.identifiers)
    everything = make_trainer(fold="all")
    everything.initialize()
    assert everything._datasets()[0].cases.identifiers == [f"case_{i}" for i in range(6)]


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("architecture_name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_every_trained_parameter_gets_a_gradient_under_ddp(
    make_trainer, tiny_trainer, tiny_plans, one_process_group, monkeypatch, architecture_name, paper
):
    """DDP with ``find_unused_parameters=False`` fails in the second step if one does not."""

    class Trainer(tiny_trainer):
        config = STC3DConfig.paper() if paper else tiny_trainer.config
        config = replace(config, batch_size=2, grid=(1, 2, 2), projector_hidden=8, projector_dim=4)

    # nnU-Net's constructor would put the trainer on a GPU.
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        trainer = started(make_trainer(Trainer, tiny_plans(architecture_name)))
    method = trainer.network
    trainer.network = DistributedDataParallel(method, find_unused_parameters=False)
    trainer.is_ddp = True
    assert trainer.method is method
    before = weights(trainer)
    outputs = steps(trainer, 2)
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert any(not torch.equal(v, before[k]) for k, v in weights(trainer).items())
    # Logging gathers from all ranks.
    trainer.on_train_epoch_end(outputs)
    assert trainer.logger.get_value("train_losses", step=-1) == pytest.approx(np.mean([o["loss"] for o in outputs]))
    # Checkpoints are written without DDP's prefix.
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    saved = torch.load(f"{trainer.output_folder}/checkpoint_latest.pth", weights_only=True)
    assert not any(k.startswith("module.") for k in {**saved["network_weights"], **saved["method_state"]})


@pytest.mark.parametrize(("batch", "world", "share"), [(4, 2, 2), (4, 4, 1), (4, 3, None)])
def test_the_batch_is_shared_by_all_gpus(make_trainer, tiny_trainer, monkeypatch, batch, world, share):
    trainer = make_trainer()
    trainer.config = replace(trainer.config, batch_size=batch)
    trainer.is_ddp = True
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    if share is None:
        with pytest.raises(ValueError, match="batch of 4 volumes must be a multiple of the number of GPUs, got 3"):
            trainer._share_of_batch()
    else:
        assert trainer._share_of_batch() == share


def test_a_share_without_negatives_is_refused(make_trainer, tiny_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.config = replace(trainer.config, batch_size=2, info_nce_weight=1.0, regions=1)
    trainer.is_ddp = True
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="needs negatives on every GPU"):
        trainer._share_of_batch()


def test_ranks_see_different_views(make_trainer):
    first, second = make_trainer(), make_trainer()
    for rank, trainer in enumerate((first, second)):
        trainer.initialize()
        trainer.local_rank = rank
    a, b = first._datasets()[0][0], second._datasets()[0][0]
    assert not torch.equal(a.batch.views, b.batch.views)
