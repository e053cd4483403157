"""``nnssl_stc3d align-plans``: one network and one preprocessing for a pretraining dataset and a target."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl_stc3d.cli.datasets import dataset_name, environment_folder
from nnssl_stc3d.evaluation.commands import find_program
from nnssl_stc3d.files import written_whole

DESCRIPTION = """\
Writes plans with which the pretraining dataset and the target get the same network and the same preprocessing, so
that pretrained weights fit and mean something. What is missing (fingerprint, nnU-Net's own plans) is made first; a
table says what was decided and why; the commands that come next are printed. Nothing is overwritten.

  nnssl_stc3d align-plans --pretrain 801 --target 4                     plans of 4 for 801, before pretraining
  nnssl_stc3d align-plans --pretrain 801 --target 4 --to pretraining    plans of 801 for 4, after pretraining
  nnssl_stc3d align-plans --checkpoint encoder.pth --target 4           the same with the plans in a checkpoint
  nnssl_stc3d align-plans --pretrain 801 --target 4 --paper             the STC3D paper's configuration for both
"""
TO_TARGET, TO_PRETRAINING = "target", "pretraining"
# The names that nnU-Net's planners give to their plans.
PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
DEFAULT_PLANS = "nnUNetPlans"
DEFAULT_CONFIGURATION = "3d_fullres"
PAPER_SUFFIX = "_STC3DPaper"
FINGERPRINT = "dataset_fingerprint.json"
TRAINER, PAPER_TRAINER, FINETUNE_TRAINER = "STC3DPretrainTrainer", "STC3DPaperPretrainTrainer", "STC3DFinetuneTrainer"
# What pretrains the networks that TRAINER refuses; None for nothing.
TRAINERS_OF_NETWORKS = {
    "nnssl_stc3d.modules.primus.PlansPrimus": "AlicePrimusPretrainTrainer",
    "nnssl_stc3d.modules.swin_unetr.PlansSwinUNETR": None,
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``align-plans``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "align-plans", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", metavar="DATASET", help="pretraining dataset, number or name")
    parser.add_argument("--target", metavar="DATASET", required=True, help="labelled dataset, number or name")
    parser.add_argument(
        "--to",
        choices=(TO_TARGET, TO_PRETRAINING),
        help="whose plans are followed (default: target; pretraining with --checkpoint)",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="pretrained weights whose plans are followed")
    parser.add_argument("-c", dest="configuration", help=f"configuration (default: {DEFAULT_CONFIGURATION})")
    parser.add_argument("-p", dest="plans", help=f"plans that are followed (default: {DEFAULT_PLANS})")
    parser.add_argument("-o", dest="output", help="name of the new plans (default: says whose plans were followed)")
    parser.add_argument("--paper", action="store_true", help="1.5 mm, HU -175 to 250, 64^3 views, 96^3 finetuning")
    parser.add_argument("-np", type=int, metavar="N", help="processes that extract a fingerprint")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser


@dataclass(frozen=True)
class Job:
    """One plans file to write.

    Attributes:
        aligned: what to write.
        own: title of the column of the dataset that the plans are for.
        reference: title of the column of the other one; None for the paper's.
        reference_first: order of the two in the table.
    """

    aligned: Any
    own: str
    reference: str | None
    reference_first: bool


def run(args: argparse.Namespace) -> int:
    """Makes what is missing, decides, and writes the plans."""
    # After the arguments are parsed: these imports take seconds.
    from nnssl_stc3d.prepare.align_table import decision_table
    from nnssl_stc3d.prepare.plans import check_plans_name, new_plans_file, write_plans

    _check_arguments(args)
    roots = {name: environment_folder(name) for name in ("nnUNet_raw", "nnUNet_preprocessed")}
    target = dataset_name(args.target)
    pretraining = dataset_name(args.pretrain) if args.pretrain else None
    if pretraining == target:
        raise ValueError(f"--pretrain and --target are both {target}, so they have the same plans already.")
    checkpoint = _plans_in(args.checkpoint) if args.checkpoint else None
    missing = _missing(args, roots, pretraining, target)
    if missing and args.dry_run:
        print("These would be run first; the plans can be decided on when they are done:")
        print("\n".join(f"  {shlex.join(words)}" for words in missing))
        return 0
    for words in missing:
        _run(words)

    source = checkpoint[0].plans["dataset_name"] if checkpoint else pretraining
    jobs, commands = _decide(args, roots, pretraining, target, checkpoint)
    files = []
    for job in jobs:
        check_plans_name(job.aligned.plans["plans_name"])
        folder = roots["nnUNet_preprocessed"] / job.aligned.plans["dataset_name"]
        files.append(new_plans_file(folder, job.aligned.plans))
    for job in jobs:
        print(f"\nPlans {job.aligned.plans['plans_name']} for {job.aligned.plans['dataset_name']}:\n")
        print(decision_table(job.aligned.decisions, job.reference, job.own, job.reference_first))
    for warning in dict.fromkeys(warning for job in jobs for warning in job.aligned.warnings):
        print(f"\nWarning: {warning}")
    print()
    for file, job in zip(files, jobs):
        if args.dry_run:
            print(f"Would write {file}" if not file.exists() else f"{file} is there already and is the same.")
            continue
        _copy_dataset_json(roots, job.aligned.plans["dataset_name"])
        print(f"Wrote {file}" if write_plans(file, job.aligned.plans) else f"{file} is there already and is the same.")
    print(f"\nNext{'' if source else ', with the weights'}:\n")
    print("\n".join(f"  {command}" for command in commands))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that contradict each other, and fills in the defaults."""
    if args.checkpoint and (args.to == TO_TARGET or args.paper or args.plans):
        raise ValueError("--checkpoint brings its own plans: leave out --to target, --paper and -p.")
    if args.paper and args.to:
        raise ValueError("--paper writes plans for both datasets: leave out --to.")
    if not args.checkpoint and not args.pretrain:
        raise ValueError("Expected --pretrain DATASET, or --checkpoint FILE for weights from elsewhere.")
    if args.np is not None and args.np < 1:
        raise ValueError(f"-np needs at least one process, got {args.np}.")
    args.to = args.to or (TO_PRETRAINING if args.checkpoint else TO_TARGET)
    args.plans = args.plans or DEFAULT_PLANS


def _plans_in(file: Path) -> tuple[Any, dict[str, Any]]:
    """Plans and dataset.json of a checkpoint."""
    from nnssl_stc3d.transfer.checkpoint import load_checkpoint
    from nnssl_stc3d.transfer.differences import plans_of_checkpoint
    from nnssl_stc3d.transfer.trusted_plans import check_plans

    checkpoint = load_checkpoint(file)
    reference = plans_of_checkpoint(checkpoint)
    dataset_json = checkpoint.get("dataset_json") or (checkpoint.get("init_args") or {}).get("dataset_json")
    if reference is None or not isinstance(dataset_json, dict) or "dataset_name" not in reference.plans:
        raise ValueError(
            f"Expected a checkpoint with plans and dataset.json, as nnU-Net and nnssl_stc3d write them; {file} has not "
            "both. Ask for the plans that the weights were trained with."
        )
    check_plans(reference.plans, file)
    return reference, dataset_json


def _missing(args: argparse.Namespace, roots: dict[str, Path], pretraining: str | None, target: str) -> list[list[str]]:
    """The commands that make what is not there yet."""
    followed = {TO_TARGET: target, TO_PRETRAINING: pretraining}[args.to]
    commands = []
    for dataset in filter(None, (pretraining if not args.checkpoint else None, target)):
        must_have = args.plans if dataset == followed and not args.checkpoint else None
        needs_fingerprint = args.paper or dataset != followed
        commands += _missing_of(roots, dataset, must_have, needs_fingerprint, args.np)
    return commands


def _missing_of(
    roots: dict[str, Path], dataset: str, plans: str | None, needs_fingerprint: bool, processes: int | None
) -> list[list[str]]:
    """The commands for one dataset; ``plans`` None takes any that nnU-Net's planners wrote."""
    folder, number = roots["nnUNet_preprocessed"] / dataset, str(int(dataset[7:10]))
    workers = str(processes or os.environ.get("nnUNet_def_n_proc") or min(8, os.cpu_count() or 1))
    if not (folder / f"{plans or _own_plans(folder)}.json").is_file():
        name = plans or DEFAULT_PLANS
        if name not in PLANNERS:
            others = sorted(file.stem for file in folder.glob("*lans*.json"))
            raise ValueError(
                f"No plans {folder / name}.json"
                + (f"; this dataset has {', '.join(others)}. Choose one with -p." if others else ".")
                + f" Only {', '.join(PLANNERS)} can be made from here."
            )
        words = ["nnUNetv2_plan_and_preprocess", "-d", number, "-pl", PLANNERS[name], "--no_pp", "-npfp", workers]
    elif needs_fingerprint and not (folder / FINGERPRINT).is_file():
        words = ["nnUNetv2_extract_fingerprint", "-d", number, "-np", workers]
    else:
        return []
    if not (roots["nnUNet_raw"] / dataset / "dataset.json").is_file():
        raise ValueError(
            f"{dataset} has to be planned first, but there is no {roots['nnUNet_raw'] / dataset / 'dataset.json'}. "
            "`nnssl_stc3d prepare` makes a raw dataset of unlabelled images."
        )
    return [words]


def _own_plans(folder: Path) -> str:
    """The plans that nnU-Net made for a dataset; those of any planner know its files, channels and labels."""
    return next((name for name in PLANNERS if (folder / f"{name}.json").is_file()), DEFAULT_PLANS)


def _run(words: Sequence[str]) -> None:
    """Runs a command of nnU-Net and shows what it says."""
    print(f"$ {shlex.join(words)}", flush=True)
    result = subprocess.run([*find_program(words[0]), *words[1:]], stdin=subprocess.DEVNULL)
    if result.returncode:
        raise RuntimeError(f"This command failed with exit code {result.returncode}; see above: {shlex.join(words)}")


def _decide(
    args: argparse.Namespace,
    roots: dict[str, Path],
    pretraining: str | None,
    target: str,
    checkpoint: tuple[Any, dict[str, Any]] | None,
) -> tuple[list[Job], list[str]]:
    """Decides on the plans and on the commands that come next."""
    from nnssl_stc3d.prepare.align import Side, align
    from nnssl_stc3d.transfer.differences import aligned_name

    configuration = args.configuration or (checkpoint[0].configuration if checkpoint else DEFAULT_CONFIGURATION)

    def side(dataset: str, plans: str | None) -> Side:
        return _read_side(roots, dataset, plans, configuration)

    def title(which: str, found: Side) -> str:
        return f"{which}, {found.plans.get('plans_name')} of {found.dataset.split('_')[0]}"

    if args.paper:
        from nnssl_stc3d.prepare.paper_plans import align_to_paper

        name = args.output or f"{args.plans}{PAPER_SUFFIX}"
        ours, theirs = side(pretraining or "", None), side(target, args.plans)
        jobs = [
            Job(aligned, title("its own", own), None, False)
            for aligned, own in zip(align_to_paper(ours, theirs, name), (ours, theirs))
        ]
        data = f"{name}_{configuration}"
        return jobs, _next(roots, (ours.dataset, name), (target, name), configuration, data, PAPER_TRAINER)
    if args.to == TO_TARGET:
        reference, own = side(target, args.plans), side(pretraining or "", None)
        name = args.output or aligned_name(args.plans, target)
        job = Job(align(reference, own, name), title("pretraining", own), title("target", reference), False)
        data = reference.resolved["data_identifier"]
        trainer = _trainer_of(job.aligned.plans, configuration)
        return [job], _next(roots, (own.dataset, name), (target, args.plans), configuration, data, trainer)
    if checkpoint:
        found, dataset_json = checkpoint
        if configuration != found.configuration:
            raise ValueError(f"The checkpoint was trained with -c {found.configuration}, got {configuration}.")
        reference = Side.read(found.plans["dataset_name"], found.plans, configuration, dataset_json)
    else:
        reference = side(pretraining or "", args.plans)
    own = side(target, None)
    followed = reference.plans.get("plans_name", DEFAULT_PLANS)
    name = args.output or aligned_name(followed, reference.dataset)
    job = Job(align(reference, own, name), title("target", own), title("pretraining", reference), True)
    data = f"{name}_{configuration}"
    source, trainer = (reference.dataset, followed), _trainer_of(job.aligned.plans, configuration)
    return [job], _next(roots, source, (target, name), configuration, data, trainer, args.checkpoint, done=True)


def _trainer_of(plans: dict[str, Any], configuration: str) -> str | None:
    """The trainer that pretrains the network of plans; None if there is none."""
    network = plans["configurations"][configuration]["architecture"]["network_class_name"]
    return TRAINERS_OF_NETWORKS.get(network, TRAINER)


def _read_side(roots: dict[str, Path], dataset: str, plans: str | None, configuration: str) -> Any:
    """Reads what nnU-Net knows of a dataset."""
    from nnssl_stc3d.prepare.align import Side
    from nnssl_stc3d.prepare.plans import read_plans

    folder = roots["nnUNet_preprocessed"] / dataset
    description = next(
        (f for f in (folder / "dataset.json", roots["nnUNet_raw"] / dataset / "dataset.json") if f.is_file()), None
    )
    if description is None:
        raise ValueError(f"No dataset.json in {folder} and in {roots['nnUNet_raw'] / dataset}.")
    fingerprint = folder / FINGERPRINT
    return Side.read(
        dataset,
        read_plans(folder, plans or _own_plans(folder)),
        configuration,
        _json(description),
        _json(fingerprint) if fingerprint.is_file() else None,
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Make it again with nnU-Net.") from error


def _copy_dataset_json(roots: dict[str, Path], dataset: str) -> None:
    """nnU-Net looks for dataset.json beside the plans."""
    raw, wanted = (
        roots["nnUNet_raw"] / dataset / "dataset.json",
        roots["nnUNet_preprocessed"] / dataset / "dataset.json",
    )
    if not wanted.exists() and raw.is_file():
        with written_whole(wanted) as beside:
            shutil.copyfile(raw, beside)


def _next(
    roots: dict[str, Path],
    pretraining: tuple[str, str],
    target: tuple[str, str],
    configuration: str,
    data: str,
    trainer: str | None,
    checkpoint: Path | None = None,
    done: bool = False,
) -> list[str]:
    """The commands that come next.

    Args:
        roots: nnU-Net's folders.
        pretraining: dataset and plans of the pretraining.
        target: dataset and plans of the target.
        configuration: such as "3d_fullres".
        data: name of the target's preprocessed data.
        trainer: that pretrains the network; None if there is none.
        checkpoint: weights that are there already, as a file.
        done: whether the pretraining is.
    """
    (source, source_plans), (labelled, plans) = pretraining, target
    number, results = int(labelled[7:10]), f"{trainer}__{source_plans}__{configuration}/fold_all/checkpoint_final.pth"
    lines = []
    if checkpoint:
        weights = shlex.quote(str(checkpoint))
    elif trainer:
        weights = f'"$nnUNet_results/{source}/{results}"'
    else:
        weights = "WEIGHTS"
        lines.append(
            f"# Nothing in nnssl_stc3d pretrains the network of {source_plans}: WEIGHTS have to come from elsewhere."
        )
    if not done:
        lines.append(f"nnUNetv2_preprocess -d {int(source[7:10])} -plans_name {source_plans} -c {configuration}")
    if not (roots["nnUNet_preprocessed"] / labelled / data).is_dir():
        lines.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans} -c {configuration}")
    lines.append('export nnUNet_extTrainer="$(nnssl_stc3d trainers)"')
    if trainer and not done:
        lines.append(f"nnUNetv2_train {int(source[7:10])} {configuration} all -tr {trainer} -p {source_plans}")
    lines += [
        f"nnUNetv2_train {number} {configuration} 0 -tr {FINETUNE_TRAINER} -p {plans} -pretrained_weights {weights}",
        f"nnUNetv2_predict -i IN -o OUT -d {number} -c {configuration} -f 0 -tr {FINETUNE_TRAINER} -p {plans}",
    ]
    return lines
