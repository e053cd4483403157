"""Losses of PiMPiC (Karimzadeh et al. 2025): intersection measurement and intersection contrast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6


def intersection_measure(embeddings: Tensor, overlap: Tensor, form: str = "official") -> Tensor:
    """PiM: the cosine of two patches shall be their overlap (PiMPiC Eq. 1).

    With ``d = |overlap - cos|``:

    * ``"paper"``: mean of ``-log(1 - d)`` over the unordered pairs of different patches.
    * ``"official"``: mean of ``-log(1 - d + 1e-6)`` over all ``N^2`` entries, the diagonal included, as released.

    A pair with ``d >= 1`` (a negative cosine where there is overlap) costs ``-log(1e-6)`` and gets no gradient.

    Args:
        embeddings: ``(..., N, D)`` of patches of one volume, N >= 2; leading axes are volumes and averaged.
        overlap: ``(..., N, N)`` in [0, 1], intersection of two patches over the volume of one.
        form: "paper" or "official".

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: for an unknown form, shapes that do not fit, or a single patch.
    """
    _check_form(form)
    n = embeddings.shape[-2]
    if overlap.shape != (*embeddings.shape[:-1], n):
        raise ValueError(
            f"embeddings (..., N, D) need overlaps (..., N, N), got {tuple(embeddings.shape)} and "
            f"{tuple(overlap.shape)}"
        )
    if n < 2:
        raise ValueError(f"overlaps need at least 2 patches of a volume, got {n}")
    with torch.autocast(embeddings.device.type, enabled=False):
        # 1 - d needs float32: half precision rounds it to zero.
        distance = _distance(embeddings, overlap).clamp(max=1)
        if form == "official":
            return -(1 - distance + _EPS).log().mean()
        i, j = torch.triu_indices(n, n, 1, device=distance.device)
        return -(1 - distance[..., i, j]).clamp(min=_EPS).log().mean()


def intersection_contrast(projections: Tensor, temperature: float = 1.0, form: str = "official") -> Tensor:
    """PiC: what two patches share shall look alike, and unlike what they do not share (PiMPiC Eq. 2).

    With the four embeddings of a pair, 0 and 1 the shared part in the first and the second patch, 2 and 3 the rest of
    each, and ``e_ij = exp(cos_ij / t)``, the mean over pairs of

    * ``"paper"``: ``-log(e_01 / (e_01 + e_02 + e_03 + e_12 + e_13 + e_23))``.
    * ``"official"``: ``-log(2 e_01 / (2 e_01 + e_02 + e_03 + e_12 + e_13))``, as released: the two rests do not meet.

    Args:
        projections: ``(P, 4, D)`` embeddings of the parts of ``P`` pairs.
        temperature: tau > 0.
        form: "paper" or "official".

    Returns:
        Scalar, float32 or wider; 0 with a gradient of zero if there is no pair.

    Raises:
        ValueError: for an unknown form, another shape, or a temperature that is not positive.
    """
    _check_form(form)
    if projections.ndim != 3 or projections.shape[1] != 4:
        raise ValueError(f"projections must be (P, 4, D), got {tuple(projections.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(projections.device.type, enabled=False):
        z = F.normalize(projections.to(torch.promote_types(projections.dtype, torch.float32)), dim=-1)
        if not len(z):
            return z.sum()
        logits = z @ z.transpose(-1, -2) / temperature
        i, j = ((0, 0, 0, 0, 1, 1), (1, 1, 2, 3, 2, 3)) if form == "official" else torch.triu_indices(4, 4, 1).tolist()
        chosen = logits[:, i, j]
        # The released form counts the shared pair twice, above and below.
        positive = chosen[:, :2] if form == "official" else chosen[:, :1]
        return (chosen.logsumexp(1) - positive.logsumexp(1)).mean()


@torch.no_grad()
def overlap_error(embeddings: Tensor, overlap: Tensor) -> Tensor:
    """Mean ``|cos - overlap|`` over pairs of different patches of a volume, in [0, 2].

    Args:
        embeddings: ``(..., N, D)``, N >= 2.
        overlap: ``(..., N, N)``.
    """
    n = embeddings.shape[-2]
    i, j = torch.triu_indices(n, n, 1, device=embeddings.device)
    with torch.autocast(embeddings.device.type, enabled=False):
        return _distance(embeddings, overlap)[..., i, j].mean()


def _distance(embeddings: Tensor, overlap: Tensor) -> Tensor:
    z = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
    return (overlap.to(z.dtype) - z @ z.transpose(-1, -2)).abs()


def _check_form(form: str) -> None:
    if form not in ("paper", "official"):
        raise ValueError(f"form must be 'paper' or 'official', got {form!r}")
