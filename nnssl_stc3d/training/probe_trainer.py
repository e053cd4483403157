"""Linear and non-linear probing (vox2vec 3.4): how good are the features themselves?"""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl_stc3d.modules.feature_pyramid import check_unet
from nnssl_stc3d.modules.probe import ProbeNetwork
from nnssl_stc3d.modules.voxel_heads import Layers
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.transfer.load import TransferReport


class ProbeTrainer(FinetuneTrainer):
    """Trains a head on the frozen features of ``-pretrained_weights``, or of a random network without them.

    Learning rate and number of steps are the paper's (vox2vec 4.2: Adam, 3e-4, 45,000 batches); AdamW, warm-up and
    cosine are those of the finetuning trainer. There is one output, so no deep supervision.

    Attributes:
        head: "linear" or "nonlinear".
        pyramid: "encoder" or "decoder", whose feature maps the head reads. The class decides, not the checkpoint, so
            that methods and the random baseline are compared at the same place.
    """

    epochs = 180
    head = "linear"
    pyramid = "encoder"

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.backbone_is_random = True

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """The network of the plans, frozen, with a head; ``nnUNetv2_predict`` calls this, too."""
        del enable_deep_supervision
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, False
        )
        # A transformer's plans name no layers that a head could be made of.
        check_unet(unet, "probing")
        layers = Layers.of_plans(
            configuration_manager.network_arch_init_kwargs, configuration_manager.network_arch_init_kwargs_req_import
        )
        return ProbeNetwork(unet, layers, num_output_channels, cls.head, cls.pyramid)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: there is one output."""

    def on_transfer(self, report: TransferReport) -> None:
        """Log what the pretrained weights became, and what of them the head does not see."""
        super().on_transfer(report)
        self.backbone_is_random = False
        if report.fresh:
            self.print_to_log_file(
                f"WARNING: {len(report.fresh)} tensors that the head depends on are random and stay so, such as "
                f"{report.fresh[0]}. Probe with the plans of the pretraining."
            )

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue; the backbone comes from the checkpoint."""
        super().load_checkpoint(filename_or_checkpoint)
        self.backbone_is_random = False

    def on_train_start(self) -> None:
        """Say what is probed."""
        super().on_train_start()
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in self.network.parameters()) - trained
        maps = "the encoder's stages" if self.pyramid == "encoder" else "the bottleneck and the decoder's stages"
        self.print_to_log_file(
            f"Probing: a {self.head} head of {trained} parameters on {maps}; {frozen} parameters stay as they are."
        )
        if self.backbone_is_random:
            self.print_to_log_file(
                "No -pretrained_weights: these are the features of a RANDOM network, the baseline that pretrained "
                "features have to beat."
            )
