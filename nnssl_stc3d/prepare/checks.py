"""What can be wrong with a volume or a case: a code, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnssl_stc3d.prepare.case import Header

ADVICE = {
    "unreadable": "Open it in a viewer; export or copy it again.",
    "truncated": "The file is incomplete: copy or download it again.",
    "no-permission": "Change the permissions, or run as a user who may read it.",
    "2d": "Only volumes can be used. Slices of one volume belong into one file or DICOM series.",
    "4d": "Split it: one file per channel (NAME_0000, NAME_0001, ...), or one per time point.",
    "colour": "Convert it to one grey value per voxel, or leave it out.",
    "spacing": "Correct the spacing in the header; nnU-Net resamples by it.",
    "not-orthonormal": "Resample it to a grid with perpendicular axes, for example with dcm2niix or SimpleITK.",
    "few-slices": "Perhaps a localiser. Leave it out, or pass --accept few-slices.",
    "no-spacing": "NumPy files have no voxel size: pass --spacing Z Y X in mm, or put an array spacing into the .npz.",
    "name-collision": "Rename one of the files, or name the cases with --cases-csv.",
    "duplicate": "The content is the same: leave the copy out, or pass --accept duplicate.",
    "channels": "Give every case one file per channel, or list the cases with --cases-csv.",
    "channels-differ": "Resample the channels to one grid first.",
    "wrong-modality": "Move it to a dataset of its own, correct --modality, or pass --accept wrong-modality.",
    "not-finite": "Replace NaN and infinite values by what air has.",
    "constant": "There is nothing to learn from it: leave it out.",
    "label-map": "Looks like a segmentation. Leave segmentations out (--exclude), or pass --accept label-map.",
    "localiser": "A localiser is no volume: leave it out.",
    "missing-slices": "Export the series again, complete.",
    "duplicate-slices": "Keep one file for each position.",
    "mixed-orientation": "Split the series by orientation, and export each part as a series.",
    "tilted": "The gantry was tilted. Correct it, for example with dcm2niix.",
    "multi-frame": "Convert it to NIfTI, for example with dcm2niix.",
    "changed": "Nothing that was written is replaced. Give the new file another name, or write another dataset.",
    "label": "Correct the segmentation of this case.",
    "failed": "Set NNSSL_STC3D_DEBUG=1 and run with --jobs 1 to see where it failed.",
}
"""What to do, for every code."""
ACCEPTABLE = ("few-slices", "duplicate", "wrong-modality", "label-map")
"""Codes of cases that can be used if the user says so."""

MIN_SLICES = 8
# Header values are stored as 32-bit numbers or as text with few digits.
_ORTHONORMAL_TOLERANCE = 1e-3
_GEOMETRY_TOLERANCE = 1e-3
# Air has -1000 HU; nothing in a body but lung and bowel gas comes close.
_AIR_HU = -200
_AIR_SHARE = 0.05
_LABEL_VALUES = 16


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        code: key of `ADVICE`.
        message: what was found, and where the words do not say it, what was expected.
        where: file, series or case.
    """

    code: str
    message: str
    where: str = ""

    @property
    def advice(self) -> str:
        """What to do."""
        return ADVICE[self.code]

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class VolumeError(ValueError):
    """A volume that cannot be used; `problem` says why."""

    def __init__(self, code: str, message: str, where: str = "") -> None:
        super().__init__(code, message, where)
        self.problem = Problem(code, message, where)

    def __str__(self) -> str:
        return str(self.problem)


def header_problems(header: Header, modality: str, where: str) -> list[Problem]:
    """Checks what can be checked without the voxels.

    Args:
        header: of the volume.
        modality: that is expected; empty to take any.
        where: name of the volume in messages.
    """
    found: list[tuple[str, str]] = []
    header = header.spatial()
    dimensions = len(header.size)
    if dimensions > 3:
        found.append(("4d", f"has {header.size[3]} volumes in one file, size {_numbers(header.size)}"))
    elif dimensions < 3 or min(header.size) < 2:
        found.append(("2d", f"is a 2D image of {_numbers(header.size)} voxels"))
    elif min(header.size) < MIN_SLICES:
        found.append(("few-slices", f"has {_numbers(header.size)} voxels, fewer than {MIN_SLICES} along an axis"))
    if header.components != 1:
        found.append(("colour", f"has {header.components} values per voxel ({header.pixel_type})"))
    spacing = np.array(header.spacing[:3])
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        found.append(("spacing", f"has the spacing {_numbers(header.spacing)} mm (x, y, z), expected positive numbers"))
    elif dimensions == 3:
        matrix = np.array(header.direction).reshape(3, 3)
        error = np.abs(matrix.T @ matrix - np.eye(3)).max()
        if not error < _ORTHONORMAL_TOLERANCE:
            found.append(("not-orthonormal", f"has axes that are not perpendicular (cosine {error:.3f})"))
    if modality and header.modality and header.modality != modality:
        found.append(("wrong-modality", f"is {header.modality}, expected {modality}"))
    return [Problem(code, message, where) for code, message in found]


def geometry_difference(first: Header, second: Header) -> str | None:
    """Words for the difference of two geometries, None if they are the same up to rounding."""
    if first.size != second.size:
        return f"size {_numbers(second.size)} instead of {_numbers(first.size)}"
    if len(first.size) != 3:
        return None
    if not np.allclose(first.spacing, second.spacing, rtol=_GEOMETRY_TOLERANCE, atol=0):
        return f"spacing {_numbers(second.spacing)} instead of {_numbers(first.spacing)} mm"
    corners = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]) * (np.array(first.size) - 1)
    points = [
        np.array(h.origin) + corners * np.array(h.spacing) @ np.array(h.direction).reshape(3, 3).T
        for h in (first, second)
    ]
    shift = float(np.linalg.norm(points[0] - points[1], axis=1).max())
    if shift > max(0.1 * min(first.spacing), 0.01):
        return f"its corners lie up to {shift:.3g} mm elsewhere"
    return None


def voxel_problems(array: NDArray[Any], modality: str, where: str) -> list[Problem]:
    """Checks the values.

    Args:
        array: (Z, Y, X) voxels.
        modality: that is expected; empty to take any.
        where: name of the volume in messages.
    """
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        count = int((~np.isfinite(array)).sum())
        return [Problem("not-finite", f"has {count} voxels that are NaN or infinite", where)]
    if low == high:
        return [Problem("constant", f"every voxel is {low:g}", where)]
    sample = thinned(array)
    if low >= 0:
        values = np.unique(sample)
        if len(values) <= _LABEL_VALUES and np.array_equal(values, np.rint(values)):
            return [Problem("label-map", f"has only {len(values)} different values, all of them whole numbers", where)]
    if modality == "CT" and low > _AIR_HU:
        message = f"has values from {low:g} to {high:g}, and none below {_AIR_HU} HU as a CT with air or lung has"
        return [Problem("wrong-modality", message, where)]
    if modality in ("MR", "PT") and (dark := float((sample < _AIR_HU).mean())) > _AIR_SHARE:
        message = f"has {100 * dark:.0f} % of its values below {_AIR_HU}, like CT and unlike {modality}"
        return [Problem("wrong-modality", message, where)]
    return []


def thinned(array: NDArray[Any], voxels: int = 2**18) -> NDArray[Any]:
    """Every n-th voxel along each axis, about `voxels` in all."""
    step = max(1, int(round((array.size / voxels) ** (1 / 3))))
    return array[::step, ::step, ::step]


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
