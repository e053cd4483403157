"""Preprocessed cases of nnU-Net without their segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
            refuse([f"{identifier} holds NaN or infinite values"])
        return image

    def check(self, view_shape: Sequence[int], progress: bool = True) -> None:
        """Look at all cases before anything long starts.

        Args:
            view_shape: ``(Z, Y, X)`` of the views that will be drawn.
            progress: show a bar.

        Raises:
            ValueError: naming every case that is too small, not finite or constant.
        """
        refuse(self.problems(view_shape, progress))

    def problems(
        self, view_shape: Sequence[int], progress: bool = True, workers: int = 1, share: tuple[int, int] = (0, 1)
    ) -> list[str]:
        """What is wrong with cases, for :func:`refuse`.

        Up to 2 GiB of data are read in full, larger data sets in the three central planes of every case.

        Args:
            view_shape: ``(Z, Y, X)`` of the views that will be drawn.
            progress: show a bar.
            workers: cases to look at in parallel.
            share: (rank, ranks); a rank looks at its own share of the cases.
        """
        rank, ranks = share
        mine = self.identifiers[rank::ranks]
        full = sum(self.open(i).nbytes for i in self.identifiers) <= _FULL_CHECK_BYTES
        with ThreadPoolExecutor(max(1, workers)) as pool:
            found = pool.map(lambda identifier: self._problem(identifier, view_shape, full), mine)
            return [p for p in tqdm(found, "checking cases", len(mine), disable=not progress, leave=False) if p]

    def _problem(self, identifier: str, view_shape: Sequence[int], full: bool) -> str | None:
        array = self.open(identifier)
        try:
            check_volume(array.shape[1:], view_shape)
        except ValueError as error:
            return f"{identifier}: {error}"
        z, y, x = (n // 2 for n in array.shape[1:])
        parts = [array[:]] if full else [array[:, z], array[:, :, y], array[:, :, :, x]]
        if not all(np.isfinite(p).all() for p in parts):
            return f"{identifier} holds NaN or infinite values"
        return f"{identifier} is constant" if all(float(np.ptp(p)) == 0 for p in parts) else None

    def _path(self, identifier: str) -> Path:
        return self.folder / f"{identifier}{_EXTENSION}"


def refuse(problems: Sequence[str]) -> None:
    """Stops if there are problems.

    Raises:
        ValueError: with all of them, and what to do.
    """
    if not problems:
        return
    listed = "\n  ".join(problems)
    raise ValueError(
        f"{len(problems)} case(s) cannot be used for pretraining:\n  {listed}\n"
        "Repair them and preprocess again, or leave them out: remove their files (CASE.b2nd, CASE_seg.b2nd, CASE.pkl) "
        "from the folder of the preprocessed cases and train fold all."
    )
