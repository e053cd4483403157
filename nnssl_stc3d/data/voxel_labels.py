"""Label maps of preprocessed cases: for looking at features only, a pretraining does not learn from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

# Of labels that are no anatomy: prepare writes body masks of unlabelled scans under this name.
_NO_ANATOMY = ("ignore", "body")


def label_file(folder: str | Path, identifier: str) -> Path:
    """Where nnU-Net keeps the preprocessed label map of a case."""
    return Path(folder) / f"{identifier}_seg.b2nd"


def read_labels(folder: str | Path, identifier: str) -> np.ndarray:
    """Label map of a case, ``(Z, Y, X)``; -1 is outside of nnU-Net's mask of nonzero voxels."""
    return np.asarray(blosc2.open(str(label_file(folder, identifier)), mode="r", dparams={"nthreads": 1})[0])


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
