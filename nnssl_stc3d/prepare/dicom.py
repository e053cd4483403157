"""DICOM series: slices found one by one, put together by series, checked for gaps before they are stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnssl_stc3d.prepare.case import Header
from nnssl_stc3d.prepare.checks import Problem, VolumeError

ENDINGS = (".dcm", ".dicom", ".ima")
_PREAMBLE = 128
_FILE_META = 2048
# SOP classes that are images; structures, reports, plans and presentation states lie beside them.
_IMAGES = "1.2.840.10008.5.1.4.1.1."
_NOT_IMAGES = ("481.", "88.", "11.", "66", "104.", "9.", "67", "68", "45", "77.1.5.3")
# Slices of one direction agree up to the digits that a scanner writes.
_DIRECTION_TOLERANCE = 1e-3
_GAP_TOLERANCE = 0.05
_TILT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Slice:
    """What is known of one DICOM file.

    Attributes:
        path: the file.
        series: Series Instance UID.
        instance: SOP Instance UID.
        number: of the series, empty if not given.
        modality: such as "CT".
        localiser: whether the image type says so.
        frames: in this file.
        size: columns and rows.
        spacing: mm along columns and rows; None if they are not given, not positive or no numbers.
        position: of the first pixel's centre in mm; None if not given.
        axes: direction of rows and of columns, six numbers; None if not given.
        components: values per pixel.
        bytes: size of the file.
    """

    path: Path
    series: str
    instance: str
    number: str
    modality: str
    localiser: bool
    frames: int
    size: tuple[int, int]
    spacing: tuple[float, float] | None
    position: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    components: int
    bytes: int


@dataclass(frozen=True)
class SeriesVolume:
    """The slices of one series in one folder.

    Attributes:
        folder: that they lie in.
        names: of the files, in the order of their positions.
        series: Series Instance UID.
        alone: whether the folder holds no other series, so that the folder names it.
    """

    folder: Path
    names: tuple[str, ...]
    series: str
    alone: bool = True

    link_ending = None

    @property
    def id(self) -> str:
        """The folder, with the series' UID if there are others in it."""
        return str(self.folder) if self.alone else f"{self.folder}#{self.series}"

    @property
    def files(self) -> tuple[Path, ...]:
        """Its slices."""
        return tuple(self.folder / name for name in self.names)

    def read(self) -> sitk.Image:
        """Stacks the slices.

        Raises:
            VolumeError: a slice cannot be read.
        """
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(path) for path in self.files])
        try:
            return reader.Execute()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise VolumeError("unreadable", f"cannot be read ({line[:160]})", self.id) from error


def is_dicom(path: Path) -> bool:
    """Whether a file looks like DICOM: by its ending, or by its content if it has no telling ending."""
    suffix = path.suffix.lower()
    if suffix in ENDINGS:
        return True
    if (suffix and not suffix[1:].isdigit()) or path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"
    except OSError:
        return False


