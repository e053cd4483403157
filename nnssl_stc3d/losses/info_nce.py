"""InfoNCE (van den Oord et al. 2018; STC3D Eq. 11; vox2vec 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

INFO_NCE_FORMS = ("official", "paper")
"""Of vox2vec's loss: "official" is the mean over all anchors, "paper" their sum."""

_ROWS_AT_ONCE = 1024


def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float,
    groups: Tensor | None = None,
    form: str = "official",
    rows: int | None = _ROWS_AT_ONCE,
) -> Tensor:
    """InfoNCE between two sets of corresponding embeddings over all ``2 N`` anchors, self excluded.

    For anchor ``i`` with partner ``j``: ``-log(exp(s_ij / t) / sum_{k != i} exp(s_ik / t))`` with cosines ``s``
    (STC3D Eq. 11, vox2vec 3.3). The similarities are never held all at once: they are computed for some rows at a time
    and again in the backward pass, so that memory grows with ``N`` and not with its square.

    Args:
        z1: ``(N, D)`` embeddings; row ``i`` corresponds to row ``i`` of ``z2``.
        z2: ``(N, D)``.
        temperature: tau > 0.
        groups: ``(N,)`` integers; if given, only pairs of one group are negatives of each other.
        form: "official" averages the anchors' losses (STC3D, vox2vec as released), "paper" sums them (vox2vec 3.3):
            ``2 N`` times as much.
        rows: anchors whose similarities are held at once; None takes all of them.

    Returns:
        Scalar, float32 or wider; 0 with a gradient of zero for no embeddings.

    Raises:
        ValueError: if the shapes differ or are not (N, D), the temperature or ``rows`` is not positive or the form is
            unknown.
    """
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"z1 and z2 must both be (N, D), got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be positive or None, got {rows}")
    if form not in INFO_NCE_FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, INFO_NCE_FORMS))}, got {form!r}")
    _check_temperature(temperature)
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack((_normalised(z1), _normalised(z2)))
        # Of other groups nothing is compared, so nothing is computed.
        parts = [z] if groups is None else [z[:, groups == group] for group in groups.unique()]
        total = torch.stack([_set_loss(part.flatten(0, 1), temperature, rows) for part in parts or [z]]).sum()
    return total if form == "paper" else total / max(1, 2 * len(z1))


def _set_loss(z: Tensor, temperature: float, rows: int | None) -> Tensor:
    """Sum of the losses of all anchors of a set, some rows of its similarities at a time.

    Args:
        z: ``(2 N, D)`` unit vectors; row ``i`` and row ``i + N`` correspond.
        temperature: tau.
        rows: see :func:`info_nce`.
    """
    index = torch.arange(len(z), device=z.device)
    if rows is None or len(z) <= rows:
        return _anchor_losses(z, index, temperature)
    parts = [
        checkpoint(_anchor_losses, z, part, temperature, use_reentrant=False, preserve_rng_state=False)
        for part in index.split(rows)
    ]
    return torch.stack(parts).sum()


def _anchor_losses(z: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Sum of the losses of some anchors, ``index`` ``(R,)`` into the rows of :func:`_set_loss`'s ``z``."""
    row = torch.arange(len(index), device=z.device)
    logits = z[index] @ z.T / temperature
    positive = logits[row, (index + len(z) // 2) % max(1, len(z))]
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    excluded[row, index] = True
    return (logits.masked_fill(excluded, -torch.inf).logsumexp(1) - positive).sum()


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
    _check_temperature(temperature)
    with torch.autocast(embeddings.device.type, enabled=False):
        z = _normalised(embeddings)
        logits = z @ z.T / temperature
        # The lowest finite number, not -inf: an anchor without negatives keeps a finite (zero) gradient.
        negative = logits.masked_fill(~negatives, torch.finfo(logits.dtype).min).logsumexp(1, keepdim=True)
        losses = torch.logaddexp(logits, negative) - logits
        return losses.where(positives, 0).sum() / positives.sum().clamp(min=1)


@torch.no_grad()
def retrieval(first: Tensor, second: Tensor, rows: int = _ROWS_AT_ONCE) -> Tensor:
    """Share of points whose nearest embedding among all points of the other views is their own.

    Args:
        first: ``(N, D)`` embeddings of points in one view.
        second: ``(N, D)`` of the same points in another view.
        rows: points whose similarities are held at once.

    Returns:
        Scalar; 0 for no points. Chance is ``1 / N``.
    """
    if not len(first):
        return first.new_zeros((), dtype=torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        other = _normalised(second).T
        nearest = torch.cat([(part @ other).argmax(1) for part in _normalised(first).split(rows)])
    return (nearest == torch.arange(len(first), device=first.device)).float().mean()


def _normalised(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
