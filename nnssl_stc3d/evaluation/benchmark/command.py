"""One benchmark from its options to its report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnssl_stc3d.evaluation.benchmark import surface_dice
from nnssl_stc3d.evaluation.benchmark.design import Budget, draw_split, fix_split, label_counts, part_sizes, read_split
from nnssl_stc3d.evaluation.benchmark.execution import call, execute_all
from nnssl_stc3d.evaluation.benchmark.lock import held_alone
from nnssl_stc3d.evaluation.benchmark.methods import (
    ABLATIONS,
    LONGER,
    SCRATCH,
    Method,
    find_methods,
    parse_schedule,
    with_options,
)
from nnssl_stc3d.evaluation.benchmark.perturb import perturbed_kinds, write_perturbed
from nnssl_stc3d.evaluation.benchmark.plan import describe_plan
from nnssl_stc3d.evaluation.benchmark.report import write_report
from nnssl_stc3d.evaluation.benchmark.runs import Settings, plan_runs
from nnssl_stc3d.evaluation.benchmark.tables import markdown
from nnssl_stc3d.evaluation.benchmark.trainer_source import (
    CALIBRATION,
    CALIBRATION_STEPS,
    EPOCHS,
    finetuning_trainer,
    trainers_source,
)
from nnssl_stc3d.evaluation.benchmark.workspace import Dataset, Workspace, read_json, write_whole
from nnssl_stc3d.evaluation.training_log import read_epoch_seconds
from nnssl_stc3d.evaluation.voxel_embeddings import build_network
from nnssl_stc3d.training.preflight import check_configuration
from nnssl_stc3d.transfer.adapt import Adaptation
from nnssl_stc3d.transfer.differences import PREPROCESSING, PlansReference, aligned_name, compare, describe_plans


@dataclass(frozen=True)
class Options:
    """The command's options; see ``nnssl_stc3d benchmark --help``."""

    output: Path
    target: Path
    target_raw: Path
    pretraining: Path | None
    pretraining_plans: str | None
    configuration: str
    plans: str
    methods: tuple[str, ...]
    ablation: str | None
    options: tuple[str, ...]
    labels: tuple[str, ...]
    seeds: int
    budget: str
    schedules: tuple[str, ...]
    finetuning_steps: int
    test_cases: int | None
    validation_cases: int | None
    split_seed: int
    split: Path | None
    cases: str | None
    robustness: tuple[str, ...]
    tolerance: float
    reference: str
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
    budget, methods, scratch, cases = _check(options)
    perturbed = perturbed_kinds(options.robustness)
    target = _dataset(options.target, options.target_raw, options.plans, options.configuration)
    pretraining = _pretraining(options.pretraining, options, target) if options.pretraining else None
    _check_networks(methods, pretraining or target)
    names = target.cases()
    wanted = (options.test_cases, options.validation_cases)
    drawn = (
        read_split(options.split, names, *wanted, options.split_seed)
        if options.split
        else draw_split(names, *part_sizes(len(names), *wanted), options.split_seed)
    )
    labels = label_counts(options.labels, len(drawn.pool))
    plan = partial(
        plan_runs, scratch, schedules=options.schedules, labels=labels, seeds=range(options.seeds), perturbed=perturbed
    )
    # Refuses missing files before the split is kept, so that one without these cases can still be taken.
    target.raw_cases([*drawn.test, *drawn.validation])
    workspace = Workspace(options.output)
    settings = Settings(
        workspace, target, pretraining or target, drawn, options.device, options.mirroring, cases,
        options.finetuning_steps,
    )  # fmt: skip
    longer = LONGER in options.methods
    if options.dry_run:
        known = _known_seconds(options.output)
        lengths = _longer_lengths(options, budget, known) if longer else None
        runs = plan(steps={method: _length(budget, known.get(method.key)) for method in methods}, longer=lengths)
        seconds = budget.amount if budget.seconds else None
        side_by_side = options.jobs * max(1, len(options.gpus))
        print(describe_plan(runs, settings, options.budget, seconds, side_by_side))
        return 0
    with held_alone(options.output):
        fix_split(options.output / "split.json", drawn)
        workspace.fix_methods(methods)
        workspace.link_datasets(target, drawn, options.device, pretraining)
        if left_out := workspace.left_out():
            examples = ", ".join(f"{case} ({test})" for case, test in list(left_out.items())[:3])
            print(f"Not pretrained on: {len(left_out)} cases that show test cases, such as {examples}")
        for perturbation, level in tqdm(perturbed, desc="perturbing cases", disable=not perturbed):
            copies = workspace.cases(f"{cases}-{perturbation}-{level}")
            write_perturbed(workspace.cases(cases), copies, workspace.ending(target), perturbation, level)
        steps = _steps(methods, options, settings, budget)
        lengths = _longer_lengths(options, budget, _known_seconds(options.output)) if longer else None
        workspace.write_trainers(trainers_source(steps, options.finetuning_steps, options.schedules, longer=lengths))
        runs = plan(steps=steps, longer=lengths)
        folder = options.output / "report" / "-".join(filter(None, (cases, options.ablation)))
        tolerance = options.tolerance if surface_dice.is_available() else 0.0
        facts = _facts(options, settings, steps, budget)

        def report_so_far(left: set[int]) -> None:
            """People look before everything is finished. That it cannot be written must not end the runs."""
            over = [run for run in runs if run.seed not in left]
            so_far = {"so far": f"{options.seeds - len(left)} of {options.seeds} seeds"}
            try:
                write_report(over, settings, so_far | facts, folder, tolerance, options.reference)
            except Exception as error:
                tqdm.write(f"No report so far: {error}", file=sys.stderr)

        failures = execute_all(
            runs, settings, options.threads, options.workers, options.jobs, options.gpus, report_so_far
        )
        # Before the report, which there is none of if all have failed.
        for failure in failures:
            print(failure, file=sys.stderr)
        rows = write_report(runs, settings, facts, folder, tolerance, options.reference)
        print(f"\n{markdown(rows, 'Dice')}\nWrote {folder / 'index.html'}")
        if options.tolerance and not tolerance:
            print(f"Left out: {surface_dice.MISSING}")
        return 1 if failures else 0


