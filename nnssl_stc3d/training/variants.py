"""Shorter variants of trainers, named as nnU-Net names its own."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def with_epochs(trainer: type[nnUNetTrainer], epochs: int) -> type[nnUNetTrainer]:
    """A shorter variant of a trainer, called ``<trainer>_1epoch`` or ``<trainer>_<n>epochs``."""
    name = f"{trainer.__name__}_{epochs}epoch{'' if epochs == 1 else 's'}"
    doc = f"{trainer.__name__} for {epochs} epoch{'' if epochs == 1 else 's'}."
    return type(name, (trainer,), {"epochs": epochs, "__doc__": doc, "__module__": trainer.__module__})
