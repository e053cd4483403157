"""Body masks of preprocessed cases: coarse, made once, kept in a folder beside the preprocessed data."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nnssl_stc3d.data.body import CELL_MM, BodyRule, body_mask
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.files import written_whole
from nnssl_stc3d.views.guide import Guide

# Masks of another version are made again.
_VERSION = 2
# Resampling with cubic splines leaves small values wherever there were zeros. Of the z-scores in the body about 4 % lie
# as close to zero, too few to matter for the share of a cell.
_ZERO = 0.05
_SUFFIX = ".npz"


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
    try:
        folder.mkdir(exist_ok=True)
        # Ranks may come to the same case at the same time.
        with written_whole(folder / f"{identifier}{_SUFFIX}", shared=True) as beside, beside.open("wb") as file:
            np.savez(
                file,
                packed=np.packbits(body),
                grid=np.array(body.shape),
                volume=np.array(shape),
                rule=np.array(key),
                told_apart=np.array(told_apart),
            )
    except PermissionError as error:
        raise PermissionError(
            f"body masks are kept in {folder}, which cannot be written ({error}). Make the folder of preprocessed data "
            "writable, or run once as a user who may write there."
        ) from error
    return told_apart


def _coarse(cases: CaseDataset, identifier: str, rule: BodyRule) -> np.ndarray:
    array = cases.open(identifier)
    return coarse_means(array, rule, rule.grid(array.shape[1:]))


def coarse_means(array: Any, rule: BodyRule, grid: tuple[int, int, int]) -> np.ndarray:
    """What :func:`nnssl_stc3d.data.body.body_mask` looks at: the mean of each cell of a volume.

    Args:
        array: ``(C, Z, Y, X)``, an array or a file of one; channels are read one after the other.
        rule: which channels to look at; for its kind "nonzero" the mean is the share of voxels that lie more
            than 0.05 from zero.
        grid: cells along each axis.

    Returns:
        ``(z, y, x)`` float32.
    """
    channels = range(array.shape[0]) if rule.channel is None else [rule.channel]
    total = torch.zeros(grid)
    for channel in channels:
        volume = torch.from_numpy(np.asarray(array[channel], dtype=np.float32))
        if rule.kind == "nonzero":
            volume = (volume.abs() > _ZERO).float()
        total += F.adaptive_avg_pool3d(volume[None], grid)[0] / len(channels)
    # What is not finite is found and named by the dataset's own check.
    return total.nan_to_num().numpy()
