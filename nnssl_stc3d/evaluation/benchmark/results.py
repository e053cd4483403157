"""Reads what the finished runs of a benchmark have reached."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnssl_stc3d.data.voxel_labels import ignored_value
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Run, Settings
from nnssl_stc3d.evaluation.benchmark.statistics import Result
from nnssl_stc3d.evaluation.benchmark.surface_dice import Structures, folder_surface_dice


def _structures(settings: Settings) -> dict[str, int | list[int]]:
    """Structure -> value in the label maps, or values of a region, without the background and what is ignored."""
    labels: dict[str, int | list[int]] = settings.workspace.dataset_json(settings.target)["labels"]
    return {name: value for name, value in labels.items() if name not in ("background", "ignore")}


def _percent(score: float) -> float:
    """A score of 0 to 1 in percent. It is NaN where neither truth nor prediction has the structure: a correct answer.

    nnU-Net leaves these out of its means. Then a false positive in such a case would count for one run, and the case
    be missing in the pairs of that run with others.
    """
    return 100.0 if math.isnan(score) else 100 * score


def read_dice(runs: Sequence[Run], settings: Settings) -> list[Result]:
    """Dice in percent of every finished finetuning, from nnU-Net's own evaluation."""
    names = {
        str(value if isinstance(value, int) else tuple(value)): name for name, value in _structures(settings).items()
    }
    ending = settings.workspace.ending(settings.target)
    results = []
    for run in finished(runs, settings):
        summary = json.loads((run.predictions(settings) / "summary.json").read_text(encoding="utf-8"))
        scores = {
            Path(case["prediction_file"]).name.removesuffix(ending): {
                names.get(label, label): _percent(metrics["Dice"]) for label, metrics in case["metrics"].items()
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
    wanted: Structures = _structures(settings)
    ignored = ignored_value(settings.workspace.dataset_json(settings.target))
    truths, ending = settings.workspace.cases(settings.cases)[1], settings.workspace.ending(settings.target)
    results = []
    for run in tqdm(finished(runs, settings), desc="surface Dice", unit="run"):
        measured = folder_surface_dice(truths, run.predictions(settings), wanted, tolerance, ending, ignored)
        percent = {case: {name: _percent(score) for name, score in of.items()} for case, of in measured.items()}
        results.append(Result(run.method, run.schedule, run.labels, run.seed, percent))
    return results


def read_perturbed_dice(runs: Sequence[Run], settings: Settings) -> dict[tuple[str, str], list[Result]]:
    """Perturbation and level -> Dice of the perturbed cases."""
    groups: dict[tuple[str, str], list[PerturbedPrediction]] = {}
    for run in runs:
        if isinstance(run, PerturbedPrediction):
            groups.setdefault((run.perturbation, run.level), []).append(run)
    found: dict[tuple[str, str], list[Result]] = {}
    for (perturbation, level), members in groups.items():
        finetunings = [run.finetuning for run in members]
        results = read_dice(finetunings, members[0].settings(settings))
        if results:
            found[perturbation, level] = results
    return found


def finished(runs: Sequence[Run], settings: Settings) -> list[Finetuning]:
    """Finetunings whose predictions are evaluated."""
    return [run for run in runs if isinstance(run, Finetuning) and run.is_done(settings)]
