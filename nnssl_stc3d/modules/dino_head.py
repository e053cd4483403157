"""The projection head of DINO (Caron et al. 2021), which Alice uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DinoHead(nn.Module):
    """Three linear layers with GELU, L2 normalisation, and a linear layer whose rows have length 1.

    Args:
        in_features: width of the descriptor.
        out_features: width of the output.
        hidden_features: width of both hidden layers.
        bottleneck_features: width that is normalised.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden_features: int = 2048, bottleneck_features: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, hidden_features),
            nn.GELU(),
            nn.Linear(hidden_features, bottleneck_features),
        )
        self.last = nn.Linear(bottleneck_features, out_features, bias=False)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return F.linear(F.normalize(self.mlp(descriptors), dim=-1), F.normalize(self.last.weight, dim=-1))
