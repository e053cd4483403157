"""Runs of the few-label comparison: which commands, in which folders, and what is done already."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from time import time

from few_label_data import Split, evaluation_folders
from tqdm import tqdm

from nnssl_stc3d.cli.trainers import trainers_folder

CONFIGURATION = "3d_fullres"
SCRATCH = "scratch"
# What a finetuning schedule is called in the tables, and the trainer that has it.
SCHEDULES = {"stock": "nnUNetTrainer", "stc3d": "STC3DFinetuneTrainer"}


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Attributes:
        work: folder for everything that is written.
        dataset: name of the dataset, DatasetXXX_Name.
        plans: identifier of the plans.
        device: nnU-Net's -device.
        threads: CPU threads of each command.
        workers: nnUNet_n_proc_DA.
        tta: predict with mirroring.
        cases: "val" or "test".
    """

    work: Path
    dataset: str
    plans: str
    device: str
    threads: int
    workers: int
    tta: bool
    cases: str

    @property
    def number(self) -> str:
        """The dataset's number."""
        return str(int(self.dataset[7:10]))

    @property
    def preprocessed(self) -> Path:
        """The dataset's preprocessed folder."""
        return self.work / "nnUNet_preprocessed" / self.dataset

    def environment(self, results: str, trainer: str = "") -> dict[str, str]:
        """Environment of a command.

        Args:
            results: name of the results root; arms that share a trainer must not share their results.
            trainer: where it is one of ours, nnU-Net is told where to find it.
        """
        own = {
            "nnUNet_raw": str(self.work / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.work / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.work / "results" / results),
            "nnUNet_n_proc_DA": str(self.workers),
            "nnUNet_def_n_proc": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "MPLBACKEND": "Agg",
        }
        if trainer and not trainer.startswith("nnUNet"):
            own["nnUNet_extTrainer"] = str(trainers_folder())
        return own


@dataclass(frozen=True)
class Run:
    """One finetuning: arm, labelled cases and draw.

    Attributes:
        init: "scratch", or the name of a pretraining.
        schedule: "stock" or "stc3d".
        trainer: class name.
        labels: number of labelled cases.
        seed: of the draw of labelled cases, of initialisation and batches.
        fold: nnU-Net's fold.
        checkpoint: pretraining, None from scratch.
    """

    init: str
    schedule: str
    trainer: str
    labels: int
    seed: int
    fold: int
    checkpoint: Path | None = None

    @property
    def name(self) -> str:
        """Short name for logs."""
        return f"{self.init}-{self.trainer}-{self.labels}labels-seed{self.seed}"

    def model(self, settings: Settings) -> Path:
        """nnU-Net's folder of the fold."""
        folder = f"{self.trainer}__{settings.plans}__{CONFIGURATION}"
        return settings.work / "results" / self.init / settings.dataset / folder / f"fold_{self.fold}"

    def predictions(self, settings: Settings) -> Path:
        """Folder of the predicted cases and their summary.json."""
        folder = f"{self.trainer}__{settings.plans}" + ("" if settings.tta else "__notta")
        return settings.work / "predictions" / self.init / folder / f"fold_{self.fold}" / settings.cases

    def is_done(self, settings: Settings) -> bool:
        """Whether the evaluation is there, which is the last thing that is written."""
        return (self.predictions(settings) / "summary.json").is_file()

    def commands(self, settings: Settings) -> list[list[str]]:
        """Commands that are still needed, in order."""
        if self.is_done(settings):
            return []
        common = ["-p", settings.plans, "-tr", self.trainer]
        device = ["-device", settings.device]
        train = ["nnUNetv2_train", settings.number, CONFIGURATION, str(self.fold), *common, *device]
        if self.checkpoint:
            train += ["-pretrained_weights", str(self.checkpoint)]
        images, labels = evaluation_folders(settings.work, settings.dataset, settings.cases)
        output = self.predictions(settings)
        predict = ["nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", settings.number, *common]
        # no processes beside it: starting them takes longer than small cases do
        predict += ["-c", CONFIGURATION, "-f", str(self.fold), *device, "-npp", "0", "-nps", "0"]
        predict += ["--disable_progress_bar"] + ([] if settings.tta else ["--disable_tta"])
        evaluate = ["nnUNetv2_evaluate_folder", str(labels), str(output), "-np", "1"]
        evaluate += ["-djfile", str(output / "dataset.json"), "-pfile", str(output / "plans.json")]
        trained = (self.model(settings) / "checkpoint_final.pth").is_file()
        return ([] if trained else [train]) + [predict, evaluate]


def plan_runs(
    split: Split,
    arms: Sequence[str],
    labels: Sequence[int],
    checkpoints: Mapping[int, Path],
    epochs: int,
    variant: str,
) -> list[Run]:
    """Lists the runs of a comparison, seed by seed, so that an interrupted one has complete pairs.

    Args:
        split: the cases.
        arms: such as "scratch-stock" and "pretrained-stc3d".
        labels: numbers of labelled cases.
        checkpoints: draws, and the pretraining that each starts from.
        epochs: of the trainers, which have a variant for it.
        variant: name of the pretraining.
    """
    suffix = f"_{epochs}epoch" + ("s" if epochs > 1 else "")
    runs = []
    for seed, checkpoint in checkpoints.items():
        for count in labels:
            for arm in arms:
                init, schedule = arm.split("-")
                pretrained = init != SCRATCH
                runs.append(
                    Run(
                        variant if pretrained else SCRATCH,
                        schedule,
                        SCHEDULES[schedule] + suffix,
                        count,
                        seed,
                        split.fold(count, seed),
                        checkpoint if pretrained else None,
                    )
                )
    return runs


