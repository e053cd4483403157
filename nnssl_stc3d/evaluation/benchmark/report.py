"""What a benchmark leaves behind: results.json, tables in CSV, Markdown and LaTeX, and one page with figures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnssl_stc3d.evaluation.benchmark import figures, tables
from nnssl_stc3d.evaluation.benchmark.execution import TRAIN, Spent, read_cost
from nnssl_stc3d.evaluation.benchmark.methods import LONGER, METHODS, SCRATCH
from nnssl_stc3d.evaluation.benchmark.results import read_dice, read_perturbed_dice, read_surface_dice
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Pretraining, Run, Settings
from nnssl_stc3d.evaluation.benchmark.statistics import Result, Row, compare, corrected
from nnssl_stc3d.evaluation.page import picture, render_page, section

Cost = Mapping[str, Mapping[str, Spent]]

_EXPLANATION = (
    "Differences are paired by seed: same labelled cases, schedule, steps and initialisation of what is not "
    "pretrained. A seed also changes the pretraining. Intervals of differences are Student's t over seeds, p-values "
    "are of paired t-tests, corrected for all rows by Benjamini and Hochberg. They say what repetitions would give on "
    "these test cases and with this pool of labelled cases, not what other patients would. Intervals of means resample "
    "seeds and cases, seeds spread wider as they are few."
)


def write_report(
    runs: Sequence[Run],
    settings: Settings,
    facts: Mapping[str, str],
    folder: Path,
    tolerance: float = 0.0,
    reference: str = SCRATCH,
) -> list[Row]:
    """Writes everything about the runs that are finished.

    Args:
        runs: of the benchmark.
        settings: of the benchmark.
        facts: what the page says about them, name -> value.
        folder: to write to; files of an earlier report are replaced.
        tolerance: of normalised surface Dice, in mm; 0 leaves it out.
        reference: method that the others are compared with.

    Returns:
        The rows of the table of Dice.

    Raises:
        ValueError: no run is finished.
    """
    results = read_dice(runs, settings)
    if not results:
        raise ValueError(f"none of the {len(runs)} runs in {settings.workspace.root} is finished: nothing to report")
    scores = {"Dice": results}
    if tolerance:
        scores[f"NSD {tolerance:g} mm"] = read_surface_dice(runs, settings, tolerance)
    rows = {name: corrected(compare(some, reference)) for name, some in scores.items()}
    perturbed = _compare_perturbed(read_perturbed_dice(runs, settings), rows["Dice"], reference)
    cost: Cost = {run.name: spent for run in runs if (spent := read_cost(run, settings))}
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "facts": dict(facts),
        "cases": settings.cases,
        "split": dataclasses.asdict(settings.split),
        "rows": {name: list(map(_as_dict, some)) for name, some in rows.items()},
        "perturbed": [
            {"perturbation": kind, "level": level, "rows": list(map(_as_dict, some))}
            for (kind, level), some in perturbed.items()
        ],
        "runs": {name: [dataclasses.asdict(result) for result in some] for name, some in scores.items()},
        "cost": cost,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "cases.csv").write_text(tables.cases_csv(scores), encoding="utf-8")
    (folder / "runs.csv").write_text(tables.runs_csv(scores), encoding="utf-8")
    for name, make in (("table.md", tables.markdown), ("table.tex", tables.latex)):
        (folder / name).write_text("\n".join(make(some, score) for score, some in rows.items()), encoding="utf-8")
    pictures = {"curves.png": figures.label_curves(rows["Dice"], "Dice")}
    if any(row.difference is not None for row in rows["Dice"]):
        pictures["differences.png"] = figures.difference_bars(rows["Dice"], "Dice")
    overlays = figures.case_overlays(runs, results, settings)
    pictures["overlays.png"] = overlays[0]
    if perturbed:
        pictures["robustness.png"] = figures.robustness_curves(perturbed)
    for name, png in pictures.items():
        (folder / name).write_bytes(png)

    curves = picture(pictures["curves.png"], "curves of Dice against labels")
    differences = picture(pictures["differences.png"], "differences") if "differences.png" in pictures else ""
    sections = [section("Dice against labelled cases", curves)]
    for name, some in rows.items():
        body, note = (differences, _EXPLANATION) if name == "Dice" else ("", "")
        sections.append(section(f"{name} against {reference}", body + tables.comparison_html(some, name), note))
        sections.append(section(f"{name} of each structure", tables.structures_html(some)))
    if perturbed:
        body = picture(pictures["robustness.png"], "Dice against perturbation") + tables.perturbed_html(perturbed)
        sections.append(section("Robustness", body, "The same models on perturbed copies of the same cases."))
    sections.append(section("Predictions", picture(overlays[0], "overlays"), overlays[1]))
    if cost:
        sections.append(section("Cost", _cost_table(runs, cost)))
    title = f"What pretraining on {settings.pretraining.name} is worth with few labels of {settings.target.name}"
    missing = sum(isinstance(run, Finetuning) for run in runs) - len(results)
    warning = caveat(rows["Dice"], missing, settings.cases)
    page = render_page(title, verdict(rows["Dice"]), warning, facts, sections)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return rows["Dice"]


def _as_dict(row: Row) -> dict[str, object]:
    return dataclasses.asdict(row) | {"significant": row.significant}


def _compare_perturbed(
    results: Mapping[tuple[str, str], Sequence[Result]], unperturbed: Sequence[Row], reference: str
) -> dict[tuple[str, str], list[Row]]:
    """Rows of every perturbation and level, corrected together, after those without it, which are corrected already."""
    compared = {kind: compare(some, reference) for kind, some in results.items()}
    rows = iter(corrected([row for some in compared.values() for row in some]))
    found: dict[tuple[str, str], list[Row]] = {}
    for (perturbation, level), some in compared.items():
        found.setdefault((perturbation, "none"), list(unperturbed))
        found[perturbation, level] = [next(rows) for _ in some]
    return found


def verdict(rows: Sequence[Row]) -> str:
    """Which differences to the reference are significant, in a sentence."""
    if all(row.method == row.reference for row in rows):
        return f"Only {rows[0].reference} was run: there is nothing to compare it with, but its ways of finetuning."
    tested = [row for row in rows if row.p_adjusted is not None]
    if not tested:
        return f"Too few seeds, or no runs of {rows[0].reference}: nothing can be said about significance."
    won = [_label(row) for row in tested if row.significant and (row.difference or 0) > 0]
    lost = [_label(row) for row in tested if row.significant and (row.difference or 0) < 0]
    parts = [f"Better than {rows[0].reference}: {', '.join(won)}." if won else ""]
    parts.append(f"Worse than {rows[0].reference}: {', '.join(lost)}." if lost else "")
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
    elif len({row.schedule for row in rows}) > 1 or {row.method for row in rows} - {SCRATCH, LONGER, *METHODS}:
        text += " To choose between ways of finetuning or options, use validation cases; these are test cases."
    if any(row.schedule.startswith("frozen-start") and row.method == SCRATCH for row in rows):
        text += " A frozen start from scratch begins with a frozen random encoder: it is no matched scratch."
    if min(seeds) < 5:
        text += " Fewer than five seeds rarely decide anything: repeats of one method differ by several points of Dice."
    return text


def _label(row: Row) -> str:
    return f"{row.method} with {row.labels} labels ({row.schedule} finetuning, {row.difference:+.1f})"


def _cost_table(runs: Sequence[Run], cost: Cost) -> str:
    """Mean time and energy of a pretraining and of a finetuning, by method."""
    spent: dict[tuple[str, str], list[Spent]] = {}
    for run in runs:
        taken = cost.get(run.name, {}).get(TRAIN)
        if taken is not None and not isinstance(run, PerturbedPrediction):
            key = ("pretraining", run.method.name) if isinstance(run, Pretraining) else ("finetuning", run.method)
            spent.setdefault(key, []).append(taken)
    lines = []
    for (kind, name), values in spent.items():
        joules = [value["joules"] for value in values]
        energy = "not reported" if None in joules else f"{np.mean([j or 0 for j in joules]) / 3600:.1f} Wh"
        lines.append([kind, name, str(len(values)), f"{np.mean([v['seconds'] or 0 for v in values]):.0f} s", energy])
    return tables.html(["training", "method", "runs", "mean time", "mean energy of the GPU"], lines)