def _check(options: Options) -> tuple[Budget, list[Method], bool, str]:
    """Refuses what cannot be; returns the budget, the methods, whether scratch is compared, and which cases."""
    if options.ablation and options.cases == "test":
        raise ValueError("an ablation is for choosing, so it is evaluated on validation cases: leave --cases test out")
    names = [m.name for m in ABLATIONS[options.ablation]] if options.ablation else list(options.methods)
    methods = with_options(find_methods(names), options.options)
    compared = [SCRATCH, *(name for name in options.methods if name == LONGER), *(method.name for method in methods)]
    if options.reference not in compared:
        raise ValueError(f"--reference must be one of the compared methods, got {options.reference}")
    ways = [parse_schedule(schedule) for schedule in options.schedules]
    if not ways or len(set(ways)) < len(ways):
        raise ValueError(f"expected different ways of finetuning, got {', '.join(options.schedules) or 'none'}")
    if min(options.seeds, options.jobs) < 1:
        raise ValueError(f"expected at least one seed and one job, got {options.seeds} and {options.jobs}")
    if options.tolerance < 0:
        raise ValueError(f"--nsd-tolerance is a distance in mm, or 0 to leave it out, got {options.tolerance}")
    if options.finetuning_steps < EPOCHS or options.finetuning_steps % EPOCHS:
        raise ValueError(f"--finetuning-steps must be a multiple of {EPOCHS}, got {options.finetuning_steps}")
    if options.pretraining_plans and not options.pretraining:
        raise ValueError("--pretrain-plans names plans of --pretrain-dataset, which is not given")
    if options.pretraining == options.target:
        raise ValueError(
            "leave --pretrain-dataset out: its cases are those of -d, and test cases are not pretrained on"
        )
    budget = Budget.parse(options.budget)
    if LONGER in options.methods and not budget.seconds:
        raise ValueError(f"{LONGER} trains for as long as a pretraining: give a --budget in time, got {options.budget}")
    if not budget.seconds and (budget.amount < EPOCHS or budget.amount % EPOCHS):
        raise ValueError(f"a budget in steps must be a multiple of {EPOCHS}, got {options.budget}")
    cases = options.cases or ("validation" if options.ablation else "test")
    return budget, methods, bool(options.ablation) or SCRATCH in options.methods, cases


