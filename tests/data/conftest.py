"""Folders of small preprocessed cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest


def write_case(folder: Path, name: str, image: np.ndarray, chunks=None, blocks=None) -> np.ndarray:
    """Writes an image as nnU-Net's preprocessing does, with a segmentation beside it."""
    image = np.ascontiguousarray(image, dtype=np.float32)
    folder.mkdir(exist_ok=True, parents=True)
    blosc2.asarray(image, urlpath=str(folder / f"{name}.b2nd"), chunks=chunks, blocks=blocks, mode="w")
    blosc2.asarray(np.zeros_like(image[:1], np.int8), urlpath=str(folder / f"{name}_seg.b2nd"), mode="w")
    return image


@pytest.fixture
def write() -> Callable[..., np.ndarray]:
    """Function ``(folder, name, image, chunks=None, blocks=None) -> image as stored``."""
    return write_case


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight cases of different sizes whose values say where they lie: 1000 * case + a smooth ramp and noise."""
    rng = np.random.default_rng(0)
    for case in range(8):
        shape = (1, 20 + case, 24, 22)
        write_case(tmp_path / "cases", f"case_{case}", rng.normal(size=shape) + np.arange(22) / 4 + 1000 * case)
    return tmp_path / "cases"
