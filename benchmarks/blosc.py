"""Bytes that blosc2 decompresses for a step against the bytes of the boxes that the sampler asks for.

blosc2 decompresses whole blocks. A step reads one box for each volume; this counts the blocks that the boxes touch, in
full and including what pads them, for nnU-Net's own choice of chunks. No voxels are needed for that. Chunks that are no
multiple of their blocks are padded, which no reader of them can avoid: "whole volume" is the same ratio for reading
everything, "without padding" leaves the padding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from common import Row, machine, parser, report
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnssl_stc3d.methods.base import default_view_shape
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.views.samplers import Box

_ITEM = 4


class Data(NamedTuple):
    """A typical dataset: preprocessed shape, spacing in mm, and the patch size and stride that nnU-Net plans for it."""

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    patch: tuple[int, int, int]
    stride: tuple[int, int, int]


DATA = (
    Data("abdominal CT", (300, 512, 512), (1.5, 0.8, 0.8), (128, 128, 128), (32, 32, 32)),
    Data("CT at 1.5 mm", (220, 270, 270), (1.5, 1.5, 1.5), (128, 128, 128), (32, 32, 32)),
    Data("brain MRI", (155, 192, 160), (1.0, 1.0, 1.0), (128, 128, 128), (32, 32, 32)),
    Data("anisotropic MRI", (20, 320, 320), (3.6, 0.6, 0.6), (16, 320, 320), (4, 64, 64)),
    Data("hippocampus", (36, 50, 35), (1.0, 1.0, 1.0), (40, 56, 40), (8, 8, 8)),
)


def touched(box: Box, chunk: Sequence[int], block: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """Voxels of the blocks that a box touches: with padding, and only those that belong to the volume.

    The grid of blocks starts anew in every chunk, and chunks are padded to whole blocks.
    """
    padded, real = [], []
    for start, stop, chunk_size, block_size, size in zip(*box, chunk, block, shape):
        intervals = []
        for first in range(start // chunk_size * chunk_size, stop, chunk_size):
            end = min(first + chunk_size, size)
            intervals += [(b, min(b + block_size, end)) for b in range(first, end, block_size)]
        mine = [b - a for a, b in intervals if a < stop and b > start]
        padded.append(len(mine) * block_size)
        real.append(sum(mine))
    return prod(padded), prod(real)


def main() -> None:
    """Count and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=200, help="of 4 volumes each")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    # The sampler's tensors are tiny.
    torch.set_num_threads(1)
    steps = 5 if options.quick else options.steps

    rows = []
    for data in DATA:
        block, chunk = (sizes[1:] for sizes in comp_blosc2_params((1, *data.shape), data.patch))
        whole = ((0, 0, 0), data.shape)
        for name, config in (("default", STC3DConfig()), ("paper", STC3DConfig.paper())):
            config = replace(config, view_shape=default_view_shape(data.patch, data.stride, config.view_share))
            sampler, rng = STC3D.view_sampler(config, data.patch, data.spacing), np.random.default_rng(options.seed)
            boxes = [sampler.sample([data.shape], rng).boxes[0] for _ in range(steps * config.batch_size)]
            counts = np.array([touched(box, chunk, block, data.shape) for box in boxes]).sum(0)
            wanted = sum(prod(b - a for a, b in zip(*box)) for box in boxes)
            full = touched(whole, chunk, block, data.shape)[0] / prod(data.shape)
            note = (
                f"without padding {counts[1] / wanted:.2f}, whole volume {full:.2f}; "
                f"{counts[0] * _ITEM / steps / 2**20:.1f} MiB a step; blocks {block}, chunks {chunk}"
            )
            rows.append(Row(f"{data.name} {data.shape}, {name}", float(counts[0] / wanted), 2.0, note=note))
    report("Bytes decompressed / bytes of the boxes", rows, machine(), options)


if __name__ == "__main__":
    main()
