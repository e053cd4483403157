"""What differs between the network that was pretrained and the one that shall get its weights, in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from nnssl_stc3d.transfer.adapt import ADAPT_VARIABLE, UNETS, Adaptation
from nnssl_stc3d.transfer.adaptation_plan import resolve_configuration

# Differences in these make the weights useless or meaningless even where all shapes agree.
ARCHITECTURE = (
    "architecture class",
    "stages",
    "features per stage",
    "kernel sizes",
    "strides",
    "convolutions per stage",
    "width",
    "blocks",
)
DECODER = ("decoder convolutions per stage",)
# Differences in these leave the weights usable, but the images look different to the network.
PREPROCESSING = ("spacing (mm)", "normalisation", "transposition")
ADAPTABLE = ("stages", "features per stage", "kernel sizes", "strides", "convolutions per stage", *DECODER)

IN_MEMORY = "a checkpoint in memory"
"""How weights without a file are called."""


class Difference(NamedTuple):
    """One property that differs; ``fatal`` if the weights cannot be used because of it."""

    name: str
    source: Any
    target: Any
    fatal: bool

    def __str__(self) -> str:
        return f"{self.name}: pretrained with {self.source}, this network has {self.target}"


class PlansReference(NamedTuple):
    """A plans file and the configuration of it that a network was built from."""

    plans: dict[str, Any]
    configuration: str


def plans_of_checkpoint(checkpoint: dict[str, Any]) -> PlansReference | None:
    """Finds the plans in a checkpoint of this package or of nnU-Net.

    Args:
        checkpoint: As returned by ``load_checkpoint``.

    Returns:
        Plans and configuration, or None where the checkpoint does not carry them.
    """
    for holder in (checkpoint, checkpoint.get("init_args") or {}):
        plans, configuration = holder.get("plans"), holder.get("configuration")
        if isinstance(plans, dict) and isinstance(configuration, str) and configuration in plans["configurations"]:
            return PlansReference(plans, configuration)
    return None


def describe_plans(reference: PlansReference) -> dict[str, Any]:
    """Collects the properties of a configuration that matter for a transfer of weights.

    Args:
        reference: Plans and configuration.

    Returns:
        Values by the names used in messages, sizes in voxels and spacings in mm, in nnU-Net's axis order (z, y, x).
    """
    resolved = resolve_configuration(*reference)
    architecture = resolved.get("architecture", {})
    kwargs = architecture.get("arch_kwargs", {})
    described = {
        "architecture class": architecture.get("network_class_name", "").rsplit(".", 1)[-1] or None,
        "stages": kwargs.get("n_stages"),
        "features per stage": kwargs.get("features_per_stage"),
        "kernel sizes": kwargs.get("kernel_sizes"),
        "strides": kwargs.get("strides"),
        "convolutions per stage": kwargs.get("n_conv_per_stage", kwargs.get("n_blocks_per_stage")),
        "decoder convolutions per stage": kwargs.get("n_conv_per_stage_decoder"),
        # Of transformers, which have no stages.
        "width": kwargs.get("embed_dim", kwargs.get("feature_size")),
        "blocks": kwargs.get("eva_depth"),
        "patch size": resolved.get("patch_size"),
        "spacing (mm)": resolved.get("spacing"),
        "normalisation": _normalisations(reference.plans, resolved),
        "transposition": reference.plans.get("transpose_forward"),
    }
    return {name: _normalised(value) for name, value in described.items() if value is not None}


def _normalisations(plans: Mapping[str, Any], resolved: Mapping[str, Any]) -> list[str] | None:
    """Words for each channel. Statistics are rounded, so that those of a few cases more or less are the same."""
    schemes = resolved.get("normalization_schemes")
    if schemes is None:
        return None
    statistics, masks = (
        plans.get("foreground_intensity_properties_per_channel") or {},
        resolved.get("use_mask_for_norm"),
    )
    return [
        normalisation_words(scheme, statistics.get(str(channel), {}), 3)
        + (" within the mask" if masks and channel < len(masks) and masks[channel] else "")
        for channel, scheme in enumerate(schemes)
    ]


def normalisation_words(scheme: str, statistics: Mapping[str, float], digits: int = 5) -> str:
    """A channel's normalisation in words; the statistics, with so many digits, matter for CT only."""
    if scheme != "CTNormalization" or not {"mean", "std", "percentile_00_5", "percentile_99_5"} <= set(statistics):
        return scheme
    low, high, mean, std = (
        f"{statistics[key]:.{digits}g}" for key in ("percentile_00_5", "percentile_99_5", "mean", "std")
    )
    return f"{scheme}: clip {low} to {high}, mean {mean}, std {std}"


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Collects what a U-Net says about itself, for networks whose plans are not at hand.

    Args:
        network: A U-Net without wrappers.

    Returns:
        The same names as ``describe_plans``, fewer of them.
    """
    encoder = getattr(network, "encoder", None)
    described: dict[str, Any] = {"architecture class": type(network).__name__}
    if encoder is not None and hasattr(encoder, "output_channels") and hasattr(encoder, "strides"):
        described["stages"] = len(encoder.output_channels)
        described["features per stage"] = encoder.output_channels
        described["strides"] = encoder.strides
    return {name: _normalised(value) for name, value in described.items()}


def compare(
    source: dict[str, Any], target: dict[str, Any], *, with_decoder: bool, adapt: Adaptation | None = None
) -> list[Difference]:
    """Compares two descriptions.

    Args:
        source: Description of the pretrained network.
        target: Description of the network that shall get the weights.
        with_decoder: Whether the decoder is transferred too.
        adapt: What may be adapted, and is then no obstacle.

    Returns:
        The properties that both name and that differ.
    """
    fatal = ARCHITECTURE + (DECODER if with_decoder else ())
    tolerated = _Tolerance(source, target, adapt or Adaptation())
    return [
        Difference(name, value, target[name], name in fatal and not tolerated.allows(name, value, target[name]))
        for name, value in source.items()
        if name in target and target[name] != value and (name not in DECODER or with_decoder)
    ]


class _Tolerance:
    """Which differences of two descriptions an adaptation bridges."""

    def __init__(self, source: dict[str, Any], target: dict[str, Any], adapt: Adaptation) -> None:
        classes = {described.get("architecture class") for described in (source, target)}
        depths = [described["stages"] for described in (source, target) if "stages" in described]
        known = len(classes) == 1 and classes <= set(UNETS) and len(depths) == 2
        # Stages that both have; without depth, all of each.
        self.common = min(depths) if adapt.depth and known else None
        self.kernels = adapt.kernels

    def allows(self, name: str, source: Any, target: Any) -> bool:
        if name == "stages":
            return self.common is not None
        if not (isinstance(source, list) and isinstance(target, list)):
            return False
        if self.common is not None:
            if name in DECODER:
                # Listed from the lowest resolution; the level above the shallower bottleneck is not transferred.
                kept = self.common - 2
                return not kept or source[-kept:] == target[-kept:]
            source, target = source[: self.common], target[: self.common]
        if source == target:
            return True
        return name == "kernel sizes" and self.kernels and len(source) == len(target)


def commands_to_align(
    source: PlansReference | None, target: PlansReference | None, weights: str = "CHECKPOINT"
) -> list[str]:
    """Writes the commands that give the downstream dataset the plans of the pretraining.

    Args:
        source: Plans of the pretraining, if known.
        target: Plans of the downstream network, if known.
        weights: The checkpoint's file.

    Returns:
        Command lines; names that are not known appear in capitals.
    """
    names = _names(source, target)
    plans, file = names.plans, _argument(weights)
    lines = []
    if names.source != names.target:
        plans = aligned_name(names.plans, names.source)
        lines = [
            f"nnssl_stc3d align-plans --to pretraining --checkpoint {file} --target {names.number}",
            f"nnUNetv2_preprocess -d {names.number} -plans_name {plans} -c {names.configuration}",
        ]
    return [
        *lines,
        f"nnUNetv2_train {names.number} {names.configuration} FOLD -p {plans} -tr STC3DFinetuneTrainer "
        f"-pretrained_weights {file}",
    ]


def explain_mismatch(
    weights: str,
    source: PlansReference | None,
    target: PlansReference | None,
    differences: list[Difference],
    problems: list[str],
    option: str | None,
) -> str:
    """Says in words why weights do not fit, and which command resolves each difference.

    Args:
        weights: The checkpoint's file.
        source: Plans of the pretraining, if known.
        target: Plans of the downstream network, if known.
        differences: Between the two.
        problems: What does not fit besides, in words.
        option: Value of ``NNSSL_STC3D_ADAPT`` with which the weights would fit; None if nothing helps.

    Returns:
        Several lines.
    """
    names = _names(source, target)
    known = source is not None and target is not None and names.source != names.target
    lines = [f"The pretrained weights of {weights} do not fit this network."]
    lines += [f"  {difference} ({_ways(difference, known, option)})" for difference in differences]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        lines.append(f"  {'; '.join(problems[:3])}{more}")
    lines.append("1. Give your dataset the plans of the pretraining, then train with them:")
    commands = commands_to_align(source, target, weights)
    lines += [f"     {command}" for command in commands]
    if known and target:
        lines.append("2. Or pretrain again, with the plans of your dataset:")
        lines.append(
            f"     nnssl_stc3d align-plans --pretrain {_dataset_id(names.source)} --target {names.number} "
            f"-p {target.plans.get('plans_name')} -c {target.configuration}"
        )
    if option and target:
        lines.append("3. Or adapt the weights (documentation/aligning_plans.md says what is lost):")
        lines.append(
            f"     {ADAPT_VARIABLE}={option} nnUNetv2_train {names.number} {target.configuration} FOLD "
            f"-p {target.plans.get('plans_name')} -tr STC3DFinetuneTrainer -pretrained_weights {_argument(weights)}"
        )
    return "\n".join(lines)


def _argument(weights: str) -> str:
    """A checkpoint as an argument of a command."""
    return "CHECKPOINT" if weights == IN_MEMORY else shlex.quote(weights)


def _ways(difference: Difference, known: bool, option: str | None) -> str:
    """Numbers of the ways of :func:`explain_mismatch` that resolve a difference."""
    ways = ["1", *(["2"] if known else []), *(["3"] if option and difference.name in ADAPTABLE else [])]
    return f"resolved by {' or '.join(ways)}"


def aligned_name(plans: str, dataset: str) -> str:
    """Name of the plans of one dataset where another dataset uses them."""
    return f"{plans}_{dataset.split('_')[0]}"


class _Names(NamedTuple):
    """What commands are filled in with."""

    source: str
    target: str
    plans: str
    configuration: str

    @property
    def number(self) -> str:
        return _dataset_id(self.target)


def _names(source: PlansReference | None, target: PlansReference | None) -> _Names:
    return _Names(
        source.plans.get("dataset_name", "PRETRAINING_DATASET") if source else "PRETRAINING_DATASET",
        target.plans.get("dataset_name", "TARGET_DATASET") if target else "TARGET_DATASET",
        source.plans.get("plans_name", "PRETRAINING_PLANS") if source else "PRETRAINING_PLANS",
        source.configuration if source else "CONFIGURATION",
    )


def _dataset_id(name: str) -> str:
    """nnUNetv2_preprocess takes the number of a dataset, not its name."""
    digits = name.removeprefix("Dataset")[:3]
    return str(int(digits)) if digits.isdigit() else name


def _normalised(value: Any) -> Any:
    """Makes tuples and lists comparable, and spacings that differ by rounding equal."""
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