def call(command: list[str], settings: Settings, results: str, log: Path, trainer: str = "", seed: int = 0) -> None:
    """Runs one command with its output in a log file, and notes it in commands.txt.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(settings.work / "commands.txt", "a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
    if command[0] in ("nnUNetv2_train", "nnUNetv2_predict"):
        wrapper = "nnssl_stc3d.evaluation.benchmark.seeded"
        command = [sys.executable, "-m", wrapper, str(seed), str(settings.threads), *command]
    elif command[0] == "nnssl_stc3d":
        command = [sys.executable, "-m", *command]
    else:
        # the scripts of this environment, whether or not it is activated
        command = [shutil.which(command[0], path=str(Path(sys.executable).parent)) or command[0], *command[1:]]
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(
            command,
            env={**os.environ, **settings.environment(results, trainer)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{shlex.join(command)} ended with {code}. The end of {log}:\n{tail}")


def execute(run: Run, settings: Settings) -> None:
    """Does what is missing of a run: train, predict, evaluate."""
    log = settings.work / "logs" / f"{run.name}-{settings.cases}.log"
    seconds: dict[str, float] = {}
    for command in run.commands(settings):
        start = time()
        call(command, settings, run.init, log, run.trainer, run.seed)
        seconds[command[0]] = round(time() - start, 1)
    (run.predictions(settings) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def execute_all(runs: Sequence[Run], settings: Settings, jobs: int) -> list[str]:
    """Executes runs side by side under one progress line; a failure does not stop the others.

    Returns:
        Messages of the failures.
    """
    waiting = [run for run in runs if not run.is_done(settings)]
    failures = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", desc="finetuning", smoothing=0) as bar,
    ):
        futures = {pool.submit(execute, run, settings): run for run in waiting}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None:
                    failures.append(f"{futures[future].name}: {error}")
                bar.set_postfix_str(f"{futures[future].name}, {len(failures)} failed")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def prepare(settings: Settings, split: Split, small_plans: Sequence[str]) -> None:
    """Plans and preprocesses the development cases once, derives small plans and writes the folds.

    Args:
        settings: the comparison's settings.
        split: the cases.
        small_plans: options of ``nnssl_stc3d small-plans``.
    """
    log = settings.work / "logs" / "prepare.log"
    done = settings.work / "preprocessed.done"
    processes = str(settings.threads)
    # nnU-Net cannot plan with nnUNet_n_proc_DA=0
    settings = replace(settings, workers=max(1, settings.workers))
    if not done.is_file():
        command = ["nnUNetv2_plan_and_preprocess", "-d", settings.number, "-c", CONFIGURATION]
        call([*command, "-npfp", processes, "-np", processes], settings, SCRATCH, log)
        done.touch()
    if not (settings.preprocessed / f"{settings.plans}.json").is_file():
        command = ["nnssl_stc3d", "small-plans", "-d", settings.number, "-o", settings.plans, *small_plans]
        call(command, settings, SCRATCH, log)
    folds, splits = json.dumps(split.folds(), indent=1), settings.preprocessed / "splits_final.json"
    # untouched where it is right: other runs may be reading it
    if not splits.is_file() or splits.read_text(encoding="utf-8") != folds:
        splits.write_text(folds, encoding="utf-8")


def pretraining_checkpoint(settings: Settings, trainer: str) -> Path:
    """Where a pretraining on all development cases writes its weights."""
    folder = f"{trainer}__{settings.plans}__{CONFIGURATION}"
    return settings.work / "results" / "pretraining" / settings.dataset / folder / "fold_all" / "checkpoint_final.pth"


def pretrain_command(settings: Settings, trainer: str) -> list[str]:
    """The pretraining's command; it continues an interrupted one."""
    command = ["nnUNetv2_train", settings.number, CONFIGURATION, "all", "-p", settings.plans, "-tr", trainer]
    interrupted = pretraining_checkpoint(settings, trainer).with_name("checkpoint_latest.pth").is_file()
    return [*command, "-device", settings.device] + (["--c"] if interrupted else [])


def pin_checkpoint(settings: Settings, run: Run) -> None:
    """Ties a variant's name and a draw to one checkpoint, so that a table never mixes two.

    Raises:
        ValueError: they belong to another checkpoint, or the file is missing.
    """
    if run.checkpoint is None or not run.checkpoint.is_file():
        raise ValueError(f"expected a pretraining checkpoint, found no file {run.checkpoint}")
    digest = hashlib.sha256(run.checkpoint.read_bytes()).hexdigest()
    record = settings.work / "results" / run.init / f"pretraining_seed{run.seed}.json"
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8"))["sha256"] != digest:
            raise ValueError(f"variant {run.init!r} was finetuned from another checkpoint; choose another --variant")
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {"checkpoint": str(run.checkpoint), "sha256": digest}
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
