"""Geometry of pairs of views, computed from their specifications alone: overlaps and corresponding points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nnssl_stc3d.views.spec import ViewSpecs, source_to_view, view_center, view_to_source

_QUADRATURE_POINTS = 4096


@lru_cache(maxsize=1)
def _quadrature() -> Tensor:
    """Low-discrepancy points of the cube [-1, 1]^3, ``(P, 3)``; fixed, so that labels are reproducible."""
    return torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(_QUADRATURE_POINTS, dtype=torch.float64) * 2 - 1


def bounding_half_extent(matrix: Tensor, view_shape: Sequence[int]) -> Tensor:
    """Half the size of the axis-aligned box around a view, in source voxels.

    Args:
        matrix: ``(..., 3, 3)`` of the view.
        view_shape: ``(Z, Y, X)``.

    Returns:
        ``(..., 3)``
    """
    half = torch.as_tensor(tuple(view_shape), dtype=matrix.dtype, device=matrix.device) / 2
    return matrix.abs() @ half


def is_axis_aligned(matrix: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Whether a map turns boxes into axis-aligned boxes (scaling, flips, quarter turns): ``(..., 3, 3) -> (...)``."""
    magnitude = matrix.abs()
    off = magnitude.sum(-1) - magnitude.amax(-1)
    return (off <= tolerance * magnitude.amax((-1, -2)).unsqueeze(-1)).all(-1)


@torch.no_grad()
def overlap_fraction(a: ViewSpecs, b: ViewSpecs, view_shape: Sequence[int]) -> Tensor:
    """Share of view ``a`` that lies inside view ``b``: ``|a intersect b| / |a|`` (VoCo's position label).

    In the frame of ``a`` the view ``b`` is a parallelepiped. Where that is axis-aligned (translation, scaling, flips,
    quarter turns, and any pair that is rotated alike) the result is exact; otherwise it is a quadrature over 4096
    low-discrepancy points of ``a``, whose error stays below 0.01.

    Args:
        a: specifications of ``Va`` views in each of ``B`` samples.
        b: specifications of ``Vb`` views in each of the same samples.
        view_shape: ``(Z, Y, X)`` of the views.

    Returns:
        ``(B, Va, Vb)`` float32 in [0, 1]; 0 for views into different sources.
    """
    center_a, center_b = a.center.double(), b.center.double()
    matrix_a, matrix_b = a.matrix.double(), b.matrix.double()
    half = torch.as_tensor(tuple(view_shape), dtype=torch.float64, device=center_a.device) / 2
    # b in the frame of a, in units of a's half extents, so that a is the cube [-1, 1]^3.
    inverse_a = torch.linalg.inv(matrix_a)[:, :, None]
    offset = (inverse_a @ (center_b[:, None] - center_a[:, :, None])[..., None])[..., 0] / half
    relative = (inverse_a @ matrix_b[:, None]) * (half / half[:, None])
    extent = relative.abs().sum(-1)
    lower, upper = (offset - extent).clamp(min=-1), (offset + extent).clamp(max=1)
    result = ((upper - lower).clamp(min=0) / 2).prod(-1)

    candidates = ~is_axis_aligned(relative) & (result > 0) & (a.source[:, :, None] == b.source[:, None])
    if candidates.any():
        points = _quadrature().to(center_a.device)
        inverse = torch.linalg.inv(relative[candidates])
        inside = ((points - offset[candidates][:, None]) @ inverse.transpose(-1, -2)).abs().amax(-1) <= 1
        result[candidates] = inside.double().mean(-1)
    return (result * (a.source[:, :, None] == b.source[:, None])).float()


@torch.no_grad()
def relative_maps(a: ViewSpecs, b: ViewSpecs) -> tuple[Tensor, Tensor]:
    """Where each view's voxels lie in each other view: ``offset in b = matrix @ offset in a + shift``.

    Offsets are view voxels from the centre of a view. Views into different sources have a map as well; whether they
    show the same is for :func:`overlap_fraction` to say.

    Args:
        a: specifications of ``Va`` views in each of ``B`` samples.
        b: specifications of ``Vb`` views in each of the same samples.

    Returns:
        ``(B, Va, Vb, 3, 3)`` and ``(B, Va, Vb, 3)``, float64.
    """
    inverse = torch.linalg.inv(b.matrix.double())[:, None]
    difference = a.center.double()[:, :, None] - b.center.double()[:, None]
    return inverse @ a.matrix.double()[:, :, None], (inverse @ difference[..., None])[..., 0]


@torch.no_grad()
def intersection_boxes(a: ViewSpecs, b: ViewSpecs, view_shape: Sequence[int]) -> Tensor:
    """The part of each view that each other view covers, as a box in voxels of the first.

    Exact where the axes of the two are parallel; otherwise the box around the other view, cut off at the first.

    Args:
        a: specifications of ``Va`` views in each of ``B`` samples.
        b: specifications of ``Vb`` views in each of the same samples.
        view_shape: ``(Z, Y, X)`` of the views.

    Returns:
        ``(B, Va, Vb, 2, 3)`` start and stop in voxels of ``a``, counted from its lower face: 0 to ``view_shape``.
    """
    # The centre and the axes of b in the frame of a.
    matrix, shift = (field.transpose(1, 2) for field in relative_maps(b, a))
    size = torch.as_tensor(tuple(view_shape), dtype=matrix.dtype, device=matrix.device)
    half = bounding_half_extent(matrix, view_shape)
    ends = torch.stack((shift - half, shift + half), dim=-2) + size / 2
    return ends.clamp(min=torch.zeros_like(size), max=size)


@torch.no_grad()
def matching_points(a: ViewSpecs, b: ViewSpecs, points: Tensor, view_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where points of one view lie in another view of the same volume.

    Args:
        a: specifications of ``V`` views in each of ``B`` samples.
        b: specifications of the ``V`` partners.
        points: ``(B, V, P, 3)`` view voxels of ``a``.
        view_shape: ``(Z, Y, X)`` of both views.

    Returns:
        ``(B, V, P, 3)`` view voxels of ``b``, and ``(B, V, P)`` bool: the point lies between the outermost voxel
        centres of ``b`` and both views look into the same source.
    """
    matched = source_to_view(b, view_to_source(a, points, view_shape), view_shape)
    limit = view_center(view_shape, points) * 2
    inside = ((matched >= 0) & (matched <= limit)).all(-1)
    return matched, inside & (a.source == b.source)[..., None]


def normalised_points(points: Tensor, view_shape: Sequence[int]) -> Tensor:
    """View voxels ``(..., 3)`` as ``grid_sample`` coordinates ``(..., 3)`` in (x, y, z) order, ``align_corners=False``.

    With ``align_corners=False`` the coordinates name the same position in feature maps of every stride.
    """
    size = torch.as_tensor(tuple(view_shape), dtype=points.dtype, device=points.device)
    return (((points + 0.5) * 2 / size) - 1).flip(-1)
