"""Reads what the finished runs of a benchmark have reached."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Run, Settings
from nnssl_stc3d.evaluation.benchmark.statistics import Result
from nnssl_stc3d.evaluation.benchmark.surface_dice import Structures, folder_surface_dice


def structures(settings: Settings) -> dict[str, int | list[int]]:
    """Structure -> value in the label maps, or values of a region, without the background and what is ignored."""
    file = settings.workspace.preprocessed / settings.target.name / "dataset.json"
    labels: dict[str, int | list[int]] = json.loads(file.read_text(encoding="utf-8"))["labels"]
    return {name: value for name, value in labels.items() if name not in ("background", "ignore")}


def read_dice(runs: Sequence[Run], settings: Settings) -> list[Result]:
    """Dice in percent of every finished finetuning, from nnU-Net's own evaluation."""
    names = {
        str(value if isinstance(value, int) else tuple(value)): name for name, value in structures(settings).items()
    }
    results = []
    for run in finished(runs, settings):
        summary = json.loads((run.predictions(settings) / "summary.json").read_text(encoding="utf-8"))
        scores = {
            Path(case["prediction_file"]).name.split(".")[0]: {
                names.get(label, label): 100 * float(metrics["Dice"]) for label, metrics in case["metrics"].items()
            }
            for case in summary["metric_per_case"]
        }
        results.append(Result(run.method, run.schedule, run.labels, run.seed, scores))
    return results


def read_surface_dice(runs: Sequence[Run], settings: Settings, tolerance: float) -> list[Result]:
    """Normalised surface Dice in percent of every finished finetuning, measured where it was not.

    Args:
        runs: of the benchmark.
        settings: of the benchmark.
        tolerance: in mm.
    """
    wanted: Structures = structures(settings)
    truths = settings.workspace.cases(settings.cases)[1]
    results = []
    for run in tqdm(finished(runs, settings), desc="surface Dice", unit="run"):
        scores = folder_surface_dice(truths, run.predictions(settings), wanted, tolerance)
        percent = {case: {name: 100 * value for name, value in of.items()} for case, of in scores.items()}
        results.append(Result(run.method, run.schedule, run.labels, run.seed, percent))
    return results


def read_perturbed_dice(runs: Sequence[Run], settings: Settings) -> dict[tuple[str, str], list[Result]]:
    """Perturbation and level -> Dice of the perturbed cases. The unperturbed ones are the level "none"."""
    groups: dict[tuple[str, str], list[PerturbedPrediction]] = {}
    for run in runs:
        if isinstance(run, PerturbedPrediction):
            groups.setdefault((run.perturbation, run.level), []).append(run)
    found: dict[tuple[str, str], list[Result]] = {}
    for (perturbation, level), members in groups.items():
        finetunings = [run.finetuning for run in members]
        results = read_dice(finetunings, members[0].settings(settings))
        if results:
            # Every level has the same unperturbed cases, which are read once.
            if (perturbation, "none") not in found:
                found[perturbation, "none"] = read_dice(finetunings, settings)
            found[perturbation, level] = results
    return found


def finished(runs: Sequence[Run], settings: Settings) -> list[Finetuning]:
    """Finetunings whose predictions are evaluated."""
    return [run for run in runs if isinstance(run, Finetuning) and run.is_done(settings)]
