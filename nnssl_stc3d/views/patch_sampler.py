"""Patches around an anchor, most of which overlap: the sampler of PiMPiC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from nnssl_stc3d.views.geometry import intersection_boxes, overlap_fraction, relative_maps
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

# Along one axis at least there is room to move a patch by half of its extent.
_SMALLEST_ROOM = 1.5


@dataclass
class PatchSampler(ViewSampler):
    """Patches whose starts lie around that of an anchor, which itself lies anywhere in the volume.

    Patches have the extent of a view and start at whole voxels, so that they show the volume's own voxels. In a volume
    that is too small for two different patches they get smaller and are shown magnified.

    Attributes:
        view_shape: ``(Z, Y, X)`` of every view.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        patches: patches of a volume, at least 2.
        reach: largest distance of a patch's start from the anchor's along each axis, fraction of the patch.
        transforms: controlled transformations of the patches.
    """

    view_shape: tuple[int, int, int]
    spacing: Sequence[float]
    in_plane: bool
    patches: int = 8
    reach: float = 0.8
    transforms: TransformRanges = field(default_factory=TransformRanges.none)

    def __post_init__(self) -> None:
        if self.patches < 2:
            raise ValueError(f"overlaps need at least 2 patches of a volume, got patches={self.patches}")
        if not 0 <= self.reach:
            raise ValueError(f"reach must not be negative, got {self.reach}")
        self.n_views = self.patches

    @property
    def parallel(self) -> bool:
        """Whether all patches have parallel axes, so that intersections are boxes."""
        return self.transforms.rotation == 0

    def sample(
        self, shapes: Sequence[Sequence[int]], rng: np.random.Generator, guides: Sequence[Guide] = ()
    ) -> Sampled:
        """See :meth:`ViewSampler.sample`."""
        del guides
        (shape,) = shapes
        check_volume(shape, self.view_shape)
        view, volume = np.asarray(self.view_shape, dtype=float), np.asarray(shape, dtype=float)
        shrink = min(1.0, float((volume / view).max()) / _SMALLEST_ROOM)
        extent = fit_extent(view * shrink, volume)
        whole = extent == view
        room = volume - extent
        reach = np.where(whole, np.floor(self.reach * extent), self.reach * extent)
        anchor = _uniform(np.zeros(3), room, whole, rng)
        low, high = np.maximum(0, anchor - reach), np.minimum(room, anchor + reach)
        centers, matrices = [], []
        for _ in range(self.patches):
            center, matrix = _uniform(low, high, whole, rng) - 0.5 + extent / 2, np.diag(extent / view)
            if self.transforms != TransformRanges.none():
                center, matrix = controlled_view(
                    center, matrix, self.transforms, shape, self.view_shape, self.spacing, self.in_plane, rng
                )
            centers.append(center)
            matrices.append(matrix)
        return to_sampled(centers, matrices, [0] * self.patches, shapes, self.view_shape)

    def targets(self, specs: ViewSpecs, rng: np.random.Generator) -> dict[str, Tensor]:
        """Overlaps of the patches and where they lie in each other.

        Returns:
            ``overlap`` ``(B, P, P)``: intersection over the larger of the two, symmetric also where patches differ in
            size. Then, for patches with parallel axes, ``boxes`` ``(B, P, P, 2, 3)``: start and stop of the second
            patch in voxels of the first, from its lower face; otherwise ``frame_matrix`` ``(B, P, P, 3, 3)`` and
            ``frame_shift`` ``(B, P, P, 3)`` of :func:`relative_maps`.
        """
        del rng
        share = overlap_fraction(specs, specs, self.view_shape)
        result = {"overlap": share.minimum(share.transpose(1, 2))}
        if self.parallel:
            return result | {"boxes": intersection_boxes(specs, specs, self.view_shape).float()}
        matrix, shift = relative_maps(specs, specs)
        return result | {"frame_matrix": matrix.float(), "frame_shift": shift.float()}


def _uniform(low: np.ndarray, high: np.ndarray, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a position between two others; along axes that are ``whole``, a whole voxel, both ends included."""
    drawn = rng.uniform(0, 1, size=3)
    return np.where(whole, np.floor(low + drawn * (high - low + 1)), low + drawn * (high - low))
