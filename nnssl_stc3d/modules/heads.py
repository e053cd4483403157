"""Projection heads and descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Linear-BatchNorm-ReLU twice and a linear layer, as in VoCo, PiMPiC and vox2vec.

    The BatchNorm over all crops of a batch is what makes pooled descriptors usable: a mean per channel right after
    InstanceNorm is nearly constant across samples, and only a normalisation across samples brings the rest to scale.
    It has no running statistics; evaluation normalises over its own batch as well.

    Args:
        in_features: width of the descriptor.
        hidden_features: width of both hidden layers.
        out_features: width of the embedding.
        affine: whether the BatchNorms have a learnt scale and shift (VoCo's have none).
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, affine: bool = False) -> None:
        layers: list[nn.Module] = []
        for width in (in_features, hidden_features):
            # The BatchNorm removes any bias.
            layers += [
                nn.Linear(width, hidden_features, bias=affine),
                nn.BatchNorm1d(hidden_features, affine=affine, track_running_stats=False),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.Linear(hidden_features, out_features))


def pooled_descriptor(features: Sequence[Tensor], bins: tuple[int, int, int]) -> Tensor:
    """Concatenate feature maps, each averaged in a grid of spatial bins.

    ``bins = (1, 1, 1)`` is global average pooling (VoCo, STC3D's paper). A map with fewer voxels than bins along an
    axis repeats them.

    Args:
        features: maps ``(N, C_i, Z_i, Y_i, X_i)``.
        bins: number of bins along each axis.

    Returns:
        ``(N, sum_i C_i * prod(bins))``
    """
    return torch.cat([F.adaptive_avg_pool3d(f, bins).flatten(1) for f in features], dim=1)


def sample_features(features: Sequence[Tensor], points: Tensor, nearest: bool = False) -> Tensor:
    """Read feature maps of any stride at points and concatenate the channels.

    Args:
        features: maps ``(N, C_i, Z_i, Y_i, X_i)``.
        points: ``(N, P, 3)`` from :func:`nnssl_stc3d.views.geometry.normalised_points`.
        nearest: read the voxel of each map that holds the point, as vox2vec does, instead of interpolating.

    Returns:
        ``(N, P, sum_i C_i)``
    """
    read = _nearest if nearest else _trilinear
    return torch.cat([read(f, points) for f in features], dim=1).transpose(1, 2)


def _nearest(features: Tensor, points: Tensor) -> Tensor:
    """Read the voxels that hold the points, ``(N, C, ...), (N, P, 3) -> (N, C, P)``."""
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    size = torch.tensor(features.shape[2:], dtype=points.dtype, device=points.device)
    index = ((points.flip(-1) + 1) / 2 * size).floor().clamp(min=torch.zeros_like(size), max=size - 1).long()
    _, height, width = features.shape[2:]
    flat = (index[..., 0] * height + index[..., 1]) * width + index[..., 2]
    return features.flatten(2).gather(2, flat[:, None].expand(-1, features.shape[1], -1))


def _trilinear(features: Tensor, points: Tensor) -> Tensor:
    """Read one feature map at points, ``(N, C, ...), (N, P, 3) -> (N, C, P)`` in float32 or wider.

    ``grid_sample`` would want coordinates in the precision of the features, which under autocast is too coarse, or a
    copy of the features in float32; few points are read much cheaper by their eight neighbours.
    """
    with torch.autocast(features.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        size = torch.tensor(features.shape[2:], dtype=points.dtype, device=points.device)
        # The borders' values continue outside, as in rendering.
        position = (((points.flip(-1) + 1) * size - 1) / 2).clamp(min=torch.zeros_like(size), max=size - 1)
        lower = position.floor()
        corners = torch.tensor(list(product((0, 1), repeat=3)), dtype=points.dtype, device=points.device)
        index = torch.minimum(lower[:, None] + corners[:, None], size - 1).long()
        above = (position - lower)[:, None]
        weight = torch.where(corners[:, None] == 1, above, 1 - above).prod(-1)
        _, height, width = features.shape[2:]
        flat = (index[..., 0] * height + index[..., 1]) * width + index[..., 2]
        # One gather for all corners: its backward pass writes one map instead of eight.
        values = features.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, features.shape[1], -1))
        return (values.unflatten(2, flat.shape[1:]) * weight[:, None]).sum(2)
