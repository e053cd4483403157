"""What was decided about plans, as a table for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nnssl_stc3d.prepare.align import Decision

COLUMN_WIDTH = 30
NOTHING = "-"


def show(value: Any) -> str:
    """A property of plans in few words: such as ``1x3x3, 4 of 3x3x3`` for kernels."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, list | tuple):
        return str(value)
    if value and all(isinstance(entry, list | tuple) for entry in value):
        runs = [(key, len(list(group))) for key, group in groupby("x".join(map(str, entry)) for entry in value)]
        return ", ".join(f"{count} of {key}" if count > 1 else key for key, count in runs)
    return " ".join(map(show, value))


def decision_table(decisions: Sequence[Decision], reference: str | None, own: str, reference_first: bool) -> str:
    """A table with a line for each decision.

    Args:
        decisions: to show.
        reference: title of the column of the dataset that is followed; None leaves the column out.
        own: title of the column of the dataset that the plans are for.
        reference_first: order of the two.

    Returns:
        Lines of text; long cells are wrapped.
    """
    rows = [["", own, "chosen", "why"]]
    rows += [[d.name, show(d.own), show(d.chosen), d.why] for d in decisions]
    if reference is not None:
        column = [reference, *(show(d.reference) for d in decisions)]
        for row, cell in zip(rows, column):
            row.insert(1 if reference_first else 2, cell)
    return format_rows(rows)


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns as wide as needed, up to a limit, with a rule below the first row."""
    cells = [[textwrap.wrap(cell, COLUMN_WIDTH) or [""] for cell in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells)]
    lines = []
    for number, row in enumerate(cells):
        for depth in range(max(len(cell) for cell in row)):
            line = (cell[depth] if depth < len(cell) else "" for cell in row)
            lines.append("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)
