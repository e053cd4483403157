"""Preprocessed cases of nnU-Net without their segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import blosc2
import numpy as np
from tqdm import tqdm

from nnssl_stc3d.views.samplers import Box, check_volume

_EXTENSION = ".b2nd"
_FULL_CHECK_BYTES = 2 * 1024**3


class CaseDataset:
    """Images of preprocessed cases; opened lazily, so that reading a box decompresses only the blocks it touches.

    Args:
        folder: nnU-Net's folder of preprocessed data of one configuration.
        identifiers: cases to use.

    Raises:
        FileNotFoundError: if the folder or a case is missing, with the command that makes it.
    """

    def __init__(self, folder: str | Path, identifiers: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.identifiers = sorted(identifiers)
        self._shapes: dict[str, tuple[int, ...]] = {}
        missing = [i for i in self.identifiers if not self._path(i).is_file()]
        if not self.identifiers or missing:
            what = f"{len(missing)} cases are missing, the first is {missing[0]}" if missing else "it holds no case"
            raise FileNotFoundError(
                f"expected preprocessed cases (*{_EXTENSION}) in {self.folder}, but {what}. "
                "Run nnUNetv2_plan_and_preprocess (or nnUNetv2_preprocess with the plans and configuration you train)."
            )

    @staticmethod
    def list_identifiers(folder: str | Path) -> list[str]:
        """Identifiers of all cases in a folder of preprocessed data."""
        names = [p.name[: -len(_EXTENSION)] for p in Path(folder).glob(f"*{_EXTENSION}")]
        return sorted(n for n in names if not n.endswith("_seg"))

    def open(self, identifier: str) -> blosc2.NDArray:
        """The image of a case, ``(C, Z, Y, X)``, not yet decompressed."""
        # One thread: the loader has a worker for each core already.
        return blosc2.open(str(self._path(identifier)), mode="r", dparams={"nthreads": 1})

    def shape(self, identifier: str) -> tuple[int, ...]:
        """``(Z, Y, X)`` of a case."""
        if identifier not in self._shapes:
            # Remembered: every sample asks, and opening the file twice costs as much as a small box.
            self._shapes[identifier] = tuple(self.open(identifier).shape[1:])
        return self._shapes[identifier]

    def modified(self, identifier: str) -> float:
        """When a case was written, seconds since the epoch."""
        return self._path(identifier).stat().st_mtime

    def read(self, identifier: str, box: Box) -> np.ndarray:
        """Read a box, ``(C, Z, Y, X)`` float32.

        Raises:
            ValueError: naming the case, if it holds values that are not finite.
        """
        (z0, y0, x0), (z1, y1, x1) = box
        image = np.asarray(self.open(identifier)[:, z0:z1, y0:y1, x0:x1], dtype=np.float32)
        if not np.isfinite(image).all():
            raise ValueError(_unusable([f"{identifier} holds NaN or infinite values"]))
        return image

    def check(self, view_shape: Sequence[int], progress: bool = True) -> None:
        """Look at all cases before anything long starts.

        Up to 2 GiB of data are read in full, larger data sets in the three central planes of every case.

        Args:
            view_shape: ``(Z, Y, X)`` of the views that will be drawn.
            progress: show a bar.

        Raises:
            ValueError: naming every case that is too small, not finite or constant.
        """
        arrays = {i: self.open(i) for i in self.identifiers}
        full = sum(a.nbytes for a in arrays.values()) <= _FULL_CHECK_BYTES
        problems = []
        for identifier, array in tqdm(arrays.items(), desc="checking cases", disable=not progress, leave=False):
            try:
                check_volume(array.shape[1:], view_shape)
            except ValueError as error:
                problems.append(f"{identifier}: {error}")
                continue
            z, y, x = (n // 2 for n in array.shape[1:])
            parts = [array[:]] if full else [array[:, z], array[:, :, y], array[:, :, :, x]]
            if not all(np.isfinite(p).all() for p in parts):
                problems.append(f"{identifier} holds NaN or infinite values")
            elif all(float(np.ptp(p)) == 0 for p in parts):
                problems.append(f"{identifier} is constant")
        if problems:
            raise ValueError(_unusable(problems))

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}{_EXTENSION}"


def _unusable(problems: Sequence[str]) -> str:
    listed = "\n  ".join(problems)
    return (
        f"{len(problems)} case(s) cannot be used for pretraining:\n  {listed}\n"
        "Repair them and preprocess again, or leave them out: remove their files (CASE.b2nd, CASE_seg.b2nd, CASE.pkl) "
        "from the folder of the preprocessed cases and train fold all."
    )
