"""Files of a dataset in nnU-Net's raw format."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets


@dataclass(frozen=True)
class RawCase:
    """Files of one labelled case.

    Attributes:
        name: identifier.
        images: one file per channel.
        label: segmentation.
    """

    name: str
    images: tuple[Path, ...]
    label: Path


def list_cases(folder: Path, description: dict[str, Any]) -> tuple[RawCase, ...]:
    """Finds the files of all training cases as nnU-Net does.

    Args:
        folder: DatasetXXX_Name.
        description: content of its dataset.json; files that lie elsewhere are listed there under "dataset".

    Returns:
        The cases, sorted by name. Whether their files exist is not checked.
    """
    if "dataset" in description:
        # The look-up writes absolute paths into the description that it is given.
        found = get_filenames_of_train_images_and_targets(str(folder), deepcopy(description))
        return tuple(
            RawCase(name, tuple(Path(i) for i in found[name]["images"]), Path(found[name]["label"]))
            for name in sorted(found)
        )
    # Listed here: nnU-Net forks a pool of processes for it, which can hang in a process that has threads.
    ending = description["file_ending"]
    images: dict[str, list[Path]] = {}
    for path in sorted((folder / "imagesTr").iterdir()):
        if path.name.endswith(ending):
            images.setdefault(path.name[: -len(ending) - len("_0000")], []).append(path)
    return tuple(
        RawCase(name, tuple(p for p in paths if _is_channel(p, name, ending)), folder / "labelsTr" / f"{name}{ending}")
        for name, paths in sorted(images.items())
    )


def _is_channel(path: Path, name: str, ending: str) -> bool:
    """Whether a file is named NAME_XXXX with four digits."""
    return re.fullmatch(re.escape(name) + r"_\d{4}" + re.escape(ending), path.name) is not None
