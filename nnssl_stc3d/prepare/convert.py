"""Makes the files of one case: links what can be used as it is, converts what cannot, and draws the body mask."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnssl_stc3d.prepare.body_mask import foreground_mask
from nnssl_stc3d.prepare.case import Case, Channel, Header, Volume
from nnssl_stc3d.prepare.checks import (
    Problem,
    VolumeError,
    geometry_difference,
    header_problems,
    thinned,
    voxel_problems,
)
from nnssl_stc3d.prepare.formats import NIFTI_ENDINGS, check_nifti
from nnssl_stc3d.prepare.raw_dataset import link_file, write_json
from nnssl_stc3d.prepare.record import CaseRecord, Source
from nnssl_stc3d.prepare.voxels import array_of, intensity_of, read_volume

RECORDS = "cases"
"""Sub-folder with the record of each finished case."""


@dataclass(frozen=True)
class Job:
    """One case to make.

    Attributes:
        case: the case.
        channels: of the dataset.
        staging: folder in which the files are made.
        final: the dataset's folder, to which they will be moved.
        ending: of all files.
        links: "absolute", "relative" or "copy".
        accept: codes of problems that are none.
    """

    case: Case
    channels: tuple[Channel, ...]
    staging: Path
    final: Path
    ending: str
    links: str = "absolute"
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a case: a record, or what is wrong with it."""

    name: str
    record: CaseRecord | None
    problems: tuple[Problem, ...] = ()


def image_path(case: Case, channel: int, ending: str) -> str:
    """Path of an image below the dataset's folder."""
    return f"images{'Ts' if case.test else 'Tr'}/{case.name}_{channel:04d}{ending}"


def label_path(case: Case, ending: str) -> str:
    """Path of a label below the dataset's folder."""
    return f"labels{'Ts' if case.test else 'Tr'}/{case.name}{ending}"


def convert_case(job: Job) -> Outcome:
    """Makes all files of a case, its record last; leaves none behind if something is wrong with it.

    Raises:
        OSError: files cannot be written.
    """
    name = job.case.name
    done = False
    try:
        record = _convert(job)
        file = job.staging / RECORDS / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(record))
        done = True
        return Outcome(name, record)
    except VolumeError as error:
        return Outcome(name, None, (error.problem,))
    finally:
        if not done:
            for channel in range(len(job.case.channels)):
                (job.staging / image_path(job.case, channel, job.ending)).unlink(missing_ok=True)
            (job.staging / label_path(job.case, job.ending)).unlink(missing_ok=True)


def _convert(job: Job) -> CaseRecord:
    case = job.case
    sources = [_look(volume) for volume in case.channels]
    reference: Header | None = None
    mask: NDArray[np.uint8] | None = None
    intensity, linked = [], []
    for index, (volume, channel) in enumerate(zip(case.channels, job.channels)):
        image, usable = _read(volume)
        header = Header.of(image)
        array = array_of(image)
        _refuse(header_problems(header, channel.modality, volume.id), job.accept)
        _refuse(voxel_problems(array, channel.modality, volume.id), job.accept)
        if reference is None:
            reference = header
            if case.label is None and not case.test:
                mask = foreground_mask(array, channel.modality, axial_axis(header))
        elif difference := geometry_difference(reference, header):
            raise VolumeError("channels-differ", f"differs from the first channel: {difference}", volume.id)
        values = thinned(array)
        intensity.append(intensity_of(values if mask is None else values[thinned(mask) > 0]))
        linked.append(_put(job, image_path(case, index, job.ending), volume, image, reference, usable))
    if reference is None:
        raise VolumeError("channels", "has no image", case.name)
    label = None
    if case.label is not None:
        label = _look(case.label)
        _put_label(job, case.label, reference)
    elif mask is not None:
        write_image(_with_geometry(sitk.GetImageFromArray(mask), reference), job.staging / label_path(case, job.ending))
    files = [image_path(case, i, job.ending) for i in range(len(case.channels))]
    if mask is not None or label is not None:
        files.append(label_path(case, job.ending))
    percentiles = tuple((i.low, i.median, i.high) for i in intensity)
    return CaseRecord(case.name, tuple(sources), label, case.test, all(linked), tuple(files), percentiles)


