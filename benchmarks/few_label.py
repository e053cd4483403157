r"""Few-label comparison on a real dataset, through nnU-Net's own commands.

Any nnU-Net raw dataset with labels serves. Test cases are drawn first and seen by nothing. The others are planned and
preprocessed once, pretrained on without their labels, and finetuned with a few of their labels, from the pretraining
and from scratch under the same plans, schedule, steps, labelled cases and seed.

    python benchmarks/few_label.py --data nnUNet_raw/Dataset004_Hippocampus --work WORK \
        --patch-size 24 40 24 --batch-size 2 --disable-tta --jobs 2

Finished runs are skipped, so the same command continues after an interruption, and extends a comparison by arms, labels
or seeds. --dry-run prints the commands. Everything is written to WORK: split.json (test and validation cases, and the
order of labelled cases per seed), commands.txt, logs/, results/ (one nnUNet_results per start), predictions/ and
report/{test,val}/results.{md,json,csv,png}.

Choices between pretrainings are made on the validation cases, and only the last table uses the test cases:

    python benchmarks/few_label.py ... --cases val --pretrain-trainer STC3DPretrainTrainer_10epochs --variant best
    python benchmarks/few_label.py ... --cases val --pretrain-trainer STC3DPaperPretrainTrainer_10epochs --variant paper
    python benchmarks/few_label.py ... --cases val --pretrain-checkpoint elsewhere.pth --variant other
    python benchmarks/few_label.py ... --cases val --stages report --report best paper other

The pretraining sees the images of the validation cases, as of all development cases; no finetuning sees their labels.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from few_label_data import Split, build_raw, load_or_make_split
from few_label_report import write_report
from few_label_runs import (
    SCHEDULES,
    SCRATCH,
    Run,
    Settings,
    call,
    execute_all,
    pin_checkpoint,
    plan_runs,
    prepare,
    pretrain_command,
    pretraining_checkpoint,
)

ARMS = [f"{init}-{schedule}" for schedule in SCHEDULES for init in (SCRATCH, "pretrained")]
STAGES = ["prepare", "pretrain", "finetune", "report"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="nnU-Net raw dataset, DatasetXXX_Name")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all of them")
    parser.add_argument("--test-cases", type=int, default=45, help="held out from everything (default: %(default)s)")
    parser.add_argument("--val-cases", type=int, default=30, help="for choices (default: %(default)s)")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--labels", nargs="+", type=int, default=[10, 20], help="labelled cases (default: 10 20)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws (default: 0 1 2)")
    parser.add_argument(
        "--epochs", type=int, choices=[1, 5, 10, 50, 100], default=5, help="of finetuning, 250 steps each"
    )
    parser.add_argument("--pretrain-trainer", default="STC3DPretrainTrainer_10epochs", help="default: %(default)s")
    checkpoint_help = "finetune from this file instead of pretraining; or one file for each of --seeds, in their order"
    parser.add_argument("--pretrain-checkpoint", type=Path, nargs="+", help=checkpoint_help)
    parser.add_argument("--variant", default="pretrained", help="name of the pretraining in folders and tables")
    parser.add_argument("--report", nargs="+", metavar="VARIANT", help="variants in the tables (default: --variant)")
    parser.add_argument("--cases", choices=["val", "test"], default="test", help="what is predicted and reported")
    plans_help = "used as they are where they exist, as nnUNetPlans does; else small plans are derived under this name"
    parser.add_argument("--plans", default="nnUNetSmallPlans", help=plans_help)
    parser.add_argument("--patch-size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="of small plans")
    parser.add_argument("--batch-size", type=int, help="of small plans")
    parser.add_argument("--base-features", type=int, help="of small plans")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="nnUNet_n_proc_DA; 0 makes runs reproducible")
    parser.add_argument("--disable-tta", action="store_true", help="predict without mirroring")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    options = parser.parse_args(arguments)
    if options.variant in (SCRATCH, "pretraining"):
        parser.error(f"--variant must not be {options.variant!r}, which is the name of another folder")
    if options.pretrain_checkpoint and len(options.pretrain_checkpoint) not in (1, len(options.seeds)):
        parser.error(
            f"expected one --pretrain-checkpoint or one for each of {len(options.seeds)} --seeds, "
            f"got {len(options.pretrain_checkpoint)}"
        )
    return options


def small_plans_options(options: argparse.Namespace) -> list[str]:
    """Options of ``nnssl_stc3d small-plans``."""
    chosen: list[str] = []
    if options.patch_size:
        chosen += ["--patch-size", *map(str, options.patch_size)]
    if options.batch_size:
        chosen += ["--batch-size", str(options.batch_size)]
    if options.base_features:
        chosen += ["--base-features", str(options.base_features)]
    return chosen


def list_runs(options: argparse.Namespace, settings: Settings, split: Split, variants: Sequence[str]) -> list[Run]:
    """Runs of some pretrainings and of scratch, each once."""
    files = options.pretrain_checkpoint or [pretraining_checkpoint(settings, options.pretrain_trainer)]
    if len(files) == 1:
        files = files * len(options.seeds)
    checkpoints = {seed: file.resolve() for seed, file in zip(options.seeds, files, strict=True)}
    planned = [
        plan_runs(split, options.arms, options.labels, checkpoints, options.epochs, variant) for variant in variants
    ]
    return list(dict.fromkeys(run for runs in planned for run in runs))


def print_plan(options: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> None:
    """Prints the commands that are still needed."""
    for name, value in settings.environment("{start}", options.pretrain_trainer).items():
        print(f"export {name}={shlex.quote(value)}")
    if not (settings.work / "preprocessed.done").is_file():
        print(f"nnUNetv2_plan_and_preprocess -d {settings.number} -c 3d_fullres")
    if not pretraining_checkpoint(settings, options.pretrain_trainer).is_file() and not options.pretrain_checkpoint:
        print("# start: pretraining\n" + shlex.join(pretrain_command(settings, options.pretrain_trainer)))
    for run in runs:
        commands = run.commands(settings)
        print(f"# start: {run.init}; {run.name}" + ("" if commands else ": done"))
        for command in commands:
            print(shlex.join(command))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0, or 1 where a run failed.
    """
    options = parse_arguments(arguments)
    work = options.work.resolve()
    settings = Settings(
        work,
        options.data.resolve().name,
        options.plans,
        options.device,
        options.threads,
        options.workers,
        not options.disable_tta,
        options.cases,
    )
    split = load_or_make_split(work, options.data.resolve(), options.test_cases, options.val_cases, options.split_seed)
    runs = list_runs(options, settings, split, [options.variant])
    if options.dry_run:
        print_plan(options, settings, runs)
        return 0
    if "prepare" in options.stages:
        build_raw(work, options.data.resolve(), split)
        prepare(settings, split, small_plans_options(options))
    pretrained = [run for run in runs if run.checkpoint]
    checkpoint = pretraining_checkpoint(settings, options.pretrain_trainer)
    if "pretrain" in options.stages and pretrained and not options.pretrain_checkpoint and not checkpoint.is_file():
        command = pretrain_command(settings, options.pretrain_trainer)
        log = work / "logs" / f"{options.pretrain_trainer}.log"
        print(f"pretraining: {shlex.join(command)}\nits output: {log}", flush=True)
        call(command, settings, "pretraining", log, options.pretrain_trainer, options.split_seed)
    failures = []
    if "finetune" in options.stages:
        for run in pretrained:
            pin_checkpoint(settings, run)
        failures = execute_all(runs, settings, options.jobs)
    if "report" in options.stages:
        shown = list_runs(options, settings, split, options.report or [options.variant])
        print(write_report(shown, settings))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
