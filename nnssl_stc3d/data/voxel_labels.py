"""Label maps of preprocessed cases: for looking at features only, a pretraining does not learn from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

UNKNOWN = -1
"""Where nobody has labelled anything; such a voxel may be of any structure."""

# Prepare writes body masks of unlabelled scans under this name; a pancreas has a body beside head and tail.
_BODY_MASK = {"body"}


def label_file(folder: str | Path, identifier: str) -> Path:
    """Where nnU-Net keeps the preprocessed label map of a case."""
    return Path(folder) / f"{identifier}_seg.b2nd"


def read_structures(
    folder: str | Path, identifier: str, values: Collection[int], ignored: int | None = None
) -> np.ndarray:
    """Structures of a case, ``(Z, Y, X)``: a value of ``values``, 0 for everything else, or :data:`UNKNOWN`.

    They are int8, or int16 if values need it: several large label maps may be in memory.

    Args:
        folder: of the preprocessed cases.
        identifier: of the case.
        values: of structures. nnU-Net's -1, outside of its mask of nonzero voxels, is background like the rest.
        ignored: value of the voxels that nobody has labelled, if there are such.
    """
    labels = np.asarray(blosc2.open(str(label_file(folder, identifier)), mode="r", dparams={"nthreads": 1})[0])
    kind = np.int8 if max(values, default=0) <= np.iinfo(np.int8).max else np.int16
    known = labels.astype(kind)
    known[~np.isin(labels, list(values))] = 0
    if ignored is not None:
        known[labels == ignored] = UNKNOWN
    return known


def ignored_value(dataset_json: Mapping[str, Any]) -> int | None:
    """Value of the voxels that nobody has labelled, nnU-Net's label "ignore"."""
    return dataset_json.get("labels", {}).get("ignore")


def anatomical_labels(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Value -> name of the labels of a dataset, without background, ignored voxels and body masks.

    Regions of several values keep the values apart, each named by the smallest region that holds it.
    """
    found: dict[int, tuple[int, str]] = {}
    for name, values in dataset_json.get("labels", {}).items():
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        for value in values:
            size = found.get(int(value), (len(values) + 1, ""))[0]
            if int(value) > 0 and name != "ignore" and len(values) < size:
                found[int(value)] = (len(values), name)
    if {name for _, name in found.values()} == _BODY_MASK:
        return {}
    return {value: name for value, (_, name) in sorted(found.items())}
