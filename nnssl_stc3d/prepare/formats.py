"""Volumes in single files: NIfTI, NRRD, MetaImage (SimpleITK) and NumPy; their headers without their voxels."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnssl_stc3d.prepare.case import Header
from nnssl_stc3d.prepare.checks import VolumeError

NUMPY_ENDINGS = (".npy", ".npz")
NIFTI_ENDINGS = (".nii", ".nii.gz")
ITK_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".nhdr", ".mha", ".mhd")
ENDINGS = (*ITK_ENDINGS, *NUMPY_ENDINGS, ".nrrd.gz", ".mha.gz", ".npy.gz")
LINK_ENDINGS = (".nii.gz", ".nrrd", ".mha", ".nii")
"""What nnU-Net reads, in the order in which they are preferred. A header with a file beside it cannot be linked."""
PART_ENDINGS = (".raw", ".zraw", ".raw.gz")
"""Files that belong to a header of another ending."""

_BLOCK = 2**20
_MAX_HEADER = 2**16


def ending_of(path: Path) -> str | None:
    """The ending by which a file is known to be a volume, None if it is not."""
    name = path.name.lower()
    return max((e for e in ENDINGS if name.endswith(e)), key=len, default=None)


def stem_of(path: Path) -> str:
    """File name without that ending."""
    return path.name[: len(path.name) - len(ending_of(path) or path.suffix)]


@dataclass(frozen=True)
class FileVolume:
    """A file that SimpleITK reads.

    Attributes:
        path: the file.
    """

    path: Path

    @property
    def id(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and the one that holds its voxels if that is another."""
        voxels = self._voxel_file
        return (self.path,) if voxels is None else (self.path, voxels)

    @property
    def link_ending(self) -> str | None:
        """Its ending, if nnU-Net reads such a file wherever it is linked."""
        ending = next((e for e in LINK_ENDINGS if self.path.name.endswith(e)), None)
        return None if self._voxel_file is not None else ending

    @cached_property
    def _voxel_file(self) -> Path | None:
        """File that a MetaImage or NRRD header names, None if the voxels follow the header."""
        if ending_of(self.path) not in (".mhd", ".nhdr", ".nrrd", ".mha"):
            return None
        try:
            with self.path.open("rb") as file:
                start = file.read(_MAX_HEADER)
        except OSError:
            return None  # Reading the header says what is wrong.
        text = start.split(b"\n\n")[0].split(b"\r\n\r\n")[0].decode("latin-1")
        for line in text.splitlines():
            key, _, value = line.replace("=", ":", 1).partition(":")
            if key.strip().lower() in ("elementdatafile", "data file", "datafile"):
                name = value.strip()
                local = name.upper() == "LOCAL" or name.upper().startswith("LIST") or "%" in name
                return None if local else self.path.parent / name
        return None

    def header(self) -> Header:
        """Reads the header.

        Raises:
            VolumeError: it cannot be read, or is one that readers would silently replace.
        """
        with _plain(self.path) as path:
            _check_readable(path, self.id)
            if ending_of(path) in NIFTI_ENDINGS:
                check_nifti(path, self.id)
            voxels = self._voxel_file
            if voxels is not None and not voxels.is_file():
                raise VolumeError(
                    "unreadable", f"names {voxels.name} as the file of its voxels, which is missing", self.id
                )
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            try:
                reader.ReadImageInformation()
            except RuntimeError as error:
                raise _itk_error(error, self.id) from error
            return Header.of(reader)

    def read(self) -> sitk.Image:
        """Reads the voxels, after checking that compressed data is whole: ITK fills what is missing with zeros.

        Raises:
            VolumeError: the file cannot be read.
        """
        with _plain(self.path) as path:
            if ending_of(path) in NIFTI_ENDINGS:
                check_nifti(path, self.id)
                check_nifti_voxels(path, self.id)
            try:
                return sitk.ReadImage(str(path))
            except RuntimeError as error:
                raise _itk_error(error, self.id) from error


