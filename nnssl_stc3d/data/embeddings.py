"""Maps of voxel embeddings: where they lie, what they were made of, and how guides get them as features."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_stc3d.files import written_whole
from nnssl_stc3d.views.guide import Guide

RECORD = "embeddings.json"
"""File beside the maps that says what they were made of; without it they are taken as a user's own."""

_SUFFIX = ".npz"


@dataclass(frozen=True)
class EmbeddingRecord:
    """What the maps of a folder were made of.

    Attributes:
        plans: name of the plans.
        configuration: of these plans.
        spacing: mm per voxel of the preprocessed data, (z, y, x).
        checkpoint: path of the checkpoint, as it was given.
        checkpoint_sha256: of its content.
        method: that the checkpoint holds.
        width: of the maps at most.
        calibration: cases that normalisation and directions were fixed on. Maps that are made later have to be made
            with the same, or their embeddings cannot be compared.
    """

    plans: str
    configuration: str
    spacing: tuple[float, float, float]
    checkpoint: str
    checkpoint_sha256: str
    method: str
    width: int
    calibration: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the record, complete or not at all."""
        with written_whole(folder / RECORD, shared=True) as beside:
            beside.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EmbeddingRecord | None:
        """The record of a folder, None if it has none.

        Raises:
            ValueError: if the file cannot be understood.
        """
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            z, y, x = values.pop("spacing")
            calibration = tuple(values.pop("calibration"))
            return cls(spacing=(float(z), float(y), float(x)), calibration=calibration, **values)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is not what nnssl_stc3d embed writes ({error}). Remove the folder {folder} or make the maps "
                "again with nnssl_stc3d embed CHECKPOINT -d DATASET --overwrite"
            ) from error


def embedding_folder(preprocessed: str | Path) -> Path:
    """Folder of the maps of a configuration; nnU-Net would take files among the cases for cases."""
    return Path(preprocessed).with_name(f"{Path(preprocessed).name}_embeddings")


def write_map(folder: Path, identifier: str, features: np.ndarray, volume: Sequence[int]) -> None:
    """Write the map of a case, complete or not at all.

    Args:
        folder: that exists.
        identifier: of the case.
        features: ``(D, z, y, x)``, covering the preprocessed volume.
        volume: ``(Z, Y, X)`` of that volume.
    """
    with written_whole(folder / f"{identifier}{_SUFFIX}", shared=True) as beside, beside.open("wb") as file:
        np.savez(file, features=features.astype(np.float16), volume=np.array(volume))


def has_map(folder: Path, identifier: str) -> bool:
    """Whether a case has a map."""
    return (folder / f"{identifier}{_SUFFIX}").is_file()


def remove_maps(folder: Path) -> None:
    """Remove all maps of a folder and their record."""
    for path in (*folder.glob(f"*{_SUFFIX}"), folder / RECORD):
        path.unlink(missing_ok=True)


def read_map(folder: Path, identifier: str, volume: Sequence[int] | None = None) -> np.ndarray:
    """The map of a case, ``(D, z, y, x)``.

    Args:
        folder: of the maps.
        identifier: of the case.
        volume: ``(Z, Y, X)`` of the preprocessed case; a map that names another one is refused.

    Raises:
        ValueError: naming the file, if it is damaged, holds something else or belongs to another volume.
    """
    path = folder / f"{identifier}{_SUFFIX}"
    again = "Make it again with nnssl_stc3d embed CHECKPOINT -d DATASET --overwrite, or remove it."
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["features"]
            made_for = tuple(file["volume"].tolist()) if "volume" in file else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as a map of embeddings ({error}); expected an .npz with an array 'features' of "
            f"shape (D, z, y, x). {again}"
        ) from error
    if features.ndim != 4 or 0 in features.shape or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(
            f"{path}: expected 'features' (D, z, y, x) of floats, got {features.dtype} {features.shape}. {again}"
        )
    if None not in (volume, made_for) and made_for != tuple(volume or ()):
        raise ValueError(
            f"{path} was made for a volume of {made_for} voxels, the case has {tuple(volume or ())}. {again}"
        )
    return features


def unit_features(features: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Bring a map to the grid of a guide and its vectors to length 1.

    Args:
        features: ``(D, z, y, x)`` on any grid that covers the volume.
        grid: cells along each axis.

    Returns:
        ``(D, *grid)`` float16; of another grid the cell that holds the centre is taken.
    """
    if features.shape[1:] != tuple(grid):
        index = [((np.arange(n) + 0.5) / n * m).astype(int) for n, m in zip(grid, features.shape[1:])]
        features = features[:, index[0][:, None, None], index[1][:, None], index[2]]
    length = np.linalg.norm(features.astype(np.float32), axis=0)
    if np.abs(length - 1).max() > 0.01:
        features = features / np.maximum(length, 1e-6)
    return features.astype(np.float16, copy=False)


