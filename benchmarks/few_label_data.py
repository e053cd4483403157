"""Data of the few-label comparison: one seeded split, and the nnU-Net folders that follow from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

# Draws are written for all of these, so that a comparison can be extended later without touching earlier runs.
LABEL_COUNTS = (5, 10, 20, 40)
DRAWS = 10
# nnU-Net validates every validation case of a fold after training; a few keep that cheap.
CASES_VALIDATED_IN_TRAINING = 4


@dataclass(frozen=True)
class Split:
    """Who may be seen by what.

    Attributes:
        seed: of the permutations.
        test: cases for the final table only; neither planning, pretraining nor finetuning sees them.
        validation: cases on which choices are made; pretraining sees their images, no finetuning their labels.
        pool: the other cases, from which labelled cases are drawn.
        draws: one order of the pool per seed; the first n are the n labelled cases, so that draws are nested.
    """

    seed: int
    test: list[str]
    validation: list[str]
    pool: list[str]
    draws: list[list[str]]

    @property
    def development(self) -> list[str]:
        """Every case but the test cases."""
        return sorted(self.validation + self.pool)

    @property
    def label_counts(self) -> list[int]:
        """Numbers of labelled cases for which the split has folds."""
        return [n for n in LABEL_COUNTS if n <= len(self.pool)]

    def fold(self, labels: int, draw: int) -> int:
        """nnU-Net's fold of a number of labelled cases and a draw.

        Raises:
            ValueError: there is no such fold.
        """
        if labels not in self.label_counts or not 0 <= draw < len(self.draws):
            raise ValueError(
                f"expected labels in {self.label_counts} and a seed below {len(self.draws)}, got {labels} and {draw}"
            )
        return draw * len(self.label_counts) + self.label_counts.index(labels)

    def folds(self) -> list[dict[str, list[str]]]:
        """Content of splits_final.json, in the order of :meth:`fold`."""
        validation = self.validation[:CASES_VALIDATED_IN_TRAINING]
        return [
            {"train": sorted(draw[:labels]), "val": validation} for draw in self.draws for labels in self.label_counts
        ]


def make_split(cases: list[str], test: int, validation: int, seed: int) -> Split:
    """Draws test and validation cases and the orders of the rest.

    Args:
        cases: identifiers of all labelled cases.
        test: number of test cases.
        validation: number of validation cases.
        seed: fixes everything.

    Raises:
        ValueError: too few cases.
    """
    needed = test + validation + LABEL_COUNTS[0]
    if len(cases) < needed or min(test, validation) < 1:
        raise ValueError(
            f"expected at least {needed} labelled cases for {test} test and {validation} validation cases, got "
            f"{len(cases)}; lower --test-cases or --val-cases"
        )
    order = [sorted(cases)[i] for i in np.random.default_rng(seed).permutation(len(cases))]
    pool = sorted(order[test + validation :])
    draws = [[pool[i] for i in np.random.default_rng([seed, d]).permutation(len(pool))] for d in range(DRAWS)]
    return Split(seed, sorted(order[:test]), sorted(order[test : test + validation]), pool, draws)


def read_dataset(data: Path) -> tuple[dict, list[str]]:
    """Reads dataset.json and the labelled cases of an nnU-Net raw dataset.

    Raises:
        ValueError: it is no such folder.
    """
    if not re.fullmatch(r"Dataset\d{3}_\w+", data.name) or not (data / "dataset.json").is_file():
        raise ValueError(f"expected a folder DatasetXXX_Name with dataset.json, imagesTr and labelsTr, got {data}")
    description = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    ending = description["file_ending"]
    return description, sorted(f.name[: -len(ending)] for f in (data / "labelsTr").glob(f"*{ending}"))


def load_or_make_split(work: Path, data: Path, test: int, validation: int, seed: int) -> Split:
    """Returns the work folder's split, which is drawn and written before anything else happens.

    Raises:
        ValueError: the folder's split was made from other cases or with other numbers.
    """
    file = work / "split.json"
    split = make_split(read_dataset(data)[1], test, validation, seed)
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != asdict(split):
            raise ValueError(f"{file} belongs to other data or other numbers of cases; use a new --work folder")
    else:
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(split), indent=1) + "\n", encoding="utf-8")
    return split


def link_cases(data: Path, cases: list[str], images: Path, labels: Path, ending: str) -> None:
    """Links images (every channel) and labels of some cases into two folders."""
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        sources = [(f, images) for f in sorted((data / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))]
        if not sources:
            raise ValueError(f"expected images {case}_0000{ending} in {data / 'imagesTr'}, found none")
        for source, folder in [*sources, (data / "labelsTr" / f"{case}{ending}", labels)]:
            if not (folder / source.name).exists():
                (folder / source.name).symlink_to(source.resolve())


def evaluation_folders(work: Path, dataset: str, cases: str) -> tuple[Path, Path]:
    """Images and labels of the ``val`` or ``test`` cases."""
    if cases == "test":
        raw = work / "nnUNet_raw" / dataset
        return raw / "imagesTs", raw / "labelsTs"
    return work / "validation" / "images", work / "validation" / "labels"


def build_raw(work: Path, data: Path, split: Split) -> None:
    """Writes nnUNet_raw with the development cases in imagesTr, and the folders of evaluation cases."""
    description, _ = read_dataset(data)
    ending = description["file_ending"]
    raw = work / "nnUNet_raw" / data.name
    link_cases(data, split.development, raw / "imagesTr", raw / "labelsTr", ending)
    link_cases(data, split.test, *evaluation_folders(work, data.name, "test"), ending)
    link_cases(data, split.validation, *evaluation_folders(work, data.name, "val"), ending)
    description["numTraining"] = len(split.development)
    (raw / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
