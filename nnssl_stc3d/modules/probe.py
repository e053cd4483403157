"""Probing: a frozen U-Net and a head on its feature pyramid (vox2vec 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnssl_stc3d.modules.feature_pyramid import check_unet, decoder_features, encoder_channels
from nnssl_stc3d.modules.voxel_heads import Layers, make_head

PYRAMIDS = ("encoder", "decoder")
"""Which feature maps a probe reads: the encoder's stages, or the bottleneck and the decoder's stages."""


class ProbeNetwork(nn.Module):
    """A segmentation network of which only the head is trained.

    The head reads all levels of the pyramid. A linear one is a linear classifier of the concatenated features of a
    voxel; a non-linear one is the decoder of a U-Net in which all kernels are 1.

    Attributes:
        backbone: the frozen U-Net without what is not read; always in evaluation mode.
        reads: names of the parts of the U-Net that the head sees.
        head: what is trained.

    Args:
        unet: PlainConvUNet, ResidualEncoderUNet or VoxelFPN; changed.
        layers: what the head is made of.
        num_classes: channels of a segmentation.
        head: "linear" or "nonlinear".
        pyramid: "encoder" or "decoder".

    Raises:
        NotImplementedError: for other networks.
        ValueError: for an unknown head or pyramid.
    """

    def __init__(self, unet: Any, layers: Layers, num_classes: int, head: str, pyramid: str) -> None:
        super().__init__()
        check_unet(unet, "probing")
        if pyramid not in PYRAMIDS:
            raise ValueError(f"pyramid must be one of {', '.join(map(repr, PYRAMIDS))}, got {pyramid!r}")
        features = encoder_channels(unet)
        strides = [layers.per_axis(stride) for stride in unet.encoder.strides]
        self.reads: tuple[str, ...] = ("encoder",) if pyramid == "encoder" else ("encoder", "decoder")
        if pyramid == "encoder":
            del unet.decoder
        else:
            unet.decoder.seg_layers = nn.ModuleList()
        self.backbone: Any = unet.requires_grad_(False)
        self.head = make_head(head, layers, features[::-1], strides[:0:-1], num_classes, every=False)
        self.head.apply(InitWeights_He(1e-2))
        self.train()

    def train(self, mode: bool = True) -> ProbeNetwork:
        """Switch the head; the backbone stays in evaluation mode, so that its statistics do not change."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Segment ``(N, C, Z, Y, X)``; logits ``(N, num_classes, Z, Y, X)``."""
        with torch.no_grad():
            skips = self.backbone.encoder(images)
            decoded = "decoder" in self.reads
            above = decoder_features(self.backbone.decoder, skips) if decoded else skips[-2::-1]
        return self.head([skips[-1], *above], False)[-1]
