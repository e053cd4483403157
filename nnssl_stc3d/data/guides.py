"""Body masks of preprocessed cases: coarse, made once, kept in a folder beside the preprocessed data."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.views.guide import Guide

CELL_MM = 4.0
"""Size of the guides' cells: fine enough for skin, coarse enough for thousands of volumes."""

_BODY_HU = -500.0
# Of the range of intensities that nnU-Net's clipping leaves: noise of clipped air stays below it.
_CLIPPING_MARGIN = 0.02
# Air is the darkest there is: its mean lies this close to the minimum, as a share of the body's. Measured: at most .04
# in CT and .22 in MR; in crops that show no air, where Otsu separates tissue from tissue, at least .42.
_DARK = 1 / 3
_HISTOGRAM_BINS = 256
# Masks of another version are made again.
_VERSION = 1
_SUFFIX = ".npz"


@dataclass(frozen=True)
class BodyRule:
    """How body is told from air in the values of a plan's preprocessed data.

    Attributes:
        kind: "threshold" above a fixed value, "otsu" above each volume's own, "nonzero" wherever the normalisation,
            which was restricted to nonzero voxels, did not leave zeros.
        channel: that is looked at; None takes the mean of all.
        threshold: in preprocessed values, kind "threshold" only.
        spacing: mm per voxel, (z, y, x) of the preprocessed array.
        axial: axis of the array along which a scan cuts through the body, so that air at its ends may be lung.
        description: what the log says.
    """

    kind: str
    channel: int | None
    threshold: float | None
    spacing: tuple[float, float, float]
    axial: int
    description: str

    @classmethod
    def of_plan(cls, plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> BodyRule:
        """Read the rule from nnU-Net's plans.

        Args:
            plans: content of a plans file.
            configuration: the resolved configuration, with normalisation schemes and spacing.
        """
        z, y, x = configuration["spacing"]
        spacing, axial = (float(z), float(y), float(x)), list(plans["transpose_forward"]).index(0)
        schemes = list(configuration["normalization_schemes"])
        properties = plans.get("foreground_intensity_properties_per_channel") or {}
        for channel, scheme in enumerate(schemes):
            known = properties.get(str(channel))
            if scheme == "CTNormalization" and known:
                threshold, description = _ct_threshold(known)
                return cls("threshold", channel, threshold, spacing, axial, description)
        masked = [channel for channel, use in enumerate(configuration["use_mask_for_norm"]) if use]
        if masked:
            return cls("nonzero", masked[0], None, spacing, axial, "the nonzero voxels")
        description = "brighter than Otsu's threshold of each volume, since the plan has no CT normalisation"
        return cls("otsu", None, None, spacing, axial, description)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Cells along each axis of a volume of ``(Z, Y, X)`` voxels."""
        z, y, x = (max(1, min(n, round(n * s / CELL_MM))) for n, s in zip(shape, self.spacing))
        return z, y, x


def _ct_threshold(properties: Mapping[str, float]) -> tuple[float, str]:
    """Preprocessed value that separates body and air, undoing nnU-Net's CT normalisation."""
    low, high = float(properties["percentile_00_5"]), float(properties["percentile_99_5"])
    hounsfield, description = _BODY_HU, f"above {_BODY_HU:g} HU"
    lowest = low + _CLIPPING_MARGIN * (high - low)
    if lowest > hounsfield:
        hounsfield = lowest
        description = f"above {lowest:.0f} HU, because the plan's normalisation clips at {low:.0f} HU"
    return (hounsfield - float(properties["mean"])) / max(float(properties["std"]), 1e-8), description


def body_mask(coarse: np.ndarray, rule: BodyRule) -> tuple[np.ndarray, bool]:
    """The body: everything but the air around it, largest component (vox2vec 3.1, on a coarse grid).

    Air belongs to the outside if it is connected to a side of the volume other than the two ends of the axial axis,
    where lungs may be cut: air inside the body is body.

    Args:
        coarse: ``(z, y, x)`` mean value of each cell; for kind "nonzero" the share of nonzero voxels.
        rule: how values tell body from air.

    Returns:
        ``(z, y, x)`` bool, and whether there was something to tell apart; if not, everything is body.
    """
    threshold = 0.5 if rule.kind == "nonzero" else rule.threshold
    if threshold is None:
        threshold = otsu_threshold(coarse)
    air = coarse <= threshold
    labels, _ = ndimage.label(air)
    sides = [np.take(labels, end, axis) for axis in range(3) if axis != rule.axial for end in (0, -1)]
    outside = np.unique(np.concatenate([side.ravel() for side in sides]))
    body = ~(air & np.isin(labels, outside[outside > 0]))
    parts, count = ndimage.label(body)
    if count > 1:
        body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    apart = bool(body.any() and not body.all())
    if apart and rule.kind == "otsu":
        dark, bright = (float(coarse[where].mean() - coarse.min()) for where in (~body, body))
        apart = dark < _DARK * bright
    return (body, True) if apart else (np.ones_like(body), False)


def otsu_threshold(values: np.ndarray) -> float:
    """Threshold of largest variance between two classes (Otsu 1979); the lowest value if all are equal."""
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    between = np.where((below > 0) & (above > 0), between, -1.0)
    if between.max() <= 0:
        return float(np.min(values))
    # Empty bins between the classes are equally good: their middle.
    return float(edges[1:][between >= between.max() * (1 - 1e-9)].mean())


class GuideFolder(Mapping[str, Guide]):
    """Guides of cases in a folder, read when they are asked for, so that a data set of any size costs no memory.

    Args:
        folder: of the files.
        identifiers: cases that have a file in it.
    """

    def __init__(self, folder: str | Path, identifiers: Sequence[str]) -> None:
        self.folder = Path(folder)
        self._identifiers = frozenset(identifiers)

    def __getitem__(self, identifier: str) -> Guide:
        if identifier not in self._identifiers:
            raise KeyError(identifier)
        with np.load(self.folder / f"{identifier}{_SUFFIX}") as file:
            grid, volume = file["grid"], file["volume"]
            body = np.unpackbits(file["packed"], count=int(grid.prod())).reshape(grid).astype(bool)
        z, y, x = (volume / grid).tolist()
        return Guide((z, y, x), body)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._identifiers))

    def __len__(self) -> int:
        return len(self._identifiers)


