"""Plans of strangers name classes that nnU-Net imports and calls: only networks and their parts may be among them."""

from __future__ import annotations

import inspect
import os
import pydoc
from collections.abc import Mapping
from typing import Any

from torch import nn

TRUST_VARIABLE = "NNSSL_STC3D_TRUST"
# Torch's other modules have classes that are not parts of networks.
_TRUSTED = ("dynamic_network_architectures.", "nnssl_stc3d.modules.", "torch.nn.", "monai.networks.")


def check_plans(plans: Mapping[str, Any], source: object) -> None:
    """Refuses plans that name anything else than networks, before nnU-Net imports and calls it.

    nnU-Net calls whatever Python name the architecture of a configuration gives, with arguments of the plans' choice.
    So a file whose tensors are harmless can still run commands through the plans beside them.

    Args:
        plans: content of a plans file, or what a checkpoint carries as its plans.
        source: where they come from, for the message.

    Raises:
        ValueError: a name that is no class of a network or of a layer in a known package. Packages of one's own are
            named in the environment variable NNSSL_STC3D_TRUST, separated by commas.
    """
    for configuration in plans.get("configurations", {}).values():
        architecture = configuration.get("architecture") or {}
        arguments = architecture.get("arch_kwargs") or {}
        names = [architecture.get("network_class_name")]
        names += [arguments.get(key) for key in architecture.get("_kw_requires_import") or ()]
        for name in names:
            if name is not None and not _is_trusted(name):
                raise ValueError(
                    f"the plans in {source} name {name!r} as a part of the network, which is no network or layer of a "
                    "known package. Such a name can run anything, so nothing was built. If it is yours, or you trust "
                    f"its author, set {TRUST_VARIABLE} to its package."
                )


def _is_trusted(name: object) -> bool:
    """Whether nnU-Net may import and call it."""
    if not isinstance(name, str):
        return False
    own = [f"{package.strip()}." for package in os.environ.get(TRUST_VARIABLE, "").split(",") if package.strip()]
    if not name.startswith((*_TRUSTED, *own)):
        return False
    # A module's own imports can be reached through it, and are not what its package is trusted for. What is not found
    # nnU-Net looks for among its own networks.
    found = pydoc.locate(name)
    return found is None or (inspect.isclass(found) and issubclass(found, nn.Module))
