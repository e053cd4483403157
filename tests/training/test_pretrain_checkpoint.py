"""Checkpoints of a pretraining: what they hold, what they restore and what is refused."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from os import listdir
from os.path import isabs

import numpy as np
import pytest
import torch

from nnssl_stc3d.methods.base import config_from_dict
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.training.state import collect_state


def started(trainer):
    trainer.on_train_start()
    return trainer


def steps(trainer, count):
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


def weights(trainer):
    return {k: v.clone() for k, v in trainer.method.state_dict().items()}


def test_a_checkpoint_holds_plain_values_and_continues(make_trainer):
    trainer = started(make_trainer())
    steps(trainer, 2)
    # The value types that a run may put there and torch's safe loading refuses.
    trainer.logger.log("val_losses", np.float64(1.5), 0)
    trainer._best_ema = np.float32(0.5)
    trainer.current_epoch = 1
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    saved = torch.load(path, weights_only=True)
    assert saved["current_epoch"] == 1
    assert saved["method"]["name"] == "STC3D" and saved["method"]["transfers"] == ["encoder", "decoder"]
    assert config_from_dict(STC3DConfig, saved["method"]["config"]) == trainer.config
    assert type(saved["_best_ema"]) is float
    assert saved["plans"]["plans_name"] == "nnUNetPlans" and "continue_training" not in saved["plans"]
    assert {"nnssl_stc3d", "nnunetv2", "torch", "python"} <= set(saved["versions"])

    torch.manual_seed(99)
    other = make_trainer()
    torch.manual_seed(99)
    other.load_checkpoint(path)
    assert other.current_epoch == 1
    assert other._best_ema == 0.5 and other.logger.get_value("val_losses", step=-1) == 1.5
    for key, value in weights(trainer).items():
        assert torch.equal(value, weights(other)[key]), key
    assert torch.equal(torch.get_rng_state(), saved["rng_state"]["torch"])
    started(other)
    started(trainer)
    assert steps(other, 2) == steps(trainer, 2)
    for key, value in weights(trainer).items():
        assert torch.equal(value, weights(other)[key]), key


def test_weights_lie_with_channels_last_on_the_cpu_and_contiguous_in_the_file(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    parameters = trainer.method.network.named_parameters()
    name, weight = next((n, w) for n, w in parameters if w.ndim == 5 and min(w.shape) > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    saved = collect_state(trainer, 0)["network_weights"][name]
    assert saved.is_contiguous() and torch.equal(saved, weight)


def test_a_weight_with_several_names_is_written_once(make_trainer, tmp_path):
    """nnU-Net's decoder holds the encoder, and its blocks hold each layer twice."""
    trainer = make_trainer()
    trainer.initialize()
    weights = collect_state(trainer, 0)["network_weights"]
    assert len(weights) > len({value.data_ptr() for value in weights.values()})
    torch.save(weights, tmp_path / "weights.pth")
    once = sum(parameter.numel() * 4 for parameter in trainer.method.network.parameters())
    assert (tmp_path / "weights.pth").stat().st_size < once + 400 * len(weights)
    assert sum(value.numel() * 4 for value in weights.values()) > 1.5 * once


def test_continuing_gives_the_dropout_that_would_have_come(make_trainer, tiny_plans):
    """The loader is made after torch's random state was restored and must not change it."""
    plans = tiny_plans(dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.2})
    whole = started(make_trainer(plans=plans))
    steps(whole, 2)
    whole.current_epoch = 1
    whole._save(f"{whole.output_folder}/checkpoint_latest.pth")
    after = steps(whole, 2)
    continued = make_trainer(plans=plans)
    continued.load_checkpoint(f"{whole.output_folder}/checkpoint_latest.pth")
    assert steps(started(continued), 2) == after
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(continued)[key]), key