@dataclass(frozen=True)
class NumpyVolume:
    """An array (z, y, x) in a .npy or .npz file; its axes are the patient's.

    Attributes:
        path: the file. In .npz, an array `spacing` (z, y, x) in mm may lie beside the one array of voxels.
        spacing: mm along (z, y, x), for files without one of their own.
    """

    path: Path
    spacing: tuple[float, float, float] | None = None

    link_ending = None

    @property
    def id(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.path,)

    def header(self) -> Header:
        """Reads shape, type and spacing.

        Raises:
            VolumeError: they cannot be read, or there is no spacing.
        """
        with self._errors(), _plain(self.path) as path:
            _check_readable(path, self.id)
            if path.suffix.lower() == ".npz":
                with zipfile.ZipFile(path) as archive, archive.open(f"{self._voxel_key(path)}.npy") as file:
                    shape, dtype = _npy_header(file)
            else:
                with path.open("rb") as file:
                    shape, dtype = _npy_header(file)
            if dtype.kind not in "biuf":
                raise VolumeError("unreadable", f"has values of type {dtype}, expected numbers", self.id)
            spacing = self._spacing(path)
        size, identity = shape[::-1], np.eye(len(shape)).ravel()
        mm = spacing[::-1] if len(shape) == 3 else (1.0,) * len(shape)
        return Header(size, tuple(mm), (0.0,) * len(shape), tuple(identity), 1, str(dtype))

    def read(self) -> sitk.Image:
        """Reads the voxels.

        Raises:
            VolumeError: the file cannot be read.
        """
        with self._errors(), _plain(self.path) as path:
            if path.suffix.lower() == ".npz":
                with np.load(path, allow_pickle=False) as content:
                    array = content[self._voxel_key(path)]
            else:
                array = np.load(path, allow_pickle=False)
            spacing = self._spacing(path)
        if array.dtype == bool:
            array = array.astype(np.uint8)
        elif array.dtype == np.float16:
            array = array.astype(np.float32)
        image = sitk.GetImageFromArray(array.astype(array.dtype.newbyteorder("="), copy=False), isVector=False)
        if array.ndim == 3:
            image.SetSpacing([float(s) for s in spacing[::-1]])
        return image

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except VolumeError:
            raise
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise VolumeError("unreadable", f"cannot be read as NumPy array: {error}", self.id) from error

    def _voxel_key(self, path: Path) -> str:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        candidates = [key for key in keys if key not in ("spacing", "origin", "direction")]
        if len(candidates) != 1:
            raise VolumeError(
                "unreadable", f"expected one array beside spacing, found {', '.join(candidates)}", self.id
            )
        return candidates[0]

    def _spacing(self, path: Path) -> tuple[float, float, float]:
        spacing: Any = self.spacing
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as content:
                if "spacing" in content:
                    spacing = content["spacing"].ravel().tolist()
        if spacing is None:
            raise VolumeError("no-spacing", "has no spacing", self.id)
        if len(spacing) != 3:
            raise VolumeError("spacing", f"has {len(spacing)} numbers as spacing, expected three (z, y, x)", self.id)
        z, y, x = (float(s) for s in spacing)
        return z, y, x


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _check_readable(path: Path, where: str) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except PermissionError as error:
        raise VolumeError("no-permission", "may not be read", where) from error
    except OSError as error:
        raise VolumeError("unreadable", f"cannot be opened: {error.strerror}", where) from error
    if empty:
        raise VolumeError("truncated", "is empty", where)


