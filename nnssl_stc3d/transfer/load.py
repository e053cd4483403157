"""Pretrained weights into an nnU-Net U-Net: strict, reported tensor by tensor and compared afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_stc3d.transfer.adapt import (
    UNETS,
    Adaptation,
    adapt_depth,
    adapt_input_channels,
    adapt_kernel,
    common_levels,
    encoder_stages,
)
from nnssl_stc3d.transfer.adaptation_plan import unwrap
from nnssl_stc3d.transfer.checkpoint import load_checkpoint
from nnssl_stc3d.transfer.differences import (
    IN_MEMORY,
    Difference,
    PlansReference,
    commands_to_align,
    compare,
    describe_network,
    describe_plans,
    explain_mismatch,
    plans_of_checkpoint,
)

SEGMENTATION_LAYERS = ".seg_layers."
ENCODER_IN_DECODER = "decoder.encoder."
LOADER_NAME = "load_pretrained_weights"


@dataclass(frozen=True)
class TransferReport:
    """What a transfer did to each tensor of the network.

    Attributes:
        source: File or other description of where the weights came from.
        parts: Parts of the network that were transferred, such as ``("encoder", "decoder")``.
        loaded: Names of the tensors that were copied.
        adapted: Names of the tensors that were changed to fit, and how.
        fresh: Names of the tensors that keep their own values.
        warnings: What the user should know although the transfer worked.
        commands: What makes the plans agree, if they do not.
    """

    source: str
    parts: tuple[str, ...]
    loaded: tuple[str, ...]
    adapted: dict[str, str]
    fresh: tuple[str, ...]
    warnings: tuple[str, ...]
    commands: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"Pretrained weights from {self.source}: {', '.join(self.parts)}",
            f"  {len(self.loaded)} tensors loaded, {len(self.adapted)} adapted, {len(self.fresh)} fresh; "
            "compared afterwards: equal",
        ]
        for how in dict.fromkeys(self.adapted.values()):
            first, *more = [name for name, other in self.adapted.items() if other == how]
            lines.append(f"  adapted: {first}{f' and {len(more)} more' if more else ''}: {how}")
        if self.fresh:
            modules = sorted({".".join(name.split(".")[:2]) for name in self.fresh})
            lines.append(f"  fresh: {', '.join(modules)}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.commands:
            lines.append("  to make them agree, if that was not intended:")
            lines += [f"    {command}" for command in self.commands]
        return "\n".join(lines)


def load_pretrained(
    network: nn.Module,
    checkpoint_or_path: dict[str, Any] | str | os.PathLike[str],
    target_plans: dict[str, Any] | None = None,
    target_configuration: str | None = None,
    adapt: Adaptation | None = None,
) -> TransferReport:
    """Loads pretrained weights into a U-Net, or leaves it untouched and says why not.

    A pretraining checkpoint says which parts of the network it trained; only those are taken. Of any other nnU-Net
    checkpoint everything but the segmentation layers is. Nothing that is transferred may be missing or have another
    shape, except for the number of input channels, to which the first convolution is adapted, and for what ``adapt``
    allows.

    Args:
        network: The network to fill, possibly wrapped by DistributedDataParallel or ``torch.compile``. One with a
            ``backbone`` (a probe, a classifier) gets the parts of it that it ``reads``.
        checkpoint_or_path: The checkpoint or its file.
        target_plans: Plans that the network was built from; without them, fewer differences can be named.
        target_configuration: Configuration of those plans.
        adapt: What may be changed about the weights so that they fit.

    Returns:
        What happened to each tensor.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit; with the differences and the commands to fix them.
        RuntimeError: If the network does not hold the weights afterwards.
    """
    network = unwrap(network)
    reads: Any = getattr(network, "reads", None)
    backbone: Any = getattr(network, "backbone", network)
    network = backbone
    if isinstance(checkpoint_or_path, dict):
        checkpoint, name = checkpoint_or_path, IN_MEMORY
    else:
        checkpoint, name = load_checkpoint(checkpoint_or_path), os.fspath(checkpoint_or_path)
    weights = network_weights(checkpoint)
    groups = tensor_groups(network)
    parts = _transferred_parts(checkpoint, network, reads)
    target = PlansReference(target_plans, target_configuration) if target_plans and target_configuration else None

    adapt = adapt or Adaptation()
    matched = _match(network, groups, weights, parts, adapt)
    differences = _differences(checkpoint, target, network, adapt, with_decoder="decoder" in parts)
    if not _fits(matched, differences):
        option = _option_that_helps(network, groups, weights, parts, checkpoint, target)
        source = plans_of_checkpoint(checkpoint)
        raise ValueError(explain_mismatch(name, source, target, differences, matched.problems, option))

    values, adapted = matched.values, matched.adapted
    state = network.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in values.items():
            state[key].copy_(value)
    _prove_equality(network, groups, values)
    return TransferReport(
        source=_source(name, checkpoint),
        parts=parts,
        loaded=tuple(key for key in values if key not in adapted),
        adapted=adapted,
        fresh=tuple(names[0] for names in groups if names[0] not in values),
        warnings=tuple(
            [str(difference) for difference in differences] + _conflicting_duplicates(groups, weights, values)
        ),
        commands=tuple(commands_to_align(plans_of_checkpoint(checkpoint), target, name)) if differences else (),
    )


def tensor_groups(network: nn.Module) -> list[list[str]]:
    """Groups the names under which a network registers one and the same tensor.

    U-Nets of nnU-Net list each tensor of a convolution twice and the whole encoder again as ``decoder.encoder``.

    Args:
        network: Any module.

    Returns:
        For each tensor its names, those inside ``decoder.encoder`` last.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [sorted(names, key=lambda name: name.startswith(ENCODER_IN_DECODER)) for names in groups.values()]


