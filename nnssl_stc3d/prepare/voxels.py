"""Voxels of a volume and what a report says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnssl_stc3d.prepare.case import Volume
from nnssl_stc3d.prepare.checks import VolumeError

# nnU-Net computes with 32-bit numbers: more digits only cost space.
_WIDE = {sitk.sitkFloat64: sitk.sitkFloat32, sitk.sitkInt64: sitk.sitkFloat32, sitk.sitkUInt64: sitk.sitkFloat32}


@dataclass(frozen=True)
class Intensity:
    """Values of a channel.

    Attributes:
        low: 0.5th percentile.
        median: 50th percentile.
        high: 99.5th percentile.
    """

    low: float
    median: float
    high: float


def intensity_of(values: NDArray[Any]) -> Intensity:
    """Percentiles of the values that are finite."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    if not finite.size:
        return Intensity(float("nan"), float("nan"), float("nan"))
    low, median, high = np.percentile(finite, (0.5, 50, 99.5)).tolist()
    return Intensity(low, median, high)


def array_of(image: sitk.Image) -> NDArray[Any]:
    """(Z, Y, X) view of the voxels, which lives as long as the image does not change."""
    return sitk.GetArrayViewFromImage(image)


def read_volume(volume: Volume) -> tuple[sitk.Image, bool]:
    """Reads a volume as three-dimensional scalar image of at most 32 bits.

    Returns:
        The image, and whether its file has three dimensions, so that it could be used as it is.

    Raises:
        VolumeError: it cannot be read or is something else.
    """
    image = volume.read()
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError("colour", f"has {image.GetNumberOfComponentsPerPixel()} values per voxel", volume.id)
    size: Sequence[int] = image.GetSize()
    flat = len(size) == 4 and size[3] == 1
    if flat:
        image = sitk.Extract(image, [*size[:3], 0], [0, 0, 0, 0])
    if image.GetDimension() != 3:
        code = "2d" if image.GetDimension() < 3 else "4d"
        raise VolumeError(code, f"has {image.GetDimension()} dimensions, expected 3", volume.id)
    if wide := _WIDE.get(image.GetPixelID()):
        image = sitk.Cast(image, wide)
    return image, not flat
