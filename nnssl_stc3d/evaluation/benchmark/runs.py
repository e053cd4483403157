"""The runs of a benchmark: which commands, in which order, and what is done already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl_stc3d.evaluation.benchmark.design import SCRATCH, Split
from nnssl_stc3d.evaluation.benchmark.workspace import (
    Dataset,
    Workspace,
    finetuning_trainer,
    pretraining_trainer,
)


@dataclass(frozen=True)
class Settings:
    """What all runs of a benchmark share.

    Attributes:
        workspace: where everything is written.
        target: the labelled dataset.
        pretraining: the dataset that is pretrained on, which may be the target.
        split: the target's cases.
        device: nnU-Net's -device.
        mirroring: predict with test-time mirroring.
        cases: "test" or "validation".
        finetuning_steps: of every finetuning.
    """

    workspace: Workspace
    target: Dataset
    pretraining: Dataset
    split: Split
    device: str
    mirroring: bool
    cases: str
    finetuning_steps: int


@dataclass(frozen=True)
class Pretraining:
    """One pretraining.

    Attributes:
        method: its name.
        steps: its length.
        seed: of initialisation; batches follow from the method's own seed and differ by it only in a method's dropout.
    """

    method: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For logs and progress."""
        return f"{self.method}-pretraining-seed{self.seed}"

    @property
    def start(self) -> str:
        """Folder of results."""
        return f"{self.method}/seed{self.seed}"

    def checkpoint(self, settings: Settings) -> Path:
        """What it writes at its end."""
        trainer, plans = pretraining_trainer(self.method, self.steps), settings.pretraining.plans["plans_name"]
        model = f"{trainer}__{plans}__{settings.pretraining.configuration}"
        folder = settings.workspace.results(self.start) / settings.pretraining.name / model
        return folder / "fold_all" / "checkpoint_final.pth"

    def commands(self, settings: Settings) -> list[list[str]]:
        """What is left to do; an interrupted pretraining continues."""
        checkpoint = self.checkpoint(settings)
        if checkpoint.is_file():
            return []
        train = ["nnUNetv2_train", settings.pretraining.number, settings.pretraining.configuration, "all"]
        train += ["-p", settings.pretraining.plans["plans_name"], "-tr", pretraining_trainer(self.method, self.steps)]
        train += ["-device", settings.device]
        return [train + (["--c"] if checkpoint.with_name("checkpoint_latest.pth").is_file() else [])]


@dataclass(frozen=True)
class Finetuning:
    """One finetuning with its prediction and evaluation.

    Attributes:
        pretraining: what it starts from, None from scratch.
        schedule: "stc3d" or "stock".
        labels: number of labelled cases.
        seed: of the draw of labelled cases, of initialisation and batches.
    """

    pretraining: Pretraining | None
    schedule: str
    labels: int
    seed: int

    @property
    def method(self) -> str:
        """Name of the pretraining's method, or "scratch"."""
        return self.pretraining.method if self.pretraining else SCRATCH

    @property
    def start(self) -> str:
        """Folder of results."""
        return self.pretraining.start if self.pretraining else SCRATCH

    @property
    def name(self) -> str:
        """For logs and progress."""
        return f"{self.method}-{self.schedule}-{self.labels}labels-seed{self.seed}"

    def _model(self, settings: Settings) -> str:
        trainer = finetuning_trainer(self.schedule, settings.finetuning_steps)
        return f"{trainer}__{settings.target.plans['plans_name']}__{settings.target.configuration}"

    def predictions(self, settings: Settings) -> Path:
        """Folder of the predicted cases and of what was measured on them."""
        fold = settings.workspace.fold(settings.target, settings.split, self.labels, self.seed)
        length = f"{self.pretraining.steps}steps" if self.pretraining else ""
        mirrored = "" if settings.mirroring else "__no_mirroring"
        folder = settings.workspace.root / "predictions" / self.start / length
        return folder / f"{self._model(settings)}{mirrored}" / f"fold_{fold}" / settings.cases

    def is_done(self, settings: Settings) -> bool:
        """Whether the last thing that is written is there."""
        return (self.predictions(settings) / "summary.json").is_file()

    def commands(self, settings: Settings) -> list[list[str]]:
        """What is left to do: train, predict, evaluate."""
        if self.is_done(settings):
            return []
        target, plans = settings.target, settings.target.plans["plans_name"]
        fold = settings.workspace.fold(target, settings.split, self.labels, self.seed)
        trainer = finetuning_trainer(self.schedule, settings.finetuning_steps)
        common = ["-p", plans, "-tr", trainer]
        train = ["nnUNetv2_train", target.number, target.configuration, str(fold), *common]
        train += ["-device", settings.device]
        if self.pretraining:
            train += ["-pretrained_weights", str(self.pretraining.checkpoint(settings))]
        images, labels = settings.workspace.cases(settings.cases)
        output = self.predictions(settings)
        predict = ["nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", target.number, *common]
        predict += ["-c", target.configuration, "-f", str(fold), "-device", settings.device]
        # No processes beside it: starting them takes longer than small cases do.
        predict += ["-npp", "0", "-nps", "0", "--disable_progress_bar"]
        predict += [] if settings.mirroring else ["--disable_tta"]
        evaluate = ["nnUNetv2_evaluate_folder", str(labels), str(output), "-np", "1"]
        evaluate += ["-djfile", str(output / "dataset.json"), "-pfile", str(output / "plans.json")]
        model = settings.workspace.results(self.start) / target.name / self._model(settings) / f"fold_{fold}"
        trained = (model / "checkpoint_final.pth").is_file()
        return ([] if trained else [train]) + [predict, evaluate]


Run = Pretraining | Finetuning


def plan_runs(
    methods: Sequence[str],
    steps: dict[str, int],
    schedules: Sequence[str],
    labels: Sequence[int],
    seeds: Sequence[int],
) -> list[Run]:
    """Lists the runs of a benchmark seed by seed, so that an interrupted one has complete pairs.

    Args:
        methods: "scratch" and names of methods.
        steps: method -> steps of its pretraining.
        schedules: of finetuning.
        labels: numbers of labelled cases.
        seeds: of draws and trainings.

    Returns:
        Every pretraining comes before the finetunings that start from it.
    """
    runs: list[Run] = []
    for seed in seeds:
        for method in methods:
            pretraining = None if method == SCRATCH else Pretraining(method, steps[method], seed)
            runs += [pretraining] if pretraining else []
            runs += [Finetuning(pretraining, s, count, seed) for s in schedules for count in labels]
    return runs
