"""``nnssl_stc3d quickstart``: pretrain, finetune, predict and compare, through nnU-Net's own commands."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nnssl_stc3d.cli.trainers import trainers_folder
from nnssl_stc3d.evaluation.commands import CommandRunner, find_program
from nnssl_stc3d.evaluation.quickstart_run import (
    PRETRAIN_TRAINERS,
    QuickstartPaths,
    QuickstartSettings,
    child_environment,
    model_folder,
    run_chain,
)

DEFAULT_FOLDER = "nnssl_stc3d_quickstart"
MARKER = ".nnssl_stc3d_quickstart"
PROGRAMS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_preprocess", "nnUNetv2_train", "nnUNetv2_predict")
SHOWN_CASES = 3


@dataclass(frozen=True)
class Data:
    """The two raw datasets that were written.

    Attributes:
        unlabelled: number of cases for pretraining.
        labelled: number of cases with labels.
        test: names of the test cases.
        fold: nnU-Net's fold for finetuning.
        source: what the cases are, for the report.
    """

    unlabelled: int
    labelled: int
    test: tuple[str, ...]
    fold: str
    source: str


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``quickstart``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quickstart",
        description="Pretrains a small network without labels, finetunes it with few labels and from scratch, "
        "and compares the two on test "
        "cases. Every command is printed. Takes some minutes on two CPU cores with the generated phantoms.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="your own nnU-Net raw dataset (DatasetXXX_Name); the default is generated phantoms",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        default=Path(DEFAULT_FOLDER),
        help="where everything is written (default: ./%(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier quickstart wrote to that folder"
    )
    parser.add_argument(
        "--method", choices=sorted(PRETRAIN_TRAINERS), default="stc3d", help="pretraining method (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto takes a CUDA GPU if there is one, else the CPU",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the quickstart and prints the table and where the report is."""
    # Ends by an exception when it is told to stop, so that the training that it started ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    execute(args, QuickstartSettings(), trainers_folder())
    return 0


def execute(args: argparse.Namespace, settings: QuickstartSettings, trainers: Path) -> QuickstartPaths:
    """Runs the quickstart.

    Args:
        args: of the command.
        settings: sizes and schedules.
        trainers: folder for nnUNet_extTrainer.

    Returns:
        Where everything was written.

    Raises:
        ValueError: the data or the folder cannot be used.
        RuntimeError: a program is missing or failed, or the device is not there.
    """
    # After the arguments are parsed: these imports take seconds.
    from nnssl_stc3d.evaluation.report import format_table, verdict, write_report
    from nnssl_stc3d.prepare.user_dataset import read_raw_dataset

    start = perf_counter()
    device = choose_device(args.device)
    for program in PROGRAMS:
        find_program(program)
    dataset = None if args.data is None else read_raw_dataset(args.data)
    root = args.keep.resolve()
    paths = QuickstartPaths(
        root,
        f"Dataset{settings.unlabelled_id:03d}_QuickstartUnlabelled",
        f"Dataset{settings.labelled_id:03d}_QuickstartLabelled",
    )
    prepare_folder(paths, args.overwrite, args.data)
    print(f"Everything is written to {root}. Device: {device}.", flush=True)
    data = _write_phantoms(paths, settings) if dataset is None else _write_user_data(paths, dataset)
    print(
        f"{data.unlabelled} cases for pretraining, {data.labelled} with labels for finetuning (fold "
        f"{data.fold}), {len(data.test)} for testing."
    )
    stages = [("make the data", perf_counter() - start)]

    runner = CommandRunner(child_environment(paths, trainers, device), root / "log.txt", root / "commands.sh")
    print("\nThe commands below need these variables:\n\n" + runner.exports(), flush=True)
    run_chain(runner, settings, paths, args.method, data.fold, len(data.test), device)
    stages += [(done.command.title, done.seconds) for done in runner.finished]

    comparison = _collect(paths, settings, data, args.method, device, runner.script.read_text(encoding="utf-8"), stages)
    rows = write_report(comparison, paths.report)
    print(f"\n{format_table(rows)}\n\n{verdict(rows)}")
    print("One run of a few minutes is a demonstration, not evidence; the report says more.")
    print(f"\nReport:   {paths.report}\nCommands: {runner.script}\nTook {perf_counter() - start:.0f} s.")
    return paths


def choose_device(asked: str) -> str:
    """Chooses the device.

    Args:
        asked: "auto", "cpu", "cuda" or "mps".

    Raises:
        RuntimeError: that device is not there.
    """
    if asked == "cpu":
        return asked
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[asked]:
        raise RuntimeError(
            f"--device {asked} was asked for, but PyTorch finds no such device. Use --device auto or cpu."
        )
    return asked


