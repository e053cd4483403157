"""Compares a pretrained model with its matched baseline: a table for the terminal and a page without external files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from nnssl_stc3d.evaluation.page import picture, render_page, section
from nnssl_stc3d.evaluation.report_figures import Overlay, dice_bars, finetuning_curves, overlays, pretraining_curves
from nnssl_stc3d.evaluation.training_log import Curves

# Differences of the mean Dice below this are called none; repeats of one training differ by more than that.
NEGLIGIBLE = 0.03
CaseDice = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: organ, or "mean".
        scratch: mean Dice of the model from scratch; NaN if no test case has the organ.
        pretrained: mean Dice of the pretrained model.
        better: test cases in which the pretrained model is better.
        cases: test cases with the organ.
    """

    name: str
    scratch: float
    pretrained: float
    better: int
    cases: int

    @property
    def difference(self) -> float:
        """Gain of pretraining, negative if it lost."""
        return self.pretrained - self.scratch


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows.

    Attributes:
        title: headline.
        facts: name -> value, such as the numbers of cases and of training steps.
        scratch: case -> organ -> Dice.
        pretrained: the same for the pretrained model.
        labels: organ -> value in the label maps, without the background; empty draws no overlays.
        pretraining: curves of the pretraining.
        scratch_curves: curves of the finetuning from scratch.
        pretrained_curves: curves of the finetuning from the pretraining.
        overlay_cases: test cases to draw.
        views: picture of the views that the pretraining saw.
        is_ct: whether the first channel is a CT.
        commands: lines that repeat the run.
        stages: what was done -> seconds.
    """

    title: str
    facts: Mapping[str, str]
    scratch: CaseDice
    pretrained: CaseDice
    labels: Mapping[str, int]
    pretraining: Curves
    scratch_curves: Curves
    pretrained_curves: Curves
    overlay_cases: Sequence[Overlay] = ()
    views: Path | None = None
    is_ct: bool = False
    commands: str = ""
    stages: Sequence[tuple[str, float]] = field(default_factory=tuple)


def read_dice(summary: Path, names: Mapping[str, str]) -> CaseDice:
    """Reads the Dice of every case that nnU-Net evaluated.

    Args:
        summary: summary.json of nnUNetv2_evaluate_folder.
        names: key in the summary ("1", or "(1, 2)" for a region) -> organ.

    Returns:
        Case -> organ -> Dice; NaN where neither truth nor prediction has the organ.

    Raises:
        ValueError: the file is missing or is not such a summary.
    """
    try:
        entries = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
        return {
            Path(entry["reference_file"]).name: {
                name: float("nan") if entry["metrics"][key]["Dice"] is None else float(entry["metrics"][key]["Dice"])
                for key, name in names.items()
            }
            for entry in entries
        }
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{summary} is not a summary of nnUNetv2_evaluate_folder for {', '.join(names.values())}: {error!r}"
        ) from error


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values, NaN if there are none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else float("nan")


def compare(scratch: CaseDice, pretrained: CaseDice) -> list[Row]:
    """Builds the table: one row for each organ, then the mean over organs.

    Args:
        scratch: case -> organ -> Dice.
        pretrained: the same cases and organs.

    Raises:
        ValueError: the two differ in cases or organs, or there are none.
    """
    if not scratch or scratch.keys() != pretrained.keys():
        raise ValueError(
            f"Both models must be tested on the same cases, got {sorted(scratch)} and {sorted(pretrained)}."
        )
    names = list(next(iter(scratch.values())))
    if any(list(case) != names for case in (*scratch.values(), *pretrained.values())):
        raise ValueError(f"Every case must have a Dice for the same organs ({', '.join(names)}).")
    rows = []
    for name in names:
        pairs = [(scratch[case][name], pretrained[case][name]) for case in scratch]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        better = sum(p > s for s, p in pairs)
        rows.append(Row(name, _mean([s for s, _ in pairs]), _mean([p for _, p in pairs]), better, len(pairs)))
    per_case = [(_mean(list(scratch[case].values())), _mean(list(pretrained[case].values()))) for case in scratch]
    better = sum(p > s for s, p in per_case)
    return [
        *rows,
        Row("mean", _mean([r.scratch for r in rows]), _mean([r.pretrained for r in rows]), better, len(per_case)),
    ]


def format_table(rows: Sequence[Row]) -> str:
    """The table as text for a terminal."""
    width = max(len("organ"), *(len(row.name) for row in rows))
    head = f"{'organ':<{width}}  scratch  pretrained  difference  better in"
    lines = [head, "-" * len(head)]
    for row in rows:
        if row is rows[-1] and row.name == "mean":
            lines.append("-" * len(head))
        lines.append(
            f"{row.name:<{width}}  {_number(row.scratch):>7}  {_number(row.pretrained):>10}  "
            f"{_number(row.difference, True):>10}  "
            f"{f'{row.better} of {row.cases}':>9}"
        )
    return "\n".join(lines)


def _number(value: float, sign: bool = False) -> str:
    """Three decimals; a dash where there is no value."""
    if not math.isfinite(value):
        return "-"
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def verdict(rows: Sequence[Row]) -> str:
    """Says in one sentence who won this run, also when pretraining lost."""
    mean = rows[-1]
    gain = mean.difference
    if not math.isfinite(gain):
        return "No organ is in any test case, so nothing can be compared."
    numbers = f"mean Dice {mean.pretrained:.3f} against {mean.scratch:.3f} ({gain:+.3f})"
    if abs(gain) < NEGLIGIBLE:
        return f"Pretraining made no difference worth naming in this run: {numbers}."
    if gain < 0:
        return f"Pretraining lost in this run: {numbers}."
    return f"Pretraining won in this run: {numbers}, better in {mean.better} of {mean.cases} test cases."


def caveat(num_cases: int) -> str:
    """What the result does not say."""
    cases = f"{num_cases} test case{'' if num_cases == 1 else 's'}"
    return (
        f"Behind these numbers stand {cases} and one run of each model (one seed), trained for a few minutes. That "
        "demonstrates the tools; it is not evidence that pretraining helps. Repeats of so short a training can "
        "differ by four tenths of Dice. Evidence takes several seeds and folds, full schedules, and real data."
    )


def write_report(comparison: Comparison, path: Path) -> list[Row]:
    """Writes the page: one HTML file with all pictures inside.

    Args:
        comparison: what to show.
        path: file to write.

    Returns:
        The rows of the table.
    """
    rows = compare(comparison.scratch, comparison.pretrained)
    organs = [row.name for row in rows[:-1]]
    sections = [
        section("Dice of the test cases", _table(rows) + picture(_bars(comparison, organs), "Dice per organ")),
    ]
    if comparison.overlay_cases and comparison.labels:
        drawn = overlays(comparison.overlay_cases, comparison.labels, comparison.is_ct)
        sections.append(
            section(
                "Predictions",
                picture(drawn, "overlays"),
                "The first test cases by name, not a selection; the slice with most labels.",
            )
        )
    curves = finetuning_curves(comparison.scratch_curves, comparison.pretrained_curves)
    sections.append(
        section(
            "Finetuning",
            picture(curves, "finetuning curves"),
            "Same trainer, schedule, plans and cases for both models.",
        )
    )
    sections.append(section("Pretraining", picture(pretraining_curves(comparison.pretraining), "pretraining curves")))
    if comparison.views is not None and comparison.views.is_file():
        sections.append(
            section(
                "What pretraining sees",
                picture(comparison.views.read_bytes(), "views"),
                "Views of one volume and where they were taken.",
            )
        )
    if comparison.stages:
        sections.append(section("Time", _times(comparison.stages)))
    if comparison.commands:
        sections.append(section("Repeat it", f"<pre>{escape(comparison.commands)}</pre>"))
    page = render_page(comparison.title, verdict(rows), caveat(len(comparison.scratch)), comparison.facts, sections)
    path.write_text(page, encoding="utf-8")
    return rows


def _bars(comparison: Comparison, organs: Sequence[str]) -> bytes:
    def by_organ(dice: CaseDice) -> dict[str, list[float]]:
        return {name: [case[name] for case in dice.values()] for name in organs}

    return dice_bars(organs, by_organ(comparison.scratch), by_organ(comparison.pretrained))


def _table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        tone = (
            ""
            if abs(row.difference) < NEGLIGIBLE or math.isnan(row.difference)
            else "gain"
            if row.difference > 0
            else "loss"
        )
        cells.append(
            f'<tr class="{"mean" if row is rows[-1] else ""}"><th scope="row">{escape(row.name.replace("_", " "))}</th>'
            f"<td>{_number(row.scratch)}</td><td>{_number(row.pretrained)}</td>"
            f'<td class="{tone}">{_number(row.difference, True)}</td><td>{row.better} of {row.cases}</td></tr>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("organ", "scratch", "pretrained", "difference", "better in")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>"


def _times(stages: Sequence[tuple[str, float]]) -> str:
    lines = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{seconds:.0f} s</td></tr>" for name, seconds in stages)
    total = sum(seconds for _, seconds in stages)
    last = f"<tr class='mean'><th scope='row'>all</th><td>{total:.0f} s</td></tr>"
    return f"<table><tbody>{lines}{last}</tbody></table>"
