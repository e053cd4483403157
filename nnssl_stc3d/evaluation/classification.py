"""Classification of new scans with the models of a ClassifyTrainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from tqdm import tqdm

from nnssl_stc3d.modules.classifier import classify_volume
from nnssl_stc3d.training.classify_trainer import RECORD, build_classifier, check_classes
from nnssl_stc3d.transfer.checkpoint import load_checkpoint
from nnssl_stc3d.transfer.trusted_plans import check_plans


class Classifier:
    """The models of one or several folds; their probabilities are averaged.

    Args:
        folder: results of a ClassifyTrainer, with plans.json and a folder for each fold.
        folds: which ones; None for all that have the checkpoint.
        checkpoint: name of the file in each fold.
        device: to compute on.

    Raises:
        ValueError: if the folder is not such a folder, or a fold is missing.
    """

    def __init__(self, folder: Path, folds: Sequence[str] | None, checkpoint: str, device: torch.device) -> None:
        plans = _read_json(folder / "plans.json")
        check_plans(plans, folder / "plans.json")
        self.plans_manager = PlansManager(plans)
        self.dataset_json = _read_json(folder / "dataset.json")
        if RECORD not in self.dataset_json:
            raise ValueError(f"Expected the results of an STC3DClassifyTrainer in {folder}, but it names no classes.")
        self.classes: list[str] = self.dataset_json[RECORD]["classes"]
        self.device = device
        names = [f"fold_{fold}" for fold in folds or []] or sorted(f.name for f in folder.glob("fold_*"))
        files = [folder / name / checkpoint for name in names]
        self.files = files if folds else [file for file in files if file.is_file()]
        if not self.files:
            raise ValueError(f"Expected fold_*/{checkpoint} in {folder}, found none. Has the training finished?")
        loaded = [load_checkpoint(file) for file in self.files]
        for file, content in zip(self.files, loaded):
            check_classes(content, self.classes, str(file))
        self.configuration = self.plans_manager.get_configuration(loaded[0]["init_args"]["configuration"])
        self.channels = determine_num_input_channels(self.plans_manager, self.configuration, self.dataset_json)
        self.networks = [self._build(content, file) for content, file in zip(loaded, self.files)]

    def _build(self, checkpoint: dict[str, Any], file: Path) -> nn.Module:
        network = build_classifier(self.plans_manager, self.configuration, self.channels, len(self.classes))
        try:
            network.load_state_dict(checkpoint["network_weights"])
        except RuntimeError as error:
            raise ValueError(f"The weights of {file} do not fit the plans and classes beside it: {error}") from error
        return network.to(self.device).eval()

    def __call__(self, files: Sequence[Path]) -> np.ndarray:
        """Probabilities ``(K,)`` of a scan.

        Args:
            files: its channels in order; preprocessed as nnU-Net does it.
        """
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        data, *_ = preprocessor.run_case(
            [str(file) for file in files], None, self.plans_manager, self.configuration, self.dataset_json
        )
        volume = torch.from_numpy(np.asarray(data, dtype=np.float32))
        window = self.configuration.patch_size
        logits = [classify_volume(network, volume, window, self.device) for network in self.networks]
        return torch.stack(logits).softmax(1).mean(0).numpy()

    def classify_folder(self, folder: Path) -> tuple[list[str], np.ndarray]:
        """Classify all scans of a folder.

        Args:
            folder: files as in nnU-Net's imagesTs, ``CASE_0000.nii.gz`` and so on.

        Returns:
            Their N identifiers, and probabilities ``(N, K)``.
        """
        scans = find_scans(folder, self.dataset_json["file_ending"], self.channels)
        return list(scans), np.stack([self(files) for files in tqdm(scans.values(), desc="classifying")])


def find_scans(folder: Path, ending: str, channels: int) -> dict[str, list[Path]]:
    """Files of each scan of a folder, one for each channel.

    Args:
        folder: to look in.
        ending: of the files, such as ``.nii.gz``.
        channels: how many each scan must have.

    Raises:
        ValueError: if there are none, or a channel is missing.
    """
    suffix = f"_0000{ending}"
    cases = sorted(file.name.removesuffix(suffix) for file in folder.glob(f"*{suffix}"))
    if not cases:
        raise ValueError(f"Expected scans called CASE_0000{ending} in {folder}, found none. Rename or convert them.")
    scans = {case: [folder / f"{case}_{channel:04d}{ending}" for channel in range(channels)] for case in cases}
    if missing := [file for files in scans.values() for file in files if not file.is_file()]:
        raise ValueError(f"Expected {channels} channels of every scan, but {missing[0]} is missing.")
    return scans


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"Expected {file}. Give the folder STC3DClassifyTrainer__PLANS__CONFIGURATION of the results.")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
