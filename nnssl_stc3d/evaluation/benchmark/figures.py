"""Figures of a benchmark, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.data.voxel_labels import anatomical_labels
from nnssl_stc3d.evaluation.benchmark.methods import SCRATCH
from nnssl_stc3d.evaluation.benchmark.results import finished
from nnssl_stc3d.evaluation.benchmark.runs import Run, Settings
from nnssl_stc3d.evaluation.benchmark.statistics import Result, Row
from nnssl_stc3d.evaluation.report_figures import Overlay, new_figure, overlays, tidy, to_png


def _colour(method: str, methods: Sequence[str]) -> str:
    others = [name for name in methods if name != SCRATCH]
    return "0.35" if method == SCRATCH else f"C{others.index(method) % 10}"


def label_curves(rows: Sequence[Row], score: str) -> bytes:
    """Score against labelled cases, a panel for each way of finetuning, with intervals and a mark for each seed."""
    schedules, labels = sorted({r.schedule for r in rows}), sorted({r.labels for r in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = new_figure(3 + 4.8 * len(schedules), max(4.2, 0.6 + 0.22 * len(methods)), 1, len(schedules))
    for axis, schedule in zip(axes.flat, schedules, strict=True):
        for index, method in enumerate(methods):
            mine = [row for row in rows if (row.schedule, row.method) == (schedule, method)]
            colour = _colour(method, methods)
            # Side by side, so that intervals do not cover each other.
            x = np.array([labels.index(row.labels) for row in mine]) + 0.3 * ((index + 0.5) / len(methods) - 0.5)
            # Colours repeat after ten methods.
            mark = "os^Dv"[index // 10 % 5]
            axis.plot(x, [row.mean for row in mine], color=colour, marker=mark, markersize=4, label=method)
            for position, row in zip(x, mine, strict=True):
                if row.interval:
                    axis.vlines(position, *row.interval, color=colour, linewidth=1)
                axis.plot([position] * len(row.per_seed), row.per_seed, "_", color=colour, alpha=0.6)
        tidy(axis, f"{schedule} finetuning", "labelled cases", f"{score} (%)")
        axis.set_xticks(range(len(labels)), [str(n) for n in labels])
    # Beside the axes, where it covers no point.
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return to_png(figure)


def difference_bars(rows: Sequence[Row], score: str) -> bytes:
    """Difference of each method to the reference, with its interval over seeds and a dot for each seed."""
    shown = [row for row in rows if row.difference is not None]
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = new_figure(7.5, 0.9 + 0.32 * len(shown))
    axis = axes[0, 0]
    axis.axvline(0, color="0.35", linewidth=1)
    for index, row in enumerate(shown):
        colour = _colour(row.method, methods)
        if row.difference_interval:
            axis.hlines(index, *row.difference_interval, color=colour, linewidth=2)
        axis.plot(row.difference_per_seed, [index] * len(row.difference_per_seed), "o", color=colour, markersize=3)
        axis.plot([row.difference], [index], "|", color=colour, markersize=14)
    several = len({row.schedule for row in rows}) > 1
    names = [
        f"{r.method}, {r.labels} labels{f', {r.schedule}' if several else ''}{' *' if r.significant else ''}"
        for r in shown
    ]
    axis.set_yticks(range(len(shown)), names)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    tidy(axis, f"against {rows[0].reference}, paired by seed (* significant after correction)", f"{score} (points)")
    return to_png(figure)


def robustness_curves(rows: Mapping[tuple[str, str], Sequence[Row]]) -> bytes:
    """Dice against the level of each perturbation, at each number of labels."""
    perturbations = list(dict.fromkeys(name for name, _ in rows))
    kinds = list(dict.fromkeys((row.schedule, row.labels) for some in rows.values() for row in some))
    methods = list(dict.fromkeys(row.method for some in rows.values() for row in some))
    figure, axes = new_figure(3.1 * len(perturbations) + 1, 2.8 * len(kinds), len(kinds), len(perturbations))
    for line, kind in zip(axes, kinds, strict=True):
        for axis, perturbation in zip(line, perturbations, strict=True):
            levels = [level for name, level in rows if name == perturbation]
            for method in methods:
                wanted = (*kind, method)
                means = [
                    next((r.mean for r in rows[perturbation, v] if (r.schedule, r.labels, r.method) == wanted), np.nan)
                    for v in levels
                ]
                axis.plot(levels, means, marker="o", markersize=4, color=_colour(method, methods), label=method)
            tidy(axis, f"{perturbation}, {kind[1]} labels, {kind[0]}", "", "Dice (%)")
    axes[0, 0].legend(fontsize=7)
    return to_png(figure)


def case_overlays(runs: Sequence[Run], results: Sequence[Result], settings: Settings) -> tuple[bytes, str]:
    """Predictions of the best, the median and the worst case by all methods.

    Cases are ranked by their mean Dice over all methods with the fewest labels, so that no method chooses them.

    Returns:
        PNG and what is shown.
    """
    schedule = results[0].schedule
    fewest = min(result.labels for result in results if result.schedule == schedule)
    shown = [r for r in results if (r.labels, r.schedule) == (fewest, schedule)]
    seed = min(r.seed for r in shown)
    order = np.argsort(-np.mean([r.case_means() for r in shown], axis=0))
    names = sorted(shown[0].scores)
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    images, truths = settings.workspace.cases(settings.cases)
    ending = settings.workspace.ending(settings.target)
    folders = {
        run.method: run.predictions(settings)
        for run in finished(runs, settings)
        if (run.labels, run.schedule, run.seed) == (fewest, schedule, seed)
    }
    cases = []
    for title, index in chosen.items():
        truth = truths / f"{names[index]}{ending}"
        predictions = {method: folder / truth.name for method, folder in folders.items()}
        cases.append(Overlay(f"{title}: {names[index]}", images / f"{names[index]}_0000{ending}", truth, predictions))
    labels = anatomical_labels(settings.workspace.dataset_json(settings.target))
    schemes = PlansManager(settings.target.plans).get_configuration(settings.target.configuration).normalization_schemes
    note = f"{schedule} finetuning, {fewest} labels, seed {seed}; ranked by mean Dice of all methods."
    return overlays(cases, {name: value for value, name in labels.items()}, schemes[0] == "CTNormalization"), note
