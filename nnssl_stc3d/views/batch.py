"""One batch of views, as the loader ships it to a method."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nnssl_stc3d.views.spec import ViewSpecs


class ViewBatch(NamedTuple):
    """Rendered views and what is known about them.

    Attributes:
        views: ``(B, V, C, Z, Y, X)`` rendered and augmented views.
        specs: where each view looks; on the CPU, but on the device under DDP, which moves every tensor of its input.
        targets: what the sampler computed from the specifications (labels, corresponding points).
    """

    views: Tensor
    specs: ViewSpecs
    targets: dict[str, Tensor]