def _dataset(preprocessed: Path, raw: Path | None, name: str, configuration: str) -> Dataset:
    """A dataset with the plans that are asked for."""
    file = preprocessed / f"{name}.json"
    if not file.is_file():
        raise ValueError(
            f"expected plans {file}, which do not exist. Plan and preprocess {preprocessed.name} first, or name its "
            "plans with -p, those of the pretraining dataset with --pretrain-plans."
        )
    plans = json.loads(file.read_text(encoding="utf-8"))
    if configuration not in plans["configurations"]:
        raise ValueError(f"{file} has no configuration {configuration}, but {', '.join(plans['configurations'])}")
    check_configuration(plans, configuration, "the benchmark")
    return Dataset(raw, preprocessed, plans, configuration)


def _check_networks(methods: Sequence[Method], dataset: Dataset) -> None:
    """Refuses methods that cannot pretrain the network of the plans: their trainers would say so only after others."""
    if not methods:
        return
    description = json.loads((dataset.preprocessed / "dataset.json").read_text(encoding="utf-8"))
    network = build_network(dataset.plans, dataset.configuration, description)
    patch_size = PlansManager(dataset.plans).get_configuration(dataset.configuration).patch_size
    for method in methods:
        method.check_network(network, patch_size)


def _pretraining(folder: Path, options: Options, target: Dataset) -> Dataset:
    """The dataset to pretrain on, whose plans have to suit the target: finetuning would say so only after it."""
    aligned = aligned_name(options.plans, target.name)
    there = (folder / f"{aligned}.json").is_file()
    name = options.pretraining_plans or (aligned if there else options.plans)
    dataset = _dataset(folder, None, name, options.configuration)
    described = [describe_plans(PlansReference(d.plans, d.configuration)) for d in (dataset, target)]
    differences = compare(*described, with_decoder=True, adapt=Adaptation.from_environment(os.environ))
    wrong = [d for d in differences if d.fatal or d.name in PREPROCESSING]
    if wrong:
        listed = "\n".join(f"  {d.name}: {dataset.name} has {d.source}, {target.name} has {d.target}" for d in wrong)
        raise ValueError(
            f"the plans {name} of {dataset.name} do not suit the plans {options.plans} of {target.name}:\n{listed}\n"
            f"Give both the same, and preprocess {dataset.name} with them:\n  nnssl_stc3d align-plans --pretrain "
            f"{dataset.number} --target {target.number} -p {options.plans} -c {options.configuration}\nThe benchmark "
            f"then finds them as {aligned}; name others with --pretrain-plans."
        )
    return dataset


def _known_seconds(output: Path) -> dict[str, float]:
    """Key of a method -> seconds of its step, as far as measured."""
    known: dict[str, float] = read_json(output / "seconds_per_step.json", {})
    return known


def _length(budget: Budget, seconds: float | None) -> int:
    """Steps of a pretraining; 0 where the seconds of a step are not known."""
    if not budget.seconds:
        return int(budget.amount)
    return max(1, round(budget.amount / seconds / EPOCHS)) * EPOCHS if seconds else 0


def _steps(methods: Sequence[Method], options: Options, settings: Settings, budget: Budget) -> dict[Method, int]:
    """Steps of each method's pretraining. A budget in seconds is translated once, by measuring a few steps."""
    measured = _known_seconds(options.output)
    missing = [method for method in methods if budget.seconds and method.key not in measured]
    alone = [s for s in options.schedules if LONGER in options.methods and _key_alone(s) not in measured]
    # What workers have prepared between two epochs costs no time in the second; it must be few of its batches.
    steps = CALIBRATION_STEPS * (1 + options.workers)
    if missing or alone:
        _same_conditions(options)
        unknown, unknown_alone = dict.fromkeys(methods, 0), dict.fromkeys(alone, 0)
        settings.workspace.write_trainers(
            trainers_source(unknown, options.finetuning_steps, options.schedules, steps, unknown_alone)
        )
    wanted: dict[str, Method | str] = {method.key: method for method in missing}
    for key, what in (wanted | {_key_alone(schedule): schedule for schedule in alone}).items():
        measured[key] = _seconds_per_step(what, steps, options, settings)
        print(f"{what.name if isinstance(what, Method) else key}: {measured[key]:.3g} s a step")
        write_whole(options.output / "seconds_per_step.json", json.dumps(measured, indent=1) + "\n")
    return {method: _length(budget, measured.get(method.key)) for method in methods}


