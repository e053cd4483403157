"""Small volumes with known geometry, on disk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import SimpleITK as sitk


@pytest.fixture
def rotated() -> tuple[float, ...]:
    """Directions that are not those of the patient: turned about all axes."""
    a, b, c = 0.3, -0.2, 0.1
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return tuple((turn_z @ turn_y @ turn_x).ravel())


def corner_points(image: sitk.Image) -> np.ndarray:
    """Physical points (8, 3) of the corners, after ITK."""
    ends = [(0, n - 1) for n in image.GetSize()]
    return np.array([image.TransformIndexToPhysicalPoint((i, j, k)) for i in ends[0] for j in ends[1] for k in ends[2]])


@pytest.fixture
def corners() -> Callable[[sitk.Image], np.ndarray]:
    """Function ``image -> (8, 3)`` physical points in mm."""
    return corner_points
