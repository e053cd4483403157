"""``nnssl_stc3d prepare``: makes an nnU-Net dataset of a folder of scans without labels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_stc3d.cli.preparation import (
    add_arguments,
    dataset_folder,
    look_report_write,
    print_next,
    report_folder,
    write_options,
)

if TYPE_CHECKING:
    from nnssl_stc3d.prepare.case import Channel
    from nnssl_stc3d.prepare.find import Search
    from nnssl_stc3d.prepare.scan import ScannedCase

DESCRIPTION = """\
Finds all volumes below a folder (NIfTI, NRRD, MetaImage, NumPy, DICOM series), looks at them, and writes an nnU-Net raw
dataset with a body mask as pseudo-label, ready for nnUNetv2_plan_and_preprocess. Files that can be used as they are
are linked. Run again, it adds what is new. Nothing that exists is changed.
"""
_MODALITIES = {"PET": "PT", "MRI": "MR"}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``prepare``."""
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
    add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Looks, reports, and writes."""
    from nnssl_stc3d.prepare.case import DatasetTarget
    from nnssl_stc3d.prepare.report import format_problems
    from nnssl_stc3d.prepare.writer import open_record

    options = write_options(args)
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
    code = look_report_write(args, target, options, record, cases, search)
    if not args.dry_run:
        print_next(args.dataset)
    return code


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
    skip = (folder, report_folder(args, folder))
    search = find_volumes(args.folder, args.spacing, args.exclude, skip, args.jobs)
    return cases_by_name(search, args.folder, channels), search


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
