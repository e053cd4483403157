"""Classes of whole cases: the table that a classification learns from, and which cases it validates on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_stc3d.data.case_table import SPLITS, keep_patients_apart, read_case_table, read_splits
from nnssl_stc3d.files import written_whole

LABELS_FILE = "classification.csv"
"""Name of the table in a dataset's folder in nnUNet_preprocessed."""
FOLDS_FILE = "classification_folds.json"
"""Name of the file beside it that keeps the folds that were drawn: case -> fold in which it is validated."""
N_FOLDS = 5

_EXPECTED = (
    "a CSV file with the columns case (as in imagesTr, without channel and ending) and label, and if you like patient, "
    "and fold (0, 1, ..: where the case is validated) or split (train, val, test)"
)


@dataclass(frozen=True)
class CaseLabels:
    """What a table says about the cases.

    Attributes:
        classes: names, in the order of the network's outputs.
        labels: index of the class of each case.
        patients: patient of each case; empty if the table does not say.
        folds: fold in which each case is validated; empty if the table does not say.
        splits: "train", "val" or "test" for each case; empty if the table does not say.
    """

    classes: tuple[str, ...]
    labels: dict[str, int]
    patients: dict[str, str]
    folds: dict[str, int]
    splits: dict[str, str]

    def counts(self, cases: Sequence[str]) -> str:
        """Number of cases of each class, in words."""
        found = Counter(self.labels[case] for case in cases)
        return ", ".join(f"{name}: {found[index]}" for index, name in enumerate(self.classes))


def read_case_labels(file: Path, known: Collection[str], min_classes: int = 2) -> CaseLabels:
    """Read and check a table.

    Args:
        file: CSV, separated by commas or semicolons.
        known: identifiers of the cases that exist. Those that the table does not name are left out.
        min_classes: how many different labels there must be.

    Raises:
        ValueError: for anything that is missing, unknown, given twice or contradictory.
    """
    names, rows = read_case_table(file, known, ("case", "label"), ("patient", "fold", "split"), _EXPECTED)
    if {"fold", "split"} <= set(names):
        raise ValueError(f"{file} has a column fold and a column split. Keep one of them.")
    classes = _sorted_classes({row["label"] for row in rows})
    if len(classes) < min_classes:
        raise ValueError(
            f"Expected at least {min_classes} different labels in {file}, got {', '.join(classes) or 'none'}."
        )
    return CaseLabels(
        classes,
        {row["case"]: classes.index(row["label"]) for row in rows},
        {row["case"]: row["patient"] for row in rows} if "patient" in names else {},
        {row["case"]: _fold(row["fold"], file) for row in rows} if "fold" in names else {},
        read_splits(rows, file) if "split" in names else {},
    )


def cases_of_fold(
    labels: CaseLabels, fold: int | str, kept: Path, given: tuple[Sequence[str], Sequence[str]] | None = None
) -> tuple[list[str], list[str]]:
    """Which labelled cases a fold trains and validates on.

    The table's fold or split decides if it has one. Otherwise patients are kept together in five stratified folds if
    the table names them, and ``given`` is used if not. Cases whose split is test are in neither.

    Stratified folds are drawn once, as nnU-Net does it: what the table says later about labels moves no case, and
    new patients are added to them. A case that a fold was trained on must never become one that validates it.

    Args:
        labels: the table.
        fold: number, or "all": everything for both.
        kept: :data:`FOLDS_FILE` of the dataset. It is written if folds are drawn.
        given: training and validation cases of nnU-Net's own split.

    Raises:
        ValueError: if there is no such fold, a class is missing in the training, nothing is left for the validation,
            or a patient is on both sides.
    """
    usable = sorted(case for case in labels.labels if labels.splits.get(case) != "test")
    if fold == "all":
        training = validation = usable
    elif labels.splits:
        if fold != 0:
            raise ValueError(f"The labels have one split, which is fold 0; got fold {fold}. Train fold 0 or all.")
        training, validation = ([case for case in usable if labels.splits[case] == name] for name in SPLITS[:2])
    else:
        training, validation = _sides(labels, usable, int(fold), kept, given)
    missing = [n for i, n in enumerate(labels.classes) if i not in {labels.labels[case] for case in training}]
    if missing or not validation:
        what = f"no training case of the class {missing[0]}" if missing else "no validation case"
        raise ValueError(
            f"Fold {fold} has {what} ({len(training)} training and {len(validation)} validation cases are labelled). "
            "Label more cases or give folds in the column fold."
        )
    tested = [case for case, split in labels.splits.items() if split == "test"]
    keep_patients_apart(labels.patients, [*training, *validation], tested, "training or validation and test")
    if fold != "all":
        keep_patients_apart(labels.patients, training, validation, f"training and validation of fold {fold}")
    return training, validation


def _sides(
    labels: CaseLabels, usable: list[str], fold: int, kept: Path, given: tuple[Sequence[str], Sequence[str]] | None
) -> tuple[list[str], list[str]]:
    if not labels.folds and not labels.patients:
        training, validation = given or ([], [])
        return [c for c in training if c in labels.labels], [c for c in validation if c in labels.labels]
    folds = labels.folds or _kept_folds(labels, usable, kept)
    if fold not in folds.values():
        raise ValueError(f"Expected one of the folds {', '.join(map(str, sorted(set(folds.values()))))}, got {fold}.")
    return [c for c in usable if folds[c] != fold], [c for c in usable if folds[c] == fold]


def _kept_folds(labels: CaseLabels, cases: list[str], kept: Path) -> dict[str, int]:
    """The stratified folds that were drawn before, or new ones; patients that came later join the smallest fold."""
    before: dict[str, int] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    folds = before.copy() or _stratified_folds(labels, cases)
    patients = {labels.patients[case]: fold for case, fold in folds.items() if case in labels.patients}
    for case in cases:
        if case in folds:
            continue
        alike = Counter(fold for other, fold in folds.items() if labels.labels.get(other) == labels.labels[case])
        sizes = Counter(folds.values())
        smallest = min(range(N_FOLDS), key=lambda fold: (alike[fold], sizes[fold]))
        folds[case] = patients.setdefault(labels.patients[case], smallest)
    if folds != before:
        with written_whole(kept, shared=True) as beside:
            beside.write_text(json.dumps(folds, indent=1) + "\n", encoding="utf-8")
    return folds


def _stratified_folds(labels: CaseLabels, cases: list[str]) -> dict[str, int]:
    """Five folds with about equal shares of the classes, all cases of a patient in one."""
    from sklearn.model_selection import StratifiedGroupKFold

    patients = [labels.patients[case] for case in cases]
    if len(set(patients)) < N_FOLDS:
        raise ValueError(
            f"Five folds need at least {N_FOLDS} patients, got {len(set(patients))}. Give folds in the column fold."
        )
    splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=12345)
    parts = splitter.split(cases, [labels.labels[case] for case in cases], patients)
    return {cases[index]: fold for fold, (_, validation) in enumerate(parts) for index in validation}


def _sorted_classes(names: Collection[str]) -> tuple[str, ...]:
    """Numbers by value, names by alphabet."""
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def _fold(text: str, file: Path) -> int:
    if not text.isdecimal():
        raise ValueError(f"Expected numbers 0, 1, .. in the column fold of {file}, got {text!r}.")
    return int(text)
