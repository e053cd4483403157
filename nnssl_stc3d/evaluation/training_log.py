"""Reads nnU-Net's training logs, which need no unpickling of checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
_VALUE = re.compile(rf": ([a-z]\w*) ({_NUMBER})\s*$")
_DICE = re.compile(r": Pseudo dice \[(.*)\]")
_IN_LIST = re.compile(rf"(?<![\w.])({_NUMBER})(?![\w.(])")

_EPOCH = re.compile(r": Epoch time: ([\d.]+) s\s*$")

Curves = dict[str, list[float]]


def read_training_log(folder: Path) -> Curves:
    """Reads one value per epoch for everything that a training reported.

    Args:
        folder: .../fold_k with training_log_*.txt; the newest counts.

    Returns:
        Name as in the log -> values. nnU-Net's pseudo-Dice appears as "pseudo_dice", averaged over the labels.

    Raises:
        ValueError: there is no log.
    """
    curves: Curves = {}
    for line in _newest_log(folder):
        value = _VALUE.search(line)
        if value:
            curves.setdefault(value.group(1), []).append(float(value.group(2)))
            continue
        dice = _DICE.search(line)
        if dice:
            curves.setdefault("pseudo_dice", []).append(_mean_of_list(dice.group(1)))
    return curves


def read_epoch_seconds(folder: Path) -> list[float]:
    """Reads how long each epoch of a training took, in seconds.

    Raises:
        ValueError: there is no log.
    """
    return [float(match.group(1)) for match in map(_EPOCH.search, _newest_log(folder)) if match]


def _newest_log(folder: Path) -> list[str]:
    logs = sorted(folder.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime)
    if not logs:
        raise ValueError(f"{folder} has no training_log_*.txt, so nothing was trained there.")
    return logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()


def _mean_of_list(text: str) -> float:
    """Mean of the numbers of a printed list, without those that are not a number."""
    numbers = [
        float(n)
        for n in _IN_LIST.findall(text.replace("np.float32(", " ").replace("np.float64(", " ").replace(")", " "))
    ]
    valid = [n for n in numbers if n == n]
    return sum(valid) / len(valid) if valid else float("nan")
