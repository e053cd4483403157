"""What a benchmark would run, and how long that takes as far as it is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnssl_stc3d.evaluation.benchmark.execution import EVALUATE, TRAIN, command_on_cases, read_cost
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Pretraining, Run, Settings

_KINDS: dict[type, str] = {
    Pretraining: "pretrainings",
    Finetuning: "finetunings",
    PerturbedPrediction: "predictions of perturbed cases",
}


def describe_plan(
    runs: Sequence[Run], settings: Settings, budget: str, pretraining: float | None, side_by_side: int
) -> str:
    """The runs in words, and the hours that are left by what finished ones took.

    Args:
        runs: of the benchmark.
        settings: of the benchmark, whose folder need not exist.
        budget: of a pretraining, as it was given.
        pretraining: seconds of a pretraining, if the budget says so.
        side_by_side: runs at a time.
    """
    split = settings.split
    sizes = f"{len(split.test)} test cases, {len(split.validation)} validation cases, {len(split.pool)} to label"
    lines = [f"{settings.target.name}: {sizes}; {settings.cases} cases are predicted.", ""]
    for run in runs:
        if isinstance(run, Pretraining):
            lines.append(f"seed {run.seed}: pretraining, {run.method.described()}")
        elif isinstance(run, Finetuning):
            what = f"{run.method}, {run.labels} labelled cases, schedule {run.schedule}"
            length = "" if run.longer is None else f", {run.longer or 'so far an unknown number of'} steps"
            lines.append(f"seed {run.seed}: finetuning, {what}{length}")
    pretrainings, finetunings, perturbed = (sum(isinstance(run, kind) for run in runs) for kind in _KINDS)
    longer = sum(isinstance(run, Finetuning) and run.longer is not None for run in runs)
    steps = sum(run.steps(settings) for run in runs if isinstance(run, Finetuning))
    more = f" and {longer} longer ones" if longer else ""
    lines += [
        "",
        f"{pretrainings} pretrainings of {budget} each, {finetunings - longer} finetunings of "
        f"{settings.finetuning_steps} steps each{more} ({steps} steps in all), {perturbed} predictions of perturbed "
        f"cases; {side_by_side} side by side.",
    ]
    return "\n".join([*lines, _left(runs, settings, pretraining, side_by_side)])


def _left(runs: Sequence[Run], settings: Settings, pretraining: float | None, side_by_side: int) -> str:
    """How many runs are finished, and how long the others take."""
    taken: dict[str, list[float]] = {}
    left = []
    for run in runs:
        cost, kind = read_cost(run, settings), _KINDS[type(run)]
        last = TRAIN if isinstance(run, Pretraining) else command_on_cases(EVALUATE, settings)
        if last in cost:
            taken.setdefault(kind, []).append(sum(spent["seconds"] or 0.0 for spent in cost.values()))
        else:
            left.append(kind)
    seconds = {kind: float(np.mean(values)) for kind, values in taken.items()}
    if pretraining is not None:
        seconds.setdefault(_KINDS[Pretraining], pretraining)
    parts = [f"{len(runs) - len(left)} of {len(runs)} runs are finished."] if taken else []
    if hours := sum(seconds.get(kind, 0.0) for kind in left) / 3600 / side_by_side:
        parts.append(f"{' and '.join(k for k in dict.fromkeys(left) if k in seconds)} left: about {hours:.2g} hours.")
    if unknown := [kind for kind in dict.fromkeys(left) if kind not in seconds]:
        parts.append(f"How long {' and '.join(unknown)} take is known when one is finished.")
    return " ".join(part[0].upper() + part[1:] for part in parts)
