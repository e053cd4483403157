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
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise ValueError(
            "The environment variable nnUNet_preprocessed is not set. Set it to nnU-Net's folder of preprocessed data."
        )
    if not Path(root).is_dir():
        raise ValueError(
            f"nnUNet_preprocessed is {root}, which is not a folder. Correct the variable or create the folder."
        )
    return find_dataset_folder(Path(root), dataset)


def find_dataset_folder(root: Path, dataset: str) -> Path:
    """Finds a dataset's folder by number or name.

    Args:
        root: nnUNet_preprocessed or nnUNet_raw.
        dataset: "802", "Dataset802" or "Dataset802_Name".

    Raises:
        ValueError: none or several match.
    """
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else f"{dataset}*"
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
