"""What is handed from those who find volumes to the one who writes datasets: volumes, cases and the dataset they make.

A folder of scans (`scan.py`) and an importer of a public corpus differ only in how they make `Case` objects;
`writer.write_dataset` does all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import SimpleITK as sitk

BODY_LABELS = {"background": 0, "body": 1}
"""Labels of a dataset without labels: nnU-Net cannot preprocess images without any, so the body is one."""


@dataclass(frozen=True)
class Header:
    """What is known of a volume without its voxels; geometry in SimpleITK's order (x, y, z).

    Attributes:
        size: voxels along each axis.
        spacing: mm between voxel centres.
        origin: position of the first voxel's centre in mm, patient coordinates (left, posterior, superior).
        direction: unit vectors of the axes, row-major matrix whose columns are the axes.
        components: values in a voxel, 1 for a scalar image.
        pixel_type: as SimpleITK names it.
        modality: DICOM's modality, such as "CT"; empty where the format has none.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    components: int = 1
    pixel_type: str = ""
    modality: str = ""

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader, modality: str = "") -> Header:
        """Header of an image, or of a reader that has read the information."""
        return cls(
            size=tuple(image.GetSize()),
            spacing=tuple(image.GetSpacing()),
            origin=tuple(image.GetOrigin()),
            direction=tuple(image.GetDirection()),
            components=(
                image.GetNumberOfComponents()
                if isinstance(image, sitk.ImageFileReader)
                else image.GetNumberOfComponentsPerPixel()
            ),
            pixel_type=sitk.GetPixelIDValueAsString(
                image.GetPixelID() if isinstance(image, sitk.Image) else image.GetPixelIDValue()
            ),
            modality=modality,
        )

    def spatial(self) -> Header:
        """The same without a fourth axis of one entry, which some NIfTI files have."""
        if len(self.size) != 4 or self.size[3] != 1:
            return self
        matrix = [self.direction[4 * row + column] for row in range(3) for column in range(3)]
        return Header(
            self.size[:3],
            self.spacing[:3],
            self.origin[:3],
            tuple(matrix),
            self.components,
            self.pixel_type,
            self.modality,
        )

    @property
    def orientation(self) -> str:
        """Letters of the directions in which x, y and z grow, such as "LPS"; empty where they cannot be told."""
        if len(self.direction) != 9:
            return ""
        try:
            return str(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction))
        except RuntimeError:
            return ""


class Volume(Protocol):
    """A three-dimensional image somewhere on disk. Objects are pickled into other processes, so they hold no voxels.

    `formats.FileVolume`, `formats.NumpyVolume` and `dicom.SeriesVolume` are volumes; an importer may bring its own.
    """

    @property
    def id(self) -> str:
        """Where it lies, as a person would say it; another for each volume."""

    @property
    def files(self) -> Sequence[Path]:
        """Files that it is made of: their content decides whether it is the same volume."""

    @property
    def link_ending(self) -> str | None:
        """Ending under which the only file could be read by nnU-Net as it is, None if it has to be converted."""

    def read(self) -> sitk.Image:
        """Reads the voxels.

        Raises:
            VolumeError: they cannot be read.
        """


@dataclass(frozen=True)
class Channel:
    """One channel of all cases.

    Attributes:
        name: what the user calls it.
        modality: "CT", "MR", "PT", ... in DICOM's words; empty if unknown. Decides the checks and the body mask.
        suffix: of the file names that belong to it, before the ending, such as "_0000".
    """

    name: str
    modality: str = ""
    suffix: str = "_0000"

    @property
    def nnunet_name(self) -> str:
        """Entry of dataset.json's channel_names, from which nnU-Net takes the normalisation: "CT" for every CT."""
        return "CT" if self.modality == "CT" else self.name


@dataclass(frozen=True)
class Case:
    """One case to be written.

    Attributes:
        name: identifier, letters, digits, dot, dash and underscore only.
        channels: one volume per channel, all with one geometry.
        label: segmentation with the same geometry; None writes a body mask instead.
        label_values: value in the file -> value in the dataset; every value that occurs has to be named. None takes
            the values as they are.
        test: goes to imagesTs, with its label, if there is one, in labelsTs.
    """

    name: str
    channels: tuple[Volume, ...]
    label: Volume | None = None
    label_values: Mapping[int, int] | None = None
    test: bool = False


@dataclass(frozen=True)
class DatasetTarget:
    """The dataset that cases are written to.

    Attributes:
        folder: nnUNet_raw/DatasetXXX_Name.
        channels: of every case.
        labels: name -> value or, for regions, values. `BODY_LABELS` if the cases have no labels.
        splits: published splits as nnU-Net writes them, [{"train": [...], "val": [...]}, ...]; written to
            splits_final.json in the dataset's folder, from where nnU-Net's planner copies it.
        extra: further entries of dataset.json, such as "reference", "licence", "regions_class_order".
    """

    folder: Path
    channels: tuple[Channel, ...]
    labels: Mapping[str, Any] = field(default_factory=lambda: dict(BODY_LABELS))
    splits: Sequence[Mapping[str, Sequence[str]]] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def without_labels(self) -> bool:
        """Whether body masks are the labels."""
        return dict(self.labels) == BODY_LABELS
