"""Small volumes with known geometry, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

SHAPE = (12, 16, 20)


def make_ct(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A bright ellipsoid with a lung in air, (z, y, x) in HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    array = np.full(shape, -1000.0)
    array[(y / 0.8) ** 2 + (x / 0.8) ** 2 < 1] = 40
    array[(y / 0.3) ** 2 + (x / 0.3) ** 2 + (z / 0.5) ** 2 < 1] = -850
    return (array + rng.normal(0, 10, shape)).astype(np.int16)


@pytest.fixture
def ct() -> Callable[..., np.ndarray]:
    """Function ``(seed=0, shape=(12, 16, 20)) -> (z, y, x) int16 in HU``."""
    return make_ct


@pytest.fixture
def rotated() -> tuple[float, ...]:
    """Directions that are not those of the patient: turned about all axes."""
    a, b, c = 0.3, -0.2, 0.1
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return tuple((turn_z @ turn_y @ turn_x).ravel())


@pytest.fixture
def save() -> Callable[..., Path]:
    """Function ``(path, array, spacing=(1, 1.5, 2), origin=(5, -6, 7), direction=identity) -> path``; (x, y, z)."""

    def write(path, array, spacing=(1.0, 1.5, 2.0), origin=(5.0, -6.0, 7.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(array, isVector=False)
        if array.ndim == 3:
            image.SetSpacing(spacing)
            image.SetOrigin(origin)
            image.SetDirection(direction)
        sitk.WriteImage(image, str(path), path.name.endswith(("gz", "nrrd", "mha")))
        return path

    return write


@pytest.fixture
def nnunet_raw(tmp_path, monkeypatch) -> Path:
    """Empty folders for nnU-Net."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("NNSSL_STC3D_DEBUG", raising=False)
    return tmp_path / "nnUNet_raw"


def corner_points(image: sitk.Image) -> np.ndarray:
    """Physical points (8, 3) of the corners, after ITK."""
    ends = [(0, n - 1) for n in image.GetSize()]
    return np.array([image.TransformIndexToPhysicalPoint((i, j, k)) for i in ends[0] for j in ends[1] for k in ends[2]])


@pytest.fixture
def corners() -> Callable[[sitk.Image], np.ndarray]:
    """Function ``image -> (8, 3)`` physical points in mm."""
    return corner_points
