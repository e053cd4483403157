"""The regulariser of STC3D in the readings that its text allows (Eqs. 10 and 12, 3.2.5, 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REGULARISERS = ("discrepancy", "overlap_weighted", "eq12")
"""Named forms of L_reg; "discrepancy" is :func:`nnssl_stc3d.losses.voco.base_discrepancy` in its symmetric form."""


def overlap_weighted(views: Tensor, overlap: Tensor, margin: float = 1.0) -> Tensor:
    """Views that overlap agree, views that do not differ (3.2.5: invariant to small, sensitive to large changes).

    Mean over ordered pairs ``i != j`` of ``o d^2 + (1 - o) max(0, margin - d)^2`` with ``d`` the distance of the
    normalised embeddings. ``o = 1`` gives Eq. 12, ``o = 0`` a bounded discrepancy.

    Args:
        views: ``(..., V, D)`` embeddings.
        overlap: ``(..., V, V)`` overlap of the views in [0, 1].
        margin: distance beyond which different views are left alone, in (0, 2].

    Returns:
        Scalar, float32 or wider; 0 for a single view.
    """
    with torch.autocast(views.device.type, enabled=False):
        z = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=-1)
        squared = (2 - 2 * z @ z.transpose(-1, -2)).clamp(min=0)
        # The square root has no finite gradient at 0.
        distance = (squared + 1e-8).sqrt()
        overlap = overlap.to(z.dtype)
        losses = overlap * squared + (1 - overlap) * (margin - distance).clamp(min=0).square()
        pairs = ~torch.eye(z.shape[-2], dtype=torch.bool, device=z.device)
        return losses[..., pairs].mean() if pairs.any() else losses.sum() * 0


def eq12(views: Tensor) -> Tensor:
    """Eq. 12 as printed: ``1 / N`` times the sum of squared distances over all ordered pairs of the ``N`` views.

    Minimised as Eq. 13 says, it pulls all views of a volume together, which contradicts 3.3.1; kept for the ablation.

    Args:
        views: ``(..., N, D)`` embeddings, normalised here so that their length cannot be what is minimised.
    """
    with torch.autocast(views.device.type, enabled=False):
        z = F.normalize(views.to(torch.promote_types(views.dtype, torch.float32)), dim=-1)
        squared = (2 - 2 * z @ z.transpose(-1, -2)).clamp(min=0)
        return squared.sum((-1, -2)).mean() / z.shape[-2]
