"""The finetuning trainer's optimiser, schedule and checkpoints."""

from __future__ import annotations

import sys

import pytest
import torch
from nnssl_stc3d.trainers.finetune import STC3DFinetuneTrainer, STC3DFinetuneTrainerNoMirroring
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer


@pytest.fixture
def trainer(make_trainer, monkeypatch):
    # What the test process imported must not be changed for the tests that follow.
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)
    return make_trainer(FinetuneTrainer, fold=0)


def test_optimiser_and_length_are_the_papers(trainer):
    """A.3.3: AdamW, 3e-4, weight decay 1e-5, warm-up of 100 steps, cosine."""
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    (group,) = trainer.optimizer.param_groups
    assert group["lr"] == 3e-4 and group["weight_decay"] == 1e-5
    assert trainer.num_epochs == 1000 and trainer.num_iterations_per_epoch == 250
    schedule = trainer.lr_scheduler
    assert schedule.total == 250_000 and schedule.warmup == 100 and schedule.shape == "cosine"
    assert schedule.learning_rate(99) == pytest.approx(3e-4)


def test_all_parameters_are_finetuned(trainer):
    trainer.initialize()
    assert all(p.requires_grad for p in trainer.network.parameters())
    optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert optimised == {id(p) for p in trainer.network.parameters()}


def test_the_learning_rate_changes_at_every_step(trainer, monkeypatch):
    trainer.initialize()
    rates = []
    monkeypatch.setattr(
        nnUNetTrainer,
        "train_step",
        lambda self, batch: rates.append(self.optimizer.param_groups[0]["lr"]) or {"loss": 0},
    )
    trainer.on_train_epoch_start()
    for _ in range(3):
        assert trainer.train_step({}) == {"loss": 0}
    assert rates == pytest.approx([3e-6, 6e-6, 9e-6])


class FrozenStart(FinetuneTrainer):
    epochs = 2
    steps_per_epoch = 40
    warmup_steps = 0
    frozen_share = 0.5
    thaw_steps = 4


def test_a_frozen_start_multiplies_the_schedule_and_thaws_over_its_steps(make_trainer):
    trainer = make_trainer(FrozenStart, fold=0)
    trainer.initialize()
    rest, encoder = trainer.optimizer.param_groups
    schedule = trainer.lr_scheduler
    for iteration, share in ((0, 0), (39, 0), (40, 0.1), (42, 10**-0.5), (44, 1), (79, 1)):
        schedule.iteration = iteration - 1
        schedule.advance()
        assert rest["lr"] == pytest.approx(schedule.learning_rate(iteration))
        assert encoder["lr"] == pytest.approx(share * rest["lr"])


def test_pretrained_weights_go_through_our_loader_once(trainer, pretraining_checkpoint, tiny_plans, tmp_path):
    original = run_training.load_pretrained_weights
    trainer.initialize()
    ours = sys.modules["nnunetv2.run.run_training"].load_pretrained_weights
    assert ours is not original
    checkpoint = pretraining_checkpoint(tiny_plans())
    torch.save(checkpoint, tmp_path / "pretrained.pth")
    ours(trainer.network, str(tmp_path / "pretrained.pth"), verbose=True)
    assert run_training.load_pretrained_weights is original
    state = trainer.network.state_dict()
    for key, value in checkpoint["network_weights"].items():
        if ".seg_layers." not in key:
            assert torch.equal(state[key], value), key
    log = open(trainer.log_file, encoding="utf-8").read()
    assert "tensors loaded" in log and "0 adapted" in log and "fresh: decoder.seg_layers" in log


def test_the_environment_says_what_may_be_adapted(
    make_trainer, monkeypatch, pretraining_checkpoint, tiny_plans, tmp_path
):
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)
    monkeypatch.setenv("NNSSL_STC3D_ADAPT", "kernel")
    with pytest.raises(ValueError, match="understands depth, kernels and stem"):
        make_trainer(FinetuneTrainer, fold=0)
    monkeypatch.setenv("NNSSL_STC3D_ADAPT", "kernels")
    trainer = make_trainer(FinetuneTrainer, fold=0)
    trainer.initialize()
    flat = tiny_plans(kernel_sizes=[[3, 3, 3], [3, 3, 3], [1, 3, 3]])
    torch.save(pretraining_checkpoint(flat), tmp_path / "pretrained.pth")
    run_training.load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    assert "kernel 1x3x3 -> 3x3x3, centred" in open(trainer.log_file, encoding="utf-8").read()


def test_its_checkpoint_is_complete_before_it_takes_its_name(trainer, request, tmp_path):
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    assert torch.load(path, weights_only=False)["trainer_name"] == "FinetuneTrainer"
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not path.with_name("checkpoint_latest.pth.tmp").exists()


def test_only_the_first_of_several_gpus_touches_the_file(trainer, tmp_path):
    trainer.initialize()
    half = tmp_path / "checkpoint_latest.pth.tmp"
    half.write_bytes(b"what rank 0 has written so far")
    trainer.local_rank = 1
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert half.read_bytes() == b"what rank 0 has written so far"
    assert not (tmp_path / "checkpoint_latest.pth").exists()


def test_nothing_is_written_when_checkpointing_is_disabled(trainer, tmp_path):
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_variable_that_is_not_set_is_named(make_trainer, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(RuntimeError, match="nnUNet_results is not set.*export nnUNet_results="):
        make_trainer(FinetuneTrainer, fold=0)


@pytest.mark.parametrize("mirroring", [True, False])
def test_mirroring_can_be_left_out(make_trainer, mirroring):
    """Of training, and of every prediction: the checkpoint says so to ``nnUNetv2_predict``."""
    trainer = make_trainer(STC3DFinetuneTrainer if mirroring else STC3DFinetuneTrainerNoMirroring, fold=0)
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    # The loaders are made of it; only then the prediction's axes are final.
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.save_checkpoint(trainer.output_folder + "/checkpoint.pth")
    saved = torch.load(trainer.output_folder + "/checkpoint.pth", weights_only=False)
    assert axes == saved["inference_allowed_mirroring_axes"] == ((0, 1, 2) if mirroring else None)
