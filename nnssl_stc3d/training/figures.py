"""``views.png``: what the transformations do to the user's data."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.spatial import ConvexHull
from torch import Tensor

from nnssl_stc3d.data.loader import Sample
from nnssl_stc3d.views.spec import ViewSpecs

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

_PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))
_MAX_VIEWS = 24


def view_corners(specs: ViewSpecs, view_shape: tuple[int, int, int]) -> Tensor:
    """Corners of the views' boxes, ``(V, 8, 3)`` in source voxels; ``specs`` without a batch axis."""
    signs = torch.tensor(list(product((-0.5, 0.5), repeat=3)), dtype=specs.center.dtype)
    offsets = signs * torch.tensor(view_shape, dtype=specs.center.dtype)
    return specs.center[:, None] + offsets @ specs.matrix.transpose(-1, -2)


def plot_views(sample: Sample, names: list[str], n_bases: int, spacing: tuple[float, ...], path: str | Path) -> None:
    """Draw one sample: its first source in three planes with the views' outlines, and the rendered views.

    Args:
        sample: from :meth:`nnssl_stc3d.data.loader.ViewDataset.preview`.
        names: its cases.
        n_bases: leading views that are bases; drawn in grey.
        spacing: mm per voxel, (z, y, x).
        path: PNG file to write.
    """
    view_shape = tuple(sample.views.shape[-3:])
    volume = sample.sources[0][0].numpy()
    mine = (sample.specs.source == 0).nonzero()[:, 0].tolist()
    corners = view_corners(sample.specs, (view_shape[0], view_shape[1], view_shape[2])).numpy()
    colours = plt.get_cmap("tab10")
    low, high = np.percentile(volume, (1, 99))
    shown = min(_MAX_VIEWS, len(sample.views))
    columns = 8
    rows = -(-shown // columns)
    figure = plt.figure(figsize=(16, 5 + 2.1 * rows), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[5, 2.1 * rows])).flat
    for axis, (title, normal) in zip(top.subplots(1, 3), _PLANES):
        rest = [a for a in range(3) if a != normal]
        axis.imshow(
            volume.take(volume.shape[normal] // 2, axis=normal),
            cmap="gray", vmin=low, vmax=high, aspect=spacing[rest[0]] / spacing[rest[1]],
        )  # fmt: skip
        for view in mine:
            outline = corners[view][:, rest]
            outline = outline[ConvexHull(outline).vertices]
            base = view < n_bases
            axis.fill(
                outline[:, 1], outline[:, 0], fill=False, linewidth=0.8 if base else 1.6,
                edgecolor="0.7" if base else colours((view - n_bases) % 10),
            )  # fmt: skip
        axis.set_title(f"{names[0]}, {title}: outlines of the views", fontsize=10)
        axis.axis("off")
    for index, axis in enumerate(bottom.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if index < shown:
            base = index < n_bases
            axis.imshow(
                sample.views[index, 0, view_shape[0] // 2].numpy(), cmap="gray", vmin=low, vmax=high,
                aspect=spacing[1] / spacing[2],
            )  # fmt: skip
            axis.set_title(
                f"base {index}" if base else f"view {index - n_bases}", fontsize=9,
                color="0.4" if base else colours((index - n_bases) % 10),
            )  # fmt: skip
    figure.savefig(path, dpi=80)
    plt.close(figure)