class EmbeddedGuides(Mapping[str, Guide]):
    """Guides with features: body masks and maps of embeddings, read when they are asked for.

    Args:
        guides: body masks of the cases.
        folder: of the maps; cases without one have no features.
    """

    def __init__(self, guides: Mapping[str, Guide], folder: str | Path) -> None:
        self.guides = guides
        self.folder = Path(folder)
        self.mapped = frozenset(i for i in guides if has_map(self.folder, i))

    def __getitem__(self, identifier: str) -> Guide:
        guide = self.guides[identifier]
        if identifier not in self.mapped:
            return guide
        volume = [round(n * cell) for n, cell in zip(guide.body.shape, guide.cell)]
        features = unit_features(read_map(self.folder, identifier, volume), guide.body.shape)
        return Guide(guide.cell, guide.body, features)

    def __iter__(self) -> Iterator[str]:
        return iter(self.guides)

    def __len__(self) -> int:
        return len(self.guides)


def embedded_guides(
    guides: Mapping[str, Guide],
    preprocessed: str | Path,
    command: str,
    plans: str,
    configuration: str,
    spacing: Sequence[float],
    log: Callable[[str], object] = print,
) -> EmbeddedGuides:
    """Guides with the maps that a configuration has.

    Args:
        guides: body masks of the cases.
        preprocessed: folder of the preprocessed cases.
        command: that makes the maps.
        plans: name of the plans that are trained.
        configuration: that is trained.
        spacing: mm per voxel of the preprocessed data, (z, y, x).
        log: gets a line on how correspondences are found.

    Raises:
        ValueError: if the maps were made for other data, or have different widths.
    """
    folder = embedding_folder(preprocessed)
    embedded = EmbeddedGuides(guides, folder)
    count = len(embedded.mapped)
    if not count:
        log(
            f"No maps of embeddings in {folder}: crops of two volumes correspond by their place in the box around the "
            f"body, which is rough. Better: {command}"
        )
        return embedded
    record = EmbeddingRecord.read(folder)
    if record is not None:
        check_record(record, plans, configuration, spacing, command)
    # A few of them, since reading all maps of a large data set takes long.
    some = sorted(embedded.mapped)[:: max(1, count // 8)]
    widths = {embedded[i].features.shape[0] for i in some}  # type: ignore[union-attr]
    if len(widths) > 1:
        raise ValueError(f"the maps in {folder} have different widths ({sorted(widths)}). Make all of them: {command}")
    origin = "given by the user" if record is None else f"{record.method}, {record.checkpoint}"
    log(f"Crops of two volumes correspond by their embeddings ({origin}) in {folder}.")
    if count < len(guides):
        first = sorted(set(guides) - embedded.mapped)[0]
        log(
            f"{len(guides) - count} of {len(guides)} cases have no map (first: {first}): the place in the body decides."
        )
    return embedded


def check_record(
    record: EmbeddingRecord, plans: str, configuration: str, spacing: Sequence[float], command: str
) -> None:
    """Refuse maps that were made for other preprocessed data.

    Plans that differ in the network only, such as small plans, share their preprocessed data and its maps.

    Raises:
        ValueError: with the command that makes them again.
    """
    same_spacing = np.allclose(record.spacing, spacing, rtol=1e-4)
    if record.configuration == configuration and same_spacing:
        return
    raise ValueError(
        f"the maps of embeddings were made for the plans {record.plans}, configuration {record.configuration}, spacing "
        f"{_mm(record.spacing)}; this is {plans}, {configuration}, {_mm(spacing)}. Make them again:\n"
        f"  {command} --overwrite"
    )


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:g}" for s in spacing) + " mm"
