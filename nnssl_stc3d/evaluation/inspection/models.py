"""Networks that are inspected: each checkpoint's, and an untrained one as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnssl_stc3d.evaluation.voxel_embeddings import VoxelEmbedder, build_network, load_embedder
from nnssl_stc3d.methods.base import check_view_shape, default_view_shape
from nnssl_stc3d.modules.feature_pyramid import check_unet, decoder_features, encoder_channels, total_stride
from nnssl_stc3d.modules.heads import pooled_descriptor
from nnssl_stc3d.transfer.differences import PlansReference, describe_plans, plans_of_checkpoint
from nnssl_stc3d.transfer.load import load_pretrained, network_weights

SCRATCH = "scratch"
"""How the untrained network is called."""

# Of the preprocessing: what makes the values or the size of structures differ from what the network was trained on.
_PREPROCESSING = ("spacing (mm)", "normalisation", "transposition")
_SPACING_TOLERANCE = 0.1


class Backbone(nn.Module):
    """A network as a source of embeddings.

    Args:
        network: PlainConvUNet, ResidualEncoderUNet, or another one with such an encoder and decoder.
        pyramid: what is read at voxels, "encoder" or "decoder".
    """

    def __init__(self, network: Any, pyramid: str) -> None:
        super().__init__()
        self.network = network
        self.pyramid = pyramid
        # The head of the voxels: channels come to one scale, each centred, so that a cosine of 0 is no similarity.
        self.voxel_head = nn.BatchNorm1d(sum(encoder_channels(network)), affine=False, track_running_stats=False)

    def voxel_maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images ``(N, C, Z, Y, X)`` that are read at voxels."""
        skips = list(self.network.encoder(images))
        return skips if self.pyramid == "encoder" else [skips[-1], *decoder_features(self.network.decoder, skips)]

    @torch.inference_mode()
    def pooled(self, images: Tensor) -> Tensor:
        """Views ``(N, C, Z, Y, X)`` to embeddings ``(N, D)``: the mean of each channel of the encoder's stages."""
        with torch.autocast("cuda", enabled=images.device.type == "cuda"):
            skips = self.network.encoder(images)
        return pooled_descriptor([skip.float() for skip in skips], (1, 1, 1))


@dataclass(frozen=True)
class Model:
    """One network under inspection.

    Attributes:
        name: in figures and tables.
        backbone: embeds views.
        embedder: embeds voxels.
        reads: what the voxel embeddings are made of, in words.
    """

    name: str
    backbone: Any
    embedder: VoxelEmbedder
    reads: str


