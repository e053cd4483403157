"""What differs between the network that was pretrained and the one that shall get its weights, in words."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from nnssl_stc3d.transfer.adaptation_plan import resolve_configuration

# Differences in these make the weights useless or meaningless even where all shapes agree.
ARCHITECTURE = (
    "architecture class",
    "stages",
    "features per stage",
    "kernel sizes",
    "strides",
    "convolutions per stage",
)
DECODER = ("decoder convolutions per stage",)


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
        "patch size": resolved.get("patch_size"),
        "spacing (mm)": resolved.get("spacing"),
        "normalisation": resolved.get("normalization_schemes"),
        "transposition": reference.plans.get("transpose_forward"),
    }
    return {name: _normalised(value) for name, value in described.items() if value is not None}


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


def compare(source: dict[str, Any], target: dict[str, Any], *, with_decoder: bool) -> list[Difference]:
    """Compares two descriptions.

    Args:
        source: Description of the pretrained network.
        target: Description of the network that shall get the weights.
        with_decoder: Whether the decoder is transferred too.

    Returns:
        The properties that both name and that differ.
    """
    fatal = ARCHITECTURE + (DECODER if with_decoder else ())
    return [
        Difference(name, value, target[name], name in fatal)
        for name, value in source.items()
        if name in target and target[name] != value and (name not in DECODER or with_decoder)
    ]


def commands_to_align(
    source: PlansReference | None, target: PlansReference | None, weights: str = "CHECKPOINT"
) -> list[str]:
    """Writes the commands that give the downstream dataset the plans of the pretraining.

    Args:
        source: Plans of the pretraining, if known.
        target: Plans of the downstream network, if known.
        weights: The checkpoint, as it shall appear in the last command.

    Returns:
        Command lines; names that are not known appear in capitals.
    """
    source_dataset = source.plans.get("dataset_name", "PRETRAINING_DATASET") if source else "PRETRAINING_DATASET"
    source_plans = source.plans.get("plans_name", "PRETRAINING_PLANS") if source else "PRETRAINING_PLANS"
    configuration = source.configuration if source else "CONFIGURATION"
    target_dataset = target.plans.get("dataset_name", "TARGET_DATASET") if target else "TARGET_DATASET"
    number = _dataset_id(target_dataset)
    plans = source_plans if source_dataset == target_dataset else f"{source_plans}_{source_dataset.split('_')[0]}"
    align = [
        f"nnUNetv2_move_plans_between_datasets -s {source_dataset} -t {target_dataset} -sp {source_plans} -tp {plans}",
        f"nnUNetv2_preprocess -d {number} -plans_name {plans} -c {configuration}",
    ]
    train = f"nnUNetv2_train {number} {configuration} FOLD -p {plans}"
    return [
        *(align if plans != source_plans else []),
        f"{train} -tr STC3DFinetuneTrainer -pretrained_weights {weights}",
    ]


def _dataset_id(name: str) -> str:
    """nnUNetv2_preprocess takes the number of a dataset, not its name."""
    digits = name.removeprefix("Dataset")[:3]
    return str(int(digits)) if digits.isdigit() else name


def _normalised(value: Any) -> Any:
    """Makes tuples and lists comparable, and spacings that differ by rounding equal."""
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
