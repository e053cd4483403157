"""``nnssl_stc3d benchmark``: what is pretraining worth on my data, with the labels that I have?"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from nnssl_stc3d.cli.datasets import environment_folder, find_dataset_folder, preprocessed_folder
from nnssl_stc3d.evaluation.benchmark.methods import ABLATIONS, LONGER, METHODS, NO_MIRRORING, SCHEDULES, SCRATCH
from nnssl_stc3d.evaluation.benchmark.perturb import STRENGTHS

DESCRIPTION = """\
Compares pretraining methods with training from scratch when few cases are labelled. Test cases are drawn first; no
pretraining and no finetuning sees them. Every method is pretrained once for each seed under one budget and finetuned
with nested draws of labelled cases; scratch runs have the same plans, schedule, steps, cases and seeds. The same
command continues after an interruption, and more methods, labels or seeds extend a benchmark.

The dataset has to be planned and preprocessed, and its images have to be in nnUNet_raw; these folders are only read.
Without --pretrain-dataset the pretraining sees the images of the dataset's own development cases. Choices (options,
methods) are made with --cases validation, as --ablation does by itself.

  nnssl_stc3d benchmark -d 4 --methods scratch,stc3d,voco --labels 10,20 --seeds 5 --budget 30min -o BENCHMARK
  nnssl_stc3d benchmark -d 4 --ablation regulariser --labels 10 --seeds 5 --budget 30min -o BENCHMARK
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``benchmark``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "benchmark", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", dest="dataset", required=True, help="labelled dataset, number or name")
    parser.add_argument("-o", dest="output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="configuration (default: %(default)s)")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    methods_help = (
        f"of {','.join([SCRATCH, *METHODS])} and the variants of ablations; {LONGER} trains from scratch for as long "
        "as a pretraining and a finetuning together (default: %(default)s)"
    )
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--methods", default="scratch,stc3d", metavar="NAMES", help=methods_help)
    compared.add_argument(
        "--ablation", choices=ABLATIONS, help="compare variants as the papers do, on validation cases"
    )
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="METHOD.OPTION=VALUE",
        help="change an option of a method, such as vox2vec.points=100 or stc3d.transforms.rotation=15",
    )  # fmt: skip
    parser.add_argument(
        "--labels",
        default="5,10,20,100%",
        metavar="COUNTS",
        help="numbers of labelled cases, or percentages of those that are neither test nor validation cases (default: "
        "%(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default: %(default)s)")
    parser.add_argument(
        "--pretrain-dataset", metavar="DATASET",
        help="pretrain on this dataset, with the same plans (see align-plans); images of test cases in it are left out",
    )  # fmt: skip
    parser.add_argument(
        "--pretrain-plans", metavar="NAME",
        help="plans of that dataset (default: those that align-plans made for it from -p, else the name after -p)",
    )  # fmt: skip
    parser.add_argument(
        "--budget",
        default="100000steps",
        help="of every pretraining, such as 5000steps, 30min, 12h (default: %(default)s)",
    )
    parser.add_argument(
        "--finetuning",
        default="stc3d",
        metavar="NAMES",
        help=f"schedules, of {','.join(SCHEDULES)}; each also with {NO_MIRRORING} at its end, and with a learning rate "
        "of your own as stc3d@0.003 (default: stc3d)",
    )
    parser.add_argument(
        "--finetuning-steps", type=int, default=25_000, metavar="N", help="of every finetuning (default: %(default)s)"
    )
    parser.add_argument("--test-cases", type=int, metavar="N", help="default: a quarter of the cases")
    parser.add_argument("--validation-cases", type=int, metavar="N", help="default: a sixth of the cases")
    parser.add_argument(
        "--split-seed", type=int, default=0, metavar="N", help="another draw of these cases (default: 0)"
    )
    parser.add_argument(
        "--split", type=Path, metavar="CSV",
        help="table of the cases: with the columns case and patient all cases of a patient are for the same purpose, "
        "with case and split (train, val, test) the split is yours; cases that it does not name are left out",
    )  # fmt: skip
    parser.add_argument(
        "--cases", choices=["test", "validation"], help="what is predicted (default: test, validation for --ablation)"
    )
    parser.add_argument(
        "--reference", default=SCRATCH, metavar="NAME", help="compare the others with this one (default: scratch)"
    )
    parser.add_argument(
        "--robustness",
        default="",
        metavar="NAMES",
        help=f"predict perturbed copies of the cases, too: {','.join(STRENGTHS)}",
    )
    parser.add_argument(
        "--nsd-tolerance", type=float, default=1.0, metavar="MM",
        help="of normalised surface Dice, which needs MONAI; 0 leaves it out (default: %(default)s mm)",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cuda", help="default: %(default)s")
    parser.add_argument("--gpus", default="", help="spread runs over these, such as 0,1")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, on each GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads of a run; 0 leaves them to nnU-Net"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="loader workers of a run (default: nnUNet_n_proc_DA, else 0 on a CPU and 8)",
    )
    parser.add_argument("--disable-tta", action="store_true", help="predict without mirroring")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs and how long they are, and write nothing"
    )
    return parser


def _visible(gpus: str, allowed: str) -> tuple[str, ...]:
    """Names for CUDA_VISIBLE_DEVICES. Numbers count the GPUs that this process may use, as everywhere in CUDA.

    Raises:
        ValueError: a number beyond them.
    """
    names, known = [g for g in gpus.split(",") if g], [g for g in allowed.split(",") if g]
    if known and any(name.isdigit() and int(name) >= len(known) for name in names):
        raise ValueError(
            f"expected numbers below {len(known)} after --gpus (CUDA_VISIBLE_DEVICES={allowed}), got {gpus}"
        )
    return tuple(known[int(name)] if known and name.isdigit() else name for name in names)


def run(args: argparse.Namespace) -> int:
    """Runs what is missing and writes the report."""
    from nnssl_stc3d.evaluation.benchmark.command import Options, benchmark

    # What a scheduler sends ends the runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raw = environment_folder("nnUNet_raw")
    workers = args.workers
    if workers is None:
        workers = int(os.environ.get("nnUNet_n_proc_DA", 0 if args.device == "cpu" else 8))
    folder = preprocessed_folder(args.dataset)
    return benchmark(
        Options(
            output=args.output.resolve(),
            target=folder,
            target_raw=find_dataset_folder(raw, folder.name),
            pretraining=preprocessed_folder(args.pretrain_dataset) if args.pretrain_dataset else None,
            pretraining_plans=args.pretrain_plans,
            configuration=args.configuration,
            plans=args.plans,
            methods=tuple(args.methods.split(",")),
            ablation=args.ablation,
            options=tuple(args.options),
            labels=tuple(args.labels.split(",")),
            seeds=args.seeds,
            budget=args.budget,
            schedules=tuple(args.finetuning.split(",")),
            finetuning_steps=args.finetuning_steps,
            test_cases=args.test_cases,
            validation_cases=args.validation_cases,
            split_seed=args.split_seed,
            split=args.split,
            cases=args.cases,
            robustness=tuple(p for p in args.robustness.split(",") if p),
            tolerance=args.nsd_tolerance,
            reference=args.reference,
            device=args.device,
            gpus=_visible(args.gpus, os.environ.get("CUDA_VISIBLE_DEVICES", "")),
            jobs=args.jobs,
            threads=args.threads,
            workers=workers,
            mirroring=not args.disable_tta,
            dry_run=args.dry_run,
        )
    )
