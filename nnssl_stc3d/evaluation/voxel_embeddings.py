"""Maps of voxel embeddings of whole volumes, from a pretraining that contrasts voxels."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from tqdm import tqdm

from nnssl_stc3d.data.body import BodyRule
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.embeddings import (
    EmbeddingRecord,
    check_record,
    embedding_folder,
    has_map,
    read_map,
    remove_maps,
    write_map,
)
from nnssl_stc3d.methods.base import PretrainConfig, PretrainMethod, config_from_dict
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.modules.heads import sample_features
from nnssl_stc3d.transfer.trusted_plans import check_plans
from nnssl_stc3d.views.geometry import normalised_points

METHODS: dict[str, tuple[type[PretrainMethod], type[PretrainConfig]]] = {
    Vox2Vec.name: (Vox2Vec, Vox2VecConfig),
    STC3D.name: (STC3D, STC3DConfig),
}
"""Methods that embed voxels: classes of the method and of its configuration."""

_CALIBRATION_CASES = 8
_CALIBRATION_POINTS = 2048
_POINTS_AT_ONCE = 8192


class VoxelEmbedder:
    """Embeds the cells of a volume: windows over the volume, the method's voxel head on top.

    The head normalises over the points of a batch; here over points of several cases, once, so that every case is
    embedded alike.

    Args:
        method: with ``voxel_maps`` and ``voxel_head``, in evaluation mode.
        window: ``(Z, Y, X)`` voxels that the network sees at a time, those of the pretraining's views.
        device: to compute on.
    """

    def __init__(self, method: Any, window: Sequence[int], device: torch.device) -> None:
        self.method = method.to(device).eval()
        self.head: nn.Module = self.method.voxel_head
        self.basis: Tensor | None = None
        self.window = tuple(window)
        self.device = device

    def calibrate(
        self,
        volumes: Iterable[np.ndarray],
        grids: Sequence[Sequence[int]],
        width: int,
        bodies: Sequence[np.ndarray] | None = None,
    ) -> float:
        """Fix the head's normalisation, and the directions that are kept, to points of some volumes.

        Args:
            volumes: ``(C, Z, Y, X)`` each.
            grids: cells along each axis of each volume.
            width: of the maps; narrower ones than the method's embeddings keep their principal directions, so that
                cosines change as little as possible.
            bodies: masks of the cells that points are taken from; None takes them from all.

        Returns:
            Share of the embeddings' energy that the width keeps.
        """
        rng, rows = np.random.default_rng(0), []
        for index, (volume, grid) in enumerate(zip(volumes, grids)):
            inside = np.ones(grid, bool) if bodies is None else bodies[index]
            found = torch.cat(
                [
                    descriptors[torch.from_numpy(inside[cells].ravel()).to(descriptors.device)]
                    for cells, descriptors in self._descriptors(volume, grid)
                ]
            )
            rows.append(found[torch.from_numpy(rng.permutation(len(found))[:_CALIBRATION_POINTS]).to(found.device)])
        points = torch.cat(rows)
        self.head = calibrated(self.head, points)
        with torch.inference_mode():
            energy, directions = torch.linalg.eigh(_gram(F.normalize(self.head(points).float(), dim=1)))
        self.basis = directions[:, -width:]
        return float(energy[-width:].sum() / energy.sum())

    def __call__(self, volume: np.ndarray, grid: Sequence[int]) -> np.ndarray:
        """Embed the centres of the cells of a volume.

        Args:
            volume: ``(C, Z, Y, X)``.
            grid: cells along each axis.

        Returns:
            ``(D, *grid)`` float16 of length 1.
        """
        result: np.ndarray | None = None
        for cells, descriptors in self._descriptors(volume, grid):
            with torch.inference_mode():
                embedded = torch.cat([self.head(part) for part in descriptors.split(_POINTS_AT_ONCE)])
                embedded = F.normalize(embedded.float(), dim=1)
                if self.basis is not None:
                    embedded = F.normalize(embedded @ self.basis, dim=1)
                embedded = embedded.half().cpu()
            if result is None:
                result = np.zeros((embedded.shape[1], *grid), dtype=np.float16)
            shape = [s.stop - s.start for s in cells]
            z, y, x = cells
            result[:, z, y, x] = embedded.T.reshape(-1, *shape).numpy()
        if result is None:
            raise ValueError(f"expected a volume with cells, got shape {volume.shape} and grid {tuple(grid)}")
        return result

    def _descriptors(self, volume: np.ndarray, grid: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Descriptors ``(cells, C)`` of the cells of one window after the other, each cell in its most central one."""
        shape = volume.shape[1:]
        missing = [max(0, w - n) for n, w in zip(shape, self.window)]
        padded = np.pad(volume, [(0, 0), *((m // 2, m - m // 2) for m in missing)], mode="edge")
        axes = [
            _assign((np.arange(g) + 0.5) * n / g - 0.5 + m // 2, n + m, w)
            for g, n, m, w in zip(grid, shape, missing, self.window)
        ]
        for z_start, z_cells, z_points in axes[0]:
            for y_start, y_cells, y_points in axes[1]:
                for x_start, x_cells, x_points in axes[2]:
                    start = (z_start, y_start, x_start)
                    box = (slice(None), *(slice(s, s + w) for s, w in zip(start, self.window)))
                    points = np.stack(np.meshgrid(z_points, y_points, x_points, indexing="ij"), axis=-1)
                    yield (z_cells, y_cells, x_cells), self._read(padded[box], points.reshape(-1, 3))

    @torch.inference_mode()
    def _read(self, window: np.ndarray, points: np.ndarray) -> Tensor:
        """Descriptors ``(P, C)`` of points ``(P, 3)`` in voxels of a window ``(C, Z, Y, X)``."""
        image = torch.from_numpy(np.ascontiguousarray(window))[None].to(self.device)
        with torch.autocast("cuda", enabled=self.device.type == "cuda"):
            maps = self.method.voxel_maps(image)
        places = normalised_points(torch.from_numpy(points), self.window).float().to(self.device)
        parts = [sample_features(maps, part[None])[0] for part in places.split(_POINTS_AT_ONCE)]
        return torch.cat(parts).float()


def calibrated(head: nn.Module, rows: Tensor) -> nn.Module:
    """A copy of a head whose BatchNorms keep the statistics of ``rows`` ``(N, C)`` instead of their batch's."""
    head = copy.deepcopy(head)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats = True
            module.register_buffer("running_mean", rows.new_zeros(module.num_features))
            module.register_buffer("running_var", rows.new_ones(module.num_features))
            module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=rows.device))
            # One pass in training mode stores the statistics of this batch and of no other.
            module.momentum = 1.0
    with torch.no_grad():
        head.train()(rows.clone())
    return head.eval()


def _gram(rows: Tensor) -> Tensor:
    """Uncentred second moments ``(D, D)``: their leading directions keep dot products best."""
    return rows.T @ rows


def load_embedder(checkpoint: dict[str, Any], device: torch.device) -> VoxelEmbedder:
    """Rebuild a pretraining from its checkpoint.

    Args:
        checkpoint: of :func:`nnssl_stc3d.transfer.checkpoint.load_checkpoint`.
        device: to compute on.

    Raises:
        ValueError: if the checkpoint's method does not embed voxels, or its heads are missing.
    """
    name = (checkpoint.get("method") or {}).get("name", checkpoint.get("trainer_name"))
    if name not in METHODS:
        raise ValueError(f"expected a pretraining that contrasts voxels ({', '.join(METHODS)}), got one of {name}")
    if not checkpoint.get("method_state"):
        raise ValueError("the checkpoint holds no heads: expected the checkpoint_final.pth of a pretraining, no export")
    method_class, config_class = METHODS[name]
    network = build_network(checkpoint["plans"], checkpoint["configuration"], checkpoint["dataset_json"])
    configuration = PlansManager(checkpoint["plans"]).get_configuration(checkpoint["configuration"])
    config = config_from_dict(config_class, checkpoint["method"]["config"])
    method = method_class(network, config)
    if getattr(method, "voxel_head", None) is None:
        raise ValueError(f"this {name} was trained without its voxel-level contrast, so it has no voxel embedding")
    weights = {f"network.{key}": value for key, value in checkpoint["network_weights"].items()}
    try:
        method.load_state_dict(weights | checkpoint["method_state"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights do not fit its own plans: {error}") from error
    return VoxelEmbedder(method, config.view_shape or configuration.patch_size, device)


def build_network(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> nn.Module:
    """The untrained network of a plan, as nnU-Net's trainer builds it.

    Raises:
        ValueError: the plans, which may be a stranger's, name something else than a network.
    """
    check_plans(plans, f"the plans {plans.get('plans_name')}")
    plans_manager = PlansManager(plans)
    resolved = plans_manager.get_configuration(configuration)
    return nnUNetTrainer.build_network_architecture(
        plans_manager,
        resolved,
        determine_num_input_channels(plans_manager, resolved, dataset_json),
        plans_manager.get_label_manager(dataset_json).num_segmentation_heads,
        True,
    )


def embed_cases(
    embedder: VoxelEmbedder,
    preprocessed: Path,
    plans: dict[str, Any],
    record: EmbeddingRecord,
    command: str,
    overwrite: bool = False,
    log: Callable[[str], object] = print,
) -> Path:
    """Make the maps of all cases of a configuration; those that an interrupted run left are kept.

    Args:
        embedder: from :func:`load_embedder`.
        preprocessed: folder of the preprocessed cases.
        plans: content of the plans file.
        record: what the maps are made of. The cases of the calibration are chosen here, unless there are maps already.
        command: that was given, for messages.
        overwrite: remove maps that something else made.
        log: gets a line on what is done.

    Returns:
        The folder of the maps.

    Raises:
        ValueError: if there are maps of other plans, of another checkpoint or width or of the user's own, or cases of
            another number of channels than the checkpoint's.
    """
    cases = CaseDataset(preprocessed, CaseDataset.list_identifiers(preprocessed))
    rule = BodyRule.of_plan(plans, PlansManager(plans).get_configuration(record.configuration).configuration)
    folder = embedding_folder(preprocessed)
    if overwrite:
        remove_maps(folder)
    existing = _existing_record(folder, cases.identifiers, record, command)
    few = tuple(cases.identifiers[:: max(1, -(-len(cases.identifiers) // _CALIBRATION_CASES))])
    record = existing or replace(record, calibration=few)
    folder.mkdir(exist_ok=True)
    record.write(folder)
    grids = {i: rule.grid(cases.shape(i)) for i in cases.identifiers}
    missing = [i for i in cases.identifiers if not _is_current(folder, i, cases.shape(i))]
    log(f"{len(missing)} of {len(grids)} cases to embed, to {folder}")
    if missing:
        some = record.calibration
        kept = embedder.calibrate([_read_case(cases, i) for i in some], [grids[i] for i in some], record.width)
        log(f"{record.width} principal directions keep {kept:.1%} of the embeddings")
    for identifier in tqdm(missing, desc="embedding"):
        features = embedder(_read_case(cases, identifier), grids[identifier])
        write_map(folder, identifier, features, cases.shape(identifier))
    return folder


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _assign(centers: np.ndarray, size: int, window: int) -> list[tuple[int, slice, np.ndarray]]:
    """Windows along one axis, half overlapping, each with the cells that are most central in it.

    Args:
        centers: ``(g,)`` of the cells, ascending, in voxels.
        size: of the axis, at least the window's.
        window: voxels.

    Returns:
        Start, cells and their positions in the window, for each window that has cells.
    """
    count = -(-(size - window) // max(1, window // 2)) + 1
    starts = np.linspace(0, size - window, count).round().astype(int)
    nearest = np.abs(centers[:, None] - (starts + (window - 1) / 2)).argmin(axis=1)
    found = []
    for index, start in enumerate(starts.tolist()):
        cells = np.flatnonzero(nearest == index)
        if len(cells):
            found.append((start, slice(int(cells[0]), int(cells[-1]) + 1), centers[cells] - start))
    return found


def _read_case(cases: CaseDataset, identifier: str) -> np.ndarray:
    z, y, x = cases.shape(identifier)
    return cases.read(identifier, ((0, 0, 0), (z, y, x)))


def _is_current(folder: Path, identifier: str, shape: Sequence[int]) -> bool:
    """Whether a case has a map that can be read and belongs to it."""
    if not has_map(folder, identifier):
        return False
    try:
        read_map(folder, identifier, shape)
    except ValueError:
        return False
    return True


def _existing_record(
    folder: Path, identifiers: Sequence[str], record: EmbeddingRecord, command: str
) -> EmbeddingRecord | None:
    """The record of maps that can be completed, None where there are none; refuse what was made by something else."""
    existing = EmbeddingRecord.read(folder)
    if existing is None:
        if any(has_map(folder, i) for i in identifiers):
            raise ValueError(
                f"{folder} holds maps that nnssl_stc3d embed did not make. Move them away, or replace them:\n"
                f"  {command} --overwrite"
            )
        return None
    check_record(existing, record.plans, record.configuration, record.spacing, command)
    gone = sorted(set(existing.calibration) - set(identifiers))
    reason = ""
    if existing.checkpoint_sha256 != record.checkpoint_sha256:
        reason = f"with another checkpoint ({existing.checkpoint})"
    elif existing.width != record.width:
        reason = f"with --width {existing.width}, not {record.width}"
    elif gone:
        reason = f"with the case {gone[0]}, which is not there any more, so that no others can be made like them"
    if reason:
        raise ValueError(f"the maps in {folder} were made {reason}. Replace them:\n  {command} --overwrite")
    return existing
