"""Tables of a benchmark in Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import numpy as np

from nnssl_stc3d.evaluation.benchmark.statistics import Interval, Result, Row

HEAD = ("labels", "finetuning", "method", "seeds", "{}", "95 %", "against {}", "95 % over seeds", "p, corrected")


def header(rows: Sequence[Row], score: str) -> list[str]:
    """Names of the columns of :func:`cells`."""
    return [name.format(rows[0].reference if "against" in name else score) for name in HEAD]


def cells(row: Row) -> list[str]:
    """A row of the table under :func:`header`; the reference has no difference."""
    start = [str(row.labels), row.schedule, row.method, str(len(row.seeds)), f"{row.mean:.1f}", _span(row.interval)]
    difference, *rest = difference_cells(row)
    if row.difference is not None and len(row.difference_per_seed) < len(row.seeds):
        difference += f" ({len(row.difference_per_seed)} pairs)"
    return [*start, difference, *rest]


def difference_cells(row: Row) -> list[str]:
    """Difference to the reference, its interval and p; empty for the reference itself."""
    if row.difference is None:
        return [""] * 3
    p = "-" if row.p_adjusted is None else "<0.001" if row.p_adjusted < 0.001 else f"{row.p_adjusted:.3f}"
    return [signed(row.difference), _span(row.difference_interval, signed), p]


def signed(value: float) -> str:
    """With its sign, which zero has not."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("+0.0", "0.0")


def _span(interval: Interval | None, shown: Callable[[float], str] = "{:.1f}".format) -> str:
    return f"{shown(interval[0])} to {shown(interval[1])}" if interval else "-"


def markdown(rows: Sequence[Row], score: str) -> str:
    """The table in Markdown."""
    lines = [header(rows, score), ["---"] * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(rows: Sequence[Row], score: str) -> str:
    """The table in LaTeX, with booktabs."""
    lines = [" & ".join(line) + r" \\" for line in [header(rows, score), *map(cells, rows)]]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    text = "\n".join([r"\begin{tabular}{" + "l" * 3 + "r" * (len(HEAD) - 3) + "}", *body, r"\end{tabular}"])
    return text.replace("%", r"\%").replace("_", r"\_").replace("<", "$<$") + "\n"


def html(head: Sequence[str], lines: Iterable[Sequence[str]], tones: Sequence[str] = ()) -> str:
    """A table for the page.

    Args:
        head: names of columns.
        lines: cells.
        tones: class of each line's cells, such as "gain"; none by default.
    """
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{tones[i] if tones else ""}">{escape(cell)}</td>' for cell in line) + "</tr>"
        for i, line in enumerate(lines)
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def comparison_html(rows: Sequence[Row], score: str) -> str:
    """The table for the page, with significant differences in colour."""
    tones = [("gain" if (row.difference or 0) > 0 else "loss") if row.significant else "" for row in rows]
    return html(header(rows, score), map(cells, rows), tones)


def structures_html(rows: Sequence[Row]) -> str:
    """Mean score of each structure."""
    lines = [[str(r.labels), r.schedule, r.method, *(f"{v:.1f}" for v in r.structures.values())] for r in rows]
    return html(["labels", "finetuning", "method", *rows[0].structures], lines)


def perturbed_html(rows: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    """Dice of perturbed cases: what it costs, and what is left of the difference to the reference."""
    lines, tones = [], []
    for (perturbation, level), some in rows.items():
        for row in some:
            clean = next(
                (c for c in rows[perturbation, "none"] if _kind(c) == _kind(row) and c.seeds == row.seeds), None
            )
            lost = signed(row.mean - clean.mean) if clean and level != "none" else ""
            labels, schedule, method, seeds, *rest = cells(row)
            lines.append([perturbation, level, labels, schedule, method, seeds, rest[0], lost, *rest[2:]])
            tones.append(("gain" if (row.difference or 0) > 0 else "loss") if row.significant else "")
    head = header([row for some in rows.values() for row in some], "Dice")
    return html(["perturbation", "level", *head[:5], "against unperturbed", *head[6:]], lines, tones)


def _kind(row: Row) -> tuple[str, int, str]:
    return row.schedule, row.labels, row.method


def cases_csv(scores: Mapping[str, Sequence[Result]]) -> str:
    """Every score of every case.

    Args:
        scores: name of a score -> results.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["score", "method", "finetuning", "labels", "seed", "case", "structure", "percent"])
    for name, results in scores.items():
        for r in results:
            for case, of in sorted(r.scores.items()):
                writer.writerows(
                    [name, r.method, r.schedule, r.labels, r.seed, case, structure, f"{value:.3f}"]
                    for structure, value in of.items()
                )
    return buffer.getvalue()


def runs_csv(scores: Mapping[str, Sequence[Result]]) -> str:
    """Mean score of each run, and of each structure.

    Args:
        scores: name of a score -> results.
    """
    names = list(next(of for results in scores.values() for r in results for of in r.scores.values()))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["score", "method", "finetuning", "labels", "seed", "mean", *names])
    for name, results in scores.items():
        for r in results:
            means = [np.mean([scores[n] for scores in r.scores.values()]) for n in names]
            values = [f"{value:.2f}" for value in (np.mean(r.case_means()), *means)]
            writer.writerow([name, r.method, r.schedule, r.labels, r.seed, *values])
    return buffer.getvalue()