def _itk_error(error: RuntimeError, where: str) -> VolumeError:
    text = str(error)
    if "orthonormal" in text:
        return VolumeError("not-orthonormal", "has axes that are not perpendicular", where)
    lines = [line for line in text.splitlines() if line.strip()]
    return VolumeError(
        "unreadable", f"cannot be read ({lines[-1].strip()[:160] if lines else 'no reason given'})", where
    )


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed by gzip, whatever its name says."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def check_nifti(path: Path, where: str) -> None:
    """Looks at the header itself: ITK replaces a spacing of zero by one, and missing voxels by zeros.

    Raises:
        VolumeError: it is no NIfTI file, a spacing is not positive, or it is shorter than its header says.
    """
    compressed = is_gzip(path)
    with _gzip_errors(where), gzip.open(path) if compressed else path.open("rb") as file:
        header = nifti_header(file.read(540))
    if header is None:
        raise VolumeError("unreadable", "is no NIfTI file", where)
    dimensions = int(header["dim"][0])
    shape = [int(n) for n in header["dim"][1 : 1 + dimensions]]
    spacing = [float(s) for s in header["pixdim"][1 : 1 + min(dimensions, 3)]]
    if not np.isfinite(spacing).all() or min(spacing, default=1) <= 0:
        numbers = " x ".join(f"{s:g}" for s in spacing)
        raise VolumeError("spacing", f"has the spacing {numbers} mm (x, y, z), expected positive numbers", where)
    expected = int(header["vox_offset"]) + int(np.prod(shape)) * int(header["bitpix"]) // 8
    if not compressed:
        actual = path.stat().st_size
        if actual < expected:
            raise VolumeError("truncated", f"has {actual} bytes, its header promises {expected}", where)
    elif (_gzip_length(path) - expected) % 2**32 and check_gzip(path, where) < expected:
        raise VolumeError("truncated", f"unpacks to less than the {expected} bytes that its header promises", where)


def nifti_header(start: bytes) -> Any:
    """Header of a NIfTI file from its first 540 bytes, None if it is none."""
    length = start[:4]
    kinds = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
    kind = kinds.get(int.from_bytes(length, "little")) or kinds.get(int.from_bytes(length, "big"))
    try:
        return None if kind is None else kind.from_fileobj(BytesIO(start), check=False)
    except nibabel.wrapstruct.WrapStructError:
        return None


def _gzip_length(path: Path) -> int:
    """Length of the unpacked data modulo 2^32, as the end of a gzip file of one member says."""
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def check_gzip(path: Path, where: str) -> int:
    """Unpacks a gzip file and compares its checksum.

    Returns:
        Bytes of the unpacked data.

    Raises:
        VolumeError: the file is incomplete or damaged.
    """
    with _gzip_errors(where), gzip.open(path) as file:
        return sum(len(block) for block in iter(lambda: file.read(_BLOCK), b""))


def check_nifti_voxels(path: Path, where: str) -> None:
    """Goes through the voxels as they are in the file, in which ITK replaces NaN by zero and passes over damage.

    Raises:
        VolumeError: a value is not finite, or the checksum of a gzip file is not that of its content.
    """
    compressed = is_gzip(path)
    with _gzip_errors(where), gzip.open(path) if compressed else path.open("rb") as file:
        header = nifti_header(file.read(540))
        if header is None:
            raise VolumeError("unreadable", "is no NIfTI file", where)
        dtype = header.get_data_dtype()
        if dtype.kind != "f" and not compressed:
            return
        file.seek(int(header["vox_offset"]))
        count = 0
        for block in iter(lambda: file.read(_BLOCK), b""):
            if dtype.kind == "f" and dtype.itemsize in (4, 8):
                values = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
                # The sum is not finite if a value is not; it may be so for large values too.
                if not np.isfinite(values.sum(dtype=np.float64)):
                    count += int((~np.isfinite(values)).sum())
    if count:
        raise VolumeError("not-finite", f"has {count} voxels that are NaN or infinite", where)


@contextmanager
def _gzip_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError("truncated", f"is not a complete gzip file ({error})", where) from error


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The file, unpacked to a temporary one if its readers know no gzip: .nrrd.gz, .mha.gz, .npy.gz."""
    ending = ending_of(path) or ""
    if not ending.endswith(".gz") or ending in NIFTI_ENDINGS:
        yield path
        return
    _check_readable(path, str(path))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name[:-3]
        with _gzip_errors(str(path)), gzip.open(path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file, _BLOCK)
        yield plain


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()
