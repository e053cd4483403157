"""Finetunings that continue after an interruption with the random numbers that they would have drawn anyway."""

from __future__ import annotations

import random

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.files import written_whole


class ContinuingTrainer(nnUNetTrainer):
    """What a benchmark adds to every trainer that it finetunes with.

    nnU-Net saves every 50 epochs, which a benchmark's finetunings do not have, and a process that continues draws as at
    the beginning. Here every epoch is saved and begins with random numbers of its own, which follow from the seed of
    the process and the number of the epoch. What loader workers draw is nnU-Net's, new in every process.
    """

    def initialize(self) -> None:
        """Remember the seed, which the epochs' own replace."""
        super().initialize()
        self.save_every = 1
        self.seed_of_run = torch.initial_seed()

    def on_train_start(self) -> None:
        """Workers begin with a copy of this process's generators; it must not be the one of the beginning."""
        if self.current_epoch:
            self._seed_epoch()
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        """What an epoch draws does not depend on the process that it runs in."""
        self._seed_epoch()
        super().on_train_epoch_start()

    def _seed_epoch(self) -> None:
        seeds = np.random.SeedSequence([self.seed_of_run, self.current_epoch]).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.manual_seed(int(seeds[2]))

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, whole before it takes its name."""
        with written_whole(filename) as beside:
            super().save_checkpoint(str(beside))
