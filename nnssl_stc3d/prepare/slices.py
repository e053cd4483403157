"""Volumes whose slices are single images without any geometry, such as PNG and JPEG."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnssl_stc3d.prepare.case import Header
from nnssl_stc3d.prepare.checks import VolumeError


@dataclass(frozen=True)
class SliceStack:
    """Images of one folder, stacked by the numbers that are their names.

    Attributes:
        folder: that they lie in.
        names: of the files, in the order of their numbers.
        spacing: mm along (z, y, x); the files have none.
    """

    folder: Path
    names: tuple[str, ...]
    spacing: tuple[float, float, float]

    link_ending = None

    @classmethod
    def of(cls, files: Iterable[Path], spacing: tuple[float, float, float]) -> SliceStack:
        """Puts the files of one folder in order.

        Args:
            files: whose names are numbers.
            spacing: mm along (z, y, x).
        """
        ordered = sorted(files, key=lambda path: (int(path.stem), path.name))
        z, y, x = spacing
        return cls(ordered[0].parent, tuple(path.name for path in ordered), (z, y, x))

    @property
    def id(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """Its slices."""
        return tuple(self.folder / name for name in self.names)

    def header(self) -> Header:
        """Reads the headers of all slices.

        Raises:
            VolumeError: there is one slice only, one cannot be read, sizes differ, or numbers are missing or repeated.
        """
        if len(self.names) < 2:
            raise VolumeError("2d", "is a single slice", self.id)
        steps = np.diff([int(Path(name).stem) for name in self.names])
        if (steps == 0).any():
            k = int(np.flatnonzero(steps == 0)[0])
            raise VolumeError("duplicate-slices", f"has {self.names[k]} and {self.names[k + 1]}", self.id)
        if (steps != steps[0]).any():
            k = int(np.flatnonzero(steps != np.median(steps))[0])
            raise VolumeError(
                "missing-slices", f"has no slice between {self.names[k]} and {self.names[k + 1]}", self.id
            )
        reader = sitk.ImageFileReader()
        sizes: dict[tuple[int, ...], str] = {}
        for path in self.files:
            reader.SetFileName(str(path))
            try:
                reader.ReadImageInformation()
            except RuntimeError as error:
                raise _unreadable(path) from error
            sizes.setdefault(tuple(reader.GetSize()[:2]), path.name)
        if len(sizes) > 1:
            words = ", ".join(f"{w} x {h} ({name})" for (w, h), name in sizes.items())
            raise VolumeError("mixed-orientation", f"mixes slices of {len(sizes)} sizes: {words}", self.id)
        # Colour is looked at when the voxels are read: grey images are often stored as colour.
        return Header(
            size=(*next(iter(sizes)), len(self.names)),
            spacing=self.spacing[::-1],
            origin=(0.0, 0.0, 0.0),
            direction=tuple(np.eye(3).ravel().tolist()),
            pixel_type=sitk.GetPixelIDValueAsString(reader.GetPixelID()),
        )

    def read(self) -> sitk.Image:
        """Stacks the slices; the axes are taken for the patient's, and the first slice lies at the origin.

        Raises:
            VolumeError: a slice cannot be read, has another size, or is really coloured.
        """
        slices = []
        for path in self.files:
            try:
                array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
            except RuntimeError as error:
                raise _unreadable(path) from error
            if array.ndim == 3:
                # The second or fourth value is opacity.
                grey = array[..., : 3 if array.shape[-1] >= 3 else 1]
                if (grey != grey[..., :1]).any():
                    raise VolumeError("colour", "is a coloured image", str(path))
                array = array[..., 0]
            slices.append(array)
        if len({array.shape for array in slices}) > 1:
            raise VolumeError("mixed-orientation", "mixes slices of several sizes", self.id)
        image = sitk.GetImageFromArray(np.stack(slices))
        image.SetSpacing(self.spacing[::-1])
        return image


def _unreadable(path: Path) -> VolumeError:
    return VolumeError("unreadable", "is no image that can be read", str(path))
