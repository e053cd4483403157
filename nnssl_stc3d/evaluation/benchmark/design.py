"""Which cases a benchmark shows to whom, how many are labelled, and how long pretraining is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnssl_stc3d.data.case_table import SPLITS, keep_patients_apart, read_case_table, read_splits

# nnU-Net validates every validation case of a fold after training; a few keep that cheap.
CASES_VALIDATED_IN_TRAINING = 4


@dataclass(frozen=True)
class Split:
    """Who may be seen by what.

    Attributes:
        seed: of the permutations.
        test: cases for the final tables; neither pretraining nor finetuning nor any choice sees them.
        validation: cases on which choices are made; pretraining sees their images, no finetuning their labels.
        pool: the other cases, from which labelled cases are drawn.
    """

    seed: int
    test: list[str]
    validation: list[str]
    pool: list[str]

    @property
    def development(self) -> list[str]:
        """Every case but the test cases."""
        return sorted(self.validation + self.pool)

    def labelled(self, count: int, seed: int) -> list[str]:
        """The labelled cases of a draw. Draws are nested: fewer cases are among more of the same seed.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= count <= len(self.pool):
            raise ValueError(f"expected 1 to {len(self.pool)} labelled cases, got {count}")
        order = np.random.default_rng([self.seed, seed]).permutation(len(self.pool))
        return sorted(self.pool[i] for i in order[:count])

    def fold(self, count: int, seed: int) -> dict[str, list[str]]:
        """A fold as nnU-Net's splits_final.json has it."""
        return {"train": self.labelled(count, seed), "val": self.validation[:CASES_VALIDATED_IN_TRAINING]}


def draw_split(
    cases: Sequence[str], test: int, validation: int, seed: int, patients: Mapping[str, str] | None = None
) -> Split:
    """Draws test and validation cases.

    Args:
        cases: identifiers of all labelled cases.
        test: number of test cases; more where the last patient drawn has several.
        validation: number of validation cases, likewise.
        seed: fixes everything.
        patients: patient of each case, whose cases stay together; every case is a patient of its own by default.

    Raises:
        ValueError: too few cases.
    """
    if min(test, validation) < 1 or len(cases) < test + validation + 1:
        raise ValueError(
            f"expected at least {test + validation + 1} labelled cases for {test} test and {validation} validation "
            f"cases and one to learn from, got {len(cases)}; lower --test-cases or --validation-cases"
        )
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault((patients or {}).get(case, case), []).append(case)
    members = list(groups.values())
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index in np.random.default_rng(seed).permutation(len(members)):
        part = 0 if len(parts[0]) < test else 1 if len(parts[1]) < validation else 2
        parts[part].extend(members[index])
    if not all(parts):
        raise ValueError(
            f"the cases of {len(members)} patients are too few for {test} test and {validation} validation cases and "
            "others to learn from; lower --test-cases or --validation-cases"
        )
    return Split(seed, *map(sorted, parts))


def read_split(file: Path, cases: Sequence[str], test: int | None, validation: int | None, seed: int) -> Split:
    """The split that a user's table asks for; cases that it does not name are left out of everything.

    Args:
        file: CSV with the columns case and split, or case and patient, or all three.
        cases: identifiers of all labelled cases.
        test: number of test cases that patients are drawn for, None for a quarter.
        validation: number of validation cases, None for a sixth.
        seed: of all draws.

    Raises:
        ValueError: the table cannot be read, has none of the columns, or a patient is on two sides of its split.
    """
    expected = (
        "a CSV file with the columns case (as in imagesTr, without channel and ending) and split (train, val, test), "
        "or case and patient, or all three"
    )
    names, rows = read_case_table(file, cases, ["case"], ["patient", "split"], expected)
    if not {"patient", "split"} & set(names):
        raise ValueError(f"Expected {expected}; {file} has the columns {', '.join(names)}.")
    patients = {row["case"]: row["patient"] for row in rows} if "patient" in names else {}
    if "split" not in names:
        return draw_split(list(patients), *part_sizes(len(patients), test, validation), seed, patients)
    if test is not None or validation is not None:
        raise ValueError(f"{file} says which cases are for testing: leave --test-cases and --validation-cases out")
    splits = read_splits(rows, file)
    pool, chosen, tested = (sorted(case for case, split in splits.items() if split == name) for name in SPLITS)
    if not (pool and chosen and tested):
        raise ValueError(
            f"Expected cases of train, val and test in the column split of {file}, got {len(pool)}, {len(chosen)} and "
            f"{len(tested)}. Choices are made on those of val."
        )
    keep_patients_apart(patients, [*pool, *chosen], tested, "train or val and test")
    keep_patients_apart(patients, pool, chosen, "train and val")
    return Split(seed, tested, chosen, pool)


def part_sizes(cases: int, test: int | None, validation: int | None) -> tuple[int, int]:
    """Numbers of test and of validation cases: a quarter and a sixth where they are not given."""
    return (
        max(1, round(cases / 4)) if test is None else test,
        max(1, round(cases / 6)) if validation is None else validation,
    )


def fix_split(file: Path, split: Split) -> None:
    """Keeps the split of a benchmark, which is written before anything else happens and never changes.

    Raises:
        ValueError: the file's split was made from other cases or with other numbers.
    """
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != asdict(split):
            raise ValueError(
                f"{file} was drawn from other cases or with other numbers of test and validation cases. Repeat the "
                "options that it was made with, or choose another output folder."
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(split), indent=1) + "\n", encoding="utf-8")


def label_counts(wanted: Sequence[str], pool: int) -> list[int]:
    """Numbers of labelled cases: "10" is ten cases, "5%" that share of the pool, rounded, at least one.

    Args:
        wanted: as on the command line.
        pool: number of cases that may be labelled.

    Raises:
        ValueError: a number that is not positive, above the pool, or no number.
    """
    counts = set()
    for text in wanted:
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                count = max(1, round(share * pool)) if share > 0 else 0
            else:
                count = int(text)
        except ValueError:
            raise ValueError(f"labels must be numbers of cases or percentages such as 10%, got {text!r}") from None
        if not 1 <= count <= pool:
            raise ValueError(
                f"expected 1 to {pool} labelled cases (those that are neither for testing nor for validation), got "
                f"{text!r}"
            )
        counts.add(count)
    return sorted(counts)


@dataclass(frozen=True)
class Budget:
    """How long every pretraining is.

    Attributes:
        amount: number of steps, or of seconds.
        seconds: the amount is in seconds.
    """

    amount: float
    seconds: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "5000", "5000steps", "240s", "30min" or "12h".

        Raises:
            ValueError: none of these.
        """
        units = {"": (1, False), "steps": (1, False), "s": (1, True), "min": (60, True), "h": (3600, True)}
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(number) :].strip()
        try:
            factor, seconds = units[unit]
            amount = float(number) * factor
        except (KeyError, ValueError):
            raise ValueError(f"expected a budget such as 5000steps, 240s, 30min or 12h, got {text!r}") from None
        if amount <= 0:
            raise ValueError(f"the budget must be positive, got {text!r}")
        return cls(amount, seconds)

    def __str__(self) -> str:
        return f"{self.amount:g} {'seconds' if self.seconds else 'steps'}"
