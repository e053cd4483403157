"""A teacher that follows its student as an exponential moving average (EMA)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class EMATeacher(nn.Module):
    """A slow copy of the parts of a method that make its embeddings.

    The copy starts equal to the student, gets no gradient and so stays out of the optimiser, and is saved and resumed
    as any submodule. Like its student it is in training or in evaluation mode.

    Args:
        student: what is copied, for several parts an ``nn.ModuleDict``. It is not kept: the parts already belong to
            the method.

    Attributes:
        module: the copy.
    """

    # What was copied: a module or several by name.
    module: Any

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move towards the student: ``teacher = momentum * teacher + (1 - momentum) * student``; buffers are copied.

        Called after an optimiser step, which is the same as before the teacher's next forward pass.

        Args:
            student: with the structure of the one that was copied.
            momentum: in [0, 1].

        Raises:
            ValueError: if the student has another number of parameters, or the momentum lies outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        for slow, fast in zip(self.module.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
        for kept, current in zip(self.module.buffers(), student.buffers(), strict=True):
            kept.copy_(current)