def read_slice(path: Path) -> Slice | None:
    """Reads the header of one file.

    Returns:
        What is in it; None for DICOM objects that are no images, such as structure sets and reports.

    Raises:
        VolumeError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_FILE_META)
    except PermissionError as error:
        raise VolumeError("no-permission", "may not be read", str(path)) from error
    except OSError as error:
        raise VolumeError("unreadable", f"cannot be opened: {error.strerror}", str(path)) from error
    kind = _sop_class(start)
    if kind and not (kind.startswith(_IMAGES) and not kind[len(_IMAGES) :].startswith(_NOT_IMAGES)):
        return None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError("unreadable", "is not a DICOM image that can be read", str(path)) from error
    keys = set(reader.GetMetaDataKeys())

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip() if tag in keys else ""

    def numbers(tag: str, count: int) -> tuple[float, ...] | None:
        try:
            values = tuple(float(v) for v in text(tag).split("\\"))
        except ValueError:
            return None
        return values if len(values) == count else None

    frames = text("0028|0008")
    columns, rows = reader.GetSize()[:2]
    width, height = reader.GetSpacing()[:2]
    # GDCM replaces what it cannot use by 1 mm.
    given = numbers("0028|0030", 2)
    usable = given is not None and all(0 < value < np.inf for value in given)
    return Slice(
        path=path,
        series=text("0020|000e"),
        instance=text("0008|0018"),
        number=text("0020|0011"),
        modality=text("0008|0060"),
        localiser="LOCALIZER" in text("0008|0008").upper().split("\\"),
        frames=int(frames) if frames.isdigit() else 1,
        size=(columns, rows),
        spacing=(width, height) if usable else None,
        position=numbers("0020|0032", 3),
        axes=numbers("0020|0037", 6),
        components=reader.GetNumberOfComponents(),
        bytes=path.stat().st_size,
    )


def _sop_class(start: bytes) -> str:
    """Media Storage SOP Class UID of a DICOM file's first bytes, empty if there is none.

    The meta header is always explicit little endian (DICOM PS3.10): tag (0002,0002), type UI, length, value.
    """
    at = start.find(b"\x02\x00\x02\x00UI", _PREAMBLE)
    if at < 0:
        return ""
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    return start[at + 8 : at + 8 + length].decode("latin-1").strip("\0 ")


Stacked = tuple[SeriesVolume, Header | None, list[Problem]]


def stack(slices: Sequence[Slice], alone: bool) -> Stacked:
    """Puts the slices of one series in order.

    Args:
        slices: of one series in one folder, at least one.
        alone: whether the folder holds no other series.

    Returns:
        The volume, its header (None if the slices do not make one), and what is wrong with it.
    """
    first = slices[0]
    ordered = sorted(slices, key=lambda s: s.path.name)

    def result(code: str, message: str) -> Stacked:
        volume = SeriesVolume(first.path.parent, tuple(s.path.name for s in ordered), first.series, alone)
        return volume, None, [Problem(code, message, volume.id)]

    if any(s.frames > 1 for s in slices):
        return result("multi-frame", f"is a DICOM file of {max(s.frames for s in slices)} frames")
    if any(s.localiser for s in slices):
        return result("localiser", f"is a localiser of {len(slices)} images")
    if len(slices) == 1:
        return result("2d", "is a DICOM series of one image")
    if any(s.components != 1 for s in slices):
        return result("colour", "is a series of colour images")
    if any(s.position is None or s.axes is None for s in slices):
        return result("unreadable", "has slices without position or orientation (0020,0032 and 0020,0037)")
    pixels = [s.spacing for s in slices if s.spacing is not None]
    if len(pixels) < len(slices):
        return result("spacing", "has slices without two positive numbers as pixel spacing in mm (0028,0030)")
    axes = np.array([s.axes for s in slices])
    spread = float(np.abs(axes - axes[0]).max())
    if spread > _DIRECTION_TOLERANCE:
        groups = len(np.unique(np.round(axes, 2), axis=0))
        return result("mixed-orientation", f"mixes slices of {groups} orientations")
    sizes = {(s.size, tuple(np.round(mm, 4))) for s, mm in zip(slices, pixels)}
    if len(sizes) > 1:
        return result("mixed-orientation", f"mixes slices of {len(sizes)} sizes or spacings")
    row, column = axes[0][:3], axes[0][3:]
    if abs(row @ column) > _DIRECTION_TOLERANCE:
        return result("not-orthonormal", f"has rows and columns that are not perpendicular (cosine {row @ column:.3f})")
    normal = np.cross(row, column)
    positions = np.array([s.position for s in slices])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    ordered = [slices[i] for i in order]
    steps = np.diff(heights[order])
    step = float(np.median(steps))
    same = steps < 0.01 * max(step, float(steps.max()), 1e-6)
    if same.any():
        return _repeated(result, ordered, same)
    gaps = np.flatnonzero(np.abs(steps - step) > _GAP_TOLERANCE * step)
    if len(gaps):
        missing = int(np.rint(steps[gaps] / step - 1).clip(0).sum())
        k = int(gaps[0])
        message = (
            f"has slices at uneven distances: {steps[k]:.4g} mm between {ordered[k].path.name} and "
            f"{ordered[k + 1].path.name}, {step:.4g} mm elsewhere" + (f"; {missing} are missing" if missing else "")
        )
        return result("missing-slices", message)
    drift = positions[order][-1] - positions[order][0]
    sideways = float(np.linalg.norm(drift - (drift @ normal) * normal) / (drift @ normal))
    if sideways > _TILT_TOLERANCE:
        return result("tilted", f"has slices that shift sideways by {np.degrees(np.arctan(sideways)):.1f} degrees")
    volume = SeriesVolume(first.path.parent, tuple(s.path.name for s in ordered), first.series, alone)
    spacing = (*pixels[0], float(drift @ normal) / (len(slices) - 1))
    direction = np.stack([row, column, normal], axis=1).ravel()
    header = Header(
        size=(*first.size, len(slices)),
        spacing=spacing,
        origin=tuple(positions[order][0].tolist()),
        direction=tuple(direction.tolist()),
        modality=first.modality,
    )
    return volume, header, []


def _repeated(result: Callable[[str, str], Stacked], ordered: Sequence[Slice], same: NDArray[np.bool_]) -> Stacked:
    """Several slices at one position: copies, or a series over time."""
    places = len(ordered) - int(same.sum())
    copies = len(ordered) - len({s.instance for s in ordered})
    if len(ordered) % places == 0 and not copies:
        return result("4d", f"has {len(ordered) // places} slices at each of {places} positions")
    k = int(np.flatnonzero(same)[0])
    names = f"{ordered[k].path.name} and {ordered[k + 1].path.name}"
    return result("duplicate-slices", f"has {int(same.sum())} slices at the position of another, such as {names}")
