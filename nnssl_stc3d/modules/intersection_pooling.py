"""Means of feature maps inside and outside the intersections of overlapping views.

Masking and averaging a copy of the maps for every pair of views is slow and large. A box is a product of one weight
for each axis, so the maps are contracted with the weights of all partners axis by axis, once for all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Boxes come from float32; a face that lies this close to a voxel's (in voxels of the map) lies on it.
_TOLERANCE = 1e-3
# A part of a map that is smaller (voxels of the map) is empty: rounding of the rest's sum would be its mean.
_EMPTY = 0.5


def box_weights(boxes: Tensor, view_shape: Sequence[int], map_shape: Sequence[int]) -> list[Tensor]:
    """Whether each voxel of a feature map counts for a box, for each axis alone.

    A voxel counts if the box touches it: from ``floor(start / stride)`` to ``ceil(stop / stride)``, as PiMPiC's
    released code has it.

    Args:
        boxes: ``(N, K, 2, 3)`` start and stop in view voxels, counted from the view's lower face.
        view_shape: ``(Z, Y, X)`` of the views.
        map_shape: ``(Z_l, Y_l, X_l)`` of the feature maps.

    Returns:
        ``(N, K, Z_l)``, ``(N, K, Y_l)``, ``(N, K, X_l)`` of zeros and ones in float32.
    """
    weights = []
    for axis, (size, cells) in enumerate(zip(view_shape, map_shape)):
        start, stop = (boxes[:, :, :, axis] * (cells / size)).unbind(2)
        index = torch.arange(cells, device=boxes.device)
        inside = index >= (start + _TOLERANCE).floor()[..., None]
        weights.append((inside & (index < (stop - _TOLERANCE).ceil()[..., None])).float())
    return weights


def pool_boxes(features: Tensor, boxes: Tensor, view_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means of feature maps inside and outside boxes.

    Args:
        features: ``(N, C, Z_l, Y_l, X_l)``.
        boxes: ``(N, K, 2, 3)``, ``K`` boxes for each map: see :func:`box_weights`.
        view_shape: ``(Z, Y, X)`` of the views.

    Returns:
        Twice ``(N, K, C)``, float32 or wider; a part without voxels is zero.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        shape = features.shape[2:]
        z, y, x = (w.to(features.dtype) for w in box_weights(boxes, view_shape, shape))
        # One more row of ones for the whole map, so that the maps are read, and their gradient is written, only once.
        rows = torch.cat((z, torch.ones_like(z[:, :1])), dim=1)
        # (N, 1, K + 1, Z) @ (N, C, Z, Y X): no copy for a pair ever holds more than a plane.
        planes = (rows[:, None] @ features.flatten(3)).unflatten(3, shape[1:])
        total = planes[:, :, -1].sum((2, 3))
        sums = ((y[:, None, :, None] @ planes[:, :, :-1])[..., 0, :] * x[:, None]).sum(-1).transpose(1, 2)
        return _means(sums, total, z.sum(-1) * y.sum(-1) * x.sum(-1), features[0, 0].numel())


def soft_masks(matrix: Tensor, shift: Tensor, view_shape: Sequence[int], map_shape: Sequence[int]) -> Tensor:
    """How much of each voxel of a view's feature map lies inside other views, turned and scaled as they may be.

    Along each axis of the other view the weight falls from 1 to 0 over the width that the voxel has there: exact for
    views whose axes are parallel, an approximation by a voxel's bounding box otherwise.

    Args:
        matrix: ``(K, 3, 3)`` and
        shift: ``(K, 3)``, from :func:`nnssl_stc3d.views.geometry.relative_maps`: offsets from the view's centre to
            offsets from the other view's centre, in view voxels.
        view_shape: ``(Z, Y, X)`` of all views.
        map_shape: ``(Z_l, Y_l, X_l)`` of the feature map.

    Returns:
        ``(K, Z_l, Y_l, X_l)`` in [0, 1].
    """
    size = torch.tensor(tuple(view_shape), dtype=matrix.dtype, device=matrix.device)
    stride = size / torch.tensor(tuple(map_shape), dtype=matrix.dtype, device=matrix.device)
    centers = [
        (torch.arange(n, dtype=matrix.dtype, device=matrix.device) + 0.5) * s - v / 2
        for n, s, v in zip(map_shape, stride, size)
    ]
    # An affine map of a grid is a sum of one term for each axis of the grid.
    terms = [matrix[:, :, axis, None] * center for axis, center in enumerate(centers)]
    width = (matrix.abs() * stride).sum(-1)
    result = matrix.new_ones(())
    for axis in range(3):
        z, y, x = (term[:, axis] for term in terms)
        position = (z + shift[:, axis, None])[:, :, None, None] + y[:, None, :, None] + x[:, None, None]
        reach = ((size[axis] + width[:, axis]) / 2)[:, None, None, None]
        result = result * ((reach - position.abs()) / width[:, axis, None, None, None]).clamp(0, 1)
    return result


def pool_masks(features: Tensor, matrix: Tensor, shift: Tensor, view_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means of feature maps inside and outside the views that overlap theirs; for views that are not boxes there.

    Args:
        features: ``(N, C, Z_l, Y_l, X_l)``.
        matrix: ``(N, K, 3, 3)`` and
        shift: ``(N, K, 3)`` from each view to ``K`` others: see :func:`soft_masks`.
        view_shape: ``(Z, Y, X)`` of all views.

    Returns:
        Twice ``(N, K, C)``, float32 or wider; a part without voxels is zero.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        sums, counts = [], []
        # The masks of one view at a time.
        for own, *frames in zip(features, matrix.to(features.dtype), shift.to(features.dtype)):
            masks = soft_masks(frames[0], frames[1], view_shape, own.shape[1:]).flatten(1)
            sums.append(masks @ own.flatten(1).T)
            counts.append(masks.sum(1))
        total = features.sum((2, 3, 4))
        return _means(torch.stack(sums), total, torch.stack(counts), features[0, 0].numel())


def _means(sums: Tensor, total: Tensor, count: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Means inside and outside.

    Args:
        sums: ``(N, K, C)`` over the voxels inside.
        total: ``(N, C)`` over all voxels.
        count: ``(N, K)`` voxels inside.
        voxels: of a map.
    """
    means = []
    for part, size in ((sums, count), (total[:, None] - sums, voxels - count)):
        empty = (size < _EMPTY)[..., None]
        means.append((part / size[..., None].masked_fill(empty, 1)).masked_fill(empty, 0))
    return means[0], means[1]
