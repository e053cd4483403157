"""Masks of blocks: how large blocks are, which voxels they cover, which tokens they leave visible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCKS_PER_AXIS = 4


def stage_strides(network: object) -> list[tuple[int, int, int]]:
    """Voxels of the input that one voxel of each encoder stage of a U-Net covers, highest resolution first."""
    cumulated = np.cumprod(np.array(network.encoder.strides), axis=0)  # type: ignore[attr-defined]
    return [(int(z), int(y), int(x)) for z, y, x in cumulated]


def default_block(view_shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """The largest stride of a network that leaves at least 4 blocks along each axis, or the smallest if none does.

    Views of 64^3 get the blocks of 16^3 of Alice's released code.

    Args:
        view_shape: ``(Z, Y, X)``.
        strides: of each stage, from :func:`stage_strides`.
    """
    block = []
    for axis, size in enumerate(view_shape):
        steps = sorted({stride[axis] for stride in strides})
        block.append(max([s for s in steps if size >= s * _BLOCKS_PER_AXIS], default=steps[0]))
    return block[0], block[1], block[2]


def check_block(block: Sequence[int], view_shape: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Refuse blocks whose borders cut through voxels of a feature map, or that leave fewer than two blocks.

    Raises:
        ValueError: naming the strides that blocks have to respect.
    """
    cut = any(s % b and b % s for stride in strides for s, b in zip(stride, block))
    if cut or any(v % b for v, b in zip(view_shape, block)) or tuple(block) == tuple(view_shape):
        steps = [sorted({stride[axis] for stride in strides}) for axis in range(3)]
        raise ValueError(
            f"blocks of a mask must tile the view {tuple(view_shape)} into two or more and be a multiple or a divisor "
            f"of every stride of the network (along z, y, x: {steps}), got {tuple(block)}. None chooses one."
        )


def expand_mask(mask: Tensor, block: Sequence[int]) -> Tensor:
    """Repeat each block, ``(..., gz, gy, gx) -> (..., gz * bz, gy * by, gx * bx)``."""
    for axis, size in zip((-3, -2, -1), block):
        mask = mask.repeat_interleave(size, dim=axis)
    return mask


def visible_tokens(mask: Tensor) -> Tensor:
    """Indices of the tokens that are not masked.

    Args:
        mask: ``(N, gz, gy, gx)`` bool, with as many masked tokens in every row.

    Returns:
        ``(N, M)`` in C order.
    """
    flat = mask.flatten(1)
    visible = int((~flat[0]).sum())
    return torch.argsort(flat.to(torch.uint8), dim=1, stable=True)[:, :visible]


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Select tokens of each row, ``(N, K, C), (N, M) -> (N, M, C)``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
