"""Where the voxels of a preprocessed case lie in its scan, before nnU-Net has transposed, cropped and resampled it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ScanGrid:
    """The grid of a scan and that of its preprocessed case.

    Attributes:
        axes: axis of the preprocessed array that each axis (z, y, x) of the scan has become.
        shape: of the preprocessed array, ``(Z, Y, X)``.
        cropped: shape before it was resampled.
        first: voxel of the transposed scan at which the crop begins.
    """

    axes: tuple[int, int, int]
    shape: tuple[int, ...]
    cropped: tuple[int, ...]
    first: tuple[int, ...]

    @classmethod
    def read(cls, file: Path, shape: Sequence[int], axes: tuple[int, int, int]) -> ScanGrid | None:
        """Reads what nnU-Net has kept beside a case.

        Args:
            file: ``CASE.pkl``.
            shape: of the preprocessed array.
            axes: of the plans.

        Returns:
            None where the file is missing or does not say it.
        """
        try:
            with open(file, "rb") as opened:
                kept = _Plain(opened).load()
            cropped = tuple(int(n) for n in kept["shape_after_cropping_and_before_resampling"])
            first = tuple(int(low) for low, _ in kept["bbox_used_for_cropping"])
        except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError):
            return None
        return cls(axes, tuple(shape), cropped, first) if len(cropped) == len(first) == 3 else None

    def to_scan(self, voxel: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
        """Voxel ``(z, y, x)`` of the scan, counted from 0, of one of the preprocessed case."""
        place = (np.asarray(voxel) + 0.5) * np.array(self.cropped) / np.array(self.shape) - 0.5 + np.array(self.first)
        z, y, x = (float(place[axis]) for axis in self.axes)
        return z, y, x

    def from_scan(self, voxel: Sequence[float] | np.ndarray) -> np.ndarray:
        """The other way, ``(3,)``."""
        place = np.empty(3)
        place[list(self.axes)] = voxel
        found: np.ndarray = (place - np.array(self.first) + 0.5) * np.array(self.shape) / np.array(self.cropped) - 0.5
        return found


class _Plain(pickle.Unpickler):
    """Numbers and lists, also NumPy's, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("scalar", "dtype", "ndarray", "_reconstruct", "_frombuffer"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not a number")
