"""Tables that say something about whole cases: CSV files of users, read and checked."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

SPLITS = ("train", "val", "test")


def read_case_table(
    file: Path, known: Collection[str], needed: Sequence[str], optional: Sequence[str], expected: str
) -> tuple[list[str], list[dict[str, str]]]:
    """Reads a table with one line for each case, separated by commas or semicolons.

    Args:
        file: CSV.
        known: identifiers of the cases that exist.
        needed: columns that have to be there, "case" among them.
        optional: columns that have no empty cell if they are there.
        expected: what the file should be, for messages.

    Returns:
        Names of its columns in lower case, and column -> cell of each line.

    Raises:
        ValueError: for anything that is missing, unknown or given twice.
    """
    if not file.is_file():
        raise ValueError(f"Expected the table {file}, {expected}. There is no such file; write it.")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Expected {file} in UTF-8, got another encoding (byte {error.start}). Spreadsheets call it 'CSV UTF-8'."
        ) from error
    header = text.partition("\n")[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [str(name).strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    numbers, rows = [], []
    for row in reader:
        numbers.append(reader.line_num)
        rows.append({k: (v or "").strip() for k, v in row.items() if isinstance(k, str)})
    if not set(needed) <= set(names):
        raise ValueError(f"Expected {expected}; {file} has the columns {', '.join(names) or '(none)'}.")
    filled = [name for name in (*needed, *optional) if name in names]
    for number, row in zip(numbers, rows):
        if empty := [name for name in filled if not row[name]]:
            raise ValueError(f"{file}, line {number}: {' and '.join(empty)} is empty. Fill it in or remove the line.")
    cases = [row["case"] for row in rows]
    if twice := [case for case, count in Counter(cases).items() if count > 1]:
        lines = [str(number) for number, case in zip(numbers, cases) if case == twice[0]]
        raise ValueError(
            f"{file} names {len(twice)} cases more than once, such as {twice[0]} in the lines {', '.join(lines)}. Keep "
            "one line for each case."
        )
    if unknown := [case for case in cases if case not in known]:
        raise ValueError(
            f"{file} names {len(unknown)} cases that are not in the data, such as {', '.join(unknown[:3])}. The data "
            f"have {', '.join(sorted(known)[:3]) or 'no cases'}, ... Correct the names or preprocess the cases."
        )
    return names, rows


def read_splits(rows: Sequence[Mapping[str, str]], file: Path) -> dict[str, str]:
    """Case -> one of :data:`SPLITS`, from the column split.

    Raises:
        ValueError: something else.
    """
    wrong = [row["split"] for row in rows if row["split"].lower() not in SPLITS]
    if wrong:
        raise ValueError(f"Expected {', '.join(SPLITS)} in the column split of {file}, got {wrong[0]!r}.")
    return {row["case"]: row["split"].lower() for row in rows}


def keep_patients_apart(
    patients: Mapping[str, str], some: Collection[str], others: Collection[str], where: str
) -> None:
    """Checks that no patient has cases on both sides.

    Args:
        patients: patient of each case; a case without one is a patient of its own.
        some: cases on one side.
        others: cases on the other side.
        where: the two sides, for the message.

    Raises:
        ValueError: a patient is on both.
    """
    both = {patients.get(case) for case in some} & {patients.get(case) for case in others} - {None}
    if both:
        raise ValueError(
            f"{len(both)} patients have cases in both {where}, such as {min(map(str, both))}. Put all cases of a "
            "patient into one fold or split."
        )