def prepare_folder(paths: QuickstartPaths, overwrite: bool, data: Path | None) -> None:
    """Makes the folder, or empties it if an earlier quickstart wrote it.

    Args:
        paths: what will be written.
        overwrite: allows to remove the results of an earlier quickstart; nothing else is ever removed.
        data: the user's dataset, which must lie elsewhere.

    Raises:
        ValueError: the folder has other contents, or earlier results without `overwrite`, or is the user's data.
    """
    root = paths.root
    if data is not None and (
        root == data.resolve() or root in data.resolve().parents or data.resolve() in root.parents
    ):
        raise ValueError(
            f"--keep {root} and --data {data.resolve()} must not lie in one another. Choose another folder with --keep."
        )
    if root.exists() and not root.is_dir():
        raise ValueError(f"--keep {root} is a file. Choose a folder.")
    if root.is_dir() and any(root.iterdir()):
        if not (root / MARKER).is_file():
            raise ValueError(f"{root} has contents that no quickstart wrote. Choose a new or empty folder with --keep.")
        if not overwrite:
            raise ValueError(
                f"{root} has the results of an earlier quickstart. Pass --overwrite to replace them, or choose "
                f"another --keep."
            )
        for path in paths.contents():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for folder in (paths.raw, paths.preprocessed, paths.results, paths.results_scratch):
        folder.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text("Written by nnssl_stc3d quickstart; --overwrite may replace it.\n", encoding="utf-8")


def _write_phantoms(paths: QuickstartPaths, settings: QuickstartSettings) -> Data:
    from nnssl_stc3d.prepare.raw_dataset import FILE_ENDING, write_phantom_datasets

    labelled = paths.raw / paths.labelled
    counts = (settings.num_unlabelled, settings.num_labelled, settings.num_test)
    write_phantom_datasets(paths.raw / paths.unlabelled, labelled, *counts)
    test = tuple(sorted(file.name.removesuffix(FILE_ENDING) for file in (labelled / "labelsTs").iterdir()))
    return Data(*counts[:2], test, "0" if counts[1] >= 5 else "all", "generated CT-like phantoms")


def _write_user_data(paths: QuickstartPaths, dataset: Any) -> Data:
    from nnssl_stc3d.prepare.user_dataset import FEW_LABELS, split_cases, write_split_datasets

    split = split_cases(dataset.cases)
    write_split_datasets(dataset, split, paths.raw / paths.unlabelled, paths.raw / paths.labelled)
    fold = "0" if len(split.labelled) >= FEW_LABELS else "all"
    test = tuple(case.name for case in split.test)
    return Data(len(split.pretraining), len(split.labelled), test, fold, str(dataset.folder.resolve()))


def _collect(
    paths: QuickstartPaths,
    settings: QuickstartSettings,
    data: Data,
    method: str,
    device: str,
    commands: str,
    stages: list[tuple[str, float]],
) -> Any:
    """Reads what the commands wrote."""
    from nnssl_stc3d.evaluation.report import Comparison, read_dice
    from nnssl_stc3d.evaluation.report_figures import Overlay
    from nnssl_stc3d.evaluation.training_log import read_training_log

    raw = paths.raw / paths.labelled
    description = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    ending = description["file_ending"]
    # nnU-Net names a region by the tuple of its labels
    targets = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["labels"].items()
        if name not in ("background", "ignore")
    }
    values = {name: value for name, value in targets.items() if isinstance(value, int)}
    pretraining = model_folder(paths.results, paths.unlabelled, PRETRAIN_TRAINERS[method], settings, "all")
    finetuned = {
        arm: model_folder(paths.results_of(arm), paths.labelled, settings.finetune_trainer, settings, data.fold)
        for arm in ("pretrained", "scratch")
    }
    dice = {
        arm: read_dice(
            paths.predictions_of(arm) / "summary.json", {str(value): name for name, value in targets.items()}
        )
        for arm in finetuned
    }
    shown = [
        Overlay(
            name,
            raw / "imagesTs" / f"{name}_0000{ending}",
            raw / "labelsTs" / f"{name}{ending}",
            {
                title: paths.predictions_of(arm) / f"{name}{ending}"
                for title, arm in (("from scratch", "scratch"), ("pretrained", "pretrained"))
            },
        )
        for name in data.test[:SHOWN_CASES]
    ]
    channel = str(description["channel_names"].get("0", ""))
    pretraining_curves = read_training_log(pretraining)
    curves = {arm: read_training_log(folder) for arm, folder in finetuned.items()}
    facts = {
        "data": data.source,
        "cases": f"{data.unlabelled} for pretraining without labels, {data.labelled} with labels (fold {data.fold}), "
        f"{len(data.test)} for testing, seen by neither",
        "pretraining": f"{PRETRAIN_TRAINERS[method]}, {len(pretraining_curves.get('train_losses', []))} epochs",
        "finetuning": f"{settings.finetune_trainer}, {len(curves['scratch'].get('train_loss', []))} epochs, "
        "the same for both models",
        "plans": f"{settings.plans}, {settings.configuration}",
        "device": device,
    }
    return Comparison(
        title="nnssl_stc3d quickstart: pretrained against scratch",
        facts=facts,
        scratch=dice["scratch"],
        pretrained=dice["pretrained"],
        labels=values if len(values) == len(targets) else {},
        pretraining=pretraining_curves,
        scratch_curves=curves["scratch"],
        pretrained_curves=curves["pretrained"],
        overlay_cases=shown,
        views=pretraining / "views.png",
        is_ct=channel.lower() == "ct",
        commands=commands,
        stages=stages,
    )
