"""View specifications: the one place that defines the coordinates of views.

Conventions used everywhere in the package:

* Axes are ``(z, y, x)``, the order of nnU-Net's arrays.
* A voxel's centre lies at its integer index, so a volume of ``n`` voxels covers ``[-0.5, n - 0.5]`` along an axis.
* The centre of a view of ``n`` voxels is ``(n - 1) / 2`` in view voxels.
* View voxel ``i`` looks at source position ``center + matrix @ (i - (view_shape - 1) / 2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ViewSpecs(NamedTuple):
    """Where the views of a batch look, as affine maps from view voxels to source voxels.

    Attributes:
        source: ``(B, V)`` long, which source volume of the sample the view looks into.
        center: ``(B, V, 3)`` source voxels, the position of the view's centre.
        matrix: ``(B, V, 3, 3)`` offset in view voxels from the view's centre -> offset in source voxels.
    """

    source: Tensor
    center: Tensor
    matrix: Tensor

    def select(self, views: slice | Tensor | Sequence[int]) -> ViewSpecs:
        """The specifications of a subset of the views (an index along the view axis)."""
        index = views if isinstance(views, slice) else torch.as_tensor(views, dtype=torch.long)
        return ViewSpecs(self.source[:, index], self.center[:, index], self.matrix[:, index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ViewSpecs:
        """The same specifications on another device."""
        return ViewSpecs(*(t.to(device, non_blocking=non_blocking) for t in self))


def view_center(view_shape: Sequence[int], like: Tensor) -> Tensor:
    """Centre of a view in view voxels, ``(3,)``, with the dtype and device of ``like``."""
    return (torch.as_tensor(tuple(view_shape), dtype=like.dtype, device=like.device) - 1) / 2


def view_to_source(specs: ViewSpecs, points: Tensor, view_shape: Sequence[int]) -> Tensor:
    """Map points from view voxels to source voxels.

    Args:
        specs: specifications of ``V`` views in each of ``B`` samples.
        points: ``(B, V, P, 3)`` view voxels.
        view_shape: ``(Z, Y, X)`` of the views.

    Returns:
        ``(B, V, P, 3)`` source voxels.
    """
    offset = points - view_center(view_shape, points)
    return specs.center[:, :, None] + offset @ specs.matrix.transpose(-1, -2)


def source_to_view(specs: ViewSpecs, points: Tensor, view_shape: Sequence[int]) -> Tensor:
    """Map points from source voxels to view voxels: the inverse of :func:`view_to_source`, same shapes."""
    offset = points - specs.center[:, :, None]
    return offset @ torch.linalg.inv(specs.matrix).transpose(-1, -2) + view_center(view_shape, points)


def stack_specs(samples: Sequence[ViewSpecs]) -> ViewSpecs:
    """Stack the specifications of single samples (``source (V,)``, ...) along a new batch axis."""
    return ViewSpecs(*(torch.stack(field) for field in zip(*samples)))
