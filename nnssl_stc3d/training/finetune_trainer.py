"""Finetuning as in STC3D A.3.3: AdamW, warm-up of 100 steps, cosine; everything else is nnU-Net's."""

from __future__ import annotations

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.training.preflight import check_environment
from nnssl_stc3d.training.schedule import WarmupSchedule
from nnssl_stc3d.transfer.adapt import Adaptation
from nnssl_stc3d.transfer.load import use_reporting_loader


class FinetuneTrainer(nnUNetTrainer):
    """nnU-Net's trainer with another optimiser; ``-pretrained_weights`` is loaded strictly and with a report.

    Patch and batch size come from the plans (the paper's are 96^3 and 1). Without ``-pretrained_weights`` it trains
    from scratch under the same schedule: the matched baseline. ``NNSSL_STC3D_ADAPT`` says what may be changed about
    weights that do not fit.
    """

    learning_rate = 3e-4
    decay = 1e-5
    warmup_steps = 100
    epochs = 1000
    steps_per_epoch = 250
    validation_steps = 50

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        check_environment()
        self.adapt = Adaptation.from_environment(os.environ)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.learning_rate
        self.weight_decay = self.decay
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.steps_per_epoch
        self.num_val_iterations_per_epoch = self.validation_steps
        # A transformer has no stages to supervise, only its output.
        self.enable_deep_supervision = "strides" in self.configuration_manager.network_arch_init_kwargs

    def initialize(self) -> None:
        """Build the network; nnU-Net loads ``-pretrained_weights`` right afterwards, through our loader."""
        super().initialize()
        use_reporting_loader(self.plans_manager.plans, self.configuration_name, self.print_to_log_file, self.adapt)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupSchedule]:
        """AdamW and a schedule that changes the learning rate at every step."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.initial_lr, weight_decay=self.weight_decay)
        schedule = WarmupSchedule(
            optimizer, self.initial_lr, self.num_iterations_per_epoch, self.num_epochs, self.warmup_steps
        )
        return optimizer, schedule

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, then the learning rate of the next one."""
        result = super().train_step(batch)
        self.lr_scheduler.advance()
        return result

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, complete on disk before it takes its name."""
        temporary = f"{filename}.tmp"
        try:
            super().save_checkpoint(temporary)
            if os.path.isfile(temporary):
                os.replace(temporary, filename)
        finally:
            if os.path.isfile(temporary):
                os.remove(temporary)
