"""Finds the folders of datasets for the commands."""

from __future__ import annotations

import os
from pathlib import Path


def preprocessed_folder(dataset: str) -> Path:
    """Folder of a dataset in nnUNet_preprocessed.

    Args:
        dataset: "802", "Dataset802" or "Dataset802_Name".

    Raises:
        ValueError: the variable is not set or names no folder; none or several datasets match.
    """
    return find_dataset_folder(environment_folder("nnUNet_preprocessed"), dataset)


def environment_folder(name: str) -> Path:
    """Folder that one of nnU-Net's variables names.

    Args:
        name: "nnUNet_raw" or "nnUNet_preprocessed".

    Raises:
        ValueError: the variable is not set or names no folder.
    """
    root = os.environ.get(name)
    if not root:
        kind = name.removeprefix("nnUNet_")
        raise ValueError(f"The environment variable {name} is not set. Set it to nnU-Net's folder of {kind} data.")
    if not Path(root).is_dir():
        raise ValueError(f"{name} is {root}, which is not a folder. Correct the variable or create the folder.")
    return Path(root)


def dataset_name(dataset: str) -> str:
    """Full name of a dataset that is there raw or preprocessed.

    Args:
        dataset: "802", "Dataset802" or "Dataset802_Name".

    Raises:
        ValueError: a variable is not set, or none or several match.
    """
    roots = [environment_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed")]
    pattern = _pattern(dataset)
    names = {folder.name for root in roots for folder in root.glob(pattern) if folder.is_dir()}
    names = {dataset} & names or names
    if len(names) != 1 or not next(iter(names))[7:10].isdigit():
        raise ValueError(
            f"Expected one dataset {pattern} in {roots[0]} or {roots[1]}, found "
            f"{', '.join(sorted(names)) or 'none'}. Give the number or full name of one that is there."
        )
    return names.pop()


def find_dataset_folder(root: Path, dataset: str) -> Path:
    """Finds a dataset's folder by number or name.

    Args:
        root: nnUNet_preprocessed or nnUNet_raw.
        dataset: "802", "Dataset802" or "Dataset802_Name".

    Raises:
        ValueError: none or several match.
    """
    pattern = _pattern(dataset)
    found = sorted(f for f in root.glob(pattern) if f.is_dir())
    exact = [f for f in found if f.name == dataset]
    if len(exact or found) != 1:
        raise ValueError(
            f"Expected one folder {root / pattern}, found {len(found)}"
            + (
                f": {', '.join(f.name for f in found)}. Give its full name."
                if found
                else ". Run nnUNetv2_plan_and_preprocess first."
            )
        )
    return (exact or found)[0]


def _pattern(dataset: str) -> str:
    return f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else f"{dataset}*"
