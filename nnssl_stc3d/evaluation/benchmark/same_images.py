"""Finds the images of test cases among those that are to be pretrained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import blosc2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

# Preprocessed intensities are about 1; formats of medical images round them by less.
TOLERANCE = 1e-3


def find_same_images(wanted: Mapping[str, Path], among: Mapping[str, Path]) -> dict[str, str]:
    """Which preprocessed cases show the same image as others.

    Compared are the number of voxels along each axis, in any order, and the intensities, whatever voxel has them. So an
    image is found that was turned by quarters, mirrored, renamed or saved in another format; one that was cropped,
    resampled or changed in brightness is not.

    Args:
        wanted: case -> preprocessed image, ".b2nd" of shape (channels, Z, Y, X).
        among: the same of the cases to look through, preprocessed alike.

    Returns:
        Case of ``among`` -> case of ``wanted``.
    """
    shapes: dict[tuple[int, ...], list[str]] = {}
    for case, file in wanted.items():
        shapes.setdefault(_shape(file), []).append(case)
    alike = {case: shapes[shape] for case, file in among.items() if (shape := _shape(file)) in shapes}
    known: dict[str, NDArray[np.float64]] = {}
    found = {}
    for case, candidates in tqdm(alike.items(), desc="looking for test cases", unit="case", disable=not alike):
        intensities = _intensities(among[case])
        for candidate in candidates:
            if candidate not in known:
                known[candidate] = _intensities(wanted[candidate])
            if np.allclose(intensities, known[candidate], rtol=TOLERANCE, atol=TOLERANCE):
                found[case] = candidate
    return found


def _shape(file: Path) -> tuple[int, ...]:
    """Channels, and voxels along the axes in ascending order."""
    channels, *voxels = blosc2.open(str(file), mode="r").shape
    return channels, *sorted(voxels)


def _intensities(file: Path) -> NDArray[np.float64]:
    """What does not depend on the order of voxels, of each channel: extremes and four moments, shape (channels, 7)."""
    image = np.asarray(blosc2.open(str(file), mode="r")[:], dtype=np.float32)
    rows = image.reshape(len(image), -1)
    means = [(rows**power).mean(axis=1, dtype=np.float64) for power in range(1, 5)]
    means.append(np.abs(rows).mean(axis=1, dtype=np.float64))
    return np.stack([rows.min(axis=1), rows.max(axis=1), *means], axis=1)
