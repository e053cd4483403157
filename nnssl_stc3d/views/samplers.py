"""Samplers decide where to look. They see shapes, spacings and coarse guides, never voxels; seeded and picklable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, radians
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from nnssl_stc3d.views.geometry import bounding_half_extent, overlap_fraction
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.spec import ViewSpecs

# A volume of half a view's length is shown magnified by 2, which samplers can still do alike along all axes. For large
# views less than half is enough, and for the smallest ones a volume is asked for all the same.
_ENOUGH, _LEAST = 16, 4

_MAX_DRAWS = 8
# nnU-Net augments in-plane only ("dummy 2D") when the patch is longer than 3 times its first axis.
_ANISOTROPY_THRESHOLD = 3

Box = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class TransformRanges:
    """Ranges of the controlled transformations (STC3D Eqs. 1 to 7). Zero width switches a transformation off.

    Attributes:
        rotation: largest angle about each axis, degrees.
        quarter_turns: probability that a view is also turned by random multiples of 90 degrees (STC3D Fig. 1b).
        translation: largest shift along each axis, fraction of the view's extent.
        scaling: smallest and largest size of the view relative to its region; above 1 the view sees more.
        scaling_per_axis: draw one factor for each axis (Eq. 4) instead of one for all.
        min_overlap: share of the view that must lie inside its region, in [0, 1).
        flips: probability for each axis that the view is mirrored along it.
    """

    rotation: float = 30.0
    quarter_turns: float = 0.0
    translation: float = 0.15
    scaling: tuple[float, float] = (0.8, 1.25)
    scaling_per_axis: bool = False
    min_overlap: float = 0.4
    flips: float = 0.0

    @classmethod
    def none(cls) -> TransformRanges:
        """No transformation at all: a view is its region."""
        return cls(rotation=0.0, translation=0.0, scaling=(1.0, 1.0))

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must lie in 0..180 degrees, got {self.rotation}")
        if not 0 <= self.quarter_turns <= 1:
            raise ValueError(f"quarter_turns is a probability in [0, 1], got {self.quarter_turns}")
        if not 0 <= self.translation <= 1:
            raise ValueError(f"translation must lie in [0, 1] (fraction of the view), got {self.translation}")
        if len(self.scaling) != 2 or not 0 < self.scaling[0] <= self.scaling[1]:
            raise ValueError(f"scaling must be (low, high) with 0 < low <= high, got {self.scaling}")
        if not 0 <= self.min_overlap < 1:
            raise ValueError(f"min_overlap must lie in [0, 1), got {self.min_overlap}")
        if not 0 <= self.flips <= 1:
            raise ValueError(f"flips is a probability in [0, 1], got {self.flips}")


class Sampled(NamedTuple):
    """Where to look in one sample.

    Attributes:
        boxes: for each source volume the box (start, stop) in voxels that has to be read.
        specs: ``source (V,)``, ``center (V, 3)``, ``matrix (V, 3, 3)``, in voxels of the boxes.
        targets: what only the sampling knows, such as points inside the body, without a batch axis: the loader stacks
            the samples' and adds what :meth:`ViewSampler.targets` computes.
    """

    boxes: list[Box]
    specs: ViewSpecs
    targets: dict[str, Tensor] = {}


class ViewSampler(ABC):
    """Draws the views of one sample and whatever follows from their geometry alone.

    Attributes:
        view_shape: ``(Z, Y, X)`` of every view, voxels.
        n_views: views in a sample.
        n_sources: source volumes in a sample.
        guided: whether :meth:`sample` wants to know more of the volumes than their shapes.
        wants_features: whether guides shall have features, where there are some.
        n_plain: the first so many views are shown without intensity augmentation.
    """

    view_shape: tuple[int, int, int]
    n_views: int
    n_sources: int = 1
    guided: bool = False
    wants_features: bool = False
    n_plain: int = 0

    @abstractmethod
    def sample(
        self, shapes: Sequence[Sequence[int]], rng: np.random.Generator, guides: Sequence[Guide] = ()
    ) -> Sampled:
        """Draw the views of one sample.

        Args:
            shapes: ``(Z, Y, X)`` of each of ``n_sources`` volumes.
            rng: the only source of randomness.
            guides: of the same volumes, if ``guided``.

        Raises:
            ValueError: if a volume is smaller than :func:`least_volume` along an axis.
        """

    def targets(self, specs: ViewSpecs, rng: np.random.Generator) -> dict[str, Tensor]:
        """Labels and corresponding points that follow from the specifications of a whole batch."""
        del specs, rng
        return {}


def is_anisotropic(patch_size: Sequence[int]) -> bool:
    """nnU-Net's dummy-2D rule: whether its augmentation, and ours, rotates in-plane only."""
    return max(patch_size) / patch_size[0] > _ANISOTROPY_THRESHOLD


