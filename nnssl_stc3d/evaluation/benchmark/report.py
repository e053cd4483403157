"""What a benchmark leaves behind: results.json, tables in CSV, Markdown and LaTeX, and one page with figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_stc3d.evaluation.benchmark.design import SCRATCH
from nnssl_stc3d.evaluation.benchmark.execution import seconds_file
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, Pretraining, Run, Settings
from nnssl_stc3d.evaluation.benchmark.statistics import Interval, Result, Row, compare
from nnssl_stc3d.evaluation.page import picture, render_page, section
from nnssl_stc3d.evaluation.report_figures import new_figure, tidy, to_png

HEAD = ("labels", "finetuning", "method", "seeds", "Dice", "95 %", "against scratch", "95 % over seeds", "p, corrected")


def read_results(runs: Sequence[Run], settings: Settings) -> list[Result]:
    """Reads Dice in percent of every finished finetuning."""
    description = json.loads(
        (settings.workspace.preprocessed / settings.target.name / "dataset.json").read_text(encoding="utf-8")
    )
    names = {str(value): name for name, value in description["labels"].items()}
    names |= {str(tuple(v)): name for name, v in description["labels"].items() if isinstance(v, list)}
    results = []
    for run in runs:
        if not isinstance(run, Finetuning) or not run.is_done(settings):
            continue
        summary = json.loads((run.predictions(settings) / "summary.json").read_text(encoding="utf-8"))
        scores = {
            Path(case["prediction_file"]).name.split(".")[0]: {
                names.get(label, label): 100 * float(metrics["Dice"]) for label, metrics in case["metrics"].items()
            }
            for case in summary["metric_per_case"]
        }
        results.append(Result(run.method, run.schedule, run.labels, run.seed, scores))
    return results


def write_report(runs: Sequence[Run], settings: Settings, facts: Mapping[str, str], folder: Path) -> list[Row]:
    """Writes everything about the runs that are finished.

    Args:
        runs: of the benchmark.
        settings: of the benchmark.
        facts: what the page says about them, name -> value.
        folder: to write to; files of an earlier report are replaced.

    Returns:
        The rows of the table.

    Raises:
        ValueError: no run is finished.
    """
    results = read_results(runs, settings)
    if not results:
        raise ValueError(f"none of the {len(runs)} runs in {settings.workspace.root} is finished: nothing to report")
    rows = compare(results)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {run.name: _seconds(run, settings) for run in runs if seconds_file(run, settings).is_file()}
    content = {
        "facts": dict(facts),
        "cases": settings.cases,
        "split": dataclasses.asdict(settings.split),
        "rows": [dataclasses.asdict(row) | {"significant": row.significant} for row in rows],
        "runs": [dataclasses.asdict(result) for result in results],
        "seconds": seconds,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with open(folder / "cases.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "finetuning", "labels", "seed", "case", "structure", "dice"])
        for r in results:
            for case, scores in sorted(r.scores.items()):
                writer.writerows([r.method, r.schedule, r.labels, r.seed, case, n, v] for n, v in scores.items())
    (folder / "runs.csv").write_text(runs_csv(results), encoding="utf-8")
    (folder / "table.md").write_text(markdown(rows), encoding="utf-8")
    (folder / "table.tex").write_text(latex(rows), encoding="utf-8")
    figure = curves(rows)
    (folder / "curves.png").write_bytes(figure)
    sections = [
        section("Dice against labelled cases", picture(figure, "curves of Dice against labels")),
        section("Against training from scratch", _html_table(rows), _EXPLANATION),
        section("Structures", _structures(rows)),
    ]
    if seconds:
        sections.append(section("Cost", _cost(runs, seconds)))
    title = f"Pretraining on {settings.pretraining.name}, few labels of {settings.target.name}"
    missing = sum(isinstance(run, Finetuning) for run in runs) - len(results)
    page = render_page(title, verdict(rows), caveat(rows, missing, settings.cases), facts, sections)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return rows


_EXPLANATION = (
    "Differences are paired by seed: same labelled cases, schedule, steps and initialisation of what is not "
    "pretrained. A seed also changes the pretraining. Intervals of differences are Student's t over seeds, p-values "
    "are of paired t-tests, corrected for all rows by Benjamini and Hochberg. Intervals of Dice resample seeds and "
    "cases."
)


def verdict(rows: Sequence[Row]) -> str:
    """Which differences to scratch are significant, in a sentence."""
    tested = [row for row in rows if row.p_adjusted is not None]
    if not tested:
        return "One run of each kind: nothing can be said about significance. Add --seeds."
    won = [_label(row) for row in tested if row.significant and (row.difference or 0) > 0]
    lost = [_label(row) for row in tested if row.significant and (row.difference or 0) < 0]
    parts = [f"Better than scratch: {', '.join(won)}." if won else ""]
    parts.append(f"Worse than scratch: {', '.join(lost)}." if lost else "")
    rest = len(tested) - len(won) - len(lost)
    parts.append(f"Not significant after correction: {rest} of {len(tested)} comparisons." if rest else "")
    return " ".join(p for p in parts if p)


def caveat(rows: Sequence[Row], missing: int, cases: str) -> str:
    """How many runs stand behind the page."""
    number, seeds = sum(len(row.seeds) for row in rows), sorted({len(row.seeds) for row in rows})
    text = f"{number} finetunings, {' to '.join(map(str, seeds[:: max(1, len(seeds) - 1)]))} seeds for each figure."
    if missing:
        text += f" {missing} planned finetunings are not finished."
    if cases == "validation":
        text += " These are validation cases, for choosing; report the test cases."
    if min(seeds) < 5:
        text += " Fewer than five seeds rarely decide anything: repeats of one method differ by several points of Dice."
    return text


def _label(row: Row) -> str:
    return f"{row.method} with {row.labels} labels ({row.schedule} finetuning, {row.difference:+.1f})"


def _span(interval: Interval | None, sign: str = "") -> str:
    return f"{interval[0]:{sign}.1f} to {interval[1]:{sign}.1f}" if interval else "-"


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the table under :data:`HEAD`."""
    lines = []
    for row in rows:
        cells = [str(row.labels), row.schedule, row.method, str(len(row.seeds)), f"{row.mean:.1f}", _span(row.interval)]
        if row.difference is not None:
            p = "-" if row.p_adjusted is None else f"{row.p_adjusted:.3f}"
            cells += [f"{row.difference:+.1f}", _span(row.difference_interval, "+"), p]
        lines.append(cells + [""] * (len(HEAD) - len(cells)))
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [list(HEAD), ["---"] * len(HEAD), *table(rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def latex(rows: Sequence[Row]) -> str:
    """The table in LaTeX, with booktabs."""
    lines = [" & ".join(cells) + r" \\" for cells in [list(HEAD), *table(rows)]]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    text = "\n".join([r"\begin{tabular}{" + "l" * 3 + "r" * (len(HEAD) - 3) + "}", *body, r"\end{tabular}"])
    return text.replace("%", r"\%").replace("_", r"\_") + "\n"


def runs_csv(results: Sequence[Result]) -> str:
    """Mean Dice of each run, and of each structure."""
    names = list(dict.fromkeys(n for r in results for scores in r.scores.values() for n in scores))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "finetuning", "labels", "seed", "mean", *names])
    for r in results:
        means = [np.nanmean([scores.get(n, np.nan) for scores in r.scores.values()]) for n in names]
        values = [f"{value:.2f}" for value in (np.nanmean(r.case_means()), *means)]
        writer.writerow([r.method, r.schedule, r.labels, r.seed, *values])
    return buffer.getvalue()


