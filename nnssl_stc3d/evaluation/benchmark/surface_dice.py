"""Normalised surface Dice of predicted cases, by MONAI.

Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", 2021: the share of both
surfaces that lies within a tolerance of the other. As in DeepMind's implementation, surfaces are weighed by their area.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from nnssl_stc3d.evaluation.benchmark.workspace import write_whole
from nnssl_stc3d.evaluation.volumes import read_volume

MISSING = "normalised surface Dice needs MONAI: pip install 'nnssl_stc3d[monai]'"
Structures = Mapping[str, int | Sequence[int]]


def is_available() -> bool:
    """Whether MONAI is installed."""
    return importlib.util.find_spec("monai") is not None


def surface_dice(
    truth: Path, prediction: Path, structures: Structures, tolerance: float, ignored: int | None = None
) -> dict[str, float]:
    """Normalised surface Dice of one case.

    Args:
        truth: reference label map.
        prediction: predicted label map on the same grid.
        structures: structure -> its value in the label maps, or values for a region.
        tolerance: distance in mm up to which a surface counts as met.
        ignored: value of voxels in the truth that nobody has labelled; what is predicted there does not count.

    Returns:
        Structure -> score of 0 to 1; NaN where neither map has the structure, 0 where one has it.

    Raises:
        ValueError: MONAI is missing, or the maps have different sizes.
    """
    if not is_available():
        raise ValueError(MISSING)
    from monai.metrics import compute_surface_dice

    (real_map, spacing), (predicted_map, _) = map(read_volume, (truth, prediction))
    maps = [real_map, predicted_map]
    if real_map.shape != predicted_map.shape:
        raise ValueError(
            f"expected {prediction} to have the size of {truth}, {real_map.shape}, got {predicted_map.shape}"
        )
    scores = {}
    for name, values in structures.items():
        masks = [np.isin(labels, values) & (maps[0] != ignored) for labels in maps]
        # Only the box around both matters, and a margin that keeps surfaces whole.
        box = _box(masks[0] | masks[1])
        real, predicted = (torch.from_numpy(np.pad(mask[box], 1)[None, None]) for mask in masks)
        scores[name] = float(
            compute_surface_dice(
                predicted,
                real,
                class_thresholds=[tolerance],
                include_background=True,
                spacing=spacing,
                use_subvoxels=True,
            )
        )
    return scores


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """Slices of the smallest box around a mask; one voxel for an empty mask."""
    if not mask.any():
        return (slice(0, 1),) * mask.ndim
    return tuple(slice(int(i.min()), int(i.max()) + 1) for i in mask.nonzero())


def folder_surface_dice(
    truths: Path,
    predictions: Path,
    structures: Structures,
    tolerance: float,
    ending: str,
    ignored: int | None = None,
) -> dict[str, dict[str, float]]:
    """The same for every case of a folder of predictions. What was measured is kept beside them.

    Args:
        truths: folder of reference label maps.
        predictions: folder of predictions with the same names.
        structures: structure -> value or values.
        tolerance: in mm.
        ending: of the files, behind the names of the cases.
        ignored: value in the truth that is ignored.

    Returns:
        Case -> structure -> score.
    """
    kept = predictions / f"surface_dice_{tolerance:g}mm.json"
    if kept.is_file():
        known: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8"))
        return known
    scores = {
        file.name.removesuffix(ending): surface_dice(file, predictions / file.name, structures, tolerance, ignored)
        for file in sorted(truths.glob(f"*{ending}"))
    }
    write_whole(kept, json.dumps(scores, indent=1) + "\n")
    return scores
