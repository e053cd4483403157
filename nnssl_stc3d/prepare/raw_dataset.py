"""Writes datasets in nnU-Net's raw format: volumes, links, dataset.json; and the phantom datasets of the quickstart."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from numpy.typing import NDArray
from tqdm import tqdm

from nnssl_stc3d.files import written_whole
from nnssl_stc3d.prepare.case import BODY_LABELS
from nnssl_stc3d.prepare.phantom import LABELS, PhantomCase, PhantomConfig, generate_case

FILE_ENDING = ".nii.gz"


def write_volume(path: Path, array: NDArray[Any], spacing: tuple[float, float, float]) -> None:
    """Writes one volume.

    Args:
        path: file to write; its ending chooses the format.
        array: (Z, Y, X) voxels.
        spacing: voxel size in mm, (z, y, x).
    """
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    sitk.WriteImage(image, str(path), useCompression=True)


def write_dataset_json(
    folder: Path,
    labels: Mapping[str, Any],
    channel_names: Mapping[str, str],
    file_ending: str,
    num_training: int,
    **extra: Any,
) -> None:
    """Writes nnU-Net's dataset.json.

    Args:
        folder: the dataset's folder.
        labels: name -> value (or list of values for regions).
        channel_names: channel number as a string -> name.
        file_ending: such as ".nii.gz".
        num_training: cases in imagesTr.
        **extra: further entries, such as "regions_class_order".
    """
    content = {
        "channel_names": dict(channel_names),
        "labels": dict(labels),
        "numTraining": num_training,
        "file_ending": file_ending,
        **extra,
    }
    write_json(folder / "dataset.json", content)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file beside its place and moves it there, so that no reader sees half of it."""
    with written_whole(file) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def link_file(source: Path, target: Path, how: str = "absolute", place: Path | None = None) -> bool:
    """Links a file, or copies it where the system allows no links.

    Args:
        source: file that exists.
        target: file to make; must not exist.
        how: "absolute" or "relative" for what the link says, "copy" for a copy.
        place: where the link will be moved to, if that is not `target`.

    Returns:
        Whether it is a link.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if how != "copy":
        real = source.resolve()
        folder = (place or target).parent.resolve()
        try:
            os.symlink(os.path.relpath(real, folder) if how == "relative" else real, target)
            return True
        except (OSError, NotImplementedError, ValueError):
            # No links here, or (ValueError) no relative path from one Windows drive to another.
            pass
    part = target.with_name(f".part_{target.name}")
    try:
        shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return False


def _write_cases(
    folder: Path, images: str, labels: str, seeds: Iterable[int], config: PhantomConfig, body: bool, description: str
) -> int:
    """Generates cases into two sub-folders and returns their number; with `body` the labels are body masks."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / labels).mkdir(parents=True, exist_ok=True)
    count = 0
    for seed in tqdm(list(seeds), desc=description, unit="case"):
        case: PhantomCase = generate_case(seed, config)
        name = f"phantom_{seed:04d}"
        write_volume(folder / images / f"{name}_0000{FILE_ENDING}", case.image, case.spacing)
        write_volume(folder / labels / f"{name}{FILE_ENDING}", case.body if body else case.labels, case.spacing)
        count += 1
    return count


def write_phantom_datasets(
    unlabelled: Path,
    labelled: Path,
    num_unlabelled: int,
    num_labelled: int,
    num_test: int,
    seed: int = 0,
    config: PhantomConfig | None = None,
) -> None:
    """Writes an unlabelled and a few-labelled phantom dataset that share no individual.

    Args:
        unlabelled: folder of the first dataset; its labels are body masks.
        labelled: folder of the second dataset: imagesTr, labelsTr, imagesTs and labelsTs.
        num_unlabelled: cases of the first.
        num_labelled: training cases of the second.
        num_test: test cases of the second.
        seed: another seed gives other individuals, at most 10,000 for each.
        config: size and variation.

    Raises:
        ValueError: a number of cases is not positive, or there are more than 10,000.
    """
    total = num_unlabelled + num_labelled + num_test
    if min(num_unlabelled, num_labelled, num_test) < 1 or total > 10_000:
        raise ValueError(
            f"Each part needs a case and all together at most 10,000, got {num_unlabelled} unlabelled, "
            f"{num_labelled} labelled and "
            f"{num_test} test cases."
        )
    config = config or PhantomConfig()
    individuals = iter(range(10_000 * seed + 1, 10_000 * seed + 1 + total))

    def draw(count: int) -> list[int]:
        return [next(individuals) for _ in range(count)]

    channel = {"0": "CT"}
    count = _write_cases(unlabelled, "imagesTr", "labelsTr", draw(num_unlabelled), config, True, "unlabelled phantoms")
    write_dataset_json(unlabelled, BODY_LABELS, channel, FILE_ENDING, count)
    count = _write_cases(labelled, "imagesTr", "labelsTr", draw(num_labelled), config, False, "labelled phantoms")
    _write_cases(labelled, "imagesTs", "labelsTs", draw(num_test), config, False, "test phantoms")
    write_dataset_json(labelled, LABELS, channel, FILE_ENDING, count)
