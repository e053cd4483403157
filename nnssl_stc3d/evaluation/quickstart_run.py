"""The quickstart's chain of nnU-Net commands, from raw datasets to two models that differ only in their start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nnssl_stc3d.evaluation.commands import Command, CommandRunner, bar_named, cases_predicted, epochs_done

PRETRAIN_TRAINERS = {
    "pimpic": "PiMPiCPretrainTrainer_quickstart",
    "stc3d": "STC3DPretrainTrainer_quickstart",
    "voco": "VoCoPretrainTrainer_quickstart",
    "vox2vec": "Vox2VecPretrainTrainer_quickstart",
    "alice": "AlicePretrainTrainer_quickstart",
}


@dataclass(frozen=True)
class QuickstartSettings:
    """Everything that decides how long the quickstart takes. The numbers suit two CPU cores.

    Attributes:
        num_unlabelled: phantom cases for pretraining.
        num_labelled: phantom cases with labels; nnU-Net's first fold trains on four of five and validates on one.
        num_test: phantom cases that are predicted.
        unlabelled_id: number of the unlabelled dataset.
        labelled_id: number of the labelled dataset.
        configuration: nnU-Net's configuration.
        plans: name of the small plans.
        base_features: channels of the small network's first stage.
        max_patch_voxels: voxels of a patch at most.
        stages: encoder stages at most.
        batch_size: patches in a batch.
        pretrain_epochs: epochs of the pretraining trainer, for the progress bar and the report.
        finetune_trainer: trainer of both arms.
        finetune_epochs: epochs of that trainer.
        processes: worker processes of nnU-Net's preprocessing.
    """

    num_unlabelled: int = 32
    num_labelled: int = 5
    num_test: int = 8
    unlabelled_id: int = 801
    labelled_id: int = 802
    configuration: str = "3d_fullres"
    plans: str = "nnUNetSmallPlans"
    base_features: int = 8
    max_patch_voxels: int = 61_440
    stages: int = 4
    batch_size: int = 2
    pretrain_epochs: int = 16
    finetune_trainer: str = "STC3DFinetuneTrainer_quickstart"
    finetune_epochs: int = 16
    processes: int = 2


@dataclass(frozen=True)
class QuickstartPaths:
    """Folders below the one folder that the quickstart writes to.

    Attributes:
        root: that folder, absolute.
        unlabelled: name of the unlabelled dataset.
        labelled: name of the labelled dataset.
    """

    root: Path
    unlabelled: str
    labelled: str

    @property
    def raw(self) -> Path:
        """The quickstart's nnUNet_raw."""
        return self.root / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        """The quickstart's nnUNet_preprocessed."""
        return self.root / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        """nnUNet_results of the pretraining and of the model that starts from it."""
        return self.root / "nnUNet_results"

    @property
    def results_scratch(self) -> Path:
        """nnUNet_results of the model from scratch: nnU-Net would write both models into the same folder."""
        return self.root / "nnUNet_results_scratch"

    @property
    def report(self) -> Path:
        """The page with the figures."""
        return self.root / "report.html"

    def results_of(self, arm: str) -> Path:
        """nnUNet_results of "pretrained" or "scratch"."""
        return {"pretrained": self.results, "scratch": self.results_scratch}[arm]

    def predictions_of(self, arm: str) -> Path:
        """Predicted test cases of "pretrained" or "scratch"."""
        return self.root / f"predictions_{arm}"

    def contents(self) -> Iterator[Path]:
        """Everything that the quickstart writes."""
        yield from (self.raw, self.preprocessed, self.results, self.results_scratch, self.report)
        yield from (self.predictions_of("pretrained"), self.predictions_of("scratch"))
        yield from (self.root / "log.txt", self.root / "commands.sh")


def model_folder(results: Path, dataset: str, trainer: str, settings: QuickstartSettings, fold: str) -> Path:
    """nnU-Net's folder of one training."""
    return results / dataset / f"{trainer}__{settings.plans}__{settings.configuration}" / f"fold_{fold}"


def child_environment(paths: QuickstartPaths, trainers: Path, device: str) -> dict[str, str]:
    """Variables that all commands of the quickstart need.

    Args:
        paths: the quickstart's folders.
        trainers: folder of this package's trainers.
        device: "cpu", "cuda" or "mps".
    """
    loaders = 1 if device == "cpu" else max(1, min(4, (os.cpu_count() or 2) - 1))
    return {
        "nnUNet_raw": str(paths.raw),
        "nnUNet_preprocessed": str(paths.preprocessed),
        "nnUNet_results": str(paths.results),
        "nnUNet_extTrainer": str(trainers),
        # Compiling takes longer than a training of this length gains.
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": str(loaders),
        "nnUNet_def_n_proc": "1",
        "nnUNet_wandb_enabled": "0",
        # One thread for each worker; nnU-Net gives the training itself all cores. Threads that wait must not keep a
        # core busy,
        # or workers and training slow each other down many times over.
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MPLBACKEND": "Agg",
    }


