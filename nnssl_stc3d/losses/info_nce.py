"""InfoNCE (van den Oord et al. 2018; STC3D Eq. 11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(z1: Tensor, z2: Tensor, temperature: float, groups: Tensor | None = None) -> Tensor:
    """InfoNCE between two sets of corresponding embeddings, mean over all ``2 N`` anchors, self excluded.

    For anchor ``i`` with partner ``j``: ``-log(exp(s_ij / t) / sum_{k != i} exp(s_ik / t))`` with cosines ``s``
    (STC3D Eq. 11; vox2vec's released form: the paper's sum divided by ``2 N``).

    Args:
        z1: ``(N, D)`` embeddings; row ``i`` corresponds to row ``i`` of ``z2``.
        z2: ``(N, D)``.
        temperature: tau > 0.
        groups: ``(N,)`` integers; if given, only pairs of one group are negatives of each other.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if the shapes differ or are not (N, D), or the temperature is not positive.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must both be (N, D), got {tuple(z1.shape)} and {tuple(z2.shape)}")
    n = len(z1)
    index = torch.arange(2 * n, device=z1.device)
    positives = index[:, None] == (index + n) % (2 * n)
    negatives = (index[:, None] != index) & ~positives
    if groups is not None:
        both = groups.repeat(2)
        negatives &= both[:, None] == both
    return masked_info_nce(torch.cat((z1, z2)), positives, negatives, temperature)


def masked_info_nce(embeddings: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE with several positives for an anchor and pairs that are neither positive nor negative.

    Each (anchor, positive) pair contributes ``-log(exp(s_ap / t) / (exp(s_ap / t) + sum_neg exp(s_an / t)))``.

    Args:
        embeddings: ``(M, D)``, any length.
        positives: ``(M, M)`` bool.
        negatives: ``(M, M)`` bool, disjoint from ``positives``.
        temperature: tau > 0.

    Returns:
        Mean over all positive pairs, scalar; 0 with a gradient of zero if there is none.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        logits = z @ z.T / temperature
        # The lowest finite number, not -inf: an anchor without negatives keeps a finite (zero) gradient.
        negative = logits.masked_fill(~negatives, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
        losses = torch.logaddexp(logits, negative) - logits
        return losses.where(positives, 0).sum() / positives.sum().clamp(min=1)