def curves(rows: Sequence[Row]) -> bytes:
    """Dice against labelled cases, a panel for each finetuning schedule, with intervals and a dot for each seed."""
    schedules, labels = sorted({r.schedule for r in rows}), sorted({r.labels for r in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = new_figure(1.5 + 4.8 * len(schedules), 4.2, 1, len(schedules))
    for axis, schedule in zip(axes.flat, schedules, strict=True):
        for index, method in enumerate(methods):
            mine = [row for row in rows if (row.schedule, row.method) == (schedule, method)]
            colour = "0.35" if method == SCRATCH else f"C{index}"
            x = np.array([labels.index(row.labels) for row in mine]) + 0.09 * (index - (len(methods) - 1) / 2)
            axis.plot(x, [row.mean for row in mine], color=colour, marker="o", markersize=4, label=method)
            for position, row in zip(x, mine, strict=True):
                if row.interval:
                    axis.vlines(position, *row.interval, color=colour, linewidth=1)
                axis.plot([position] * len(row.per_seed), row.per_seed, "_", color=colour, alpha=0.6)
        tidy(axis, f"{schedule} finetuning", "labelled cases", "Dice (%)")
        axis.set_xticks(range(len(labels)), [str(n) for n in labels])
        axis.legend(fontsize=8)
    return to_png(figure)


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in HEAD)
    lines = []
    for row, cells in zip(rows, table(rows), strict=True):
        tone = ("gain" if (row.difference or 0) > 0 else "loss") if row.significant else ""
        lines.append("<tr>" + "".join(f'<td class="{tone}">{escape(cell)}</td>' for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _structures(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.structures))
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in ("labels", "finetuning", "method", *names))
    lines = []
    for row in rows:
        cells = [str(row.labels), row.schedule, row.method, *(f"{row.structures[n]:.1f}" for n in names)]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _seconds(run: Run, settings: Settings) -> dict[str, float]:
    content: dict[str, float] = json.loads(seconds_file(run, settings).read_text(encoding="utf-8"))
    return content


def _cost(runs: Sequence[Run], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Mean seconds of a pretraining and of a finetuning's training, by method."""
    spent: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        taken: Any = seconds.get(run.name, {}).get("nnUNetv2_train")
        if taken is not None:
            kind = "pretraining" if isinstance(run, Pretraining) else "finetuning"
            spent.setdefault((kind, run.method), []).append(taken)
    lines = [
        f"<tr><td>{kind}</td><td>{escape(method)}</td><td>{len(values)}</td><td>{np.mean(values):.0f} s</td></tr>"
        for (kind, method), values in spent.items()
    ]
    head = "".join(f'<th scope="col">{n}</th>' for n in ("training", "method", "runs", "mean time"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
