"""What only a GPU can show: half precision, compiled networks, memory, checkpoints that change the device."""

from __future__ import annotations

import math

import pytest
import torch

from nnssl_stc3d.losses.info_nce import info_nce

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"


def trained(trainer, steps):
    """The trainer and the losses of some steps."""
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer, [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(steps)]


def test_every_method_trains_in_half_precision(make_trainer, any_method_trainer):
    any_method_trainer.steps_per_epoch = 8
    trainer = make_trainer(any_method_trainer, device=DEVICE)
    trainer.initialize()
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    # The first steps may be left out, until the scale of the gradients suits half precision.
    trainer, losses = trained(trainer, 8)
    assert trainer.grad_scaler is not None and trainer.grad_scaler.get_scale() > 0
    assert all(math.isfinite(loss) for loss in losses)
    after = trainer.method.state_dict()
    assert all(value.device.type == DEVICE and value.isfinite().all() for value in after.values())
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert "network" in moved and len(moved) > 1, "the network and the heads have learnt"


def test_half_precision_computes_what_the_cpu_computes(make_trainer, any_method_trainer):
    on_cpu, on_gpu = make_trainer(any_method_trainer), make_trainer(any_method_trainer, device=DEVICE)
    losses = []
    for trainer in (on_cpu, on_gpu):
        trainer.on_train_start()
        trainer.method.load_state_dict(on_cpu.method.state_dict())
        trainer.method.eval()
        with torch.no_grad():
            losses.append(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_checkpoint_of_the_gpu_continues_on_the_cpu(make_trainer, any_method_trainer):
    trainer, _ = trained(make_trainer(any_method_trainer, device=DEVICE), 2)
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    resumed = make_trainer(any_method_trainer)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    for name, value in resumed.method.state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, trainer.method.state_dict()[name].cpu(), rtol=0, atol=0)


def test_a_compiled_network_trains_and_keeps_its_names(make_trainer, any_method_trainer, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "0")
    names = set(trained(make_trainer(any_method_trainer, device=DEVICE), 0)[0].method.state_dict())
    monkeypatch.setenv("nnUNet_compile", "1")
    trainer, losses = trained(make_trainer(any_method_trainer, device=DEVICE), 2)
    assert trainer._do_i_compile()
    assert all(math.isfinite(loss) for loss in losses)
    assert set(trainer.method.state_dict()) == names


def test_ten_thousand_voxels_are_contrasted_in_less_than_three_gigabytes():
    """vox2vec's batch: 10 pairs of 1024 voxels."""
    first, second = (torch.randn(10240, 128, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    info_nce(first, second, 0.1, rows=1024).backward()
    assert first.grad is not None and first.grad.isfinite().all()
    assert torch.cuda.max_memory_allocated() < 3 * 2**30