def least_volume(view_shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxels ``(Z, Y, X)`` that a volume needs: half of the view along each axis, but at least 4 and no more than 16.

    Anything smaller would be mostly interpolation in its views.
    """
    z, y, x = (min(_ENOUGH, max(_LEAST, ceil(n / 2))) for n in view_shape)
    return z, y, x


def check_volume(shape: Sequence[int], view_shape: Sequence[int]) -> None:
    """Refuse volumes that are too small to look into.

    Args:
        shape: ``(Z, Y, X)`` of the volume.
        view_shape: ``(Z, Y, X)`` of the views.

    Raises:
        ValueError: if the volume is smaller than :func:`least_volume` along an axis.
    """
    least = least_volume(view_shape)
    if len(shape) != 3 or any(n < m for n, m in zip(shape, least)):
        raise ValueError(
            f"volumes need at least {least} voxels (z, y, x) to be shown in views of {tuple(view_shape)}, got shape "
            f"{tuple(shape)}. Leave it out, use smaller views (view_share), or plans with a finer spacing or a smaller "
            "patch along the short axis."
        )


def place_window(shape: Sequence[int], size: np.ndarray, placement: str, rng: np.random.Generator) -> np.ndarray:
    """Lower corner ``(3,)`` of a window of ``size`` inside a volume, in voxels from the volume's lower face.

    Args:
        shape: ``(Z, Y, X)`` of the volume.
        size: ``(3,)`` of the window, at most ``shape``.
        placement: "random", "center" or "edge" (STC3D Table 7).
        rng: source of randomness.
    """
    free = np.asarray(shape, dtype=float) - size
    if placement == "center":
        return free / 2
    if placement == "edge":
        return free * rng.integers(0, 2, size=3)
    return rng.uniform(0, 1, size=3) * free


def grid_cells(start: np.ndarray, size: np.ndarray, grid: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tile a window with a grid of cells.

    Args:
        start: ``(3,)`` lower corner of the window, from the volume's lower face.
        size: ``(3,)`` of the window, voxels.
        grid: number of cells along each axis.

    Returns:
        Centres ``(n, 3)`` in voxel coordinates (C order over the grid) and the size of a cell ``(3,)``.
    """
    cell = size / np.asarray(grid)
    index = np.stack(np.meshgrid(*[np.arange(g) for g in grid], indexing="ij"), axis=-1).reshape(-1, 3)
    return start - 0.5 + (index + 0.5) * cell, cell


def orientation(ranges: TransformRanges, in_plane: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw quarter turns and flips: a permutation of the axes with signs, ``(3, 3)``.

    Args:
        ranges: what may be drawn.
        in_plane: turn about the first axis only; flips are along all axes, as nnU-Net mirrors.
        rng: source of randomness.
    """
    result = np.eye(3)
    if rng.uniform() < ranges.quarter_turns:
        n_axes, turns = 1 if in_plane else 3, np.zeros(3)
        turns[:n_axes] = rng.integers(0, 4, size=n_axes) * np.pi / 2
        result = Rotation.from_euler("xyz", turns).as_matrix().round()
    if ranges.flips > 0:
        result = result * np.where(rng.uniform(size=3) < ranges.flips, -1, 1)
    return result


def transformation(
    ranges: TransformRanges, spacing: Sequence[float], in_plane: bool, rng: np.random.Generator
) -> np.ndarray:
    """Draw a rotation and scaling in millimetres as a map of voxel offsets: ``P^-1 R S P`` with ``P = diag(spacing)``.

    Quarter turns and flips are part of ``R``.

    Args:
        ranges: what may be drawn.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        rng: source of randomness.

    Returns:
        ``(3, 3)``
    """
    n_axes = 1 if in_plane else 3
    angles = np.zeros(3)
    angles[:n_axes] = rng.uniform(-1, 1, size=n_axes) * radians(ranges.rotation)
    # Euler angles about the array's axes 0, 1, 2; a quarter turn is drawn for each axis.
    rotation = Rotation.from_euler("xyz", angles).as_matrix() @ orientation(ranges, in_plane, rng)
    low, high = np.log(ranges.scaling)
    scale = np.exp(rng.uniform(low, high, size=3))
    if not ranges.scaling_per_axis:
        scale[:] = scale[0]
    spacing_array = np.asarray(spacing, dtype=float)
    return (rotation * scale) * (spacing_array / spacing_array[:, None])


def controlled_view(
    center: np.ndarray,
    matrix: np.ndarray,
    ranges: TransformRanges,
    shape: Sequence[int],
    view_shape: Sequence[int],
    spacing: Sequence[float],
    in_plane: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Transform a region into a view that stays inside the volume and keeps ``min_overlap`` with the region.

    A transformation that does not fit is shrunk, then moved inside; one that loses too much of its region is drawn
    again, closer to the identity each time, and after 8 draws the region itself is the view.

    Args:
        center: ``(3,)`` of the region, voxels.
        matrix: ``(3, 3)`` of the region.
        ranges: controlled transformations.
        shape: ``(Z, Y, X)`` of the volume.
        view_shape: ``(Z, Y, X)`` of the view.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        rng: source of randomness.

    Returns:
        Centre ``(3,)`` and matrix ``(3, 3)`` of the view.
    """
    limit = np.asarray(shape) / 2
    region = _specs(center[None], matrix[None])
    for draw in range(_MAX_DRAWS):
        strength = 1 - draw / _MAX_DRAWS
        drawn = transformation(_scaled(ranges, strength), spacing, in_plane, rng) @ matrix
        shift = rng.uniform(-1, 1, size=3) * ranges.translation * strength
        half = np.abs(drawn) @ (np.asarray(view_shape) / 2)
        fit = min(1.0, float((limit / half).min()))
        drawn, half = drawn * fit, half * fit
        moved = np.clip(center + drawn @ (shift * np.asarray(view_shape)), half - 0.5, 2 * limit - 0.5 - half)
        if float(overlap_fraction(_specs(moved[None], drawn[None]), region, view_shape)) >= ranges.min_overlap:
            return moved, drawn
    return center, matrix


def to_sampled(
    centers: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    sources: Sequence[int],
    shapes: Sequence[Sequence[int]],
    view_shape: Sequence[int],
) -> Sampled:
    """Find the boxes that have to be read and express the views in their voxels.

    Args:
        centers: ``V`` times ``(3,)``, voxels of the view's volume.
        matrices: ``V`` times ``(3, 3)``.
        sources: ``V`` indices of volumes.
        shapes: ``(Z, Y, X)`` of each volume.
        view_shape: ``(Z, Y, X)`` of the views.
    """
    center, matrix = torch.from_numpy(np.stack(centers)), torch.from_numpy(np.stack(matrices))
    source = torch.as_tensor(list(sources), dtype=torch.long)
    half = bounding_half_extent(matrix, view_shape)
    boxes: list[Box] = []
    for index, shape in enumerate(shapes):
        mine = source == index
        if not mine.any():
            raise ValueError(f"no view looks into source volume {index}")
        lower, upper = (center - half)[mine].amin(0), (center + half)[mine].amax(0)
        start = tuple(max(0, min(floor(v), n - 1)) for v, n in zip(lower.tolist(), shape))
        stop = tuple(min(n, max(ceil(v) + 1, s + 1)) for v, n, s in zip(upper.tolist(), shape, start))
        boxes.append((start, stop))
        center[mine] -= torch.tensor(start, dtype=center.dtype)
    return Sampled(boxes, ViewSpecs(source, center, matrix))


def _specs(centers: np.ndarray, matrices: np.ndarray) -> ViewSpecs:
    """One sample of views into one source, with a batch axis."""
    center, matrix = torch.from_numpy(centers)[None], torch.from_numpy(matrices)[None]
    return ViewSpecs(torch.zeros(center.shape[:2], dtype=torch.long), center, matrix)


def _scaled(ranges: TransformRanges, strength: float) -> TransformRanges:
    """The same transformations drawn closer to the identity."""
    if strength == 1:
        return ranges
    low, high = ranges.scaling
    return TransformRanges(
        rotation=ranges.rotation * strength,
        quarter_turns=ranges.quarter_turns * strength,
        translation=ranges.translation,
        scaling=(low**strength, high**strength),
        scaling_per_axis=ranges.scaling_per_axis,
        min_overlap=ranges.min_overlap,
        flips=ranges.flips,
    )
