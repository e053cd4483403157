"""The ``nnssl_adaptation_plan``: what nnU-Net's own tools need to know to reuse pretrained weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# As older plans name them, which have no entry "architecture". nnU-Net converts such plans when it reads them.
_OLD_ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")


def unwrap(network: nn.Module) -> nn.Module:
    """Returns the network inside DistributedDataParallel and ``torch.compile`` wrappers."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    original = getattr(network, "_orig_mod", network)
    if not isinstance(original, nn.Module):
        raise ValueError(f"Expected a network, got a {type(network).__name__} around a {type(original).__name__}.")
    return original


def resolve_configuration(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Returns one configuration of a plans file, what it inherits included.

    Args:
        plans: Contents of an nnU-Net plans file.
        configuration: Name such as ``3d_fullres``.

    Returns:
        A copy of the configuration, with the architecture in nnU-Net's present form if the plans have an older one.

    Raises:
        ValueError: If the plans do not have it, or it inherits from itself.
    """
    chain: list[dict[str, Any]] = []
    visited: list[str] = []
    name: str | None = configuration
    while name is not None:
        if name not in plans["configurations"] or name in visited:
            raise ValueError(
                f"The plans {plans.get('plans_name', '')} have no usable configuration {configuration}: looked for "
                f"{' <- '.join([*visited, name])} among {', '.join(plans['configurations'])}."
            )
        visited.append(name)
        chain.append(plans["configurations"][name])
        name = chain[-1].get("inherits_from")
    resolved: dict[str, Any] = {}
    for entry in reversed(chain):
        resolved.update(deepcopy(entry))
    if "architecture" not in resolved and resolved.get("UNet_class_name") in _OLD_ARCHITECTURES:
        resolved = ConfigurationManager(resolved).configuration
    return resolved


def build_adaptation_plan(
    plans: dict[str, Any], configuration: str, num_input_channels: int, network: nn.Module
) -> dict[str, Any]:
    """Builds the adaptation plan of a U-Net, in the form that nnU-Net's repository reads from nnssl checkpoints.

    Args:
        plans: Contents of the plans file that the network was built from.
        configuration: Name of the configuration, for example ``3d_fullres``.
        num_input_channels: Channels of the pretraining images.
        network: The U-Net (PlainConvUNet, ResidualEncoderUNet, or another one that declares its encoder's keys).

    Returns:
        Plain dictionary for the checkpoint's ``nnssl_adaptation_plan``.

    Raises:
        NotImplementedError: If the architecture does not say where its encoder and its stem are.
        ValueError: If plans, network and ``num_input_channels`` contradict each other.
    """
    network = unwrap(network)
    resolved = resolve_configuration(plans, configuration)
    architecture = resolved["architecture"]
    class_name = architecture["network_class_name"]
    if class_name.rsplit(".", 1)[-1] != type(network).__name__:
        raise ValueError(
            f"The plans name the architecture {class_name}, but the network is a {type(network).__name__}. Build the "
            "network from the same plans."
        )
    missing = [name for name in ("key_to_encoder", "key_to_stem", "keys_to_in_proj") if not hasattr(network, name)]
    if missing:
        raise NotImplementedError(
            f"{type(network).__name__} does not declare {', '.join(missing)}, so nnU-Net could not find its encoder. "
            "Supported are PlainConvUNet and ResidualEncoderUNet of dynamic_network_architectures."
        )
    plan = {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": deepcopy(architecture["arch_kwargs"]),
            "arch_kwargs_requiring_import": list(architecture["_kw_requires_import"]),
        },
        "pretrain_plan": {"configurations": {configuration: resolved}},
        "pretrain_num_input_channels": int(num_input_channels),
        "recommended_downstream_patchsize": [int(size) for size in resolved["patch_size"]],
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),  # type: ignore[arg-type]
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }
    verify_adaptation_plan(plan, network)
    return plan


def verify_adaptation_plan(plan: dict[str, Any], network: nn.Module) -> None:
    """Checks that every key of an adaptation plan leads to weights of the network.

    Args:
        plan: As returned by ``build_adaptation_plan``.
        network: The network whose weights go into the checkpoint.

    Raises:
        ValueError: If a key leads nowhere, or the input projection has another number of channels.
    """
    weights = network.state_dict()
    keys = [plan["key_to_encoder"], plan["key_to_stem"], *plan["keys_to_in_proj"]]
    keys += [plan["key_to_lpe"]] if plan["key_to_lpe"] is not None else []
    for key in keys:
        if not any(name == key or name.startswith(key + ".") for name in weights):
            raise ValueError(
                f"The adaptation plan points to {key}, but {type(network).__name__} has no weights of that name; its "
                f"first ones are {', '.join(list(weights)[:3])}."
            )
    for key in plan["keys_to_in_proj"]:
        channels = weights[f"{key}.weight"].shape[1]
        if channels != plan["pretrain_num_input_channels"]:
            raise ValueError(
                f"The adaptation plan says {plan['pretrain_num_input_channels']} input channels, but {key}.weight has "
                f"{channels}. Give the number of channels of the pretraining images."
            )
