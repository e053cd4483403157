"""The Medical Segmentation Decathlon, which nnU-Net converts itself: the commands to do so."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

PAGE = "http://medicaldecathlon.com"
LICENCE = "CC BY-SA 4.0"
_LAYOUT = "TaskXX_Name/dataset.json, imagesTr, labelsTr, imagesTs"


def msd_commands(folder: Path, number: int, name: str, unlabelled: bool) -> list[str]:
    """Commands that make an nnU-Net dataset of a task.

    Args:
        folder: TaskXX_Name.
        number: of the dataset that the user wants.
        name: of that dataset; nnU-Net's converter takes the task's name.
        unlabelled: body masks instead of the segmentations.

    Raises:
        ValueError: the folder is not a task of the Decathlon.
    """
    folder = folder.resolve()
    task = re.fullmatch(r"Task(\d{2})_(.+)", folder.name)
    missing = [part for part in ("dataset.json", "imagesTr", "labelsTr") if not (folder / part).exists()]
    if not task or missing:
        tasks = sorted(entry.name for entry in folder.glob("Task*_*")) if folder.is_dir() else []
        reason = f"it lacks {', '.join(missing)}" if task else "it is not named after a task"
        hint = f" Its folders {', '.join(tasks[:10])} are tasks." if tasks else ""
        raise ValueError(f"{folder} is not a task of the Decathlon: {reason}. Expected {_LAYOUT}.{hint} See {PAGE}.")
    convert = f"nnUNetv2_convert_MSD_dataset -i {shlex.quote(str(folder))}"
    if not unlabelled:
        return [f"{convert} -overwrite_id {number}"]
    description: dict[str, Any] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    names = [str(value) for _, value in sorted(description.get("modality", {"0": "CT"}).items(), key=_by_number)]
    modality = "CT" if names[0].upper() == "CT" else "MR"
    channels = f" --channels {shlex.join(names)}" if len(names) > 1 else ""
    converted = f"Dataset{int(task[1]):03d}_{task[2]}"
    return [
        convert,
        f'nnssl_stc3d prepare -i "$nnUNet_raw/{converted}/imagesTr" -d {number} -n {name} --modality {modality}'
        f"{channels}",
    ]


def _by_number(item: tuple[str, Any]) -> int:
    return int(item[0])
