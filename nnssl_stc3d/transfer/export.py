"""Checkpoints in the forms that others can use: stock nnU-Net, plain tensors, or a model without our trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnssl_stc3d.transfer.adapt import adapt_input_channels
from nnssl_stc3d.transfer.checkpoint import (
    SAFETENSORS_SUFFIX,
    is_pretraining,
    load_checkpoint,
    save_checkpoint_atomically,
    to_plain,
    write_atomically,
)
from nnssl_stc3d.transfer.differences import PlansReference, plans_of_checkpoint
from nnssl_stc3d.transfer.trusted_plans import check_plans

STOCK_TRAINER = "nnUNetTrainer"
# Class names of networks that nnU-Net can build only where this package is installed.
OUR_NETWORKS = "nnssl_stc3d."
FINAL_CHECKPOINT = "checkpoint_final.pth"
FINGERPRINT = "dataset_fingerprint.json"
# What an exported encoder needs besides its weights; heads, optimiser and random states stay behind.
SHARED_KEYS = (
    "method",
    "plans",
    "dataset_json",
    "configuration",
    "versions",
    "nnssl_adaptation_plan",
    "citations",
    "trainer_name",
    "current_epoch",
)


def export_nnunet(
    source: str | Path, output: str | Path, *, channels: int | None = None, overwrite: bool = False
) -> Path:
    """Writes a slim checkpoint for ``nnUNetv2_train -pretrained_weights``, with or without this package.

    Args:
        source: Pretraining checkpoint, or its results folder.
        output: File to write, ending in ``.pth``.
        channels: Adapt the first convolution to this number of input channels, for tools that cannot.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        ValueError: If the source is no pretraining checkpoint, or the output exists or has another ending.
        RuntimeError: If the file cannot be written.
    """
    file = _output_file(output, ".pth", overwrite)
    checkpoint = _load_pretraining(source)
    exported = {key: checkpoint[key] for key in SHARED_KEYS if key in checkpoint}
    exported["network_weights"] = dict(checkpoint["network_weights"])
    if channels is not None:
        _adapt_channels(exported, channels)
    save_checkpoint_atomically(to_plain(exported), file)
    return file


def export_safetensors(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the encoder alone as safetensors; plans, dataset.json, method and versions are JSON strings beside it.

    The encoder is what pretraining trained but the decoder: ``encoder`` of a U-Net, ``down_projection`` and ``eva`` of
    Primus.

    Args:
        source: Pretraining checkpoint, or its results folder.
        output: File to write, ending in ``.safetensors``.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The file that was written.

    Raises:
        ValueError: If the source is no pretraining checkpoint or trained no encoder, or the output exists or has
            another ending.
        RuntimeError: If the file cannot be written.
    """
    from safetensors.torch import save

    file = _output_file(output, SAFETENSORS_SUFFIX, overwrite)
    checkpoint = _load_pretraining(source)
    shared = {key: checkpoint[key] for key in SHARED_KEYS if key in checkpoint}
    transfers = checkpoint["method"]["transfers"]
    parts = [part for part in transfers if part != "decoder"]
    tensors = encoder_tensors(checkpoint["network_weights"], parts)
    if not tensors:
        raise ValueError(
            f"Expected a pretraining that trained an encoder, but the checkpoint transfers {', '.join(transfers)} and "
            f"has no weights of an encoder. Export it with --format nnunet, which keeps the whole network: {source}"
        )
    shared["method"] = {**checkpoint["method"], "transfers": parts}
    metadata = {key: json.dumps(to_plain(value)) for key, value in shared.items()}
    write_atomically(file, lambda opened: opened.write(save(tensors, {"format": "pt", **metadata})))
    return file


