"""Weights of a network that is almost the same: other input channels, other depth, flat against cubic kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

ADAPT_VARIABLE = "NNSSL_STC3D_ADAPT"
"""Environment variable that finetuning reads :class:`Adaptation` from."""

STEMS = ("divided", "copied", "fresh")
UNETS = ("PlainConvUNet", "ResidualEncoderUNet")
"""Networks whose stages are known to mean the same at another depth."""

_STAGE = re.compile(r"^(?P<path>(?:decoder\.)?encoder\.stages)\.(?P<index>\d+)\.")
_LEVEL = re.compile(r"^(?P<path>decoder\.(?:stages|transpconvs))\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class Adaptation:
    """What may be changed about pretrained weights so that they fit.

    Attributes:
        stem: the first convolution on images with another number of channels: "divided" repeats the channels and
            divides them, so that equal channels give the response that they gave; "copied" repeats them as they are;
            "fresh" leaves it untrained.
        depth: take the stages that both U-Nets have, if one has more than the other.
        kernels: turn 1x3x3 kernels into 3x3x3 ones and the other way round.
    """

    stem: str = "divided"
    depth: bool = False
    kernels: bool = False

    def __post_init__(self) -> None:
        """Checks the choice of stem.

        Raises:
            ValueError: if there is no such choice.
        """
        if self.stem not in STEMS:
            raise ValueError(f"Expected stem to be one of {', '.join(STEMS)}, got {self.stem!r}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Adaptation:
        """Reads ``NNSSL_STC3D_ADAPT``, such as ``depth,kernels,stem=copied``.

        Raises:
            ValueError: if it holds another word.
        """
        options: dict[str, str | bool] = {}
        for word in environment.get(ADAPT_VARIABLE, "").replace(",", " ").split():
            name, _, value = word.partition("=")
            if name == "stem" and value in STEMS:
                options[name] = value
            elif word in {field.name for field in fields(cls)} - {"stem"}:
                options[name] = True
            else:
                raise ValueError(
                    f"{ADAPT_VARIABLE} understands depth, kernels and stem={'|'.join(STEMS)}, separated by commas; got "
                    f"{word!r}."
                )
        return cls(**options)  # type: ignore[arg-type]


def adapt_input_channels(weight: Tensor, channels: int, stem: str = "divided") -> Tensor:
    """Changes the number of input channels of a convolution.

    Args:
        weight: (out, in, ...) weights of the convolution.
        channels: Number of input channels wanted.
        stem: "divided" or "copied", see :class:`Adaptation`.

    Returns:
        (out, channels, ...). With more channels, the given ones are repeated in turn, and if divided, by how often each
        was repeated. With fewer, each gets an equal share of their sum if divided; the first ones are copied otherwise.
    """
    index = torch.arange(channels, device=weight.device) % weight.shape[1]
    if stem == "copied":
        return weight[:, index]
    if channels < weight.shape[1]:
        return weight.sum(1, keepdim=True).expand(-1, channels, *weight.shape[2:]) / channels
    repeats = torch.bincount(index)[index].to(weight.dtype)
    return weight[:, index] / repeats.reshape(1, -1, *[1] * (weight.ndim - 2))


def adapt_kernel(weight: Tensor, kernel: tuple[int, ...]) -> Tensor | None:
    """Changes a convolution between kernels of 1 and of odd width along some axes.

    Images that do not change along such an axis get the response that they got (away from the border, where a wider
    kernel sees padding).

    Args:
        weight: (out, in, z, y, x) weights of the convolution.
        kernel: (z, y, x) wanted.

    Returns:
        The weights, summed over an axis that becomes 1 wide and centred in zeros along one that was; None if another
        change is needed.
    """
    for axis, (old, new) in enumerate(zip(weight.shape[2:], kernel), start=2):
        if old == new:
            continue
        if new == 1 and old % 2:
            weight = weight.sum(axis, keepdim=True)
        elif old == 1 and new % 2:
            widened = weight.new_zeros([new if a == axis else n for a, n in enumerate(weight.shape)])
            widened.narrow(axis, new // 2, 1).copy_(weight)
            weight = widened
        else:
            return None
    return weight


def encoder_stages(names: Mapping[str, object]) -> int:
    """Counts the encoder stages that the names of a state dict speak of."""
    found = [int(m["index"]) for m in map(_STAGE.match, names) if m]
    return max(found) + 1 if found else 0


def adapt_depth(weights: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Renames the weights of a U-Net as those of a U-Net with another number of stages, and drops what only one has.

    Encoder stages are counted from the highest resolution and see the same in both. A decoder's are counted from the
    bottleneck, so that they move. Its level above the bottleneck of the shallower network is dropped, since it was fed
    by another module, or will be; the finer ones stay.

    Args:
        weights: State dict of a PlainConvUNet or ResidualEncoderUNet.
        stages: Encoder stages of the other network.

    Returns:
        Weights under the names of the other network.
    """
    given = encoder_stages(weights)
    common = min(given, stages)
    adapted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if (stage := _STAGE.match(name)) and int(stage["index"]) >= common:
            continue
        if level := _LEVEL.match(name):
            # Level 0 is the full resolution; the decoder's list starts at the lowest.
            resolution = given - 2 - int(level["index"])
            if resolution >= common - 2:
                continue
            name = f"{level['path']}.{stages - 2 - resolution}.{name[level.end() :]}"
        adapted[name] = value
    return adapted


def common_levels(name: str, stages: int, others: int) -> bool:
    """Whether a tensor of a U-Net with ``stages`` stages belongs to what one with ``others`` stages has as well."""
    common = min(stages, others)
    if stage := _STAGE.match(name):
        return int(stage["index"]) < common
    if level := _LEVEL.match(name):
        return stages - 2 - int(level["index"]) < common - 2
    return True
