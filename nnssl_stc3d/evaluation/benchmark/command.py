"""One benchmark from its options to its report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nnssl_stc3d.evaluation.benchmark.design import (
    METHODS,
    SCHEDULES,
    SCRATCH,
    Budget,
    Split,
    draw_split,
    fixed_split,
    label_counts,
)
from nnssl_stc3d.evaluation.benchmark.execution import call, execute_all
from nnssl_stc3d.evaluation.benchmark.report import markdown, write_report
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, Run, Settings, plan_runs
from nnssl_stc3d.evaluation.benchmark.workspace import (
    CALIBRATION_STEPS,
    EPOCHS,
    Dataset,
    Workspace,
    calibration_trainer,
)
from nnssl_stc3d.evaluation.training_log import read_epoch_seconds


@dataclass(frozen=True)
class Options:
    """The command's options; see ``nnssl_stc3d benchmark --help``."""

    output: Path
    target: Path
    target_raw: Path
    pretraining: Path | None
    configuration: str
    plans: str
    methods: tuple[str, ...]
    labels: tuple[str, ...]
    seeds: int
    budget: str
    schedules: tuple[str, ...]
    finetuning_steps: int
    test_cases: int | None
    validation_cases: int | None
    split_seed: int
    cases: str
    device: str
    gpus: tuple[str, ...]
    jobs: int
    threads: int
    workers: int
    mirroring: bool
    dry_run: bool


def benchmark(options: Options) -> int:
    """Runs what is missing of a benchmark and writes its report.

    Returns:
        0, or 1 where a run failed.

    Raises:
        ValueError: options that cannot be, before anything is written.
    """
    budget = _check(options)
    target = _dataset(options.target, options.target_raw, options)
    pretraining = _dataset(options.pretraining, None, options) if options.pretraining else None
    cases = target.cases()
    test = options.test_cases or max(1, round(len(cases) / 4))
    validation = options.validation_cases or max(1, round(len(cases) / 6))
    labels = label_counts(options.labels, len(draw_split(cases, test, validation, options.split_seed).pool))
    if options.dry_run:
        _print_plan(options, labels, budget)
        return 0
    split = fixed_split(options.output / "split.json", cases, test, validation, options.split_seed)
    workspace = Workspace(options.output)
    workspace.link_datasets(target, split, pretraining)
    settings = Settings(
        workspace, target, pretraining or target, split, options.device, options.mirroring, options.cases,
        options.finetuning_steps,
    )  # fmt: skip
    steps = _steps(options, settings, budget)
    workspace.write_trainers(steps, options.finetuning_steps)
    runs = plan_runs(options.methods, steps, options.schedules, labels, range(options.seeds))
    failures = execute_all(runs, settings, options.threads, options.workers, options.jobs, options.gpus)
    folder = options.output / "report" / options.cases
    rows = write_report(runs, settings, _facts(options, settings, split, steps, budget), folder)
    print(f"\n{markdown(rows)}\nWrote {folder / 'index.html'}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _check(options: Options) -> Budget:
    """Refuses what cannot be; returns the budget."""
    for what, wanted, known in (
        ("methods", options.methods, [SCRATCH, *METHODS]),
        ("finetuning schedules", options.schedules, list(SCHEDULES)),
    ):
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"expected different {what} of {', '.join(known)}, got {', '.join(wanted) or 'none'}")
    if min(options.seeds, options.jobs) < 1:
        raise ValueError(f"expected at least one seed and one job, got {options.seeds} and {options.jobs}")
    if options.finetuning_steps < EPOCHS or options.finetuning_steps % EPOCHS:
        raise ValueError(f"--finetuning-steps must be a multiple of {EPOCHS}, got {options.finetuning_steps}")
    budget = Budget.parse(options.budget)
    if not budget.seconds and (budget.amount < EPOCHS or budget.amount % EPOCHS):
        raise ValueError(f"a budget in steps must be a multiple of {EPOCHS}, got {options.budget}")
    return budget


