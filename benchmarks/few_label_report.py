"""Statistics, tables and figure of the few-label comparison."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from few_label_runs import SCRATCH, Run, Settings
from scipy import stats

RESAMPLES = 10_000


def read_run(run: Run, settings: Settings, names: dict[str, str]) -> dict[str, Any]:
    """Reads the Dice of every case and class of a finished run.

    Args:
        run: the run.
        settings: the comparison's settings.
        names: class names by label.
    """
    folder = run.predictions(settings)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    dice = {
        Path(case["prediction_file"]).name.split(".")[0]: {
            names.get(label, label): metrics["Dice"] for label, metrics in case["metrics"].items()
        }
        for case in summary["metric_per_case"]
    }
    timing = folder / "seconds.json"
    return {
        "init": run.init,
        "schedule": run.schedule,
        "trainer": run.trainer,
        "labels": run.labels,
        "seed": run.seed,
        "fold": run.fold,
        "seconds": json.loads(timing.read_text(encoding="utf-8")) if timing.is_file() else {},
        "dice": dice,
    }


def case_means(run: dict[str, Any]) -> np.ndarray:
    """Mean Dice over the classes, in percent, of each case in sorted order; shape (cases,).

    A class that neither truth nor prediction has is left out, as nnU-Net does.
    """
    return np.array([100 * np.nanmean(list(run["dice"][case].values())) for case in sorted(run["dice"])])


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    mean = float(np.mean(values))
    return mean - half, mean + half


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled cases.

    Args:
        values: one value per case, shape (cases,).
    """
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per number of labels, schedule and initialisation, with its difference to the matched scratch runs.

    Args:
        runs: of :func:`read_run`.

    Returns:
        Rows with Dice in percent: "mean" and "interval" (t, over draws), "classes", and for pretrained arms
        "difference" with "difference_over_draws" (t interval of the paired differences) and "difference_over_cases"
        (bootstrap over cases of the differences averaged over draws).
    """
    groups: dict[tuple[int, str, str], dict[int, dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["labels"], run["schedule"], run["init"]), {})[run["seed"]] = run
    rows = []
    for labels, schedule, init in sorted(groups, key=lambda k: (k[0], k[1], k[2] != SCRATCH, k[2])):
        group = groups[labels, schedule, init]
        means = [float(case_means(group[seed]).mean()) for seed in sorted(group)]
        classes: dict[str, list[float]] = {}
        for run in group.values():
            for case in run["dice"].values():
                for name, dice in case.items():
                    classes.setdefault(name, []).append(100 * dice)
        row: dict[str, Any] = {
            "labels": labels,
            "schedule": schedule,
            "init": init,
            "seeds": sorted(group),
            "mean": float(np.mean(means)),
            "per_seed": means,
            "interval": t_interval(means),
            "classes": {name: float(np.nanmean(values)) for name, values in classes.items()},
        }
        scratch = groups.get((labels, schedule, SCRATCH), {})
        pairs = sorted(set(group) & set(scratch))
        if init != SCRATCH and pairs:
            differences = np.stack([case_means(group[s]) - case_means(scratch[s]) for s in pairs])
            row["paired_seeds"] = pairs
            row["difference"] = float(differences.mean())
            row["difference_over_draws"] = t_interval(differences.mean(axis=1).tolist())
            row["difference_over_cases"] = bootstrap_interval(differences.mean(axis=0))
        rows.append(row)
    return rows


def _format(interval: Sequence[float] | None, sign: str = "") -> str:
    """Text of an interval."""
    return f"{interval[0]:{sign}.1f} to {interval[1]:{sign}.1f}" if interval else "-"


def markdown(rows: list[dict[str, Any]], cases: int, kind: str) -> str:
    """The table for the documentation.

    Args:
        rows: of :func:`compare`.
        cases: number of evaluated cases.
        kind: "test" or "val".
    """
    names = list(rows[0]["classes"])
    head = ["Labelled cases", "Finetuning", "Start", "Draws", "Dice", "95 % over draws", *names]
    head += ["Against scratch", "95 % over draws", "95 % over cases"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["labels"]), row["schedule"], row["init"], str(len(row["seeds"])), f"{row['mean']:.1f}"]
        cells += [_format(row["interval"]), *(f"{row['classes'][name]:.1f}" for name in names)]
        if "difference" in row:
            cells += [f"{row['difference']:+.1f}", _format(row["difference_over_draws"], "+")]
            cells += [_format(row["difference_over_cases"], "+")]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    which = "held-out test" if kind == "test" else "validation"
    lines += [
        "",
        f"Dice in percent, mean over {cases} {which} cases and classes. Differences are paired by draw (same labelled "
        "cases, same seed). Over draws: Student's t. Over cases: bootstrap of the cases' differences, "
        f"averaged over draws, {RESAMPLES} resamples.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Dice against labelled cases by arm, with 95 % intervals over draws and a dot per draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = sorted({row["labels"] for row in rows})
    arms = sorted({(row["schedule"], row["init"]) for row in rows}, key=lambda a: (a[0], a[1] != SCRATCH, a[1]))
    inits = list(dict.fromkeys(init for _, init in arms))
    schedules = sorted({schedule for schedule, _ in arms})
    figure, axes = plt.subplots(1, len(schedules), figsize=(1 + 4 * len(schedules), 4), sharey=True, squeeze=False)
    for axis, schedule in zip(axes[0], schedules, strict=True):
        shown = [init for s, init in arms if s == schedule]
        for i, init in enumerate(shown):
            mine = [row for row in rows if (row["schedule"], row["init"]) == (schedule, init)]
            x = np.array([labels.index(row["labels"]) for row in mine]) + 0.12 * (i - (len(shown) - 1) / 2)
            mean = np.array([row["mean"] for row in mine])
            half = np.array([row["interval"][1] - row["mean"] if row["interval"] else 0.0 for row in mine])
            color = "0.45" if init == SCRATCH else f"C{inits.index(init) - (SCRATCH in inits)}"
            axis.errorbar(x, mean, yerr=half, fmt="o-", color=color, capsize=4, label=init)
            for position, row in zip(x, mine, strict=True):
                dots = [position] * len(row["per_seed"])
                axis.scatter(dots, row["per_seed"], color=color, s=12, alpha=0.5, zorder=3)
        axis.set_title(f"{schedule} finetuning")
        axis.set_xticks(range(len(labels)), [str(n) for n in labels])
        axis.set_xlabel("labelled cases")
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("Dice (%)")
    figure.suptitle("Mean with 95 % interval over draws; one dot per draw", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def write_report(runs: Sequence[Run], settings: Settings) -> str:
    """Writes results.json, results.csv, results.md and results.png for the runs that are finished.

    Returns:
        The table.

    Raises:
        ValueError: no run is finished, or runs were evaluated on different cases.
    """
    description = json.loads((settings.preprocessed / "dataset.json").read_text(encoding="utf-8"))
    names = {str(label): name for name, label in description["labels"].items()}
    results = [read_run(run, settings, names) for run in runs if run.is_done(settings)]
    if not results:
        raise ValueError(f"none of the {len(runs)} runs in {settings.work} is finished, so there is nothing to report")
    if len({tuple(sorted(result["dice"])) for result in results}) > 1:
        raise ValueError(f"runs in {settings.work} were evaluated on different cases; remove their predictions")
    rows = compare(results)
    table = markdown(rows, len(results[0]["dice"]), settings.cases)
    folder = settings.work / "report" / settings.cases
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "cases": settings.cases,
        "plans": settings.plans,
        "test_time_mirroring": settings.tta,
        "device": settings.device,
        "threads_per_run": settings.threads,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "nnunetv2")} | {"python": platform.python_version()},
        "rows": rows,
        "runs": results,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["init", "schedule", "labels", "seed", "case", "class", "dice"])
        for result in results:
            key = [result["init"], result["schedule"], result["labels"], result["seed"]]
            for case, classes in sorted(result["dice"].items()):
                writer.writerows([*key, case, name, dice] for name, dice in classes.items())
    (folder / "results.md").write_text(table, encoding="utf-8")
    plot(rows, folder / "results.png")
    return table