def preparation(settings: QuickstartSettings) -> list[Command]:
    """Commands that make both datasets ready: the labelled one is planned, the unlabelled one gets its plans."""
    config, workers = settings.configuration, str(settings.processes)
    pretrain, finetune = str(settings.unlabelled_id), str(settings.labelled_id)
    plan = ("nnUNetv2_plan_and_preprocess", "-d", finetune, "-c", config, "-npfp", workers, "-np", workers)
    small = ("nnssl_stc3d", "small-plans", "-d", finetune, "-c", config, "-o", settings.plans)
    sizes = {
        "--base-features": settings.base_features,
        "--max-patch-voxels": settings.max_patch_voxels,
        "--stages": settings.stages,
        "--batch-size": settings.batch_size,
    }
    move = ("nnUNetv2_move_plans_between_datasets", "-s", finetune, "-t", pretrain)
    preprocess = ("nnUNetv2_preprocess", "-d", pretrain, "-plans_name", settings.plans, "-c", config, "-np", workers)
    preprocessed = bar_named("Preprocessing cases")
    return [
        Command(
            "plan and preprocess the labelled cases", (*plan, "--verify_dataset_integrity"), {}, "case", preprocessed
        ),
        Command("small network", (*small, *(word for item in sizes.items() for word in map(str, item)))),
        Command(
            "fingerprint of the unlabelled cases",
            ("nnUNetv2_plan_and_preprocess", "-d", pretrain, "-npfp", workers, "--no_pp"),
            {},
            "case",
            bar_named("Extracting dataset fingerprint"),
        ),
        Command("hand the plans over", (*move, "-sp", settings.plans, "-tp", settings.plans)),
        Command("preprocess the unlabelled cases", preprocess, {}, "case", preprocessed),
    ]


def pretraining(settings: QuickstartSettings, method: str, device: str) -> Command:
    """The command that pretrains on all images of the unlabelled dataset."""
    trainer = PRETRAIN_TRAINERS[method]
    words = ("nnUNetv2_train", str(settings.unlabelled_id), settings.configuration, "all", "-tr", trainer)
    return Command(
        "pretrain without labels",
        (*words, "-p", settings.plans, "-device", device),
        {},
        "epoch",
        epochs_done(),
        settings.pretrain_epochs,
    )


def arm(
    settings: QuickstartSettings,
    paths: QuickstartPaths,
    name: str,
    checkpoint: Path | None,
    fold: str,
    num_test: int,
    device: str,
) -> list[Command]:
    """Commands that finetune, predict and evaluate one model.

    Args:
        settings: the same for both arms.
        paths: the quickstart's folders.
        name: "pretrained" or "scratch".
        checkpoint: pretrained weights, None for scratch.
        fold: "0" or "all".
        num_test: test cases.
        device: "cpu", "cuda" or "mps".
    """
    dataset, config, trainer = str(settings.labelled_id), settings.configuration, settings.finetune_trainer
    environment = {} if name == "pretrained" else {"nnUNet_results": str(paths.results_of(name))}
    predictions, folder = paths.predictions_of(name), paths.raw / paths.labelled
    train = ("nnUNetv2_train", dataset, config, fold, "-tr", trainer, "-p", settings.plans, "-device", device)
    start = () if checkpoint is None else ("-pretrained_weights", str(checkpoint))
    predict = ("nnUNetv2_predict", "-i", str(folder / "imagesTs"), "-o", str(predictions), "-d", dataset, "-c", config)
    # Mirrored copies would make the prediction eight times as long.
    options = (
        "-f",
        fold,
        "-tr",
        trainer,
        "-p",
        settings.plans,
        "-device",
        device,
        "--disable_tta",
        "-npp",
        "1",
        "-nps",
        "1",
    )
    evaluate = ("nnUNetv2_evaluate_folder", str(folder / "labelsTs"), str(predictions))
    files = ("-djfile", str(predictions / "dataset.json"), "-pfile", str(predictions / "plans.json"), "-np", "1")
    title = "from the pretraining" if checkpoint else "from scratch"
    return [
        Command(f"finetune {title}", (*train, *start), environment, "epoch", epochs_done(), settings.finetune_epochs),
        Command(f"predict ({name})", (*predict, *options), environment, "case", cases_predicted(), num_test),
        Command(f"evaluate ({name})", (*evaluate, *files), environment),
    ]


def run_chain(
    runner: CommandRunner,
    settings: QuickstartSettings,
    paths: QuickstartPaths,
    method: str,
    fold: str,
    num_test: int,
    device: str,
) -> None:
    """Runs all commands on the two raw datasets that are there.

    Args:
        runner: runs them.
        settings: sizes and trainers.
        paths: the quickstart's folders.
        method: key of `PRETRAIN_TRAINERS`.
        fold: fold of the finetuning, "0" or "all".
        num_test: test cases.
        device: "cpu", "cuda" or "mps".

    Raises:
        RuntimeError: a command failed.
    """
    for command in preparation(settings):
        runner.run(command)
    runner.run(pretraining(settings, method, device))
    folder = model_folder(paths.results, paths.unlabelled, PRETRAIN_TRAINERS[method], settings, "all")
    for name, checkpoint in (("pretrained", folder / "checkpoint_final.pth"), ("scratch", None)):
        for command in arm(settings, paths, name, checkpoint, fold, num_test, device):
            runner.run(command)
