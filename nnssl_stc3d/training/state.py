"""What a pretraining checkpoint holds, and how a pretraining continues from it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from nnssl_stc3d.training.versions import installed_versions
from nnssl_stc3d.transfer.adaptation_plan import build_adaptation_plan
from nnssl_stc3d.transfer.checkpoint import to_plain

if TYPE_CHECKING:
    from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer


def collect_state(trainer: PretrainTrainer, epoch: int) -> dict[str, Any]:
    """Everything that continuing, finetuning and sharing need; plain values and CPU tensors only.

    Args:
        trainer: an initialised pretraining.
        epoch: finished epochs, where the training continues.
    """
    method, plans, device = trainer.method, trainer.plans_manager.plans, trainer.device
    scaler = trainer.grad_scaler
    return to_plain(
        {
            "network_weights": method.network.state_dict(),
            "method_state": {k: v for k, v in method.state_dict().items() if not k.startswith("network.")},
            "method": {"name": method.name, "config": trainer.config.to_dict(), "transfers": list(method.transfers)},
            "optimizer_state": trainer.optimizer.state_dict(),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": trainer.logger.get_checkpoint(),
            "_best_ema": trainer._best_ema,
            "current_epoch": epoch,
            "init_args": {"configuration": trainer.configuration_name, "fold": trainer.fold},
            "trainer_name": type(trainer).__name__,
            "inference_allowed_mirroring_axes": None,
            "rng_state": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
            "plans": plans,
            "dataset_json": trainer.dataset_json,
            "configuration": trainer.configuration_name,
            "versions": installed_versions() | {"python": platform.python_version()},
            "nnssl_adaptation_plan": build_adaptation_plan(
                plans, trainer.configuration_name, trainer.num_input_channels, method.network
            ),
        }
    )


def restore_state(trainer: PretrainTrainer, checkpoint: dict[str, Any]) -> None:
    """Continue from :func:`collect_state`: weights, heads, optimiser, log, epoch and, on rank 0, random states.

    Raises:
        ValueError: if the checkpoint is not of this method and network.
    """
    saved, method = checkpoint["method"], trainer.method
    if saved["name"] != method.name:
        raise ValueError(
            f"this trainer continues {method.name}, but the checkpoint was written by {saved['name']}. "
            f"Continue with -tr {checkpoint['trainer_name']}."
        )
    current = trainer.config.to_dict()
    changed = [f"{k}: {saved['config'].get(k)} -> {v}" for k, v in current.items() if saved["config"].get(k) != v]
    if changed:
        trainer.print_to_log_file(f"WARNING: continuing with options that differ from before: {'; '.join(changed)}")
    weights = {f"network.{k}": v for k, v in checkpoint["network_weights"].items()}
    try:
        method.load_state_dict(weights | checkpoint["method_state"])
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint does not fit this network; was the dataset planned again since? {error}"
        ) from error
    trainer.optimizer.load_state_dict(checkpoint["optimizer_state"])
    if trainer.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
        trainer.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
    trainer.logger.load_checkpoint(checkpoint["logging"])
    trainer._best_ema = checkpoint["_best_ema"]
    trainer.current_epoch = checkpoint["current_epoch"]
    # The states are those of rank 0; the other ranks keep their own, or all would drop out and mask alike.
    if trainer.local_rank != 0:
        return
    torch.set_rng_state(checkpoint["rng_state"]["torch"])
    if trainer.device.type == "cuda" and checkpoint["rng_state"]["cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng_state"]["cuda"], trainer.device)