def _refuse(problems: Sequence[Problem], accept: Sequence[str]) -> None:
    for problem in problems:
        if problem.code not in accept:
            raise VolumeError(problem.code, problem.message, problem.where)


def _look(volume: Volume) -> Source:
    try:
        return Source.of(volume, hashed=True)
    except PermissionError as error:
        raise VolumeError("no-permission", "may not be read", volume.id) from error
    except OSError as error:
        raise VolumeError("unreadable", f"cannot be opened: {error.strerror}", volume.id) from error


def _read(volume: Volume) -> tuple[sitk.Image, bool]:
    """Reads a volume, with every failure as one of its own: the disk that is written to is not to blame."""
    try:
        return read_volume(volume)
    except VolumeError:
        raise
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        raise VolumeError("unreadable", f"cannot be read ({error})"[:200], volume.id) from error


def _put(job: Job, relative: str, volume: Volume, image: sitk.Image, reference: Header, usable: bool) -> bool:
    """Links or writes an image; returns whether it is a link."""
    target = job.staging / relative
    same = _same_header(reference, Header.of(image))
    if usable and same and volume.link_ending == job.ending:
        target.unlink(missing_ok=True)
        return link_file(volume.files[0], target, job.links, job.final / relative)
    write_image(image if same else _with_geometry(image, reference), target)
    return False


def _put_label(job: Job, volume: Volume, reference: Header) -> None:
    case = job.case
    image, usable = _read(volume)
    if difference := geometry_difference(reference, Header.of(image)):
        raise VolumeError("label", f"the segmentation differs from the image: {difference}", volume.id)
    array = array_of(image)
    values = np.unique(array)
    if not np.array_equal(values, np.rint(values)) or values[0] < 0:
        raise VolumeError("label", "the segmentation has values that are no whole numbers from 0 on", volume.id)
    wanted = {int(v): int(v) for v in values} if case.label_values is None else case.label_values
    unknown = [int(v) for v in values if int(v) not in wanted]
    if unknown:
        raise VolumeError("label", f"the segmentation has the unexpected values {unknown[:10]}", volume.id)
    if all(wanted[int(v)] == v for v in values):
        _put(job, label_path(case, job.ending), volume, _integers(image, int(values[-1])), reference, usable)
        return
    mapped = np.zeros(array.shape, np.uint8 if max(wanted.values()) < 256 else np.uint16)
    for value in values:
        mapped[array == value] = wanted[int(value)]
    write_image(_with_geometry(sitk.GetImageFromArray(mapped), reference), job.staging / label_path(case, job.ending))


def _integers(image: sitk.Image, largest: int) -> sitk.Image:
    return sitk.Cast(image, sitk.sitkUInt8 if largest < 256 else sitk.sitkUInt16)


def _same_header(first: Header, second: Header) -> bool:
    """Whether nnU-Net takes two geometries, of which one is known to be near the other, for the same."""
    return all(
        np.allclose(getattr(first, key), getattr(second, key), rtol=1e-6, atol=1e-5)
        for key in ("spacing", "origin", "direction")
    )


def _with_geometry(image: sitk.Image, header: Header) -> sitk.Image:
    """Gives an image the geometry of another; changes the image itself."""
    image.SetSpacing(header.spacing)
    image.SetOrigin(header.origin)
    image.SetDirection(header.direction)
    return image


def axial_axis(header: Header) -> int:
    """Axis of the array (z, y, x) that runs most nearly from feet to head."""
    superior: list[Any] = [abs(header.direction[6 + axis]) for axis in range(3)]
    return 2 - int(np.argmax(superior))


def write_image(image: sitk.Image, path: Path) -> None:
    """Writes an image beside its place, looks whether it is whole, and moves it there.

    Raises:
        OSError: it could not be written. ITK itself says nothing when the disk fills up while it writes NIfTI.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part_{os.getpid()}_{path.name}")
    try:
        try:
            sitk.WriteImage(image, str(part), useCompression=not path.name.endswith(".nii"))
            if path.name.endswith(NIFTI_ENDINGS):
                check_nifti(part, str(path))
        except (RuntimeError, VolumeError) as error:
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{path.name} could not be written; {free / 2**20:.0f} MiB are free on its disk") from error
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