def guide_folder(preprocessed: str | Path) -> Path:
    """Folder of the body masks of a configuration; nnU-Net would take files among the cases for cases."""
    return Path(preprocessed).with_name(f"{Path(preprocessed).name}_body")


def body_guides(
    cases: CaseDataset,
    rule: BodyRule,
    log: Callable[[str], object] = print,
    workers: int = 1,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> GuideFolder:
    """Body masks of all cases: those in the cache, the others made now.

    A mask is made again if it belongs to another plan or is older than its case.

    Args:
        cases: preprocessed cases.
        rule: of their plan.
        log: gets one line on how the body was found.
        workers: cases to look at in parallel.
        share: (rank, ranks); a rank begins with its own share of the cases and makes others only if they are missing.
        progress: show a bar.

    Raises:
        PermissionError: if masks are missing and their folder cannot be written.
    """
    folder = guide_folder(cases.folder)
    key = json.dumps({**asdict(rule), "cell_mm": CELL_MM, "version": _VERSION})
    rank, ranks = share
    order = [name for turn in range(ranks) for name in cases.identifiers[(rank + turn) % ranks :: ranks]]

    def make(identifier: str) -> bool:
        found = _cached(folder, cases, identifier, key)
        return _write(folder, cases, identifier, rule, key) if found is None else found

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(tqdm(pool.map(make, order), "body masks", len(order), disable=not progress, leave=False))
    log(f"The body is {rule.description}, without the air around it.")
    if not all(results):
        plain = sorted(i for i, told_apart in zip(order, results) if not told_apart)
        log(f"No air was told from the body in {len(plain)} of {len(order)} cases (first: {plain[0]}): all is body.")
    return GuideFolder(folder, cases.identifiers)


def _cached(folder: Path, cases: CaseDataset, identifier: str, key: str) -> bool | None:
    """Whether body and air were told apart in a case, or None if its mask has to be made."""
    path = folder / f"{identifier}{_SUFFIX}"
    try:
        if path.stat().st_mtime < cases.modified(identifier):
            return None
        with np.load(path) as file:
            current = str(file["rule"]) == key and tuple(file["volume"]) == cases.shape(identifier)
            return bool(file["told_apart"]) if current else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # Missing, or what an older version or a full disk left: it is made again.
        return None


def _write(folder: Path, cases: CaseDataset, identifier: str, rule: BodyRule, key: str) -> bool:
    shape = cases.shape(identifier)
    body, told_apart = body_mask(_coarse(cases, identifier, rule), rule)
    # Ranks may come to the same case at the same time.
    partial = folder / f"{identifier}.{os.getpid()}.tmp"
    try:
        folder.mkdir(exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    packed=np.packbits(body),
                    grid=np.array(body.shape),
                    volume=np.array(shape),
                    rule=np.array(key),
                    told_apart=np.array(told_apart),
                )
            partial.replace(folder / f"{identifier}{_SUFFIX}")
        finally:
            partial.unlink(missing_ok=True)
    except PermissionError as error:
        raise PermissionError(
            f"body masks are kept in {folder}, which cannot be written ({error}). Make the folder of preprocessed data "
            "writable, or run once as a user who may write there."
        ) from error
    return told_apart


def _coarse(cases: CaseDataset, identifier: str, rule: BodyRule) -> np.ndarray:
    """Mean of each cell of a case ``(z, y, x)`` float32; for kind "nonzero" the share of nonzero voxels."""
    array = cases.open(identifier)
    channels = range(array.shape[0]) if rule.channel is None else [rule.channel]
    grid = rule.grid(array.shape[1:])
    total = torch.zeros(grid)
    for channel in channels:
        volume = torch.from_numpy(np.asarray(array[channel], dtype=np.float32))
        if rule.kind == "nonzero":
            volume = (volume != 0).float()
        total += F.adaptive_avg_pool3d(volume[None], grid)[0] / len(channels)
    # What is not finite is found and named by the dataset's own check.
    return total.nan_to_num().numpy()
