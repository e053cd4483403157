"""Bases that tile a window, and transformed views of regions inside it: the sampler of STC3D and VoCo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nnssl_stc3d.views.geometry import matching_points, overlap_fraction
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.samplers import (
    Sampled,
    TransformRanges,
    ViewSampler,
    check_volume,
    controlled_view,
    grid_cells,
    orientation,
    place_window,
    to_sampled,
)
from nnssl_stc3d.views.spec import ViewSpecs, view_center, view_to_source

_CANDIDATES_PER_POINT = 4
_SMALLEST_UNIFORM_SHRINK = 0.5


def fit_extent(extent: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Shrink a box into a volume: alike along all axes to keep the anatomy's shape, down to half; then as needed."""
    shrink = max(_SMALLEST_UNIFORM_SHRINK, min(1.0, float((volume / extent).min())))
    return np.minimum(volume, extent * shrink)


@dataclass
class RegionSampler(ViewSampler):
    """Views in the order: bases (C order of the grid), then the views of region 0, of region 1, ...

    A window of ``grid * view_shape * base_scale`` voxels, or the whole volume along axes that are shorter, is tiled by
    the grid; a base looks at one cell, however small that is. Regions lie anywhere inside the window. Without a
    ``base_scale`` the window is the whole volume, whatever its size.

    Attributes:
        view_shape: ``(Z, Y, X)`` of every view.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        grid: bases along each axis; None draws no bases and takes a window of one view, for a single region: several
            would all lie at its place.
        base_scale: source voxels per view voxel of a base in a volume that is large enough; None lets the bases tile
            the whole volume.
        region_scale: the same for regions, shrunk to fit; None gives regions the size of a cell.
        placement: of the window, "random", "center" or "edge".
        regions: regions per volume.
        views_per_region: transformed views of each region.
        transforms: controlled transformations.
        points: corresponding points drawn for each pair of consecutive views of a region.
        bins: grid of bins whose centres are matched between the same pairs, or None.
        turn_bases: show each base under quarter turns and flips of its own, drawn from ``transforms``. They change how
            a cell is shown, not what is shown: where a cell is no cube, a turned base is stretched to the view.
        show_bases: draw the bases as views. Without them the grid still says in which window the regions lie.
    """

    view_shape: tuple[int, int, int]
    spacing: Sequence[float]
    in_plane: bool
    grid: tuple[int, int, int] | None
    base_scale: float | None = 1.0
    region_scale: float | None = None
    placement: str = "random"
    regions: int = 2
    views_per_region: int = 2
    transforms: TransformRanges = field(default_factory=TransformRanges)
    points: int = 0
    bins: tuple[int, int, int] | None = None
    turn_bases: bool = False
    show_bases: bool = True

    def __post_init__(self) -> None:
        self.n_bases = 0 if self.grid is None or not self.show_bases else int(np.prod(self.grid))
        self.n_views = self.n_bases + self.regions * self.views_per_region

    def sample(
        self, shapes: Sequence[Sequence[int]], rng: np.random.Generator, guides: Sequence[Guide] = ()
    ) -> Sampled:
        """See :meth:`ViewSampler.sample`."""
        del guides
        (shape,) = shapes
        check_volume(shape, self.view_shape)
        view, volume = np.asarray(self.view_shape, dtype=float), np.asarray(shape, dtype=float)
        grid = self.grid or (1, 1, 1)
        size = volume
        if self.base_scale is not None:
            size = np.minimum(volume, view * self.base_scale * np.asarray(grid))
        start = place_window(shape, size, self.placement, rng)
        cells, cell = grid_cells(start, size, grid)
        centers = list(cells[: self.n_bases])
        matrices = [np.diag(cell / view)] * self.n_bases
        if self.turn_bases:
            matrices = [
                np.diag(cell) @ orientation(self.transforms, self.in_plane, rng) / view for _ in range(self.n_bases)
            ]

        extent = cell if self.region_scale is None else fit_extent(view * self.region_scale, volume)
        # Regions lie inside the window where they fit, otherwise around it inside the volume.
        room = np.maximum(size, extent)
        lower = np.clip(start, 0, volume - room)
        for _ in range(self.regions):
            center = lower - 0.5 + extent / 2 + rng.uniform(0, 1, size=3) * (room - extent)
            for _ in range(self.views_per_region):
                moved, matrix = controlled_view(
                    center, np.diag(extent / view), self.transforms, shape, self.view_shape, self.spacing,
                    self.in_plane, rng,
                )  # fmt: skip
                centers.append(moved)
                matrices.append(matrix)
        return to_sampled(centers, matrices, [0] * self.n_views, shapes, self.view_shape)

    def targets(self, specs: ViewSpecs, rng: np.random.Generator) -> dict[str, Tensor]:
        """Position labels, overlaps of the views and corresponding points.

        Returns:
            ``position`` ``(B, M, n)`` overlap of each of the ``M`` transformed views with each base;
            ``overlap`` ``(B, M, M)`` overlap of the transformed views;
            ``points`` ``(B, pairs, 2, P, 3)`` view voxels in both views of each pair of :meth:`pairs` and
            ``points_inside`` ``(B, pairs, P)``; ``bins`` and ``bins_inside`` likewise for the bins of the first view;
            ``bins_overlap`` ``(B, pairs * P, pairs * P)`` overlap of these bins, where the second of two is taken for a
            box of the size and orientation of the first.
        """
        views = specs.select(slice(self.n_bases, None))
        result = {"overlap": overlap_fraction(views, views, self.view_shape)}
        if self.n_bases:
            result["position"] = overlap_fraction(views, specs.select(slice(0, self.n_bases)), self.view_shape)
        first, second = (views.select(index) for index in self.pairs())
        batch, pairs = first.source.shape
        if self.points and pairs:
            limit = view_center(self.view_shape, first.center) * 2
            drawn = rng.uniform(size=(batch, pairs, self.points * _CANDIDATES_PER_POINT, 3))
            result.update(self._match("points", first, second, torch.from_numpy(drawn) * limit, self.points))
        if self.bins is not None and pairs:
            shape = torch.tensor(self.view_shape, dtype=torch.float64)
            axes = [(torch.arange(b, dtype=torch.float64) + 0.5) / b for b in self.bins]
            centers = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3) * shape - 0.5
            result.update(self._match("bins", first, second, centers.expand(batch, pairs, -1, 3), len(centers)))
            bins = view_to_source(first, result["bins"][:, :, 0].double(), self.view_shape).flatten(1, 2)
            to_bins = torch.linalg.inv(first.matrix) / (shape / torch.tensor(self.bins))[:, None]
            to_bins = to_bins.repeat_interleave(len(centers), dim=1)[:, :, None]
            apart = (to_bins @ (bins[:, None] - bins[:, :, None])[..., None])[..., 0]
            result["bins_overlap"] = (1 - apart.abs()).clamp(min=0).prod(-1).float()
        return result

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Indices among the transformed views of the first and the second view of each pair of one region."""
        index = torch.arange(self.regions * self.views_per_region).reshape(self.regions, self.views_per_region)
        return index[:, :-1].flatten(), index[:, 1:].flatten()

    def _match(
        self, name: str, first: ViewSpecs, second: ViewSpecs, candidates: Tensor, count: int
    ) -> dict[str, Tensor]:
        """Keep the first ``count`` candidates, those that both views see before those that one misses."""
        matched, inside = matching_points(first, second, candidates, self.view_shape)
        order = torch.argsort(~inside, dim=-1, stable=True)[..., :count]
        both = torch.stack((candidates, matched), dim=2)
        index = order[:, :, None, :, None].expand(-1, -1, 2, -1, 3)
        return {name: both.gather(3, index).float(), f"{name}_inside": inside.gather(-1, order)}
