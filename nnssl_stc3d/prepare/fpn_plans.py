"""Derives plans of vox2vec's feature pyramid network from nnU-Net's own plans."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from nnssl_stc3d.prepare.plans import trainable_configuration, write_derived_plans

FPN_CLASS = "nnssl_stc3d.modules.fpn.VoxelFPN"

# Arguments that other architectures have and the FPN does not.
_FOREIGN = ("n_conv_per_stage", "nonlin_first", "block", "bottleneck_channels", "stem_channels")
_BLOCKS = {"n_blocks_per_stage": 1, "n_conv_per_stage_decoder": 1}
_PAPER = {
    "n_stages": 6,
    "features_per_stage": [16, 32, 64, 128, 256, 512],
    "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "nonlin": "torch.nn.ReLU",
    "nonlin_kwargs": {"inplace": True},
}


def derive_fpn_plans(
    plans: dict[str, Any], name: str, configuration: str = "3d_fullres", paper: bool = False, head: str = "nonlinear"
) -> dict[str, Any]:
    """Exchange the network of a plan for the FPN.

    Patch, spacing, normalisation and data stay, so that data preprocessed for the original plans are used.

    Args:
        plans: nnU-Net plans of a U-Net; they are not changed.
        name: identifier of the new plans.
        configuration: the one configuration that the new plans have.
        paper: 6 levels of 16 to 512 channels with BatchNorm and ReLU (vox2vec 3.2) and the strides and kernels of the
            plans' first six stages, instead of the plans' levels, widths and normalisation.
        head: segmentation head, "nonlinear" or "linear".

    Raises:
        ValueError: if there is no such configuration, or it has fewer than the paper's 6 stages.
        NotImplementedError: for 2D, cascades and architectures without stages.
    """
    resolved = trainable_configuration(plans, configuration)
    architecture = deepcopy(resolved.get("architecture", {}))
    kwargs = {k: v for k, v in architecture.get("arch_kwargs", {}).items() if k not in _FOREIGN}
    if not {"n_stages", "features_per_stage", "kernel_sizes", "strides"} <= set(kwargs):
        raise NotImplementedError(
            "FPN plans are derived from plans that list stages, features, kernels and strides, as nnU-Net's planners "
            f"write them; got {architecture.get('network_class_name', 'plans without an architecture')}."
        )
    if paper:
        if kwargs["n_stages"] < _PAPER["n_stages"]:
            raise ValueError(
                f"the paper's FPN has {_PAPER['n_stages']} levels, {configuration} of {plans.get('plans_name')} has "
                f"{kwargs['n_stages']} stages. Leave paper=False, or plan with a larger patch."
            )
        kwargs.update(deepcopy(_PAPER))
    stages = int(kwargs["n_stages"])
    for key in ("features_per_stage", "kernel_sizes", "strides"):
        kwargs[key] = list(kwargs[key])[:stages]
    kwargs["n_blocks_per_stage"] = [_BLOCKS["n_blocks_per_stage"]] * stages
    kwargs["n_conv_per_stage_decoder"] = [_BLOCKS["n_conv_per_stage_decoder"]] * (stages - 1)
    kwargs["head"] = head
    resolved["architecture"] = {**architecture, "network_class_name": FPN_CLASS, "arch_kwargs": kwargs}
    # A following cascade stage is not among the new plans' configurations.
    resolved.pop("next_stage", None)
    derived = {key: deepcopy(value) for key, value in plans.items() if key != "configurations"}
    return derived | {"plans_name": name, "configurations": {configuration: resolved}}


def write_fpn_plans(
    folder: str | Path,
    source: str = "nnUNetPlans",
    target: str = "nnUNetFPNPlans",
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write FPN plans beside the plans that they come from.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name.
        source: identifier of nnU-Net's plans.
        target: identifier of the new plans, which is also the file's name.
        overwrite: replaces an existing file of that name.
        options: see :func:`derive_fpn_plans`.

    Raises:
        ValueError: if the new name cannot be used or exists; see also :func:`derive_fpn_plans`.
    """
    return write_derived_plans(
        Path(folder), source, target, lambda plans: derive_fpn_plans(plans, target, **options), overwrite
    )
