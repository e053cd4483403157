"""Derives plans of transformers from nnU-Net's own plans of a U-Net."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from nnssl_stc3d.prepare.plans import trainable_configuration, write_derived_plans

PRIMUS_TOKEN = 8
# Width, depth and heads of nnU-Net 2.8.1's nnUNet_Primus_S_Trainer to nnUNet_Primus_L_Trainer.
PRIMUS_SIZES = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16)}
SWIN_STRIDE = 32
# Of the Swin-UNETR paper, and of MONAI's pretrained weights.
SWIN_FEATURES = 48

# nnU-Net's trainers expect as many outputs as there are strides, less one, and give the last of them no weight. Three
# strides of 1 leave the one output that a transformer has.
_STRIDES = [[1, 1, 1]] * 3


class Transformer(NamedTuple):
    """An architecture for plans.

    Attributes:
        class_name: importable name.
        arguments: of its constructor.
        divisor: of the patch, along each axis.
        several: whether more than one cell of that size is needed, for a normalisation over cells.
    """

    class_name: str
    arguments: dict[str, Any]
    divisor: int
    several: bool


def primus(size: str, patch_size: Sequence[int]) -> Transformer:
    """Primus as nnU-Net's own trainers build it.

    Raises:
        ValueError: there is no such size.
    """
    if size not in PRIMUS_SIZES:
        raise ValueError(f"Expected a size of Primus, one of {', '.join(PRIMUS_SIZES)}, got {size!r}.")
    width, depth, heads = PRIMUS_SIZES[size]
    arguments = {
        "embed_dim": width,
        "patch_embed_size": [PRIMUS_TOKEN] * 3,
        "eva_depth": depth,
        "eva_numheads": heads,
        "input_shape": list(patch_size),
        "drop_path_rate": 0.2,
        "scale_attn_inner": True,
        "init_values": 0.1,
    }
    return Transformer("nnssl_stc3d.modules.primus.PlansPrimus", arguments, PRIMUS_TOKEN, False)


def swin_unetr() -> Transformer:
    """Swin-UNETR as published; MONAI has to be there.

    Raises:
        ValueError: MONAI is not installed.
    """
    if importlib.util.find_spec("monai") is None:
        raise ValueError(
            "Swin-UNETR comes from MONAI, which is not installed. Install it for this Python, and wherever the plans "
            "are used: pip install 'nnssl_stc3d[monai]'"
        )
    arguments = {"feature_size": SWIN_FEATURES}
    return Transformer("nnssl_stc3d.modules.swin_unetr.PlansSwinUNETR", arguments, SWIN_STRIDE, True)


def derive_transformer_plans(
    plans: dict[str, Any],
    name: str,
    network: str,
    configuration: str = "3d_fullres",
    size: str | None = None,
    patch_size: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Exchanges the network of plans for a transformer.

    Spacing, normalisation and data stay, so that data preprocessed for the original plans are used.

    Args:
        plans: nnU-Net plans; they are not changed.
        name: identifier of the new plans.
        network: "primus" or "swin-unetr".
        configuration: the one configuration that the new plans have.
        size: of Primus, "S" (default), "B", "M" or "L".
        patch_size: voxels (z, y, x), None keeps the plans' patch.

    Returns:
        The new plans.

    Raises:
        ValueError: there is no such configuration, network or size, or the patch does not suit the network.
        NotImplementedError: 2D or a cascade.
    """
    resolved = trainable_configuration(plans, configuration)
    patch = [int(n) for n in (patch_size or resolved["patch_size"])]
    if network == "primus":
        chosen = primus(size or "S", patch)
    elif network == "swin-unetr":
        if size is not None:
            raise ValueError(f"Only primus comes in sizes, got --size {size} for {network}.")
        chosen = swin_unetr()
    else:
        raise ValueError(f"Expected primus or swin-unetr, got {network!r}.")
    _check_patch(patch, chosen, network)
    resolved["patch_size"] = patch
    resolved["architecture"] = {
        "network_class_name": chosen.class_name,
        "arch_kwargs": {**chosen.arguments, "strides": deepcopy(_STRIDES)},
        "_kw_requires_import": [],
    }
    # A following cascade stage is not among the new plans' configurations.
    resolved.pop("next_stage", None)
    derived = {key: deepcopy(value) for key, value in plans.items() if key != "configurations"}
    return derived | {"plans_name": name, "configurations": {configuration: resolved}}


def write_transformer_plans(
    folder: str | Path, source: str, target: str, network: str, overwrite: bool = False, **options: Any
) -> Path:
    """Writes plans of a transformer beside the plans that they come from.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name.
        source: identifier of nnU-Net's plans.
        target: identifier of the new plans, which is also the file's name.
        network: "primus" or "swin-unetr".
        overwrite: replaces an existing file of that name.
        options: see :func:`derive_transformer_plans`.

    Raises:
        ValueError: the new name cannot be used or exists; see also :func:`derive_transformer_plans`.
    """
    return write_derived_plans(
        Path(folder),
        source,
        target,
        lambda plans: derive_transformer_plans(plans, target, network, **options),
        overwrite,
    )


def _check_patch(patch: Sequence[int], network: Transformer, name: str) -> None:
    """Refuses patches that the network cannot take, with the nearest that it can."""
    step = network.divisor
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"Expected a patch size of three positive numbers (z, y, x), got {tuple(patch)}.")
    if any(n % step for n in patch):
        lower = tuple(max(n // step, 1) * step for n in patch)
        upper = tuple(-(-n // step) * step for n in patch)
        raise ValueError(
            f"{name} needs patches whose axes are multiples of {step}, got {tuple(patch)}. Choose one with "
            f"--patch-size, such as {lower} or {upper}."
        )
    if network.several and all(n == step for n in patch):
        raise ValueError(
            f"{name} leaves a single voxel of a patch of {tuple(patch)} at its deepest stage, which cannot be "
            "normalised. Choose a larger one with --patch-size."
        )
