"""A light decoder of tokens: transformer blocks over visible and mask tokens (He et al. 2022, Alice 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenDecoder(nn.Module):
    """Fills masked tokens in and predicts the voxels of every token.

    Args:
        features: width of the encoder's tokens, and of the decoder's output.
        tokens: number of tokens of a view.
        voxels: values of a token: its voxels times channels.
        width: of the transformer blocks.
        depth: number of transformer blocks.
        heads: of the attention; they divide ``width``.
    """

    def __init__(self, features: int, tokens: int, voxels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        for parameter in (self.mask_token, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, features)
        self.to_voxels = nn.Linear(features, voxels)

    def forward(self, tokens: Tensor, index: Tensor | None) -> Tensor:
        """Decode all tokens of a view.

        Args:
            tokens: ``(N, M, features)`` visible tokens.
            index: ``(N, M)`` their places, or None if all are visible.

        Returns:
            ``(N, tokens, features)``; :attr:`to_voxels` maps them to voxels.
        """
        x = self.embed(tokens)
        if index is not None:
            everywhere = self.mask_token.to(x.dtype).expand(len(x), self.position.shape[1], -1)
            x = everywhere.scatter(1, index[..., None].expand_as(x), x)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))