def _dataset(preprocessed: Path, raw: Path | None, options: Options) -> Dataset:
    """A dataset with the plans that are asked for."""
    file = preprocessed / f"{options.plans}.json"
    if not file.is_file():
        raise ValueError(
            f"expected plans {file}, which do not exist. Plan and preprocess {preprocessed.name} first, or name its "
            "plans with -p; nnssl_stc3d align-plans gives a pretraining dataset the plans of its target."
        )
    plans = json.loads(file.read_text(encoding="utf-8"))
    if options.configuration not in plans["configurations"]:
        raise ValueError(
            f"{file} has no configuration {options.configuration}, but {', '.join(plans['configurations'])}"
        )
    return Dataset(raw, preprocessed, plans, options.configuration)


def _steps(options: Options, settings: Settings, budget: Budget) -> dict[str, int]:
    """Steps of each method's pretraining. A budget in seconds is translated once, by measuring a few steps."""
    methods = [m for m in options.methods if m != SCRATCH]
    if not budget.seconds:
        return dict.fromkeys(methods, int(budget.amount))
    file = options.output / "seconds_per_step.json"
    measured: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings.workspace.write_trainers(dict.fromkeys(methods, 0), options.finetuning_steps)
    for method in methods:
        if method not in measured:
            measured[method] = _seconds_per_step(method, options, settings)
            print(f"{method}: {measured[method]:.3g} s a step")
            file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return {m: max(1, round(budget.amount / measured[m] / EPOCHS)) * EPOCHS for m in methods}


def _seconds_per_step(method: str, options: Options, settings: Settings) -> float:
    """Seconds of a pretraining step, validation included, measured alone in the second epoch of a short run."""
    trainer, start = calibration_trainer(method), f"{method}/calibration"
    dataset = settings.pretraining
    words = ["nnUNetv2_train", dataset.number, dataset.configuration, "all", "-p", options.plans, "-tr", trainer]
    log = options.output / "logs" / f"{method}-calibration.log"
    gpu = options.gpus[0] if options.gpus else ""
    call([*words, "-device", options.device], settings, start, log, 0, options.threads, options.workers, gpu)
    model = f"{trainer}__{options.plans}__{dataset.configuration}"
    return (
        read_epoch_seconds(settings.workspace.results(start) / dataset.name / model / "fold_all")[-1]
        / CALIBRATION_STEPS
    )


def _print_plan(options: Options, labels: Sequence[int], budget: Budget) -> None:
    """Prints the runs and what they cost."""
    steps = dict.fromkeys((m for m in options.methods if m != SCRATCH), EPOCHS)
    runs: list[Run] = plan_runs(options.methods, steps, options.schedules, labels, range(options.seeds))
    finetunings = [run for run in runs if isinstance(run, Finetuning)]
    for run in runs:
        print(run.name)
    pretrainings = len(runs) - len(finetunings)
    print(
        f"\n{pretrainings} pretrainings of {budget} each, {len(finetunings)} finetunings of {options.finetuning_steps} "
        f"steps each ({options.finetuning_steps * len(finetunings)} steps in all), {options.jobs} side by side."
    )
    if budget.seconds:
        print(f"The pretrainings take {pretrainings * budget.amount / 3600 / options.jobs:.2g} hours.")


def _facts(options: Options, settings: Settings, split: Split, steps: dict[str, int], budget: Budget) -> dict[str, str]:
    """What the page says about the benchmark."""
    pretrained_on = (
        f"{settings.pretraining.name}, {len(settings.pretraining.cases())} cases"
        if options.pretraining
        else f"images of the {len(split.development)} development cases"
    )
    lengths = ", ".join(f"{method} {count}" for method, count in steps.items()) or "none"
    facts = {
        "cases": f"{len(split.test)} test, {len(split.validation)} validation, {len(split.pool)} to label",
        "shown here": f"{options.cases} cases, predicted {'with' if options.mirroring else 'without'} mirroring",
        "pretrained on": pretrained_on,
        "budget of a pretraining": f"{budget}; steps: {lengths}",
        "finetuning": f"{options.finetuning_steps} steps, {', '.join(options.schedules)}",
        "plans": f"{options.plans}, {options.configuration}, as they were before the split was drawn",
        "device": options.device,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("nnssl_stc3d", "nnunetv2", "torch")),
        "command": shlex.join(sys.argv[1:]),
    }
    return facts