def use_reporting_loader(
    plans: dict[str, Any],
    configuration: str,
    log: Callable[[TransferReport], object] = print,
    adapt: Adaptation | None = None,
) -> Callable[..., None] | None:
    """Makes the next ``nnUNetv2_train -pretrained_weights`` of this process load through ``load_pretrained``.

    nnU-Net's training script calls its own loader through a global name right after the trainer's ``initialize``, so a
    trainer calls this from there. The loader serves once and then puts nnU-Net's own back. Where nnU-Net has no such
    name (a newer version, or a process that does not train), nothing changes.

    Args:
        plans: Plans of the network that is being trained.
        configuration: Configuration of those plans.
        log: Where the report goes, for example the trainer's ``print_to_log_file``.
        adapt: What may be changed about the weights so that they fit.

    Returns:
        The loader that was put in place, or None.
    """
    modules = [module for module in map(sys.modules.get, _TRAINING_MODULES) if _is_training_script(module)]
    if not modules:
        return None
    original = getattr(modules[0], LOADER_NAME)
    original = getattr(original, "replaces", original)

    def load(network: nn.Module, fname: str, verbose: bool = False) -> None:
        for module in modules:
            setattr(module, LOADER_NAME, original)
        report = load_pretrained(network, fname, plans, configuration, adapt)
        if not dist.is_initialized() or dist.get_rank() == 0:
            log(report)

    load.replaces = original  # type: ignore[attr-defined]
    for module in modules:
        setattr(module, LOADER_NAME, load)
    return load


# Where probes and classifiers hold the U-Net.
_BACKBONE = "backbone."
# The script is a module for the console command, and the main module for `python -m nnunetv2.run.run_training`.
_TRAINING_MODULES = ("nnunetv2.run.run_training", "__main__", "__mp_main__")


def _is_training_script(module: Any) -> bool:
    return callable(getattr(module, LOADER_NAME, None)) and hasattr(module, "maybe_load_checkpoint")


