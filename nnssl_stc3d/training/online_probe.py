"""A small probe during pretraining: can a linear classifier read labels off the features yet? It changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.voxel_labels import anatomical_labels, ignored_value, label_file, read_structures
from nnssl_stc3d.modules.feature_pyramid import check_unet, decoder_features
from nnssl_stc3d.modules.heads import sample_features
from nnssl_stc3d.training.monitors import ONLINE_PROBE
from nnssl_stc3d.views.geometry import normalised_points

if TYPE_CHECKING:
    from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

ONLINE_VARIABLE = "NNSSL_STC3D_ONLINE"
"""Epochs between two probes; 0 for none. Overrules the trainer's ``online_probe_every``."""

_CASES = 16
_POINTS_PER_LABEL = 64


def online_interval(default: int) -> int:
    """Epochs between two probes, from the environment if it says so.

    Raises:
        ValueError: if the variable is no number of epochs.
    """
    text = os.environ.get(ONLINE_VARIABLE, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{ONLINE_VARIABLE} must be a number of epochs, or 0 for no probe, got {text!r}")
    return int(text)


def probe_online(trainer: PretrainTrainer) -> None:
    """Log the balanced accuracy of the probe, if it is due in this epoch and the validation cases have labels.

    The labels are seen by the probe alone. The network is read in evaluation mode without gradients, and no global
    random generator is used, so that the pretraining stays what it is without the probe.
    """
    epoch, every = trainer.current_epoch, trainer.online_probe_every
    if trainer.local_rank != 0 or every < 1 or epoch % every:
        return
    try:
        value = _balanced_accuracy(trainer)
    except (ValueError, NotImplementedError) as error:
        if epoch == 0:
            trainer.print_to_log_file(f"No online probe: {error}")
        return
    trainer.logger.log(ONLINE_PROBE, value, epoch)


def _balanced_accuracy(trainer: PretrainTrainer) -> float:
    """Fit on the points of every other validation case, score on the points of the rest."""
    check_unet(trainer.method.network, "the online probe")
    names, ignored = anatomical_labels(trainer.dataset_json), ignored_value(trainer.dataset_json)
    folder = trainer.preprocessed_dataset_folder
    cases = [i for i in sorted(trainer.validation_keys) if label_file(folder, i).is_file()][:_CASES]
    if not names or len(cases) < 2:
        raise ValueError("it needs two validation cases with labels of structures")
    dataset = CaseDataset(folder, cases)
    training = trainer.method.training
    trainer.method.eval()
    try:
        read = [
            read_points(trainer.method, dataset, case, list(names), trainer.configuration_manager.patch_size,
                        trainer.device, index, ignored)
            for index, case in enumerate(cases)
        ]  # fmt: skip
    finally:
        trainer.method.train(training)
    (rows, groups), (test_rows, test_groups) = (
        tuple(np.concatenate(parts) for parts in zip(*read[start::2])) for start in (0, 1)
    )
    if len(np.unique(groups)) < 2 or not np.isin(test_groups, groups).any():
        raise ValueError("the validation cases have fewer than two labels")
    probe = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced")).fit(rows, groups)
    known = np.isin(test_groups, groups)
    return float(balanced_accuracy_score(test_groups[known], probe.predict(test_rows[known])))


def read_points(
    method: Any,
    dataset: CaseDataset,
    case: str,
    values: Sequence[int],
    window: Sequence[int],
    device: torch.device,
    seed: int,
    ignored: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of points of one case: up to 64 of each label, in a window around a labelled voxel.

    Args:
        method: a pretraining in evaluation mode.
        dataset: of the case.
        case: identifier.
        values: labels of structures; everything else is background.
        window: ``(Z, Y, X)`` voxels that the network sees.
        device: of the method.
        seed: of window and points, so that they are the same in every epoch.
        ignored: value of voxels that nobody has labelled; no point is taken there.

    Returns:
        ``(P, D)`` float32 and ``(P,)`` int.
    """
    rng = np.random.default_rng([seed, 0])
    labels = read_structures(dataset.folder, case, values, ignored)
    shape = np.array(labels.shape)
    inside = np.flatnonzero(labels > 0)
    middle = shape // 2
    if len(inside):
        middle = np.array(np.unravel_index(inside[rng.integers(len(inside))], labels.shape))
    start = np.clip(middle - np.array(window) // 2, 0, np.maximum(shape - window, 0))
    stop = np.minimum(start + window, shape)
    (z0, y0, x0), (z1, y1, x1) = start.tolist(), stop.tolist()
    image = dataset.read(case, ((z0, y0, x0), (z1, y1, x1)))
    image = np.pad(image, [(0, 0), *((0, w - n) for w, n in zip(window, image.shape[1:]))], mode="edge")
    cut = labels[z0:z1, y0:y1, x0:x1]
    chosen = [rng.permutation(np.argwhere(cut == value))[:_POINTS_PER_LABEL] for value in (0, *values)]
    points = np.concatenate(chosen)
    z, y, x = points.T
    return _features(method, image, points, window, device), cut[z, y, x]


@torch.no_grad()
def _features(
    method: Any, image: np.ndarray, points: np.ndarray, window: Sequence[int], device: torch.device
) -> np.ndarray:
    network = method.network
    maps: list[Tensor] = list(network.encoder(torch.from_numpy(image)[None].to(device)))
    if "decoder" in method.transfers:
        maps = [maps[-1], *decoder_features(network.decoder, maps)]
    places = normalised_points(torch.from_numpy(points).double(), window).float().to(device)
    return sample_features(maps, places[None])[0].float().cpu().numpy()