def check_fits(checkpoint: dict[str, Any], source: str, data: PlansReference, dataset_json: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained on data preprocessed in another way.

    Args:
        checkpoint: of :func:`nnssl_stc3d.transfer.checkpoint.load_checkpoint`.
        source: its file.
        data: plans of the cases.
        dataset_json: of the cases.

    Raises:
        ValueError: with what differs.
    """
    reference = plans_of_checkpoint(checkpoint)
    if reference is None:
        raise ValueError(
            f"{source} does not hold its plans, so its network cannot be built. Give a nnU-Net checkpoint."
        )
    trained, here = describe_plans(reference), describe_plans(data)
    trained["channels"], here["channels"] = (
        _channels(reference, _dataset_json(checkpoint)),
        _channels(data, dataset_json),
    )
    problems = [
        f"{name}: {trained.get(name)} there, {here.get(name)} here"
        for name in (*_PREPROCESSING, "channels")
        if not _agree(name, trained.get(name), here.get(name))
    ]
    if problems:
        raise ValueError(
            f"{source} was trained on data that were preprocessed with other plans ({'; '.join(problems)}). Name the "
            "plans that the cases share with it with -p, or make such plans with nnssl_stc3d align-plans."
        )


def common_view_shape(checkpoints: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """Views that all networks are shown: those of the first pretraining, or half of the first plan's patch.

    Raises:
        ValueError: if they do not fit the strides of all networks.
    """
    for checkpoint in checkpoints:
        shape = (checkpoint.get("method") or {}).get("config", {}).get("view_shape")
        if shape:
            return shape[0], shape[1], shape[2]
    reference = _reference(checkpoints[0])
    network = build_network(*reference, _dataset_json(checkpoints[0]))
    check_unet(network, "inspect")
    patch = PlansManager(reference.plans).get_configuration(reference.configuration).patch_size
    return default_view_shape(patch, total_stride(network))


def load_model(
    checkpoint: dict[str, Any],
    name: str,
    source: str,
    view_shape: tuple[int, int, int],
    window: tuple[int, int, int],
    device: torch.device,
    pyramid: str = "auto",
    embedding: str = "features",
) -> Model:
    """The network of a checkpoint, with the weights that a finetuning would take from it.

    Args:
        checkpoint: of :func:`nnssl_stc3d.transfer.checkpoint.load_checkpoint`.
        name: in figures.
        source: its file, for messages.
        view_shape: ``(Z, Y, X)`` of the views.
        window: ``(Z, Y, X)`` of the windows in which voxels are embedded.
        device: to compute on.
        pyramid: "auto", "encoder" or "decoder".
        embedding: of voxels, "features" or "head".

    Raises:
        ValueError: if weights and plans contradict each other, or the method embeds no voxels.
        NotImplementedError: for networks without an encoder and a decoder of stages.
    """
    trained = _trained(checkpoint)
    if pyramid == "decoder" and "decoder" not in trained:
        raise ValueError(f"{source} trained only the {' and '.join(trained)}. Use --pyramid auto or encoder.")
    network = _network(checkpoint, view_shape, window)
    load_pretrained(network, checkpoint)
    try:
        return _model(network, checkpoint, name, window, device, pyramid, embedding)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def scratch_model(
    checkpoint: dict[str, Any],
    view_shape: tuple[int, int, int],
    window: tuple[int, int, int],
    device: torch.device,
    pyramid: str,
    seed: int,
) -> Model:
    """The network of a checkpoint before any training, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(checkpoint, view_shape, window)
    return _model(network, checkpoint, SCRATCH, window, device, pyramid, "features")


def _model(
    network: nn.Module,
    checkpoint: dict[str, Any],
    name: str,
    window: tuple[int, int, int],
    device: torch.device,
    pyramid: str,
    embedding: str,
) -> Model:
    if pyramid == "auto":
        pyramid = "decoder" if "decoder" in _trained(checkpoint) else "encoder"
    backbone = Backbone(network, pyramid).to(device).eval()
    if embedding == "head":
        embedder = load_embedder(checkpoint, device)
        embedder.window = window
        return Model(name, backbone, embedder, "the method's own voxel embedding")
    reads = "bottleneck and decoder" if pyramid == "decoder" else "encoder"
    return Model(name, backbone, VoxelEmbedder(backbone, window, device), f"features of the {reads}")


def _network(checkpoint: dict[str, Any], view_shape: tuple[int, int, int], window: tuple[int, int, int]) -> nn.Module:
    network = build_network(*_reference(checkpoint), _dataset_json(checkpoint))
    check_unet(network, "inspect")
    for shape in (view_shape, window):
        check_view_shape(shape, total_stride(network))
    return network


def _reference(checkpoint: dict[str, Any]) -> PlansReference:
    reference = plans_of_checkpoint(checkpoint)
    if reference is None:
        raise ValueError("the checkpoint does not hold its plans")
    return reference


def _dataset_json(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint.get("dataset_json") or (checkpoint.get("init_args") or {}).get("dataset_json") or {}


def _trained(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Parts of the network that were trained; a segmentation trains all, a classifier has no decoder."""
    method = checkpoint.get("method")
    if isinstance(method, dict):
        return tuple(method["transfers"])
    carried = {key.split(".")[0] for key in network_weights(checkpoint)}
    return tuple(part for part in ("encoder", "decoder") if part in carried)


def _channels(reference: PlansReference, dataset_json: dict[str, Any]) -> int | None:
    if not dataset_json:
        return None
    manager = PlansManager(reference.plans)
    return int(determine_num_input_channels(manager, manager.get_configuration(reference.configuration), dataset_json))


def _agree(name: str, trained: Any, here: Any) -> bool:
    if trained is None or here is None:
        return True
    if name == "spacing (mm)":
        return all(abs(a / b - 1) <= _SPACING_TOLERANCE for a, b in zip(trained, here))
    return bool(trained == here)