def network_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint's U-Net by its own names, without wrappers and the head of a probe or classifier."""
    weights = {_without_prefix(key): value for key, value in checkpoint["network_weights"].items()}
    if not _has_backbone(checkpoint):
        return weights
    return {key.removeprefix(_BACKBONE): value for key, value in weights.items() if key.startswith(_BACKBONE)}


def _has_backbone(checkpoint: dict[str, Any]) -> bool:
    return any(_without_prefix(key).startswith(_BACKBONE) for key in checkpoint["network_weights"])


def _without_prefix(key: str) -> str:
    """Undoes the prefixes of networks that were saved inside their wrappers."""
    return key.removeprefix("module.").removeprefix("_orig_mod.")


def _transferred_parts(
    checkpoint: dict[str, Any], network: nn.Module, reads: tuple[str, ...] | None
) -> tuple[str, ...]:
    existing = tuple(name for name, _ in network.named_children())
    method = checkpoint.get("method")
    if not isinstance(method, dict):
        carried = {key.split(".")[0] for key in network_weights(checkpoint)}
        # A classifier has no decoder. Of others everything is expected.
        parts = tuple(name for name in existing if name in carried) if _has_backbone(checkpoint) else existing
    else:
        parts = tuple(method["transfers"])
    if reads is not None:
        if set(reads) - set(parts):
            raise ValueError(
                f"This network reads the {' and '.join(reads)}, but the checkpoint carries only the "
                f"{' and '.join(parts)}. Use a trainer that reads only that, such as STC3DLinearProbeTrainer."
            )
        return reads
    unknown = [part for part in parts if part not in existing]
    if unknown:
        raise ValueError(
            f"The checkpoint transfers {', '.join(parts)}, but this {type(network).__name__} has only "
            f"{', '.join(existing)}. Use an nnU-Net configuration with an encoder-decoder U-Net."
        )
    return parts


class _Matched(NamedTuple):
    """The value of each tensor, what was adapted and how, and what does not fit, in words."""

    values: dict[str, Tensor]
    adapted: dict[str, str]
    problems: list[str]


def _match(
    network: nn.Module,
    groups: list[list[str]],
    weights: dict[str, Tensor],
    parts: tuple[str, ...],
    adapt: Adaptation,
) -> _Matched:
    """Finds the value of each tensor."""
    state = network.state_dict()
    in_projections = {f"{key}.weight" for key in getattr(network, "keys_to_in_proj", ())}
    here, there = encoder_stages(state), encoder_stages(weights)
    other_depth = adapt.depth and type(network).__name__ in UNETS and here != there and bool(there)
    if other_depth:
        weights = adapt_depth(weights, here)
    matched = _Matched({}, {}, [])
    for names in groups:
        key, own = names[0], state[names[0]]
        if key.split(".")[0] not in parts or SEGMENTATION_LAYERS in key:
            continue
        if other_depth and not common_levels(key, here, there):
            continue
        value = next((weights[name] for name in names if name in weights), None)
        if value is None:
            matched.problems.append(f"{key} is missing in the checkpoint")
        elif not torch.isfinite(value).all():
            matched.problems.append(f"{key} holds NaN or infinite values in the checkpoint")
        elif value.shape == own.shape:
            matched.values[key] = value
        elif adapt.stem == "fresh" and in_projections & set(names) and value.shape[1] != own.shape[1]:
            continue
        elif (changed := _adapt(value, own, adapt, bool(in_projections & set(names)))) is not None:
            matched.values[key], matched.adapted[key] = changed
        else:
            matched.problems.append(f"{key} has shape {tuple(value.shape)} in the checkpoint, {tuple(own.shape)} here")
    matched.problems.extend(
        f"{key} is in the checkpoint, but not in this network"
        for key in weights
        if key.split(".")[0] in parts and key not in state and SEGMENTATION_LAYERS not in key
    )
    return matched