def test_every_gpu_continues_with_random_numbers_of_its_own(make_trainer):
    """The states in a checkpoint are those of the first."""
    trainer = started(make_trainer())
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    trainer._save(path)
    other = make_trainer()
    other.initialize()
    other.local_rank = 1
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other.load_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_of_results_may_be_relative(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", "nnUNet_results")
    trainer = started(make_trainer())
    assert not isabs(trainer.output_folder)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([{"loss": 1.0}])
    trainer.logger.log("val_losses", 1.0, 0)
    trainer.on_epoch_end()
    trainer.on_train_end()
    assert {"checkpoint_best.pth", "checkpoint_final.pth"} <= set(listdir(trainer.output_folder))


def test_nothing_is_written_when_checkpointing_is_disabled(make_trainer):
    trainer = started(make_trainer())
    trainer.disable_checkpointing = True
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    with pytest.raises(ValueError, match="is not there"):
        make_trainer().load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(make_trainer, monkeypatch):
    trainer = started(make_trainer())
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    before = open(path, "rb").read()

    def full(value, file, *args, **kwargs):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    steps(trainer, 1)
    with pytest.raises(RuntimeError, match=r"(?s)No space left on device.*previous file.*untouched.*--c"):
        trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert open(path, "rb").read() == before


def test_a_checkpoint_of_another_method_is_refused(make_trainer):
    trainer = started(make_trainer())
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    saved = torch.load(path, weights_only=True)
    saved["method"]["name"] = "VoCo"
    saved["trainer_name"] = "VoCoPretrainTrainer"
    with pytest.raises(ValueError, match="continues STC3D, but .* written by VoCo. Continue with -tr VoCoPretrain"):
        make_trainer().load_checkpoint(saved)


def test_a_checkpoint_of_another_network_is_refused(make_trainer, tiny_plans):
    trainer = started(make_trainer())
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    other = make_trainer(plans=tiny_plans(features_per_stage=[4, 8, 16]))
    with pytest.raises(ValueError, match="does not fit this network; was the dataset planned again"):
        other.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")


def test_a_finetuning_checkpoint_cannot_be_continued(make_trainer, tmp_path):
    trainer = started(make_trainer())
    torch.save(
        {"network_weights": trainer.method.network.state_dict(), "trainer_name": "nnUNetTrainer"}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match="Expected a pretraining checkpoint .* written by nnUNetTrainer"):
        make_trainer().load_checkpoint(str(tmp_path / "a.pth"))


def test_options_that_changed_since_the_checkpoint_are_reported(make_trainer, tiny_trainer):
    trainer = started(make_trainer())
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")

    class Warmer(tiny_trainer):
        config = replace(tiny_trainer.config, temperature=0.5)

    other = make_trainer(Warmer)
    other.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert "options that differ from before: temperature: 0.1 -> 0.5" in open(other.log_file, encoding="utf-8").read()


def test_the_best_checkpoint_is_the_one_of_the_lowest_smoothed_validation_loss(make_trainer, monkeypatch):
    trainer = started(make_trainer())
    written = []
    monkeypatch.setattr(trainer, "_save", lambda path, *_: written.append((trainer.current_epoch, path)))
    for epoch, loss in enumerate([3.0, 1.0, 10.0, 1.0]):
        trainer.current_epoch = epoch
        trainer.on_epoch_start()
        trainer.logger.log("lrs", 0.1, epoch)
        trainer.logger.log("train_losses", loss, epoch)
        trainer.logger.log("val_losses", loss, epoch)
        trainer.on_epoch_end()
    # Smoothed: 3, 2.8, 3.52, 3.27.
    assert [epoch for epoch, path in written if path.endswith("/checkpoint_best.pth")] == [1, 2]
    assert trainer._best_ema == pytest.approx(2.8)


@dataclass(frozen=True)
class _CountingConfig(STC3DConfig):
    weight: float = 2.0


class _Counting(STC3D):
    """A method with a buffer that changes after every step, such as an EMA teacher."""

    name = "Counting"

    def __init__(self, network, config):
        super().__init__(network, config)
        self.register_buffer("progress", torch.zeros(()))

    def after_step(self, progress):
        self.progress.fill_(progress)


def test_buffers_of_a_method_are_updated_saved_and_restored(make_trainer, tiny_trainer):
    class Trainer(tiny_trainer):
        method_class = _Counting
        config = _CountingConfig(batch_size=2, grid=(1, 2, 2), projector_hidden=8, projector_dim=4, dense_dim=4)

    trainer = started(make_trainer(Trainer))
    steps(trainer, 2)
    assert float(trainer.method.progress) == 0.5
    trainer._save(f"{trainer.output_folder}/checkpoint_latest.pth")
    other = make_trainer(Trainer)
    other.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert float(other.method.progress) == 0.5
    saved = torch.load(f"{trainer.output_folder}/checkpoint_latest.pth", weights_only=True)
    assert saved["method"]["config"]["weight"] == 2.0
