"""What ``prepare`` and ``import`` have in common: their options, and looking, reporting and writing."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl_stc3d.prepare.case import Channel, DatasetTarget
    from nnssl_stc3d.prepare.checks import Problem
    from nnssl_stc3d.prepare.convert import Outcome
    from nnssl_stc3d.prepare.find import Search
    from nnssl_stc3d.prepare.record import CaseRecord, Record
    from nnssl_stc3d.prepare.scan import ScannedCase
    from nnssl_stc3d.prepare.writer import WriteOptions

_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both commands have."""
    from nnssl_stc3d.prepare.checks import ACCEPTABLE
    from nnssl_stc3d.prepare.parallel import default_jobs
    from nnssl_stc3d.prepare.writer import LINKS

    parser.add_argument(
        "--accept",
        nargs="+",
        default=[],
        choices=ACCEPTABLE,
        metavar="CODE",
        help=f"use these: {', '.join(ACCEPTABLE)}",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used, instead of stopping")
    parser.add_argument("--dry-run", action="store_true", help="look and report only")
    parser.add_argument("--links", choices=LINKS, default="absolute", help="or copies (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=default_jobs(), help="processes (default: cores, here %(default)s)")
    parser.add_argument(
        "--sample", type=int, default=16, metavar="N", help="cases whose values are looked at first (default: 16)"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="default: report_DATASET beside the dataset")


def write_options(args: argparse.Namespace) -> WriteOptions:
    """How to write, as the user says.

    Raises:
        ValueError: an option cannot be.
    """
    from nnssl_stc3d.prepare.writer import WriteOptions

    if args.sample < 0:
        raise ValueError(f"--sample must not be negative, got {args.sample}.")
    if args.spacing and not all(s > 0 for s in args.spacing):
        raise ValueError(f"--spacing needs three positive numbers in mm, got {args.spacing}.")
    return WriteOptions(args.jobs, args.links, args.skip_bad, tuple(args.accept))


def report_folder(args: argparse.Namespace, folder: Path) -> Path:
    """Where the report of a dataset goes."""
    return args.report or folder.with_name(f"report_{folder.name}")


def look_report_write(
    args: argparse.Namespace,
    target: DatasetTarget,
    options: WriteOptions,
    record: Record,
    cases: list[ScannedCase],
    search: Search,
) -> int:
    """Looks at what was found, says what is wrong with it, and writes the dataset.

    Args:
        args: options of `add_arguments`.
        target: the dataset.
        options: how it is written.
        record: what is in it already.
        cases: that were found.
        search: what else was found.

    Returns:
        Exit code: 1 for a dry run that found something wrong.

    Raises:
        ValueError: cases are bad, and the user did not say that they be left out.
        OSError: files cannot be written.
    """
    from nnssl_stc3d.prepare.record import with_record
    from nnssl_stc3d.prepare.report import format_problems, format_summary
    from nnssl_stc3d.prepare.scan import look_at_some, with_collisions
    from nnssl_stc3d.prepare.writer import CasesFailed, write_dataset

    folder, channels = target.folder, target.channels
    cases = [c.accepting(args.accept) for c in cases]
    cases = with_record(cases, record, args.jobs)
    cases = [c.accepting(args.accept) for c in with_collisions(cases, record.cases)]
    cases = [c.accepting(args.accept) for c in look_at_some(cases, channels, args.sample, args.jobs)]
    print(format_summary(cases, channels, search.ignored), flush=True)
    report = report_folder(args, folder)
    problems = [*search.problems, *(p for c in cases for p in c.problems)]
    if problems:
        print(f"\n{format_problems(problems)}", flush=True)
    good = [c.case for c in cases if not c.problems and not c.known]
    known = sum(c.known and not c.problems for c in cases)
    result = None
    try:
        if not args.dry_run:
            _check_problems(problems, len(good) + known, args.skip_bad)
            result = write_dataset(good, target, options)
            cases = _with_results(cases, result.new, result.failed)
    except OSError:
        # The disk may be full: then the report cannot be written either, and that is not what went wrong.
        with suppress(OSError):
            _report(report, folder.name, cases, channels)
        raise
    except ValueError as error:
        if isinstance(error, CasesFailed):
            cases = _with_results(cases, (), error.failed)
        _report(report, folder.name, cases, channels)
        raise
    _report(report, folder.name, cases, channels)
    if result is None:
        print(f"Dry run: would write {len(good)} cases to {folder}; {known} are there already.")
        return 1 if problems and not args.skip_bad else 0
    linked = sum(r.linked for r in result.new)
    print(
        f"{folder}: added {len(result.new)} cases ({linked} linked, {len(result.new) - linked} converted), "
        f"{result.total} in all, {result.ending} files."
    )
    if result.failed:
        print("Left out:\n" + format_problems([p for o in result.failed for p in o.problems]))
    return 0


def _check_problems(problems: Sequence[Problem], usable: int, skip_bad: bool) -> None:
    """Raises ValueError if nothing is to be written because of what was found."""
    if problems and not skip_bad:
        raise ValueError(
            f"{len(problems)} problems, listed above and in the report; nothing was written. Mend them, or pass "
            f"--skip-bad to leave these cases out."
        )
    if not usable:
        raise ValueError("Every case is bad; nothing was written.")


def _report(folder: Path, title: str, cases: Sequence[ScannedCase], channels: Sequence[Channel]) -> None:
    from nnssl_stc3d.prepare.report import write_report

    print("\nReport: " + ", ".join(str(file) for file in write_report(folder, title, cases, channels)), flush=True)


def _with_results(
    cases: Sequence[ScannedCase], new: Sequence[CaseRecord], failed: Sequence[Outcome]
) -> list[ScannedCase]:
    """The cases with what was seen when they were written."""
    from nnssl_stc3d.prepare.voxels import Intensity

    seen = {r.name: tuple(Intensity(*i) for i in r.intensity) for r in new}
    wrong = {o.name: o.problems for o in failed}
    return [
        replace(c, intensity=seen.get(c.case.name, c.intensity)).with_problems(
            wrong.get(c.case.name, ()) if not c.problems else ()
        )
        for c in cases
    ]


def print_next(number: int) -> None:
    """Prints the command that comes next."""
    print(f"Next, to pretrain for a labelled dataset: nnssl_stc3d align-plans --pretrain {number} --target DATASET")
    print(f"or by itself: nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres --verify_dataset_integrity")


def dataset_folder(number: int, name: str) -> Path:
    """Folder of the dataset in nnUNet_raw.

    Raises:
        ValueError: the variable, the number or the name cannot be used, or the number belongs to another dataset.
    """
    root = os.environ.get("nnUNet_raw")
    if not root:
        raise ValueError("nnUNet_raw is not set. Set it to nnU-Net's folder of raw data: export nnUNet_raw=/path")
    if not Path(root).is_dir():
        raise ValueError(f"nnUNet_raw is {root}, which is not a folder. Correct the variable or create the folder.")
    if not 0 < number < 1000:
        raise ValueError(f"-d needs a number from 1 to 999, got {number}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"-n needs letters, digits, dash and underscore, got {name!r}.")
    wanted = f"Dataset{number:03d}_{name}"
    for variable in _VARIABLES:
        place = Path(os.environ.get(variable) or os.devnull)
        others = [f for f in place.glob(f"Dataset{number:03d}*") if f.is_dir() and f.name != wanted]
        if others:
            raise ValueError(f"Number {number} belongs to {others[0]}. Choose another number, or the name of that one.")
    return Path(root) / wanted
