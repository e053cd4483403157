"""Heads that classify single voxels from a feature pyramid (vox2vec 3.4), and the layers that they are made of."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_pool_op
from torch import Tensor, nn

HEADS = ("nonlinear", "linear")
"""Segmentation heads of vox2vec 3.4; both read all levels of a pyramid."""


class Layers:
    """Makes layers as the plans say."""

    def __init__(
        self,
        conv_op: type[nn.Module],
        conv_bias: bool,
        norm_op: type[nn.Module] | None,
        norm_kwargs: dict[str, Any],
        dropout_op: type[nn.Module] | None,
        dropout_kwargs: dict[str, Any],
        nonlin: type[nn.Module],
        nonlin_kwargs: dict[str, Any],
    ) -> None:
        self.conv_op = conv_op
        self.conv_bias = conv_bias
        self.norm_op, self.norm_kwargs = norm_op, norm_kwargs
        self.dropout_op, self.dropout_kwargs = dropout_op, dropout_kwargs
        self.nonlin, self.nonlin_kwargs = nonlin, nonlin_kwargs
        self.pool_op = get_matching_pool_op(conv_op=conv_op, pool_type="max")
        self.dimensions = 3 if conv_op is nn.Conv3d else 2

    @classmethod
    def of_plans(cls, arch_kwargs: Mapping[str, Any], requiring_import: Sequence[str] = ()) -> Layers:
        """The layers that a plans file names.

        Args:
            arch_kwargs: of the architecture.
            requiring_import: names of those that are paths of classes.
        """

        def value(name: str) -> Any:
            given = arch_kwargs.get(name)
            return pydoc.locate(given) if name in requiring_import and given is not None else given

        return cls(
            value("conv_op"), bool(value("conv_bias")), value("norm_op"), value("norm_op_kwargs") or {},
            value("dropout_op"), value("dropout_op_kwargs") or {}, value("nonlin") or nn.ReLU,
            value("nonlin_kwargs") or {},
        )  # fmt: skip

    def per_axis(self, value: int | Sequence[int]) -> tuple[int, ...]:
        """One value for each axis."""
        return (value,) * self.dimensions if isinstance(value, int) else tuple(value)

    def conv(self, channels: int, features: int, kernel: int | Sequence[int] = 1) -> nn.Module:
        """A convolution that keeps the size."""
        sizes = self.per_axis(kernel)
        return self.conv_op(channels, features, sizes, padding=[(k - 1) // 2 for k in sizes], bias=self.conv_bias)

    def activated_conv(self, channels: int, features: int, kernel: int | Sequence[int]) -> list[nn.Module]:
        """Normalisation, nonlinearity, dropout and convolution, in the order of pre-activation."""
        layers: list[nn.Module] = [] if self.norm_op is None else [self.norm_op(channels, **self.norm_kwargs)]
        # Never in place: the input of a block is also its shortcut.
        layers.append(self.nonlin(**{**self.nonlin_kwargs, "inplace": False}))
        if self.dropout_op is not None:
            layers.append(self.dropout_op(**self.dropout_kwargs))
        return [*layers, self.conv(channels, features, kernel)]

    def blocks(self, count: int, channels: int, features: int, kernel: int | Sequence[int]) -> list[nn.Module]:
        """Residual blocks; the first changes the width."""
        widths = [channels, *[features] * count]
        return [ResidualBlock(self, a, b, kernel) for a, b in zip(widths[:-1], widths[1:])]


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two convolutions (He et al. 2016, as in vox2vec's FPN)."""

    def __init__(self, parts: Layers, channels: int, features: int, kernel: int | Sequence[int]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *parts.activated_conv(channels, features, kernel), *parts.activated_conv(features, features, kernel)
        )
        self.shortcut = nn.Identity() if channels == features else parts.conv(channels, features)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, ...)`` to ``(N, features, ...)``."""
        return self.shortcut(x) + self.residual(x)


class LinearHead(nn.Module):
    """A linear classifier of the pyramid's concatenated vectors (vox2vec 3.4), without concatenating them.

    One convolution of kernel 1 for each level; the results are upsampled and summed.
    """

    def __init__(
        self, parts: Layers, features: Sequence[int], strides: Sequence[Sequence[int]], num_classes: int
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(parts.conv_op(width, num_classes, 1, bias=True) for width in features)
        self.upsamples = nn.ModuleList(nearest_upsample(stride) for stride in strides)

    def forward(self, pyramid: Sequence[Tensor], every: bool) -> list[Tensor]:
        """Logits of every level but the deepest, or of the finest only, from the lowest resolution to the highest.

        Args:
            pyramid: the levels, lowest resolution first.
            every: whether all of them are wanted.
        """
        total = self.levels[0](pyramid[0])
        outputs = []
        for level, upsample, features in zip(self.levels[1:], self.upsamples, pyramid[1:]):
            total = upsample(total) + level(features)
            outputs.append(total)
        return outputs if every else outputs[-1:]


class NonlinearHead(nn.Module):
    """A U-Net's decoder over the pyramid in which all kernels are 1 (vox2vec 3.4): it classifies single voxels.

    Args:
        parts: what it is made of.
        features: channels of the levels, lowest resolution first.
        strides: between a level and the next.
        num_classes: channels of a segmentation.
        every: whether levels below the finest can be segmented, too.
    """

    def __init__(
        self,
        parts: Layers,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        every: bool = True,
    ) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(
            nn.Sequential(parts.conv(below, here), nearest_upsample(stride))
            for stride, below, here in zip(strides, features[:-1], features[1:])
        )
        self.blocks = nn.ModuleList(ResidualBlock(parts, 2 * width, width, 1) for width in features[1:])
        last = len(features) - 2
        self.levels = nn.ModuleList(
            parts.conv_op(width, num_classes, 1, bias=True) if every or index == last else nn.Identity()
            for index, width in enumerate(features[1:])
        )

    def forward(self, pyramid: Sequence[Tensor], every: bool) -> list[Tensor]:
        """See :meth:`LinearHead.forward`."""
        x, outputs = pyramid[0], []
        last = len(self.levels) - 1
        for index, features in enumerate(pyramid[1:]):
            x = self.blocks[index](torch.cat((self.upsamples[index](x), features), dim=1))
            if every or index == last:
                outputs.append(self.levels[index](x))
        return outputs


def make_head(
    head: str,
    layers: Layers,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    num_classes: int,
    every: bool = True,
) -> LinearHead | NonlinearHead:
    """One of :data:`HEADS`.

    Args:
        head: its name.
        layers: what it is made of.
        features: channels of the pyramid's levels, lowest resolution first.
        strides: between a level and the next.
        num_classes: channels of a segmentation.
        every: whether levels below the finest shall be segmented, too.

    Raises:
        ValueError: if there is no such head.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}")
    if head == "linear":
        return LinearHead(layers, features, strides, num_classes)
    return NonlinearHead(layers, features, strides, num_classes, every)


def nearest_upsample(stride: Sequence[int]) -> nn.Module:
    """Nearest upsampling by a stride, one factor for each axis."""
    return nn.Upsample(scale_factor=tuple(float(s) for s in stride), mode="nearest")
