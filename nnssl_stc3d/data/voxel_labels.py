"""Label maps of preprocessed cases: for looking at features only, a pretraining does not learn from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

UNKNOWN = -1
"""Where nobody has labelled anything; such a voxel may be of any structure."""

# Of labels that are no anatomy: prepare writes body masks of unlabelled scans under this name.
_NO_ANATOMY = ("ignore", "body")


def label_file(folder: str | Path, identifier: str) -> Path:
    """Where nnU-Net keeps the preprocessed label map of a case."""
    return Path(folder) / f"{identifier}_seg.b2nd"


def read_structures(
    folder: str | Path, identifier: str, values: Collection[int], ignored: int | None = None
) -> np.ndarray:
    """Structures of a case, ``(Z, Y, X)`` int64: a value of ``values``, 0 for everything else, or :data:`UNKNOWN`.

    Args:
        folder: of the preprocessed cases.
        identifier: of the case.
        values: of structures. nnU-Net's -1, outside of its mask of nonzero voxels, is background like the rest.
        ignored: value of the voxels that nobody has labelled, if there are such.
    """
    labels = np.asarray(blosc2.open(str(label_file(folder, identifier)), mode="r", dparams={"nthreads": 1})[0])
    known = np.where(np.isin(labels, list(values)), labels, 0).astype(np.int64)
    return known if ignored is None else np.where(labels == ignored, UNKNOWN, known)


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
            if int(value) > 0 and name not in _NO_ANATOMY and len(values) < size:
                found[int(value)] = (len(values), name)
    return {value: name for value, (_, name) in sorted(found.items())}
