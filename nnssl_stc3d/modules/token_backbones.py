"""Networks as makers of tokens, for methods that mask: what is visible, what it becomes, and how it is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.modules.feature_pyramid import decoder_features, encoder_channels
from nnssl_stc3d.modules.masking import check_block, default_block, stage_strides, take_tokens
from nnssl_stc3d.modules.primus import encode_tokens, is_primus, token_grid

Parts = Mapping[str, Any]


class Encoded(NamedTuple):
    """What an encoder makes of views.

    Attributes:
        tokens: ``(N, M, C)`` of the visible tokens, or of all.
        pooled: ``(N, C')`` mean of the bottleneck, or of a transformer's tokens.
        maps: stages of a U-Net, highest resolution first; none of a transformer.
    """

    tokens: Tensor
    pooled: Tensor
    maps: list[Tensor]


class UNetBackbone:
    """Tokens of a U-Net: its stages averaged over the blocks of the mask and concatenated.

    A convolutional network sees masked voxels as zeros; blocks respect its strides, so that what a visible token has of
    a stage whose stride is at most the block's lies wholly in visible blocks. The cells of deeper stages are larger
    than a block and cover masked ones too.

    Attributes:
        parts: names of the modules of the network that encode.
        block: voxels of a token, those of a block of the mask.
        grid: tokens along each axis.
        features: width of the tokens, of the encoder and of the decoder alike.
        pooled_features: width of the pooled bottleneck.
    """

    parts = ("encoder",)

    def __init__(self, network: nn.Module, block: Sequence[int], view_shape: Sequence[int]) -> None:
        z, y, x = (v // b for v, b in zip(view_shape, block))
        self.block, self.grid = tuple(block), (z, y, x)
        channels = encoder_channels(network)
        self.features, self.pooled_features, self.finest_features = sum(channels), channels[-1], channels[0]

    def encode(self, parts: Parts, images: Tensor, index: Tensor | None) -> Encoded:
        """Run the encoder on ``(N, C, Z, Y, X)`` and keep the tokens at ``index`` ``(N, M)``, or all."""
        maps = parts["encoder"](images)
        tokens = self._tokens(maps)
        return Encoded(tokens if index is None else take_tokens(tokens, index), maps[-1].mean((2, 3, 4)), maps)

    def decode(self, decoder: nn.Module, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the network's own decoder: its tokens ``(N, K, features)`` and its finest map ``(N, C0, Z, Y, X)``."""
        features = [maps[-1], *decoder_features(decoder, maps)]
        # As the encoder's: the highest resolution first, the bottleneck last.
        return self._tokens(features[::-1]), features[-1]

    def _tokens(self, maps: Sequence[Tensor]) -> Tensor:
        pooled = [F.adaptive_avg_pool3d(m, self.grid).flatten(2) for m in maps]
        return torch.cat(pooled, dim=1).transpose(1, 2)


class PrimusBackbone:
    """Tokens of dynamic-network-architectures' Primus; masked ones are left out.

    Attributes:
        parts: names of the modules of the network that encode.
        block: voxels of a token.
        grid: tokens along each axis.
        features: width of the tokens.
        pooled_features: the same.
    """

    parts = ("down_projection", "eva")

    def __init__(self, network: nn.Module) -> None:
        self.block, view_shape = token_grid(network)
        self.grid = tuple(v // b for v, b in zip(view_shape, self.block))
        self.features = self.pooled_features = int(network.embed_dim)  # type: ignore[arg-type]

    def encode(self, parts: Parts, images: Tensor, index: Tensor | None) -> Encoded:
        """Run the transformer on the tokens at ``index`` ``(N, M)`` of ``(N, C, Z, Y, X)``, or on all."""
        tokens = encode_tokens(parts["down_projection"], parts["eva"], images, index)
        return Encoded(tokens, tokens.mean(1), [])


def token_backbone(
    network: nn.Module, mask_block: Sequence[int], view_shape: Sequence[int]
) -> UNetBackbone | PrimusBackbone:
    """The backbone of a network."""
    return PrimusBackbone(network) if is_primus(network) else UNetBackbone(network, mask_block, view_shape)


def resolve_block(
    network: nn.Module, block: Sequence[int] | None, view_shape: Sequence[int]
) -> tuple[int, int, int]:  # fmt: skip
    """Blocks of the mask that suit a network: the configured ones, checked, or a choice.

    Raises:
        ValueError: if the configured blocks do not suit it.
    """
    strides = [token_grid(network)[0]] if is_primus(network) else stage_strides(network)
    if block is None:
        return default_block(view_shape, strides)
    check_block(block, view_shape, strides)
    if is_primus(network) and any(b % s for b, s in zip(block, strides[0])):
        raise ValueError(f"blocks of a mask must be made of whole tokens of {strides[0]} voxels, got {tuple(block)}")
    return block[0], block[1], block[2]
