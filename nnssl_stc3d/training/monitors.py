"""Collapse monitors: four numbers that say whether embeddings still carry information."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

MONITORS = ("effective_rank", "embedding_std", "alignment", "uniformity")
ONLINE_PROBE = "online_probe"
"""Name in the log of what :mod:`nnssl_stc3d.training.online_probe` measures."""

# The distances of all pairs of 80,000 embeddings would take 12.8 GB; of 2048 they take 8 MB.
_MOST_PAIRS = 1024


@torch.no_grad()
def collapse_monitors(pairs: Tensor) -> dict[str, float]:
    """Describe the embeddings of positive pairs.

    Args:
        pairs: ``(P, 2, D)``, two embeddings of each pair.

    Returns:
        ``effective_rank``: exponential of the entropy of the normalised singular values (Roy & Vetterli 2007), between
        1 (collapsed) and ``min(2 P, D)``. ``embedding_std``: mean over dimensions of the standard deviation of the
        normalised embeddings times ``sqrt(D)``; 0 when collapsed, near 1 when spread evenly. ``alignment``: mean
        squared distance of a pair, ``uniformity``: log of the mean Gaussian potential ``exp(-2 d^2)`` over all pairs of
        embeddings, lower is more uniform (both Wang & Isola 2020). Of more than 1024 positive pairs every second, third
        ... goes into the uniformity, whose cost grows with their square.
    """
    z = F.normalize(pairs.detach().float(), dim=-1)
    flat = z.flatten(0, 1)
    some = z[:: max(1, ceil(len(z) / _MOST_PAIRS))].flatten(0, 1)
    distance = torch.pdist(some).square()
    return {
        "effective_rank": effective_rank(flat),
        "embedding_std": float(flat.std(0).mean() * flat.shape[1] ** 0.5),
        "alignment": float((z[:, 0] - z[:, 1]).square().sum(-1).mean()),
        "uniformity": float((-2 * distance).exp().mean().log()),
    }


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of ``(N, D)`` (Roy & Vetterli 2007)."""
    singular = torch.linalg.svdvals(rows)
    share = singular / singular.sum().clamp(min=1e-12)
    return float((-(share * share.clamp(min=1e-12).log()).sum()).exp())
