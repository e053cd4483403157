"""``nnssl_stc3d import``: makes an nnU-Net dataset of a public corpus."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from dataclasses import replace
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
    from nnssl_stc3d.prepare.corpora.collect import Collected

DESCRIPTION = """\
Makes an nnU-Net raw dataset of a public corpus, from the folder that it was unpacked to. Segmentations become the
labels, so that it can be a target of finetuning; with --unlabelled, body masks do, so that it can be pretrained on, and
what the published split keeps for validation and testing is left out. Everything else is as with `nnssl_stc3d prepare`.
Nothing is downloaded. documentation/corpora.md has a section for each corpus.

corpora:
{table}
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``import``."""
    from nnssl_stc3d.prepare.corpora.table import CORPORA, MSD

    names = [*CORPORA, MSD]
    table = "\n".join(f"  {name:14}{corpus.title}; {corpus.page}" for name, corpus in CORPORA.items())
    table += f"\n  {MSD:14}Medical Segmentation Decathlon; prints the commands of nnU-Net's own converter"
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "import",
        description=DESCRIPTION.format(table=table.replace("%", "%%")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", choices=names, metavar="CORPUS", help="one of those above")
    parser.add_argument("-i", dest="folder", type=Path, required=True, metavar="FOLDER", help="the unpacked corpus")
    parser.add_argument("-d", dest="dataset", type=int, required=True, metavar="ID", help="dataset number, such as 801")
    parser.add_argument("-n", dest="name", required=True, help="name of the dataset, such as MyBTCV")
    parser.add_argument("--modality", choices=("CT", "MR"), help="of corpora that have both (default: CT)")
    parser.add_argument("--unlabelled", action="store_true", help="body masks instead of the segmentations")
    parser.add_argument(
        "--with-held-out",
        action="store_true",
        help="with --unlabelled: take what the split keeps for validation and testing, too",
    )
    parser.add_argument("--spacing", type=float, nargs=3, metavar=("Z", "Y", "X"), help="mm, for cc-ccii")
    add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Finds the cases of the corpus, looks, reports, and writes."""
    from nnssl_stc3d.prepare.corpora.collect import collect, corpus_target
    from nnssl_stc3d.prepare.corpora.corpus import CorpusOptions
    from nnssl_stc3d.prepare.corpora.table import CORPORA, MSD
    from nnssl_stc3d.prepare.writer import open_record

    options = write_options(args)
    if args.with_held_out and not args.unlabelled:
        raise ValueError("--with-held-out is for pretraining: pass it with --unlabelled.")
    folder = dataset_folder(args.dataset, args.name)
    if args.corpus == MSD:
        return _print_msd(args)
    corpus = CORPORA[args.corpus]
    modality = args.modality or corpus.modalities[0]
    if modality not in corpus.modalities:
        raise ValueError(f"{corpus.title} has {' and '.join(filter(None, corpus.modalities)) or 'windowed CT'} only.")
    if args.spacing and args.corpus != "cc-ccii":
        raise ValueError(f"--spacing is for cc-ccii, whose slices have none; the files of {corpus.title} have theirs.")
    target = corpus_target(corpus, folder, modality, args.unlabelled)
    record = open_record(target)
    spacing = tuple(args.spacing) if args.spacing else None
    choice = CorpusOptions(modality, spacing, args.jobs)
    skip = (folder, report_folder(args, folder))
    found = collect(corpus, args.folder, choice, args.unlabelled, args.with_held_out, skip)
    print(f"{corpus.title}: " + ", ".join(f"{count} {part}" for part, count in found.parts.items()))
    if found.left_out:
        print(f"Left out: {', '.join(found.left_out)} ({_reason(args.unlabelled)}).")
    print(f"Licence: {corpus.licence}. {corpus.page}\n", flush=True)
    target = replace(target, splits=found.splits)
    code = look_report_write(args, target, options, record, found.cases, found.search)
    if not args.dry_run:
        _after(args, folder, found)
    return code


def _reason(unlabelled: bool) -> str:
    return (
        "kept for evaluation; --with-held-out takes them" if unlabelled else "without labels; --unlabelled takes them"
    )


def _after(args: argparse.Namespace, folder: Path, found: Collected) -> None:
    """Writes the classes of cases, and says what to do with the split."""
    from nnssl_stc3d.prepare.corpora.case_labels import write_case_labels
    from nnssl_stc3d.prepare.writer import SPLITS_FILE

    if found.case_labels:
        print(f"Classes of the cases: {write_case_labels(folder, found.case_labels)}")
    print_next(args.dataset)
    published = folder / SPLITS_FILE
    if published.is_file():
        folds = len(json.loads(published.read_text(encoding="utf-8")))
        print(f"Published split: {published} ({folds} fold{'s' if folds > 1 else ''}), which nnU-Net's planner copies.")
        used = Path(os.environ.get("nnUNet_preprocessed") or os.devnull) / folder.name / SPLITS_FILE
        if used.is_file() and used.read_bytes() != published.read_bytes():
            print(
                f"{used} is another split, with which the planner would fail. Before you plan again, replace it: "
                f"cp {shlex.quote(str(published))} {shlex.quote(str(used))}"
            )


def _print_msd(args: argparse.Namespace) -> int:
    from nnssl_stc3d.prepare.corpora.msd import LICENCE, PAGE, msd_commands

    commands = msd_commands(args.folder, args.dataset, args.name, args.unlabelled)
    print(f"Medical Segmentation Decathlon. Licence: {LICENCE}. {PAGE}")
    print("nnU-Net has a converter, which names the dataset after the task. Nothing was written. Run:\n")
    print("\n".join(f"  {command}" for command in commands))
    return 0
