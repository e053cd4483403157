"""PiC's pooling with separable box weights against a mask for each pair of patches: forward and backward.

All ways take the feature maps of the shallow levels and give the same means inside and outside what the patches of
each pair share, which is checked. A mask for each pair is how the equations read: take the two maps of a pair out of
the batch and average the voxels inside and outside a mask; "selected" picks the voxels with a boolean mask,
"multiplied" multiplies with a mask of zeros and ones, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import numpy as np
import torch
from common import Row, interleaved, machine, parser, ratio, report, seconds
from torch import Tensor

from nnssl_stc3d.modules.intersection_pooling import box_weights, pool_boxes
from nnssl_stc3d.views.patch_sampler import PatchSampler
from nnssl_stc3d.views.spec import stack_specs


def with_boxes(maps: list[Tensor], boxes: Tensor, pairs: list[tuple[int, int]], size: int) -> Tensor:
    """Parts of every pair, ``(P, 4, C)``, from one contraction for all partners of a patch."""
    pooled = [torch.stack(pool_boxes(features, boxes, (size,) * 3), dim=2) for features in maps]
    everything = torch.cat(pooled, dim=-1)
    i, j = (torch.tensor(index) for index in zip(*pairs))
    return torch.stack((everything[i, j], everything[j, i]), dim=2).flatten(1, 2)


def with_masks(select: bool, maps: list[Tensor], boxes: Tensor, pairs: list[tuple[int, int]], size: int) -> Tensor:
    """The same with a mask for each map of each pair: voxels selected by the mask, or multiplied with it."""
    rows = []
    for i, j in pairs:
        parts = []
        for features in maps:
            means = []
            for own, other in ((i, j), (j, i)):
                z, y, x = (w[0, 0] for w in box_weights(boxes[own, other][None, None], (size,) * 3, features.shape[2:]))
                mask = z[:, None, None] * y[:, None] * x
                for part in (mask, 1 - mask):
                    if select:
                        means.append(features[own][:, part.bool()].mean(1))
                    else:
                        means.append((features[own] * part).sum((1, 2, 3)) / part.sum())
            parts.append(torch.stack(means))
        rows.append(torch.cat(parts, dim=1)[[0, 2, 1, 3]])
    return torch.stack(rows)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--patches", type=int, default=8)
    arguments.add_argument("--size", type=int, default=64, help="voxels of a patch along each axis")
    arguments.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of levels 1, 2, 4, ...")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    size, channels = (16, [4, 8]) if options.quick else (options.size, options.channels)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    # All patches overlap, so that every pair counts: the most work that the masks can have.
    sampler = PatchSampler((size,) * 3, (1.0, 1.0, 1.0), False, options.patches, reach=0.4)
    specs = stack_specs([sampler.sample([(3 * size,) * 3], rng).specs])
    boxes = sampler.targets(specs, rng)["boxes"][0]
    pairs = list(combinations(range(options.patches), 2))
    maps = [
        torch.randn(options.patches, c, *(size // 2**level,) * 3, requires_grad=True)
        for level, c in enumerate(channels)
    ]
    ways: dict[str, Callable[..., Tensor]] = {
        "boxes": with_boxes,
        "selected": partial(with_masks, True),
        "multiplied": partial(with_masks, False),
    }
    with torch.no_grad():
        results = {name: way(maps, boxes, pairs, size) for name, way in ways.items()}
    difference = max(float((results["boxes"] - result).abs().max()) for result in results.values())

    def forward(name: str) -> None:
        with torch.no_grad():
            ways[name](maps, boxes, pairs, size)

    def both(name: str) -> None:
        ways[name](maps, boxes, pairs, size).square().sum().backward()
        for features in maps:
            features.grad = None

    rows = []
    # The target is for what a training step does.
    for title, function, target in (("forward", forward, None), ("forward and backward", both, 50)):
        timings = interleaved({name: partial(function, name) for name in ways}, options.repeats)
        for name in ("selected", "multiplied"):
            masks, ours = timings[name], timings["boxes"]
            note = f"{seconds(masks, 'cpu'):.2f} s / {seconds(ours, 'cpu'):.3f} s; wall time {ratio(masks, ours):.0f}"
            row_title = f"{title}: processor time, masks ({name}) / boxes"
            rows.append(Row(row_title, ratio(masks, ours, "cpu"), target, at_least=True, note=note))
    rows.append(Row("largest difference of the results", difference, 1e-4))
    title = f"{options.patches} patches of {size}^3, {len(pairs)} pairs, channels {channels}, {options.threads} threads"
    report(title, rows, machine(), options)


if __name__ == "__main__":
    main()
