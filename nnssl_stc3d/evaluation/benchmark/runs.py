"""The runs of a benchmark: which commands, what they wait for, and what is done already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import is_zipfile

from nnssl_stc3d.evaluation.benchmark.design import Split
from nnssl_stc3d.evaluation.benchmark.methods import LONGER, SCRATCH, Method
from nnssl_stc3d.evaluation.benchmark.trainer_source import finetuning_trainer
from nnssl_stc3d.evaluation.benchmark.workspace import Dataset, Workspace


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
        cases: what is predicted, "test" or "validation", or a perturbed copy such as "test-noise-low".
        finetuning_steps: of every finetuning, but those from scratch that are longer.
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
        method: what is pretrained.
        steps: its length.
        seed: of initialisation and views.
    """

    method: Method
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """For logs and progress."""
        return f"{self.method.key}-pretraining-{self.steps}steps-seed{self.seed}"

    @property
    def start(self) -> str:
        """Folder of results, its own for each length and options."""
        return f"{self.method.key}/{self.steps}steps/seed{self.seed}"

    @property
    def after(self) -> None:
        """It waits for nothing."""
        return None

    def checkpoint(self, settings: Settings) -> Path:
        """What it writes at its end."""
        trainer = self.method.trainer_name(f"{self.steps}steps")
        plans = settings.pretraining.plans["plans_name"]
        model = f"{trainer}__{plans}__{settings.pretraining.configuration}"
        folder = settings.workspace.results(self.start) / settings.pretraining.name / model
        return folder / "fold_all" / "checkpoint_final.pth"

    def commands(self, settings: Settings) -> list[list[str]]:
        """What is left to do; an interrupted pretraining continues."""
        checkpoint = self.checkpoint(settings)
        if checkpoint.is_file():
            return []
        train = ["nnUNetv2_train", settings.pretraining.number, settings.pretraining.configuration, "all"]
        train += ["-p", settings.pretraining.plans["plans_name"], "-tr"]
        train += [self.method.trainer_name(f"{self.steps}steps")]
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
        longer: steps, if they are other than those of every finetuning; 0 while they are not known.
    """

    pretraining: Pretraining | None
    schedule: str
    labels: int
    seed: int
    longer: int | None = None

    @property
    def after(self) -> Pretraining | None:
        """What has to be there before it."""
        return self.pretraining

    @property
    def method(self) -> str:
        """Name of the pretraining's method, or "scratch" or "scratch-longer"."""
        if self.pretraining:
            return self.pretraining.method.name
        return SCRATCH if self.longer is None else LONGER

    def steps(self, settings: Settings) -> int:
        """Length of the training."""
        return settings.finetuning_steps if self.longer is None else self.longer

    @property
    def start(self) -> str:
        """Folder of results."""
        return self.pretraining.start if self.pretraining else SCRATCH

    @property
    def name(self) -> str:
        """For logs and progress."""
        start = f"{self.pretraining.method.key}-{self.pretraining.steps}steps" if self.pretraining else self.method
        return f"{start}-{self.schedule}-{self.labels}labels-seed{self.seed}"

    def _model(self, settings: Settings) -> str:
        trainer = finetuning_trainer(self.schedule, self.steps(settings))
        return f"{trainer}__{settings.target.plans['plans_name']}__{settings.target.configuration}"

    def predictions(self, settings: Settings) -> Path:
        """Folder of the predicted cases and of what was measured on them."""
        fold = settings.workspace.fold(settings.target, settings.split, self.labels, self.seed)
        mirrored = "" if settings.mirroring else "__no_mirroring"
        folder = settings.workspace.root / "predictions" / self.start
        return folder / f"{self._model(settings)}{mirrored}" / f"fold_{fold}" / settings.cases

    def is_done(self, settings: Settings) -> bool:
        """Whether the last thing that is written is there, and whole: nnU-Net does not write it at once."""
        file = self.predictions(settings) / "summary.json"
        try:
            return bool(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return False

    def commands(self, settings: Settings) -> list[list[str]]:
        """What is left to do: train, predict, evaluate; an interrupted training continues."""
        if self.is_done(settings):
            return []
        target, plans = settings.target, settings.target.plans["plans_name"]
        fold = settings.workspace.fold(target, settings.split, self.labels, self.seed)
        trainer = finetuning_trainer(self.schedule, self.steps(settings))
        common = ["-p", plans, "-tr", trainer]
        train = ["nnUNetv2_train", target.number, target.configuration, str(fold), *common]
        train += ["-device", settings.device]
        model = settings.workspace.results(self.start) / target.name / self._model(settings) / f"fold_{fold}"
        # nnU-Net refuses weights to start from when it continues. A file without its end is no archive.
        if is_zipfile(model / "checkpoint_latest.pth"):
            train += ["--c"]
        elif self.pretraining:
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
        trained = (model / "checkpoint_final.pth").is_file()
        return ([] if trained else [train]) + [predict, evaluate]


@dataclass(frozen=True)
class PerturbedPrediction:
    """Prediction and evaluation of perturbed copies of the cases by a finetuned model.

    Attributes:
        finetuning: whose model predicts.
        perturbation: such as "noise".
        level: such as "low".
    """

    finetuning: Finetuning
    perturbation: str
    level: str

    @property
    def name(self) -> str:
        """For logs and progress."""
        return f"{self.finetuning.name}-{self.perturbation}-{self.level}"

    @property
    def start(self) -> str:
        """Folder of results."""
        return self.finetuning.start

    @property
    def seed(self) -> int:
        """Of the finetuning."""
        return self.finetuning.seed

    @property
    def after(self) -> Finetuning:
        """What has to be there before it."""
        return self.finetuning

    def settings(self, settings: Settings) -> Settings:
        """The same with the perturbed copies of the cases."""
        return replace(settings, cases=f"{settings.cases}-{self.perturbation}-{self.level}")

    def commands(self, settings: Settings) -> list[list[str]]:
        """What is left to do: predict, evaluate."""
        return self.finetuning.commands(self.settings(settings))


Run = Pretraining | Finetuning | PerturbedPrediction


def plan_runs(
    scratch: bool,
    steps: Mapping[Method, int],
    schedules: Sequence[str],
    labels: Sequence[int],
    seeds: Sequence[int],
    perturbed: Sequence[tuple[str, str]] = (),
    longer: Mapping[str, int] | None = None,
) -> list[Run]:
    """Lists the runs of a benchmark seed by seed, so that an interrupted one has complete pairs.

    Args:
        scratch: train from scratch, too.
        steps: method -> steps of its pretraining.
        schedules: of finetuning.
        labels: numbers of labelled cases.
        seeds: of draws and trainings.
        perturbed: pairs of perturbation and level, whose cases every finetuned model predicts, too.
        longer: schedule -> steps of trainings from scratch that are as long as a pretraining and a finetuning; None for
            no such trainings.

    Returns:
        Every run comes after what it waits for.
    """
    runs: list[Run] = []
    for seed in seeds:
        draws = [(schedule, count) for schedule in schedules for count in labels]
        here: list[Run] = [Finetuning(None, *draw, seed) for draw in draws] if scratch else []
        here += [Finetuning(None, *draw, seed, longer[draw[0]]) for draw in draws] if longer is not None else []
        for pretraining in (Pretraining(method, number, seed) for method, number in steps.items()):
            here += [pretraining, *(Finetuning(pretraining, *draw, seed) for draw in draws)]
        for run in here:
            runs.append(run)
            if isinstance(run, Finetuning):
                runs += [PerturbedPrediction(run, *kind) for kind in perturbed]
    return runs
