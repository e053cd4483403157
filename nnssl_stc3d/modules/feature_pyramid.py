"""The feature maps of nnU-Net's U-Nets: encoder stages, and decoder stages without the segmentation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PYRAMIDS = ("decoder", "encoder", "both")
"""What a voxel may be read from: the bottleneck and the decoder's stages, the encoder's stages, or all stages."""


def check_unet(network: nn.Module, who: str = "pretraining") -> None:
    """Refuse networks that have no encoder and decoder of dynamic-network-architectures' U-Nets.

    Args:
        network: to look at.
        who: needs them, for the message.

    Raises:
        NotImplementedError: naming the network and what is supported.
    """
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    parts = (encoder, "output_channels"), (encoder, "strides"), (decoder, "stages"), (decoder, "transpconvs")
    if any(not hasattr(part, name) for part, name in parts):
        raise NotImplementedError(
            f"{who} supports PlainConvUNet and ResidualEncoderUNet, got {type(network).__name__}. Plan with "
            "nnU-Net's default or ResEnc planners."
        )


def total_stride(network: Any) -> tuple[int, ...]:
    """Voxels of the input that one voxel of the bottleneck covers, for each axis."""
    return tuple(int(s) for s in np.prod(np.array(network.encoder.strides), axis=0))


def encoder_channels(network: Any) -> list[int]:
    """Channels of the encoder's stages, from the highest resolution to the bottleneck."""
    return list(network.encoder.output_channels)


def decoder_features(decoder: Any, skips: Sequence[Tensor]) -> list[Tensor]:
    """Run the decoder's stages without the segmentation layers.

    Args:
        decoder: of PlainConvUNet or ResidualEncoderUNet.
        skips: the encoder's stages, highest resolution first.

    Returns:
        The decoder's stages, lowest resolution first; channels are those of the encoder stage of the same resolution.
    """
    below, features = skips[-1], []
    for stage, upsample, skip in zip(decoder.stages, decoder.transpconvs, reversed(skips[:-1])):
        below = stage(torch.cat((upsample(below), skip), dim=1))
        features.append(below)
    return features


def pyramid_channels(network: Any, pyramid: str) -> int:
    """Channels of a voxel that is read from every map of :func:`pyramid_maps`."""
    channels = encoder_channels(network)
    return sum(channels) + (sum(channels[:-1]) if pyramid == "both" else 0)


def pyramid_maps(network: Any, skips: Sequence[Tensor], pyramid: str) -> list[Tensor]:
    """The feature maps of a pyramid.

    Args:
        network: a U-Net; its decoder is run only where the pyramid has it.
        skips: the encoder's stages, highest resolution first.
        pyramid: one of :data:`PYRAMIDS`.

    Returns:
        The encoder's maps, highest resolution first, then the decoder's, lowest resolution first.
    """
    maps = [skips[-1]] if pyramid == "decoder" else list(skips)
    return maps if pyramid == "encoder" else maps + decoder_features(network.decoder, skips)
