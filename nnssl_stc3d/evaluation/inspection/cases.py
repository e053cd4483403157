"""Cases that an inspection looks at: which, where their body is, and what is labelled in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnssl_stc3d.data.body import BodyRule, body_mask
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.guides import coarse_means
from nnssl_stc3d.data.voxel_labels import label_file, read_structures
from nnssl_stc3d.evaluation.inspection.scan_grid import ScanGrid
from nnssl_stc3d.transfer.differences import plans_of_checkpoint
from nnssl_stc3d.views.guide import Guide

# A map has about this many cells along the longest axis of the largest case.
_CELLS_ALONG = 64
# That the middle of a structure is looked for among.
_MOST_VOXELS = 1_000_000


@dataclass(frozen=True)
class Chosen:
    """The cases that are looked at.

    Attributes:
        identifiers: of the cases.
        unseen: whether none of the checkpoints was trained on any of them, as far as can be told.
        statement: how that is known, a sentence.
    """

    identifiers: list[str]
    unseen: bool
    statement: str


def choose_cases(
    identifiers: Sequence[str],
    checkpoints: Sequence[dict[str, Any]],
    dataset: str,
    splits: Sequence[Mapping[str, Sequence[str]]] | None,
    limit: int,
    wanted: str | None = None,
) -> Chosen:
    """Prefer cases that no checkpoint was trained on.

    Args:
        identifiers: all preprocessed cases.
        checkpoints: with the dataset and the fold that they were trained on. One without a pretraining's method was
            finetuned, and does not say by which splits and from what.
        dataset: name of the dataset of the cases.
        splits: content of its splits_final.json, if there is one.
        limit: cases at most, evenly spread over the sorted ones.
        wanted: a case that has to be among them, and comes first.

    Raises:
        ValueError: if the wanted case is not there, or there are fewer than two cases.
    """
    everything = sorted(identifiers)
    if wanted is not None and wanted not in everything:
        listed = ", ".join(everything[:8]) + (", ..." if len(everything) > 8 else "")
        raise ValueError(f"expected a case of {dataset}, got {wanted}. Its cases are {listed}.")
    if len(everything) < 2:
        raise ValueError(f"expected at least 2 preprocessed cases of {dataset}, got {len(everything)}")
    validation: set[str] = set(everything)
    doubts = []
    for checkpoint in checkpoints:
        reference = plans_of_checkpoint(checkpoint)
        if reference is not None and reference.plans.get("dataset_name") != dataset:
            continue
        fold = (checkpoint.get("init_args") or {}).get("fold")
        if not isinstance(fold, int) or splits is None or fold >= len(splits):
            doubts.append("on all cases of this dataset" if fold == "all" else "on cases that it does not name")
            continue
        validation &= set(splits[fold]["val"])
    usable = sorted(validation)
    if doubts:
        statement = f"The cases may have been trained on: a checkpoint was trained {doubts[0]}."
        usable = everything
    elif len(usable) < 2:
        statement = "The cases were trained on: the validation cases of the checkpoints' folds are fewer than two."
        usable = everything
    elif usable == everything:
        statement = "No checkpoint was trained on this dataset, by its name."
    else:
        statement = "No checkpoint was trained on these cases: they are validation cases of the checkpoints' folds."
    unseen = statement.startswith("No checkpoint")
    if unseen and not all(checkpoint.get("method") for checkpoint in checkpoints):
        unseen = False
        statement = (
            "Whether the cases were trained on cannot be told: a finetuned checkpoint does not say what it was "
            "pretrained on, nor by which splits its fold was drawn."
            + ("" if usable == everything else " They are validation cases of that fold in this dataset's splits.")
        )
    spread = [
        usable[i] for i in np.unique(np.linspace(0, len(usable) - 1, min(limit, len(usable))).round().astype(int))
    ]
    if wanted is not None:
        if unseen and wanted not in usable:
            unseen, statement = False, f"{wanted}, the case of the point, was trained on; no checkpoint saw the others."
        spread = [wanted, *(i for i in spread if i != wanted)][: max(2, limit)]
    return Chosen(spread, unseen, statement)


@dataclass
class InspectedCases:
    """Chosen cases with their bodies on the grid of the maps.

    Attributes:
        images: preprocessed images.
        names: identifiers in the order of the inspection.
        rule: how body is told from air.
        cell_mm: size of the grid's cells, about.
        label_names: value -> name, without the background; empty if nothing is labelled.
        ignored: value of voxels that nobody has labelled.
        axes: axis of the preprocessed arrays that each axis (z, y, x) of the scans has become.
    """

    images: CaseDataset
    names: list[str]
    rule: BodyRule
    cell_mm: float
    label_names: dict[int, str] = field(default_factory=dict)
    ignored: int | None = None
    axes: tuple[int, int, int] = (0, 1, 2)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres per voxel, (z, y, x)."""
        return self.rule.spacing

    def volume(self, name: str) -> np.ndarray:
        """The image of a case, ``(C, Z, Y, X)`` float32."""
        z, y, x = self.images.shape(name)
        return self.images.read(name, ((0, 0, 0), (z, y, x)))

    def in_scan(self, values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
        """A point, or sizes, along the axes of the scan instead of those of the array."""
        z, y, x = (float(values[axis]) for axis in self.axes)
        return z, y, x

    def scan_grid(self, name: str) -> ScanGrid | None:
        """Where the voxels of a case lie in its scan, if that is known."""
        return ScanGrid.read(self.images.folder / f"{name}.pkl", self.images.shape(name), self.axes)

    def axial(self, volume: np.ndarray, layer: float) -> np.ndarray:
        """The axial slice ``(Y, X)`` of the scan in a volume ``(Z, Y, X)``."""
        return self._turned(volume[self._layer(layer)])

    def axial_image(self, name: str, layer: float) -> np.ndarray:
        """The same of the first channel of a case, of which no more is read."""
        return self._turned(np.asarray(self.images.open(name)[(0,) + self._layer(layer)]))

    def _layer(self, layer: float) -> tuple[slice | int, ...]:
        return tuple(round(float(layer)) if axis == self.axes[0] else slice(None) for axis in range(3))

    def _turned(self, cut: np.ndarray) -> np.ndarray:
        return cut if self.axes[1] < self.axes[2] else cut.T

    def grid(self, name: str) -> tuple[int, int, int]:
        """Cells along each axis of a case."""
        shape = self.images.shape(name)
        z, y, x = (max(1, min(n, round(n * s / self.cell_mm))) for n, s in zip(shape, self.spacing))
        return z, y, x

    def guide(self, name: str) -> Guide:
        """The body of a case."""
        grid = self.grid(name)
        body, _ = body_mask(coarse_means(self.images.open(name), self.rule, grid), self.rule)
        z, y, x = (n / g for n, g in zip(self.images.shape(name), grid))
        return Guide((z, y, x), body)

    def labels(self, name: str) -> np.ndarray | None:
        """Structures ``(Z, Y, X)`` of a case as of ``read_structures``, or None if nothing is labelled."""
        if not self.label_names or not label_file(self.images.folder, name).is_file():
            return None
        return read_structures(self.images.folder, name, self.label_names, self.ignored)


def default_cell(shapes: Sequence[Sequence[int]], spacing: Sequence[float]) -> float:
    """Size of a cell in mm with which the largest case has 64 cells along its longest axis, a voxel at least."""
    longest = max(n * s for shape in shapes for n, s in zip(shape, spacing))
    return max(longest / _CELLS_ALONG, min(spacing))


def default_reference(guide: Guide, labels: np.ndarray | None, names: Mapping[int, str]) -> tuple[np.ndarray, str]:
    """A place to compare others with, if the user names none: the middle of the largest structure, or of the body.

    Args:
        guide: the body.
        labels: label map ``(Z, Y, X)`` of the case, or None.
        names: value -> name of the labels.

    Returns:
        Voxel ``(3,)`` of the structure, or centre of a cell of the body, that is closest to the centroid; and what that
        is, in words.
    """
    sizes = {} if labels is None else {value: int((labels == value).sum()) for value in names}
    largest = max(sizes, key=lambda value: sizes[value], default=0)
    if labels is not None and sizes.get(largest):
        flat = np.flatnonzero(labels == largest)
        # A large organ of a CT has tens of millions.
        flat = flat[:: -(-len(flat) // _MOST_VOXELS)]
        voxels = np.stack(np.unravel_index(flat, labels.shape), axis=1)
        return _most_central(voxels).astype(float), f"the middle of {names[largest]}, its largest structure"
    place = (_most_central(np.argwhere(guide.body)) + 0.5) * np.asarray(guide.cell) - 0.5
    return place, "the middle of the body"


def _most_central(points: np.ndarray) -> np.ndarray:
    """The point of ``(N, 3)`` that is closest to their mean."""
    return points[((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin()]