def _key_alone(schedule: str) -> str:
    """Of the seconds of a step of finetuning."""
    return f"{SCRATCH} {schedule}"


def _longer_lengths(options: Options, budget: Budget, known: dict[str, float]) -> dict[str, int]:
    """Schedule -> steps that fit into the time of a pretraining and a finetuning; 0 where it is not known."""
    lengths = {}
    for schedule in options.schedules:
        seconds = known.get(_key_alone(schedule))
        lengths[schedule] = options.finetuning_steps + _length(budget, seconds) if seconds else 0
    return lengths


def _same_conditions(options: Options) -> None:
    """Methods get as many steps as fit into the budget, so all have to be measured under the same conditions."""
    file, now = options.output / "measured_with.json", {"threads": options.threads, "workers": options.workers}
    before = read_json(file, now)
    if before != now and _known_seconds(options.output):
        raise ValueError(
            f"expected --threads {before['threads']} --workers {before['workers']}, with which the seconds of a step "
            f"were measured in {options.output}, got {options.threads} and {options.workers}: methods would not get "
            "the same time. Repeat these options, or choose another output folder."
        )
    write_whole(file, json.dumps(now) + "\n")


def _seconds_per_step(what: Method | str, steps: int, options: Options, settings: Settings) -> float:
    """Seconds of a step of a pretraining, or of a schedule from scratch, in the second epoch of a short run alone."""
    if isinstance(what, Method):
        trainer, start, dataset = what.trainer_name(CALIBRATION), f"{what.key}/{CALIBRATION}", settings.pretraining
        fold = "all"
    else:
        trainer, start, dataset = finetuning_trainer(what, CALIBRATION), f"{SCRATCH}/{CALIBRATION}", settings.target
        fewest = label_counts(options.labels, len(settings.split.pool))[0]
        fold = str(settings.workspace.fold(dataset, settings.split, fewest, 0))
    plans = dataset.plans["plans_name"]
    words = ["nnUNetv2_train", dataset.number, dataset.configuration, fold, "-p", plans, "-tr", trainer]
    log = options.output / "logs" / f"{start.replace('/', '-')}-{trainer}.log"
    gpu = options.gpus[0] if options.gpus else ""
    call([*words, "-device", options.device], settings, start, log, 0, options.threads, options.workers, gpu)
    model = f"{trainer}__{plans}__{dataset.configuration}"
    folder = settings.workspace.results(start) / dataset.name / model / f"fold_{fold}"
    return read_epoch_seconds(folder)[-1] / steps


def _facts(options: Options, settings: Settings, steps: dict[Method, int], budget: Budget) -> dict[str, str]:
    """What the page says about the benchmark."""
    split = settings.split
    left_out = len(settings.workspace.left_out())
    pretrained_on = (
        f"{settings.pretraining.name}, {len(settings.pretraining.cases()) - left_out} cases"
        + (f"; {left_out} that show test cases were left out" if left_out else "")
        if options.pretraining
        else f"images of the {len(split.development)} development cases"
    )
    lengths = "; ".join(f"{method.described()} {count}" for method, count in steps.items()) or "none"
    return {
        "cases": f"{len(split.test)} test, {len(split.validation)} validation, {len(split.pool)} to label"
        + (f", by {options.split.name}" if options.split else ""),
        "shown here": f"{settings.cases} cases, predicted {'with' if options.mirroring else 'without'} mirroring",
        "pretrained on": pretrained_on,
        "budget of a pretraining": f"{budget}; steps: {lengths}",
        "finetuning": f"{options.finetuning_steps} steps, {', '.join(options.schedules)}",
        "plans": f"{options.plans}, {options.configuration}, as they were before the split was drawn",
        "device": options.device,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("nnssl_stc3d", "nnunetv2", "torch")),
        "command": shlex.join(["nnssl_stc3d", *sys.argv[1:]]),
    }
