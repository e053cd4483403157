"""Pairs of overlapping views and the body voxels that both see: the sampler of vox2vec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nnssl_stc3d.views.geometry import bounding_half_extent
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.region_sampler import fit_extent
from nnssl_stc3d.views.samplers import (
    Sampled,
    TransformRanges,
    ViewSampler,
    check_volume,
    controlled_view,
    to_sampled,
)
from nnssl_stc3d.views.spec import ViewSpecs, source_to_view, view_center

# Voxels of the overlap's bounding box that are tried for each point wanted; rotated views miss some of them.
_CANDIDATES_PER_POINT = 16


@dataclass
class PointPairSampler(ViewSampler):
    """Views ``2 k`` and ``2 k + 1`` are a pair (vox2vec 3.1): two boxes that hold the same random voxel of the body.

    Without transformations boxes lie on whole voxels, so that nothing is interpolated; with them each view is a
    transformed box, and points are matched by the specifications. A volume that is smaller than a view is shown
    magnified: boxes shrink into it.

    Attributes:
        view_shape: ``(Z, Y, X)`` of every view.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        pairs: of views from each volume.
        points: voxels of the body that both views of a pair see, at most; drawn without replacement.
        transforms: of both views.
        guided: whether points lie in the body; otherwise anywhere.
    """

    view_shape: tuple[int, int, int]
    spacing: Sequence[float]
    in_plane: bool
    pairs: int = 1
    points: int = 1000
    transforms: TransformRanges = field(default_factory=TransformRanges.none)
    guided: bool = True

    def __post_init__(self) -> None:
        self.n_views = 2 * self.pairs

    def sample(
        self, shapes: Sequence[Sequence[int]], rng: np.random.Generator, guides: Sequence[Guide] = ()
    ) -> Sampled:
        """See :meth:`ViewSampler.sample`.

        The targets are ``points`` ``(pairs, 2, P, 3)``, view voxels in both views of each pair, and ``points_inside``
        ``(pairs, P)``: the first of the ``P`` points exist.
        """
        (shape,) = shapes
        check_volume(shape, self.view_shape)
        guide = guides[0] if guides else Guide.everywhere(shape)
        centers: list[np.ndarray] = []
        matrices: list[np.ndarray] = []
        points = np.zeros((self.pairs, 2, self.points, 3), dtype=np.float32)
        inside = np.zeros((self.pairs, self.points), dtype=bool)
        for pair in range(self.pairs):
            anchor = body_voxel(guide, shape, rng)
            both = [self._view(anchor, shape, rng) for _ in range(2)]
            centers += [center for center, _ in both]
            matrices += [matrix for _, matrix in both]
            found = self._shared(both, shape, guide, rng)
            points[pair, :, : found.shape[1]] = found
            inside[pair, : found.shape[1]] = True
        sampled = to_sampled(centers, matrices, [0] * self.n_views, shapes, self.view_shape)
        targets = {"points": torch.from_numpy(points), "points_inside": torch.from_numpy(inside)}
        return sampled._replace(targets=targets)

    def _view(
        self, anchor: np.ndarray, shape: Sequence[int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Centre ``(3,)`` and matrix ``(3, 3)`` of a view of a box that holds a voxel."""
        view, volume = np.asarray(self.view_shape, dtype=float), np.asarray(shape, dtype=float)
        extent = fit_extent(view, volume)
        start = np.array([_box_start(int(a), n, e, rng) for a, n, e in zip(anchor, shape, extent)])
        return controlled_view(
            start + (extent - 1) / 2, np.diag(extent / view), self.transforms, shape, self.view_shape, self.spacing,
            self.in_plane, rng,
        )  # fmt: skip

    def _shared(
        self,
        both: Sequence[tuple[np.ndarray, np.ndarray]],
        shape: Sequence[int],
        guide: Guide,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Voxels of the body that two views see, in the voxels of both, ``(2, at most points, 3)``."""
        center = torch.from_numpy(np.stack([c for c, _ in both]))
        matrix = torch.from_numpy(np.stack([m for _, m in both]))
        half = bounding_half_extent(matrix, self.view_shape)
        lower = np.maximum(0, np.ceil((center - half).amax(0).numpy())).astype(int)
        upper = np.minimum(np.asarray(shape) - 1, np.floor((center + half).amin(0).numpy())).astype(int)
        if (upper < lower).any():
            return np.zeros((2, 0, 3))
        allowed = guide.voxels(lower, upper + 1)
        candidates = np.flatnonzero(allowed)
        chosen = rng.choice(candidates, min(len(candidates), self.points * _CANDIDATES_PER_POINT), replace=False)
        voxels = torch.from_numpy(np.stack(np.unravel_index(chosen, allowed.shape), axis=-1) + lower).double()
        specs = ViewSpecs(torch.zeros(1, 2, dtype=torch.long), center[None], matrix[None])
        seen = source_to_view(specs, voxels.expand(1, 2, -1, 3), self.view_shape)[0]
        limit = view_center(self.view_shape, seen) * 2
        # A box may end between two voxel centres.
        kept = ((seen >= -0.5) & (seen <= limit + 0.5)).all(-1).all(0)
        return seen[:, kept][:, : self.points].numpy()


def body_voxel(guide: Guide, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A random voxel of the body, ``(3,)`` int; anywhere in the volume if there is no body."""
    cells = np.flatnonzero(guide.body)
    if not len(cells):
        return rng.integers(0, shape)
    cell = np.array(np.unravel_index(rng.choice(cells), guide.body.shape))
    # The voxels whose centres lie in the cell: one at least, since cells are no smaller than voxels.
    low = np.ceil(cell * np.asarray(guide.cell) - 0.5).astype(int)
    high = np.ceil((cell + 1) * np.asarray(guide.cell) - 0.5).astype(int)
    limit = np.asarray(shape) - 1
    return np.minimum(rng.integers(low, np.maximum(high, low + 1)), limit)


def _box_start(voxel: int, length: int, extent: float, rng: np.random.Generator) -> float:
    """Where a box along one axis may start so that it holds a voxel and stays inside the volume; uniform.

    Args:
        voxel: index that has to be in the box.
        length: voxels of the volume.
        extent: voxels of the box, at most ``length``.
        rng: source of randomness.

    Returns:
        Index of the box's first voxel; not a whole number where the extent is none.
    """
    if extent == int(extent):
        return float(rng.integers(max(0, voxel - int(extent) + 1), min(voxel, length - int(extent)) + 1))
    low, high = max(0.0, voxel + 1 - extent), min(float(voxel), length - extent)
    return float(rng.uniform(low, max(low, high)))
