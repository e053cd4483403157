"""``nnssl_stc3d prepare``: makes an nnU-Net dataset of a folder of scans without labels."""

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
    from nnssl_stc3d.prepare.case import Channel
    from nnssl_stc3d.prepare.checks import Problem
    from nnssl_stc3d.prepare.convert import Outcome
    from nnssl_stc3d.prepare.find import Search
    from nnssl_stc3d.prepare.record import CaseRecord
    from nnssl_stc3d.prepare.scan import ScannedCase

DESCRIPTION = """\
Finds all volumes below a folder (NIfTI, NRRD, MetaImage, NumPy, DICOM series), looks at them, and writes an nnU-Net raw
dataset with a body mask as pseudo-label, ready for nnUNetv2_plan_and_preprocess. Files that can be used as they are
are linked. Run again, it adds what is new. Nothing that exists is changed.
"""
_MODALITIES = {"PET": "PT", "MRI": "MR"}
_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``prepare``."""
    from nnssl_stc3d.prepare.checks import ACCEPTABLE
    from nnssl_stc3d.prepare.parallel import default_jobs
    from nnssl_stc3d.prepare.writer import LINKS

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "prepare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-i", dest="folder", type=Path, metavar="FOLDER", help="folder to search")
    parser.add_argument("-d", dest="dataset", type=int, required=True, metavar="ID", help="dataset number, such as 801")
    parser.add_argument("-n", dest="name", required=True, help="name of the dataset, such as MyCT")
    parser.add_argument(
        "--modality",
        help="CT, MR, PT, ...: decides checks, body mask and normalisation (nnU-Net normalises CT by its own rule)",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME[=SUFFIX]",
        help="names of several channels, whose files end in _0000, _0001, ... or in the given suffixes",
    )
    parser.add_argument(
        "--cases-csv", type=Path, metavar="FILE", help="table of cases instead of a search: case, one file per channel"
    )
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="mm, for NumPy files")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="paths to leave out, such as '*labels*'"
    )
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
    return parser


def run(args: argparse.Namespace) -> int:
    """Looks, reports, and writes."""
    from nnssl_stc3d.prepare.case import DatasetTarget
    from nnssl_stc3d.prepare.record import with_record
    from nnssl_stc3d.prepare.report import format_problems, format_summary
    from nnssl_stc3d.prepare.scan import look_at_some, with_collisions
    from nnssl_stc3d.prepare.writer import CasesFailed, WriteOptions, open_record, write_dataset

    options = WriteOptions(args.jobs, args.links, args.skip_bad, tuple(args.accept))
    if args.sample < 0:
        raise ValueError(f"--sample must not be negative, got {args.sample}.")
    if args.spacing and not all(s > 0 for s in args.spacing):
        raise ValueError(f"--spacing needs three positive numbers in mm, got {args.spacing}.")
    channels = make_channels(args.channels, args.modality, args.cases_csv)
    folder = dataset_folder(args.dataset, args.name)
    target = DatasetTarget(folder, channels)
    record = open_record(target)

    cases, search = _find(args, channels, folder)
    if not cases:
        others = ", ".join(f"{n} {name}" for name, n in search.ignored.most_common(5)) or "no file"
        raise ValueError(
            f"No volume was found in {args.folder or args.cases_csv} ({others}).\n{format_problems(search.problems)}"
        )
    cases = [c.accepting(args.accept) for c in cases]
    cases = with_record(cases, record, args.jobs)
    cases = [c.accepting(args.accept) for c in with_collisions(cases, record.cases)]
    cases = [c.accepting(args.accept) for c in look_at_some(cases, channels, args.sample, args.jobs)]
    print(format_summary(cases, channels, search.ignored), flush=True)
    report = args.report or folder.with_name(f"report_{folder.name}")
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
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.dataset} -c 3d_fullres --verify_dataset_integrity")
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


def _find(args: argparse.Namespace, channels: tuple[Channel, ...], folder: Path) -> tuple[list[ScannedCase], Search]:
    """Cases and what else was found, from the table or the folder."""
    from nnssl_stc3d.prepare.find import find_volumes
    from nnssl_stc3d.prepare.scan import cases_by_name, cases_by_table

    if args.folder is not None and not args.folder.is_dir():
        raise ValueError(f"-i {args.folder} is not a folder.")
    if args.cases_csv is not None:
        root = args.folder or args.cases_csv.parent
        return cases_by_table(args.cases_csv, root, channels, args.spacing, args.jobs)
    if args.folder is None:
        raise ValueError("Give the folder to search with -i, or a table of cases with --cases-csv.")
    skip = (folder, args.report or folder.with_name(f"report_{folder.name}"))
    search = find_volumes(args.folder, args.spacing, args.exclude, skip, args.jobs)
    return cases_by_name(search, args.folder, channels), search


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


def make_channels(names: list[str] | None, modality: str | None, table: Path | None) -> tuple[Channel, ...]:
    """Channels of every case.

    Args:
        names: of ``--channels``, each with an optional suffix after "=".
        modality: of ``--modality``, for every channel that is not called CT, MR, PT or PET itself.
        table: of ``--cases-csv``, whose columns name the channels if ``names`` does not.

    Raises:
        ValueError: neither is given, or names or suffixes are not different.
    """
    from nnssl_stc3d.prepare.case import Channel
    from nnssl_stc3d.prepare.scan import channel_columns

    if names is None and table is not None:
        names = channel_columns(table)
    if names is None and modality is None:
        raise ValueError("Say what the scans are: --modality CT, MR, PT, ..., or --channels T1 T2 ... for several.")
    common = _dicom_modality(modality or "")
    result = []
    for index, text in enumerate(names or [modality or ""]):
        name, _, suffix = text.partition("=")
        own = _dicom_modality(name)
        result.append(Channel(name, own if own in ("CT", "MR", "PT") else common, suffix or f"_{index:04d}"))
    for what, values in (("names", [c.name for c in result]), ("suffixes", [c.suffix for c in result])):
        if len(set(values)) != len(values) or not all(values):
            raise ValueError(f"--channels needs different {what}, got {', '.join(values)}.")
    return tuple(result)


def _dicom_modality(name: str) -> str:
    return _MODALITIES.get(name.upper(), name.upper())


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
