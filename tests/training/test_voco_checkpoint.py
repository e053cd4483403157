"""A pretraining with a teacher: what the checkpoint holds, and that it continues as it would have gone on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer


class VoCoTrainer(PretrainTrainer):
    method_class = VoCo
    config = replace(VoCoConfig(), batch_size=2, grid=(1, 2, 2), projector_hidden=8, projector_dim=4)
    epochs = 2
    steps_per_epoch = 2
    validation_steps = 1


class DecoderTrainer(VoCoTrainer):
    config = replace(VoCoTrainer.config, descriptor_stages="encoder+decoder", bases_through="teacher")


def steps(trainer, count):
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


@pytest.mark.parametrize("trainer_class", [VoCoTrainer, DecoderTrainer])
def test_the_teacher_is_saved_and_continues(make_trainer, trainer_class):
    whole = make_trainer(trainer_class)
    whole.on_train_start()
    initial = {k: v.clone() for k, v in whole.method.teacher.state_dict().items()}
    steps(whole, 2)
    whole.current_epoch = 1
    whole._save(f"{whole.output_folder}/checkpoint_latest.pth")
    path = f"{whole.output_folder}/checkpoint_latest.pth"
    saved = torch.load(path, weights_only=True)
    teacher = {k: v for k, v in saved["method_state"].items() if k.startswith("teacher.")}
    assert len(teacher) == len(initial) and any(not torch.equal(teacher[f"teacher.{k}"], v) for k, v in initial.items())
    expected = ["encoder", "decoder"] if trainer_class is DecoderTrainer else ["encoder"]
    assert saved["method"]["transfers"] == expected
    # The network alone is what finetuning reads.
    assert not any("teacher" in k for k in saved["network_weights"])

    continued = make_trainer(trainer_class)
    continued.load_checkpoint(path)
    continued.on_train_start()
    whole.on_train_start()
    assert steps(continued, 2) == steps(whole, 2)
    for key, value in whole.method.state_dict().items():
        assert torch.equal(value, continued.method.state_dict()[key]), key


def test_the_teacher_is_left_to_its_own_update(make_trainer):
    trainer = make_trainer(VoCoTrainer)
    trainer.on_train_start()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    teacher = list(trainer.method.teacher.parameters())
    assert teacher and not optimised & {id(p) for p in teacher}
    assert {id(p) for p in trainer.method.network.encoder.parameters()} <= optimised
    student = [p.detach().clone() for p in trainer.method._student().parameters()]
    steps(trainer, 1)
    for slow, old, fast in zip(teacher, student, trainer.method._student().parameters(), strict=True):
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * fast.detach())
