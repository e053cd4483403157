"""Learning rate and weight decay per step: linear warm-up, then cosine to zero or constant."""

from __future__ import annotations

from math import cos, pi
from typing import NamedTuple

from torch.optim import Optimizer


class Thaw(NamedTuple):
    """A frozen start for the parameter groups that have a key ``thaws`` (vox2vec 4.2).

    Their learning rate is zero at first, then rises exponentially from a tenth of the others' to all of it.

    Attributes:
        frozen_steps: steps at zero.
        rising_steps: steps of the rise.
    """

    frozen_steps: int
    rising_steps: int

    def factor(self, iteration: int) -> float:
        """Share of the learning rate that these groups have in a step, counted from 0."""
        if iteration < self.frozen_steps:
            return 0.0
        return 0.1 ** max(0.0, 1 - (iteration - self.frozen_steps) / max(1, self.rising_steps))


class WarmupSchedule:
    """Sets the learning rate of every step; nnU-Net's own schedules change it once an epoch.

    Args:
        optimizer: whose parameter groups are set.
        peak: learning rate after the warm-up.
        steps_per_epoch: steps between two calls of :meth:`step`.
        epochs: length of the training.
        warmup_steps: steps of linear warm-up, at most a tenth of the training, so that short variants reach the peak.
        shape: "cosine" or "constant".
        weight_decay_end: weight decay at the end, reached from the optimiser's along a cosine; None keeps that.
        thaw: frozen start of some groups, None for none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        peak: float,
        steps_per_epoch: int,
        epochs: int,
        warmup_steps: int,
        shape: str = "cosine",
        weight_decay_end: float | None = None,
        thaw: Thaw | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.peak = peak
        self.steps_per_epoch = steps_per_epoch
        self.total = max(1, steps_per_epoch * epochs)
        self.warmup = min(warmup_steps, self.total // 10)
        self.shape = shape
        self.weight_decay = optimizer.defaults["weight_decay"]
        self.weight_decay_end = weight_decay_end
        self.thaw = thaw
        self.iteration = 0

    def step(self, epoch: int) -> None:
        """Go to the first step of an epoch."""
        self.iteration = epoch * self.steps_per_epoch
        self._apply()

    def advance(self) -> None:
        """Go to the next step."""
        self.iteration += 1
        self._apply()

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, self.iteration / self.total)

    def learning_rate(self, iteration: int) -> float:
        """The learning rate of a step, counted from 0."""
        if iteration < self.warmup:
            return self.peak * (iteration + 1) / self.warmup
        if self.shape == "constant":
            return self.peak
        done = (iteration - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * 0.5 * (1 + cos(pi * min(1.0, done)))

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.iteration)
            if self.thaw is not None and group.get("thaws"):
                group["lr"] *= self.thaw.factor(self.iteration)
            if self.weight_decay_end is not None:
                share = 0.5 * (1 - cos(pi * self.progress))
                group["weight_decay"] = self.weight_decay + share * (self.weight_decay_end - self.weight_decay)
