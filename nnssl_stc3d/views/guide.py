"""What a sampler may know of a volume besides its shape: where the body is, and what lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Guide:
    """Knowledge of one volume on a coarse grid that covers it.

    Cell ``i`` of the grid covers ``[i * cell - 0.5, (i + 1) * cell - 0.5]`` of the volume's voxels along an axis.

    Attributes:
        cell: voxels of the volume per cell of the grid, (z, y, x).
        body: ``(z, y, x)`` bool, the cell lies in the body.
        features: ``(D, z, y, x)`` float16 unit vectors on the same grid, or None.
    """

    cell: tuple[float, float, float]
    body: np.ndarray
    features: np.ndarray | None = None

    @classmethod
    def everywhere(cls, shape: Sequence[int]) -> Guide:
        """A single cell of body that covers a volume of ``(Z, Y, X)`` voxels."""
        return cls((float(shape[0]), float(shape[1]), float(shape[2])), np.ones((1, 1, 1), dtype=bool))

    def index(self, points: np.ndarray) -> np.ndarray:
        """Cells that hold points, ``(..., 3)`` voxels to ``(..., 3)`` int; points outside take the nearest cell."""
        cells = np.floor((np.asarray(points, dtype=float) + 0.5) / np.asarray(self.cell)).astype(np.int64)
        return np.clip(cells, 0, np.asarray(self.body.shape) - 1)

    def in_body(self, points: np.ndarray) -> np.ndarray:
        """Whether points lie in the body, ``(..., 3)`` voxels to ``(...)`` bool."""
        z, y, x = np.moveaxis(self.index(points), -1, 0)
        return self.body[z, y, x]

    def voxels(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """Which voxels of a box lie in the body, bool of shape ``stop - start``."""
        last = np.asarray(self.body.shape) - 1
        rows = [
            np.clip(np.floor((np.arange(a, b) + 0.5) / cell).astype(np.int64), 0, n)
            for a, b, cell, n in zip(start, stop, self.cell, last)
        ]
        return self.body[np.ix_(*rows)]
