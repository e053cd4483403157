"""The table of classes of whole cases, for a trainer that classifies: case, label, patient."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from nnssl_stc3d.files import written_whole
from nnssl_stc3d.prepare.record import Record

CASE_LABELS_FILE = "case_labels.csv"
COLUMNS = ("case", "label", "patient")


def read_case_labels(file: Path) -> dict[str, tuple[str, str]]:
    """Reads the table.

    Args:
        file: CSV with the columns case, label and patient.

    Returns:
        Case -> label, patient.

    Raises:
        ValueError: it has other columns.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.reader(stream))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"Expected the columns {', '.join(COLUMNS)} in {file}, got {rows[0] if rows else 'nothing'}.")
    return {case: (label, patient) for case, label, patient in rows[1:]}


def write_case_labels(folder: Path, labels: Mapping[str, tuple[str, str]]) -> Path:
    """Writes the table of the cases that are in a dataset, beside its dataset.json; keeps rows of earlier runs.

    Args:
        folder: the dataset's folder.
        labels: case -> label, patient; of more cases than are in the dataset, maybe.
    """
    record = Record.read(folder)
    written = record.cases if record else {}
    file = folder / CASE_LABELS_FILE
    rows = {**(read_case_labels(file) if file.is_file() else {}), **labels}
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([case, *rows[case]] for case in sorted(rows) if case in written)
    with written_whole(file) as beside:
        beside.write_text(text.getvalue(), encoding="utf-8", newline="")
    return file
