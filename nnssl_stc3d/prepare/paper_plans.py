"""The configuration of the STC3D paper (A.3.1 and A.3.3) as nnU-Net plans."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnssl_stc3d.prepare.align import Aligned, Side, align
from nnssl_stc3d.prepare.plans import PER_DECODER_STAGE, PER_STAGE, trainable_configuration

SPACING_MM = 1.5
WINDOW_HU = (-175.0, 250.0)
FINETUNING_PATCH = 96
# Views are half of the patch of the plans that pretraining uses: 64 voxels.
PRETRAINING_PATCH = 128
CT_SCHEME = "CTNormalization"

_MIN_EDGE = 4
"""Voxels of the smallest feature map, as in nnU-Net's planner."""
_MAX_FEATURES = 320
_NO_LIMIT = 999_999


def align_to_paper(pretraining: Side, target: Side, name: str) -> tuple[Aligned, Aligned]:
    """Makes the paper's plans for both datasets.

    1.5 mm isotropic, HU from -175 to 250 mapped to 0 to 1, patches of 96^3 for finetuning and of 128^3 for
    pretraining, whose views are half as wide. Architecture class, widths and blocks are those of the target's plans;
    their number of stages follows from the patch as in nnU-Net's planner.

    Args:
        pretraining: the unlabelled dataset, with the plans that nnU-Net made for it.
        target: the labelled dataset, likewise.
        name: of the new plans, for both.

    Returns:
        Plans for the pretraining dataset and for the target.

    Raises:
        ValueError: a channel is not CT.
        NotImplementedError: 2D, a cascade, or an architecture without stages.
    """
    for side in (pretraining, target):
        others = [n for n, scheme in zip(side.channels, side.resolved["normalization_schemes"]) if scheme != CT_SCHEME]
        if others:
            raise ValueError(
                f"The paper's window from {WINDOW_HU[0]:g} to {WINDOW_HU[1]:g} HU is for CT, but {side.dataset} has "
                f'the channels {", ".join(others)}. Leave --paper out, or name CT channels "CT" in dataset.json and '
                "plan again."
            )
    reference = replace(target, plans=paper_plans(target.plans, target.configuration))
    labelled = _with_reasons(align(reference, target, name), "the paper, A.3.3")
    wide = deepcopy(reference.plans)
    wide["configurations"][target.configuration]["patch_size"] = [PRETRAINING_PATCH] * 3
    unlabelled = align(replace(reference, plans=wide), pretraining, name)
    return _with_reasons(unlabelled, f"views are half of it: {PRETRAINING_PATCH // 2}"), labelled


def paper_plans(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Gives plans the paper's spacing, intensities and patch.

    Args:
        plans: nnU-Net's plans of a U-Net; they are not changed.
        configuration: the one configuration that the new plans have.

    Returns:
        The new plans, under the same name.

    Raises:
        NotImplementedError: 2D, a cascade, or an architecture without stages.
    """
    resolved = trainable_configuration(plans, configuration)
    architecture = resolved.get("architecture", {})
    kwargs = deepcopy(architecture.get("arch_kwargs", {}))
    if not {"n_stages", "features_per_stage", "kernel_sizes", "strides"} <= set(kwargs):
        raise NotImplementedError(
            "The paper's configuration is derived from plans that list stages, features, kernels and strides, got "
            f"{architecture.get('network_class_name', 'plans without an architecture')}. Start from nnU-Net's "
            "own with -p."
        )
    _, strides, kernels, patch, _ = get_pool_and_conv_props(
        [SPACING_MM] * 3, [FINETUNING_PATCH] * 3, _MIN_EDGE, _NO_LIMIT
    )
    stages = len(strides)
    for key, length in (*((key, stages) for key in PER_STAGE), *((key, stages - 1) for key in PER_DECODER_STAGE)):
        if isinstance(kwargs.get(key), list | tuple):
            kwargs[key] = _resized(list(kwargs[key]), length, grows=key == "features_per_stage")
    kwargs |= {
        "n_stages": stages,
        "strides": [[int(s) for s in stride] for stride in strides],
        "kernel_sizes": [[int(k) for k in kernel] for kernel in kernels],
    }
    resolved |= {
        "spacing": [SPACING_MM] * 3,
        "patch_size": [int(p) for p in patch],
        "normalization_schemes": [CT_SCHEME] * len(resolved["normalization_schemes"]),
        "architecture": {**architecture, "arch_kwargs": kwargs},
    }
    low, high = WINDOW_HU
    statistics = {
        "mean": low,
        "std": high - low,
        "median": low,
        "min": low,
        "max": high,
        "percentile_00_5": low,
        "percentile_99_5": high,
    }
    return {
        **deepcopy({key: value for key, value in plans.items() if key != "configurations"}),
        # What nnU-Net's planner chooses for isotropic spacing.
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {
            str(index): dict(statistics) for index in range(len(resolved["normalization_schemes"]))
        },
        "configurations": {configuration: resolved},
    }


def _with_reasons(aligned: Aligned, patch: str) -> Aligned:
    """Says where the decisions come from; they follow the paper here, not another dataset."""
    reasons = {"patch size": patch, "spacing (mm)": "the paper, A.3.1", "transposition": "the spacing is isotropic"}
    reasons |= dict.fromkeys(("stages", "strides", "kernel sizes"), "follows from 96^3 and 1.5 mm")
    decisions = [
        decision._replace(
            why="the paper, A.3.1" if decision.name.startswith("channel") else reasons.get(decision.name, decision.why)
        )
        for decision in aligned.decisions
    ]
    return aligned._replace(decisions=decisions)


def _resized(values: list[Any], length: int, grows: bool) -> list[Any]:
    """Shortens a list, or repeats its last entry; widths double up to nnU-Net's limit instead."""
    while len(values) < length:
        values.append(max(values[-1], min(2 * values[-1], _MAX_FEATURES)) if grows else values[-1])
    return values[:length]
