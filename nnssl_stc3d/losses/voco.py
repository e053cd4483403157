"""Losses of VoCo (Wu et al. 2024): contextual position prediction and the discrepancy between bases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def position_logits(views: Tensor, bases: Tensor) -> Tensor:
    """Similarity of views to the bases of their volume, ``relu(cos)`` (VoCo Eq. 1, rectified as released).

    Args:
        views: ``(..., M, D)`` embeddings.
        bases: ``(..., n, D)`` embeddings.

    Returns:
        ``(..., M, n)`` in [0, 1], float32 or wider.
    """
    with torch.autocast(views.device.type, enabled=False):
        dtype = torch.promote_types(views.dtype, torch.float32)
        views, bases = F.normalize(views.to(dtype), dim=-1), F.normalize(bases.to(dtype), dim=-1)
        return (views @ bases.transpose(-1, -2)).relu()


def position_prediction(logits: Tensor, labels: Tensor, form: str = "official") -> Tensor:
    """Contextual position prediction (VoCo Eqs. 2 and 3).

    With ``d = |label - logit|``:

    * ``"paper"``: mean over bases and views of ``-log(1 - d)``.
    * ``"official"``: ``pos + neg`` of the released code. ``pos`` is the mean of ``-log(1 - d + 1e-6)`` weighted by the
      label, ``neg`` the mean squared logit over the bases that a view does not touch, both over all views of a volume.

    Args:
        logits: ``(..., M, n)`` rectified cosines in [0, 1]; leading axes are volumes and averaged.
        labels: ``(..., M, n)`` overlap of each view with each base in [0, 1].
        form: "paper" or "official".

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: for an unknown form or shapes that differ.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"logits and labels must have one shape, got {tuple(logits.shape)} and {tuple(labels.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        # 1 - d needs float32: half precision rounds it to zero.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.dtype)
        similarity = 1 - (labels - logits).abs()
        if form == "paper":
            return -similarity.clamp(min=_EPS).log().mean()
        if form == "official":
            weighted = -labels * (similarity + _EPS).log()
            apart = (labels == 0).to(logits.dtype)
            positive = weighted.sum((-1, -2)) / (labels.sum((-1, -2)) + _EPS)
            negative = (apart * logits.square()).sum((-1, -2)) / (apart.sum((-1, -2)) + _EPS)
            return positive.mean() + negative.mean()
    raise ValueError(f"form must be 'paper' or 'official', got {form!r}")


@torch.no_grad()
def position_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of views whose most similar base is the one they overlap most; chance is 1 / n.

    Args:
        logits: ``(..., M, n)``.
        labels: ``(..., M, n)`` overlap of each view with each base.
    """
    return (logits.argmax(-1) == labels.argmax(-1)).float().mean()


def base_discrepancy(bases: Tensor, form: str = "official") -> Tensor:
    """Discrepancy between the bases of one volume (VoCo Eq. 5): lower where bases differ.

    * ``"paper"``: mean of ``|cos|`` over unordered pairs.
    * ``"official"``: mean over pairs ``i < j`` of ``relu(cos(b_i, stopgrad(b_j)))^2``, as released.
    * ``"symmetric"``: the same value with gradients to both sides (as released, the last base never gets one).

    Args:
        bases: ``(..., n, D)`` embeddings, n >= 2; leading axes are averaged.
        form: "paper", "official" or "symmetric".

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: for an unknown form or fewer than two bases.
    """
    n = bases.shape[-2]
    if n < 2:
        raise ValueError(f"a discrepancy needs at least 2 bases, got {n}")
    with torch.autocast(bases.device.type, enabled=False):
        bases = F.normalize(bases.to(torch.promote_types(bases.dtype, torch.float32)), dim=-1)
        i, j = torch.triu_indices(n, n, 1, device=bases.device)
        if form == "paper":
            return (bases @ bases.transpose(-1, -2))[..., i, j].abs().mean()
        if form in ("official", "symmetric"):
            other = bases.detach() if form == "official" else bases
            return (bases @ other.transpose(-1, -2))[..., i, j].relu().square().mean()
    raise ValueError(f"form must be 'paper', 'official' or 'symmetric', got {form!r}")
