"""Crops of two volumes that show the same part of the body: the sampler of Alice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from nnssl_stc3d.views.correspondence import cell_centers, match_cells, match_points_by_body
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
from nnssl_stc3d.views.spec import ViewSpecs

# Candidates that are matched in one go: one more costs next to nothing beside reading the maps.
_CANDIDATES_AT_ONCE = 8


@dataclass
class CropPairSampler(ViewSampler):
    """Four views of a pair of volumes: the online views of query and key, then their target views.

    A point of the query's body is matched with one of the key's, by features where both volumes have some, otherwise
    by its place in the box around the body. The online views are crops around the two points, of the same size in mm
    and shifted alike to lie inside; a volume that is smaller than a view shrinks both. The target views are the same
    crops under controlled transformations.

    Attributes:
        view_shape: ``(Z, Y, X)`` of every view.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        mask_grid: blocks of the mask along each axis.
        mask_ratio: share of the blocks that is masked.
        mask_columns: mask whole columns along the first axis.
        transforms: of the target views.
        max_cycle: cells that the match of a match may lie away from its start.
        min_score: smallest cosine of a match.
        search: a match lies within this share of the box around the body from the same place in it; None looks
            everywhere.
        attempts: points that are tried before the place in the body decides.
        n_plain: 2 leaves the online views without intensity augmentation.
    """

    view_shape: tuple[int, int, int]
    spacing: Sequence[float]
    in_plane: bool
    mask_grid: tuple[int, int, int]
    mask_ratio: float = 0.75
    mask_columns: bool = False
    transforms: TransformRanges = field(default_factory=TransformRanges)
    max_cycle: float = 2.0
    min_score: float = 0.7
    search: float | None = 0.1
    attempts: int = 32
    n_sources: int = 2
    n_views: int = 4
    guided: bool = True
    wants_features: bool = True
    n_plain: int = 0

    def sample(
        self, shapes: Sequence[Sequence[int]], rng: np.random.Generator, guides: Sequence[Guide] = ()
    ) -> Sampled:
        """See :meth:`ViewSampler.sample`.

        ``targets``: ``matched`` bool, features and not the place in the body decided.
        """
        for shape in shapes:
            check_volume(shape, self.view_shape)
        guides = guides or [Guide.everywhere(shape) for shape in shapes]
        points, matched = self._correspond(guides[0], guides[1], rng)
        view = np.asarray(self.view_shape, dtype=float)
        extent = fit_extent(view, np.min(shapes, axis=0).astype(float))
        centers = _inside(points, extent, np.asarray(shapes, dtype=float))
        matrix = np.diag(extent / view)
        targets = [
            controlled_view(
                center, matrix, self.transforms, shape, self.view_shape, self.spacing, self.in_plane, rng
            )
            for center, shape in zip(centers, shapes)
        ]  # fmt: skip
        sampled = to_sampled(
            [*centers, *(center for center, _ in targets)],
            [matrix, matrix, *(moved for _, moved in targets)],
            (0, 1, 0, 1),
            shapes,
            self.view_shape,
        )
        return sampled._replace(targets={"matched": torch.tensor(matched)})

    def targets(self, specs: ViewSpecs, rng: np.random.Generator) -> dict[str, Tensor]:
        """Masks of the online views, ``masked`` ``(B, 2, *mask_grid)`` bool; as many blocks in each."""
        drawn = [
            draw_mask(self.mask_grid, self.mask_ratio, self.mask_columns, rng) for _ in range(2 * len(specs.source))
        ]
        return {"masked": torch.from_numpy(np.stack(drawn)).unflatten(0, (-1, 2))}

    def _correspond(
        self, query: Guide, key: Guide, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:  # fmt: skip
        """Corresponding points ``(2, 3)`` in voxels of query and key, and whether features decided."""
        body = np.argwhere(query.body if query.body.any() else np.ones_like(query.body))
        if query.features is not None and key.features is not None:
            for start in range(0, self.attempts, _CANDIDATES_AT_ONCE):
                cells = body[rng.integers(len(body), size=min(_CANDIDATES_AT_ONCE, self.attempts - start))]
                matches, accepted = match_cells(query, key, cells, self.max_cycle, self.min_score, self.search)
                if accepted.any():
                    first = int(accepted.argmax())
                    within = rng.uniform(-0.5, 0.5, size=3) * np.asarray(query.cell)
                    start_point, match = cell_centers(query, cells[first]), cell_centers(key, matches[first])
                    return np.stack((start_point + within, match + within)), True
        cell = body[rng.integers(len(body))]
        point = cell_centers(query, cell) + rng.uniform(-0.5, 0.5, size=3) * np.asarray(query.cell)
        return np.stack((point, match_points_by_body(query, key, point))), False


def draw_mask(grid: Sequence[int], ratio: float, columns: bool, rng: np.random.Generator) -> np.ndarray:
    """Choose the blocks to mask, at least one and never all.

    Args:
        grid: blocks along each axis.
        ratio: share of the blocks, or of the columns.
        columns: mask columns along the first axis (Alice as released) instead of single blocks.
        rng: source of randomness.

    Returns:
        ``grid`` bool, True where masked.
    """
    drawn = (1, *grid[1:]) if columns else tuple(grid)
    count = prod(drawn)
    masked = np.zeros(count, dtype=bool)
    masked[rng.permutation(count)[: min(count - 1, max(1, round(ratio * count)))]] = True
    return np.broadcast_to(masked.reshape(drawn), grid).copy()


def _inside(points: np.ndarray, extent: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Centres of crops around corresponding points that lie inside their volumes, moved alike as far as possible.

    Args:
        points: ``(2, 3)`` voxels.
        extent: ``(3,)`` of both crops, voxels; at most that of the volumes.
        shapes: ``(2, 3)`` of the volumes.

    Returns:
        ``(2, 3)`` voxels.
    """
    lower, upper = extent / 2 - 0.5, shapes - 0.5 - extent / 2
    query = np.clip(points[0], lower, upper[0])
    key = np.clip(points[1] + query - points[0], lower, upper[1])
    # What kept the key's crop inside moves the query's too, where there is room.
    return np.stack((np.clip(points[0] + key - points[1], lower, upper[0]), key))
