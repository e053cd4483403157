"""Finetuning the encoder on classes of whole cases (STC3D Table 4)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os.path import isdir, join
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import autocast, nn
from torch import distributed as dist

from nnssl_stc3d.data.case_labels import FOLDS_FILE, LABELS_FILE, CaseLabels, cases_of_fold, read_case_labels
from nnssl_stc3d.modules.classifier import ClassifierNetwork, classify_volume
from nnssl_stc3d.training.classification_metrics import classification_metrics, metrics_table, write_predictions
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.logger import PretrainLogger
from nnssl_stc3d.training.preflight import check_configuration, check_environment
from nnssl_stc3d.training.ranks import from_all_ranks, rank_and_ranks
from nnssl_stc3d.transfer.adaptation_plan import unwrap
from nnssl_stc3d.transfer.checkpoint import load_checkpoint, write_atomically

RECORD = "classification"
"""Key of dataset.json in a results folder, under which the classes are kept."""


class ClassifyTrainer(FinetuneTrainer):
    """Learns the labels of ``classification.csv`` in the dataset's folder in nnUNet_preprocessed.

    Schedule, loading and augmentation are those of the finetuning trainer. A training step sees random patches, each
    with the label of its case; the final validation averages the logits of windows that cover the case.
    """

    # nnU-Net's attributes, which it sets without a type.
    dataset_class: Any
    current_epoch: int
    _best_ema: float | None
    epochs = 100
    validation_steps = 25

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        check_environment()
        check_configuration(plans, configuration, "classification")
        self.labels = _read_labels(plans, configuration)
        # nnU-Net copies dataset.json into the results, where `nnssl_stc3d classify` finds the classes.
        dataset_json = {**dataset_json, RECORD: {"classes": list(self.labels.classes)}}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.logger.local_logger = PretrainLogger()
        self.enable_deep_supervision = False
        # Patches anywhere: a label belongs to the whole case, and segmentations may not exist.
        self.oversample_foreground_percent = 0.0

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Called by ``nnUNetv2_predict`` only: a classifier cannot segment.

        Raises:
            RuntimeError: with the command that predicts.
        """
        raise RuntimeError(
            "This folder holds a classifier of whole cases, which has no segmentation to predict. Use\n"
            "  nnssl_stc3d classify -i FOLDER -o FILE.csv MODEL_FOLDER"
        )

    def initialize(self) -> None:
        """Build the classifier; ``-pretrained_weights`` fill its encoder."""

        def build(
            plans_manager: Any,
            configuration_manager: Any,
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = False,
        ) -> nn.Module:
            del num_output_channels, enable_deep_supervision
            return build_classifier(plans_manager, configuration_manager, num_input_channels, len(self.labels.classes))

        self.build_network_architecture = build  # type: ignore[method-assign]
        super().initialize()

    def _build_loss(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Labelled cases of the fold: by the table, or nnU-Net's split."""
        table = self.labels
        own = self.fold == "all" or table.folds or table.splits or table.patients
        kept = Path(self.preprocessed_dataset_folder_base) / FOLDS_FILE
        training, validation = cases_of_fold(table, self.fold, kept, None if own else super().do_split())
        self.print_to_log_file(
            f"{len(training)} training cases ({table.counts(training)}), {len(validation)} validation cases "
            f"({table.counts(validation)})"
        )
        return training, validation

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue, if the classes are still those of the beginning."""
        if isinstance(filename_or_checkpoint, dict):
            check_classes(filename_or_checkpoint, self.labels.classes, "the checkpoint")
        else:
            check_classes(load_checkpoint(filename_or_checkpoint), self.labels.classes, filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: there is no segmentation."""

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _classes_of(self, cases: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.labels.labels[str(case)] for case in cases])

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, with the classes of the cases as target."""
        return super().train_step({"data": batch["data"], "target": self._classes_of(batch["keys"])})

    def validation_step(self, batch: dict) -> dict:
        """Loss and logits of patches."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = self._classes_of(batch["keys"])
        with autocast("cuda") if self.device.type == "cuda" else dummy_context():
            logits = self.network(data)
            loss = self.loss(logits, target.to(self.device))
        return {"loss": float(loss), "probabilities": logits.float().softmax(1).cpu().numpy(), "truth": target.numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Log loss and balanced accuracy of the patches."""
        val_outputs = from_all_ranks(self, val_outputs)
        truth, probabilities = (np.concatenate([o[key] for o in val_outputs]) for key in ("truth", "probabilities"))
        metrics = classification_metrics(truth.tolist(), probabilities, self.labels.classes)
        self.logger.log("val_losses", float(np.mean([o["loss"] for o in val_outputs])), self.current_epoch)
        self.logger.log("val_balanced_accuracy", metrics["balanced_accuracy"], self.current_epoch)

    def on_epoch_end(self) -> None:
        """Report the epoch, save checkpoints and draw ``progress.png``; the best has the lowest smoothed loss."""
        epoch = self.current_epoch
        self.logger.log("epoch_end_timestamps", time(), epoch)
        for key in ("train_losses", "val_losses", "val_balanced_accuracy"):
            self.print_to_log_file(f"{key} {self.logger.get_value(key, step=-1):.4f}")
        log = self.logger.local_logger.my_fantastic_logging
        smoothed = log["val_losses"][0]
        for value in log["val_losses"][1:]:
            smoothed = 0.9 * smoothed + 0.1 * value
        if (epoch + 1) % self.save_every == 0 and epoch != self.num_epochs - 1:
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if self._best_ema is None or smoothed < self._best_ema:
            self._best_ema = smoothed
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Classify whole cases and write ``validation/predictions.csv`` and ``summary.json``.

        Args:
            save_probabilities: no effect, they always are.
        """
        del save_probabilities
        _, cases = self.do_split()
        logits = self._classify(cases)
        if self.local_rank == 0:
            probabilities = torch.stack([logits[case] for case in cases]).softmax(1).numpy()
            truth = self._classes_of(cases).tolist()
            metrics = classification_metrics(truth, probabilities, self.labels.classes)
            folder = Path(self.output_folder) / "validation"
            folder.mkdir(exist_ok=True)
            write_predictions(folder / "predictions.csv", cases, probabilities, self.labels.classes, truth)
            text = json.dumps(metrics, indent=2).encode()
            write_atomically(folder / "summary.json", lambda file: file.write(text))
            note = " on the cases that were trained on" if self.fold == "all" else ""
            self.print_to_log_file(f"Validation complete{note}\n{metrics_table(metrics)}")
            for key in ("accuracy", "balanced_accuracy", "auc", "f1"):
                self.logger.log_summary(f"final_val/{key}", metrics[key])
        if self.is_ddp:
            dist.barrier()

    def _classify(self, cases: Sequence[str]) -> dict[str, torch.Tensor]:
        """Logits of whole cases. Each rank takes its share, and waits for the others after every case."""
        # Without DDP's wrapper, whose forward may be one of all ranks.
        network = unwrap(self.network).eval()
        dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
        window = self.configuration_manager.patch_size
        rank, ranks = rank_and_ranks(self)
        logits = []
        for first in range(0, len(cases), ranks):
            for case in cases[first : first + ranks][rank : rank + 1]:
                self.print_to_log_file(f"classifying {case}")
                volume = torch.from_numpy(np.array(dataset.load_case(case)[0][:], dtype=np.float32))
                logits.append((case, classify_volume(network, volume, window, self.device)))
            if self.is_ddp:
                dist.barrier()
        return dict(from_all_ranks(self, logits))


def check_classes(checkpoint: dict[str, Any], classes: Sequence[str], source: str) -> None:
    """Refuses a classifier whose outputs mean other classes, or the same in another order.

    Raises:
        ValueError: with both.
    """
    trained = (checkpoint["init_args"].get("dataset_json") or {}).get(RECORD, {}).get("classes")
    if trained is not None and list(trained) != list(classes):
        raise ValueError(
            f"{source} was trained with the classes {', '.join(trained)}, in this order, expected "
            f"{', '.join(classes)}. The table of labels has changed since: train all folds with the same one."
        )


def build_classifier(
    plans_manager: Any, configuration_manager: Any, num_input_channels: int, num_classes: int
) -> ClassifierNetwork:
    """The encoder of the network that the plans name, with a classification head."""
    unet = nnUNetTrainer.build_network_architecture(plans_manager, configuration_manager, num_input_channels, 2, False)
    return ClassifierNetwork(unet, num_classes)


def _read_labels(plans: dict, configuration: str) -> CaseLabels:
    """The table of the dataset that the plans belong to, checked against its preprocessed cases."""
    manager = PlansManager(plans)
    base = join(nnUNet_preprocessed, manager.dataset_name)
    folder = join(base, manager.get_configuration(configuration).data_identifier)
    if not isdir(folder):
        raise FileNotFoundError(
            f"expected preprocessed data in {folder}, which does not exist. Run nnUNetv2_preprocess "
            f"-d {int(manager.dataset_name[7:10])} -plans_name {manager.plans_name} -c {configuration}"
        )
    known = infer_dataset_class(folder).get_identifiers(folder)
    return read_case_labels(Path(base) / LABELS_FILE, set(known))
