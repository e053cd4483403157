"""Reads a user's own dataset in nnU-Net's raw format, checks it, and links parts of it into new datasets.

Nothing is written into the user's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnssl_stc3d.data.raw_files import RawCase, list_cases
from nnssl_stc3d.prepare.body_mask import foreground_mask
from nnssl_stc3d.prepare.case import BODY_LABELS
from nnssl_stc3d.prepare.raw_dataset import link_file, write_dataset_json

MIN_CASES = 4
# nnU-Net's five folds need five cases; one of them validates.
FEW_LABELS = 5
MAX_TEST = 8
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class RawDataset:
    """A checked dataset.

    Attributes:
        folder: where it lies.
        description: content of its dataset.json.
        cases: labelled training cases, sorted by name.
    """

    folder: Path
    description: dict[str, Any]
    cases: tuple[RawCase, ...]

    @property
    def file_ending(self) -> str:
        """Such as ".nii.gz"."""
        return str(self.description["file_ending"])

    def reader(self) -> BaseReaderWriter:
        """nnU-Net's reader for the dataset's files."""
        reader = determine_reader_writer_from_dataset_json(
            self.description, str(self.cases[0].images[0]), verbose=False
        )
        return reader()


@dataclass(frozen=True)
class Split:
    """Which case is used for what; the test cases are in neither of the others.

    Attributes:
        pretraining: cases whose images pretraining sees.
        labelled: cases whose labels finetuning sees.
        test: cases that are predicted.
    """

    pretraining: tuple[RawCase, ...]
    labelled: tuple[RawCase, ...]
    test: tuple[RawCase, ...]


def read_raw_dataset(folder: Path) -> RawDataset:
    """Reads a dataset and checks it.

    Args:
        folder: DatasetXXX_Name with dataset.json, imagesTr and labelsTr.

    Returns:
        The dataset.

    Raises:
        ValueError: a file or an entry is missing, the images are 2D, or there are fewer than four cases.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. Expected an nnU-Net raw dataset: DatasetXXX_Name with dataset.json, "
            f"imagesTr and labelsTr."
        )
    file = folder / "dataset.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing. nnU-Net's documentation/dataset_format.md describes it.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    missing = [key for key in ("channel_names", "labels", "file_ending") if key not in description]
    if missing:
        raise ValueError(
            f"{file} has no {', '.join(missing)}. nnU-Net's documentation/dataset_format.md describes the entries."
        )
    if "dataset" not in description:
        for name in ("imagesTr", "labelsTr"):
            if not (folder / name).is_dir():
                raise ValueError(
                    f"{folder / name} is missing. Expected the training images in imagesTr and their labels in "
                    f"labelsTr."
                )
    cases = list_cases(folder, description)
    _check_files(cases, len(description["channel_names"]), folder, description["file_ending"])
    dataset = RawDataset(folder, description, cases)
    image, _ = dataset.reader().read_images([str(i) for i in cases[0].images])
    if image.ndim != 4 or min(image.shape[1:]) < 2:
        raise ValueError(
            f"{cases[0].images[0]} is a 2D image (read as {image.shape}, channels first). Only 3D images are supported."
        )
    return dataset


def _check_files(cases: Sequence[RawCase], channels: int, folder: Path, ending: str) -> None:
    """Raises ValueError if files are missing or cases too few."""
    problems: list[str] = []
    for case in cases:
        if len(case.images) != channels:
            problems.append(f"{case.name}: {len(case.images)} image files, but dataset.json names {channels} channels")
        problems += [f"{case.name}: {path} is missing" for path in (*case.images, case.label) if not path.is_file()]
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise ValueError(f"The dataset {folder} is incomplete:\n  " + "\n  ".join(problems[:SHOWN_PROBLEMS]) + more)
    if len(cases) < MIN_CASES:
        raise ValueError(
            f"Found {len(cases)} labelled cases NAME_0000{ending} in {folder}, but at least {MIN_CASES} are "
            f"needed: two to finetune, two to test."
        )


def split_cases(cases: Sequence[RawCase], seed: int = 0) -> Split:
    """Draws test cases and few labelled cases.

    Args:
        cases: at least four.
        seed: of the draw.

    Returns:
        The split: about a third, but at most eight, for testing; five of the others with labels (all others if they
        are fewer); and all others for pretraining.
    """
    order = [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    num_test = max(2, min(MAX_TEST, len(order) // 3))
    rest = order[num_test:]

    def by_name(part: Sequence[RawCase]) -> tuple[RawCase, ...]:
        return tuple(sorted(part, key=lambda case: case.name))

    return Split(by_name(rest), by_name(rest[:FEW_LABELS]), by_name(order[:num_test]))


def _link_images(case: RawCase, folder: Path, ending: str) -> None:
    for channel, image in enumerate(case.images):
        link_file(image, folder / f"{case.name}_{channel:04d}{ending}")


def write_split_datasets(dataset: RawDataset, split: Split, unlabelled: Path, labelled: Path) -> None:
    """Writes the two datasets of a split: images are linked, body masks are the labels of the unlabelled one.

    Args:
        dataset: the user's dataset.
        split: of its cases.
        unlabelled: folder of the dataset to pretrain on.
        labelled: folder of the dataset to finetune and test on.

    Raises:
        ValueError: an image holds one value only, or values that are not finite.
    """
    ending, reader = dataset.file_ending, dataset.reader()
    inherited = {
        key: value
        for key, value in dataset.description.items()
        if key in ("regions_class_order", "overwrite_image_reader_writer")
    }
    modality = str(dataset.description["channel_names"].get("0", "")).upper()
    for case in tqdm(split.pretraining, desc="body masks", unit="case"):
        _link_images(case, unlabelled / "imagesTr", ending)
        image, properties = reader.read_images([str(i) for i in case.images])
        (unlabelled / "labelsTr").mkdir(parents=True, exist_ok=True)
        try:
            mask = foreground_mask(image[0], modality)
        except ValueError as error:
            raise ValueError(f"{case.name} ({case.images[0]}): {error}") from error
        reader.write_seg(mask, str(unlabelled / "labelsTr" / f"{case.name}{ending}"), properties)
    for part, images, labels in ((split.labelled, "imagesTr", "labelsTr"), (split.test, "imagesTs", "labelsTs")):
        for case in part:
            _link_images(case, labelled / images, ending)
            link_file(case.label, labelled / labels / f"{case.name}{ending}")
    channels = dataset.description["channel_names"]
    reader_entry = {k: v for k, v in inherited.items() if k == "overwrite_image_reader_writer"}
    write_dataset_json(unlabelled, BODY_LABELS, channels, ending, len(split.pretraining), **reader_entry)
    write_dataset_json(labelled, dataset.description["labels"], channels, ending, len(split.labelled), **inherited)