def _adapt(value: Tensor, own: Tensor, adapt: Adaptation, is_stem: bool) -> tuple[Tensor, str] | None:
    """Makes a convolution's weights fit; returns them and how, or None where that is impossible or not allowed."""
    if value.ndim != own.ndim or value.ndim < 3 or value.shape[0] != own.shape[0]:
        return None
    how = []
    if value.shape[1] != own.shape[1]:
        if not is_stem:
            return None
        how.append(_stem_words(value.shape[1], own.shape[1], adapt.stem))
        value = adapt_input_channels(value, own.shape[1], adapt.stem)
    if value.shape != own.shape:
        changed = adapt_kernel(value, tuple(own.shape[2:])) if adapt.kernels else None
        if changed is None:
            return None
        old, new = ("x".join(map(str, weight.shape[2:])) for weight in (value, own))
        how.append(f"kernel {old} -> {new}, {'summed' if changed.numel() < value.numel() else 'centred'}")
        value = changed
    return value, "; ".join(how)


def _stem_words(source: int, target: int, stem: str) -> str:
    if stem == "copied":
        how = "repeated as they are" if target > source else f"the first {target} copied"
    else:
        how = f"repeated and divided by {target / source:g}" if target > source else "summed and shared out"
    return f"{source} -> {target} input channels, {how}"


def _fits(matched: _Matched, differences: list[Difference]) -> bool:
    return not matched.problems and not any(difference.fatal for difference in differences)


def _option_that_helps(
    network: nn.Module,
    groups: list[list[str]],
    weights: dict[str, Tensor],
    parts: tuple[str, ...],
    checkpoint: dict[str, Any],
    target: PlansReference | None,
) -> str | None:
    """Finds what would have to be adapted, as the user would ask for it; None if nothing helps."""
    for words in (("depth",), ("kernels",), ("depth", "kernels")):
        adapt = Adaptation(depth="depth" in words, kernels="kernels" in words)
        differences = _differences(checkpoint, target, network, adapt, with_decoder="decoder" in parts)
        if _fits(_match(network, groups, weights, parts, adapt), differences):
            return ",".join(words)
    return None


def _differences(
    checkpoint: dict[str, Any],
    target: PlansReference | None,
    network: nn.Module,
    adapt: Adaptation,
    *,
    with_decoder: bool,
) -> list[Difference]:
    source = plans_of_checkpoint(checkpoint)
    if source is None:
        return []
    described = describe_plans(target) if target else describe_network(network)
    return compare(describe_plans(source), described, with_decoder=with_decoder, adapt=adapt)


def _prove_equality(network: nn.Module, groups: list[list[str]], values: dict[str, Tensor]) -> None:
    """Compares every transferred tensor under each of its names."""
    state = network.state_dict()
    for names in groups:
        if names[0] not in values:
            continue
        for name in names:
            expected = values[names[0]].to(device=state[name].device, dtype=state[name].dtype)
            if not torch.equal(state[name], expected):
                raise RuntimeError(
                    f"{name} differs from the pretrained weights after loading them. Expected equal tensors; please "
                    "report this with the checkpoint's plans."
                )


def _conflicting_duplicates(
    groups: list[list[str]], weights: dict[str, Tensor], values: dict[str, Tensor]
) -> list[str]:
    """Counts tensors that the checkpoint holds twice with different values, where loading everything would be wrong."""
    conflicts = 0
    for names in groups:
        present = [weights[name] for name in names if name in weights]
        if names[0] in values and any(not torch.equal(present[0], other) for other in present[1:]):
            conflicts += 1
    if not conflicts:
        return []
    return [
        f"{conflicts} tensors have a duplicate with other values in the checkpoint (as {ENCODER_IN_DECODER}*); ignored"
    ]


def _source(name: str, checkpoint: dict[str, Any]) -> str:
    method = checkpoint.get("method")
    trained_by = method.get("name") if isinstance(method, dict) else checkpoint.get("trainer_name")
    epoch = checkpoint.get("current_epoch")
    details = [str(trained_by)] if trained_by else []
    details += [f"{epoch} epochs"] if epoch is not None else []
    return f"{name} ({', '.join(details)})" if details else name
