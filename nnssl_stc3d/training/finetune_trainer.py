"""Finetuning as in STC3D A.3.3: AdamW, warm-up of 100 steps, cosine; everything else is nnU-Net's."""

from __future__ import annotations

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl_stc3d.files import written_whole
from nnssl_stc3d.training.preflight import check_environment
from nnssl_stc3d.training.schedule import Thaw, WarmupSchedule
from nnssl_stc3d.transfer.adapt import Adaptation
from nnssl_stc3d.transfer.adaptation_plan import unwrap
from nnssl_stc3d.transfer.load import TransferReport, use_reporting_loader


class FinetuneTrainer(nnUNetTrainer):
    """nnU-Net's trainer with another optimiser; ``-pretrained_weights`` is loaded strictly and with a report.

    Patch and batch size come from the plans (the paper's are 96^3 and 1). Without ``-pretrained_weights`` it trains
    from scratch under the same schedule: the matched baseline. ``NNSSL_STC3D_ADAPT`` says what may be changed about
    weights that do not fit.

    Attributes:
        frozen_share: share of the epochs in which the encoder stays as it is. Afterwards its learning rate rises
            exponentially over ``thaw_steps`` from a tenth of the others' (vox2vec 4.2).
    """

    learning_rate = 3e-4
    decay = 1e-5
    warmup_steps = 100
    epochs = 1000
    steps_per_epoch = 250
    validation_steps = 50
    frozen_share = 0.0
    thaw_steps = 1200

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
        use_reporting_loader(self.plans_manager.plans, self.configuration_name, self.on_transfer, self.adapt)

    def on_transfer(self, report: TransferReport) -> None:
        """Log what the pretrained weights became."""
        self.print_to_log_file(str(report))

    @property
    def frozen_epochs(self) -> int:
        """Epochs in which the encoder stays as it is."""
        return round(self.frozen_share * self.num_epochs)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupSchedule]:
        """AdamW and a schedule that changes the learning rate at every step."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trained}]
        thaw = None
        if self.frozen_epochs:
            encoder = {id(p) for module in encoder_modules(self.network) for p in module.parameters()}
            groups = [
                {"params": [p for p in trained if id(p) not in encoder]},
                {"params": [p for p in trained if id(p) in encoder], "thaws": True},
            ]
            total = self.num_epochs * self.num_iterations_per_epoch
            thaw = Thaw(self.frozen_epochs * self.num_iterations_per_epoch, min(self.thaw_steps, total // 10))
            self.print_to_log_file(
                f"Frozen start: the encoder stays as it is for {self.frozen_epochs} of {self.num_epochs} epochs, then "
                f"its learning rate rises over {thaw.rising_steps} steps from a tenth of the others'."
            )
        optimizer = torch.optim.AdamW(groups, lr=self.initial_lr, weight_decay=self.weight_decay)
        schedule = WarmupSchedule(
            optimizer, self.initial_lr, self.num_iterations_per_epoch, self.num_epochs, self.warmup_steps, thaw=thaw
        )
        return optimizer, schedule

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's; AdamW counts its steps on the CPU, where reading them does not wait for the GPU."""
        super().load_checkpoint(filename_or_checkpoint)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].cpu()

    def on_train_epoch_start(self) -> None:
        """A frozen encoder keeps its normalisation's statistics, too."""
        super().on_train_epoch_start()
        if self.current_epoch < self.frozen_epochs:
            for module in encoder_modules(self.network):
                module.eval()

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, then the learning rate of the next one."""
        result = super().train_step(batch)
        self.lr_scheduler.advance()
        return result

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, complete on disk before it takes its name."""
        # The other ranks write nothing; they would move or remove the file that rank 0 is writing.
        if self.local_rank != 0:
            return
        with written_whole(filename) as beside:
            super().save_checkpoint(str(beside))


def encoder_modules(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that encode: a U-Net's encoder, or a transformer with its embedding.

    Raises:
        NotImplementedError: if the network does not declare them.
    """
    network = unwrap(network)
    # Classifiers hold a part of a U-Net.
    backbone: Any = getattr(network, "backbone", network)
    network = backbone
    keys = [getattr(network, name, None) for name in ("key_to_encoder", "key_to_stem")]
    if None in keys:
        raise NotImplementedError(
            f"a frozen start needs a network that says where its encoder is, {type(network).__name__} does not. Use "
            "STC3DFinetuneTrainer, which trains all of it from the start."
        )
    return [network.get_submodule(name) for name in dict.fromkeys(str(key).split(".")[0] for key in keys)]
