"""Spectrum of embeddings: how many directions of the feature space are used (STC3D Fig. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nnssl_stc3d.training.monitors import effective_rank

_MOST = 0.9


@dataclass(frozen=True)
class Spectrum:
    """Of the covariance of embeddings.

    Attributes:
        shares: ``(min(N - 1, D),)`` eigenvalues, largest first, as shares of their sum.
        effective_rank: exponential of the entropy of the normalised singular values: 1 for embeddings on a line,
            the dimension for embeddings that spread evenly.
        directions_for_90: eigenvalues that make up 90 % of the variance.
        dimension: of the embeddings.
        views: number of embeddings.
    """

    shares: np.ndarray
    effective_rank: float
    directions_for_90: int
    dimension: int
    views: int

    def to_dict(self) -> dict:
        """Plain numbers for results.json."""
        return {
            "effective_rank": self.effective_rank,
            "directions_for_90_percent": self.directions_for_90,
            "dimension": self.dimension,
            "views": self.views,
            "eigenvalue_shares": [float(v) for v in self.shares],
        }


def spectrum(rows: np.ndarray) -> Spectrum:
    """The spectrum of embeddings ``(N, D)``.

    Raises:
        ValueError: if they are fewer than two or not finite.
    """
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"expected at least 2 finite embeddings for a spectrum, got shape {rows.shape}")
    centred = torch.from_numpy(rows).double()
    centred = centred - centred.mean(0)
    # Centring takes one direction from fewer views than dimensions.
    count = min(len(rows) - 1, rows.shape[1])
    values = torch.linalg.svdvals(centred)[:count].square().numpy()
    shares = values / max(float(values.sum()), 1e-300)
    needed = int(np.searchsorted(np.cumsum(shares), _MOST * shares.sum())) + 1
    return Spectrum(shares, effective_rank(centred), needed, rows.shape[1], len(rows))