def encoder_tensors(weights: dict[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    """Selects the encoder's tensors, each once.

    Args:
        weights: State dict of a network.
        parts: Names of the network's modules that encode, such as ``("encoder",)``.

    Returns:
        Contiguous CPU tensors under ``PART.*``, without those under ``all_modules`` that repeat another one.
    """
    encoder = {key: value for key, value in weights.items() if key.split(".")[0] in parts}
    selected: dict[str, Tensor] = {}
    for key, value in encoder.items():
        block, repeats, _ = key.partition(".all_modules.")
        twins = (
            encoder[f"{block}.{name}.{key.rsplit('.', 1)[-1]}"]
            for name in ("conv", "norm")
            if f"{block}.{name}.{key.rsplit('.', 1)[-1]}" in encoder
        )
        if not (repeats and any(torch.equal(value, twin) for twin in twins)):
            selected[key] = value.detach().cpu().contiguous().clone()
    return selected


def export_stock_trainer(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a finetuned model under the name of nnU-Net's own trainer, so that predicting needs no extension.

    Args:
        source: Model folder (all its folds), one fold's folder, or a checkpoint of a fold.
        output: Folder in which ``nnUNetTrainer__PLANS__CONFIGURATION`` is made.
        overwrite: Whether existing files may be replaced.

    Returns:
        The model folder, complete for ``nnUNetv2_predict_from_modelfolder``.

    Raises:
        ValueError: If the source is a pretraining, incomplete, not a stock architecture, or the output exists or
            belongs to another dataset.
        RuntimeError: If a file cannot be written.
    """
    files = find_checkpoints(source)
    reference, dataset_json = _model_of(load_checkpoint(files[0]), files[0])
    model = Path(output) / "__".join((STOCK_TRAINER, reference.plans["plans_name"], reference.configuration))
    destinations = [model / file.parent.name / FINAL_CHECKPOINT for file in files]
    for file, destination in zip(files, destinations, strict=True):
        if not file.parent.name.startswith("fold_"):
            raise ValueError(f"Expected {file.name} in a folder such as fold_0, but it lies in {file.parent}.")
        _refuse_to_overwrite(destination, overwrite)
    beside = {
        name: json.dumps(to_plain(value), indent=4).encode("utf-8")
        for name, value in (("plans.json", reference.plans), ("dataset.json", dataset_json))
    }
    fingerprint = files[0].parent.parent / FINGERPRINT
    if fingerprint.is_file():
        beside[FINGERPRINT] = fingerprint.read_bytes()
    for name, content in beside.items():
        _refuse_to_mix(model / name, content, overwrite)
    for file, destination in zip(files, destinations, strict=True):
        checkpoint = load_checkpoint(file)
        _check_stock_architecture(file, *_model_of(checkpoint, file), checkpoint["network_weights"])
        kept = ("network_weights", "init_args", "inference_allowed_mirroring_axes", "current_epoch")
        stock = {key: checkpoint[key] for key in kept if key in checkpoint}
        destination.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint_atomically(to_plain({**stock, "trainer_name": STOCK_TRAINER}), destination)
    for name, content in beside.items():
        _write_bytes(model / name, content)
    return model


def _model_of(checkpoint: dict[str, Any], file: Path) -> tuple[PlansReference, dict[str, Any]]:
    """Returns plans and dataset.json of a trained segmentation model."""
    if is_pretraining(checkpoint):
        raise ValueError(
            f"{file} is a pretraining: its segmentation layers were never trained, so it cannot predict. Finetune it "
            f"first: nnUNetv2_train DATASET CONFIGURATION FOLD -tr STC3DFinetuneTrainer -pretrained_weights {file}"
        )
    reference = plans_of_checkpoint(checkpoint)
    dataset_json = (checkpoint.get("init_args") or {}).get("dataset_json")
    if reference is None or dataset_json is None:
        raise ValueError(f"Expected a checkpoint of an nnU-Net training, but {file} does not carry plans and dataset.")
    return reference, dataset_json


def find_checkpoints(source: str | Path) -> list[Path]:
    """Finds the final checkpoints of a results folder.

    Args:
        source: A checkpoint, a fold's folder, or the folder of a model with one or more folds.

    Returns:
        Checkpoint files, at least one.

    Raises:
        ValueError: If there is none.
    """
    path = Path(source)
    if not path.is_dir():
        return [path]
    if (path / FINAL_CHECKPOINT).is_file():
        return [path / FINAL_CHECKPOINT]
    found = sorted(path.glob(f"fold_*/{FINAL_CHECKPOINT}"))
    if not found:
        raise ValueError(
            f"Expected {FINAL_CHECKPOINT} in {path} or in its fold_* folders, but there is none. Give the folder of a "
            "finished training, or a checkpoint file."
        )
    return found


def _load_pretraining(source: str | Path) -> dict[str, Any]:
    files = find_checkpoints(source)
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} pretrainings; give one: {', '.join(map(str, files))}")
    return load_checkpoint(files[0], pretraining=True)


def _adapt_channels(checkpoint: dict[str, Any], channels: int) -> None:
    """Adapts the first convolution under all of its names, and says so in the adaptation plan."""
    if channels < 1:
        raise ValueError(f"Expected at least one input channel, got {channels}.")
    plan = deepcopy(checkpoint["nnssl_adaptation_plan"])
    weights = checkpoint["network_weights"]
    names = [f"{key}.weight" for key in plan["keys_to_in_proj"]]
    adapted = adapt_input_channels(weights[names[0]], channels).contiguous()
    for name in (*names, *(f"decoder.{name}" for name in names)):
        if name in weights:
            weights[name] = adapted
    plan["pretrain_num_input_channels"] = channels
    checkpoint["nnssl_adaptation_plan"] = plan


def _output_file(output: str | Path, suffix: str, overwrite: bool) -> Path:
    file = Path(output)
    if file.suffix != suffix:
        raise ValueError(f"Expected an output file that ends in {suffix}, got {file}.")
    _refuse_to_overwrite(file, overwrite)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _refuse_to_overwrite(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already. Choose another output, or add --overwrite to replace it.")


def _refuse_to_mix(file: Path, content: bytes, overwrite: bool) -> None:
    """Refuses to replace JSON that says something else: folds of another model may lie beside it."""
    if overwrite or not file.exists():
        return
    try:
        same = json.loads(file.read_bytes()) == json.loads(content)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"{file} differs from that of this model: the folder holds a model of another dataset or of other plans. "
            "Choose another output, or add --overwrite to replace it; folds of the other model would stay beside it."
        )


def _write_bytes(file: Path, content: bytes) -> None:
    write_atomically(file, lambda opened: opened.write(content))


def _check_stock_architecture(
    file: Path, reference: PlansReference, dataset_json: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    """Builds the network as the stock trainer will without this package, and loads the weights strictly."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    check_plans(reference.plans, file)
    plans = PlansManager(deepcopy(reference.plans))
    configuration = plans.get_configuration(reference.configuration)
    if configuration.network_arch_class_name.startswith(OUR_NETWORKS):
        raise ValueError(
            f"{file} is a {configuration.network_arch_class_name}, which nnU-Net cannot build without nnssl_stc3d, so "
            f"it cannot be used under the name {STOCK_TRAINER}. Share the model folder as it is; whoever predicts with "
            "it needs nnssl_stc3d."
        )
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not fit the network that nnU-Net's own trainer builds from its plans, so it cannot be used "
            f"under the name {STOCK_TRAINER}: {error}"
        ) from error
