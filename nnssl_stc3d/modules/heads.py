"""Projection heads and descriptors."""

from __future__ import annotations

from collections.abc import Sequence

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


def sample_features(features: Sequence[Tensor], points: Tensor) -> Tensor:
    """Read feature maps of any stride at points and concatenate the channels.

    Args:
        features: maps ``(N, C_i, Z_i, Y_i, X_i)``.
        points: ``(N, P, 3)`` from :func:`nnssl_stc3d.views.geometry.normalised_points`.

    Returns:
        ``(N, P, sum_i C_i)``
    """
    grid = points[:, :, None, None]
    sampled = [
        F.grid_sample(f, grid.to(f.dtype), mode="bilinear", padding_mode="border", align_corners=False)[..., 0, 0]
        for f in features
    ]
    return torch.cat(sampled, dim=1).transpose(1, 2)
