"""Conditional anatomical semantic alignment (Alice 3.3): attention of visible tokens over whole volumes."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

FORMS = ("paper", "official")


class CasaPaper(nn.Module):
    """Pre-LN cross attention and a projection, without a residual (Alice Eqs. 3 and 4).

    The query never reaches the output except through the attention's weights: a residual would make student and teacher
    embeddings, which share their query, agree without any alignment.

    Args:
        query_features: width of the visible tokens.
        memory_features: width of the tokens that are attended to.
        features: width C of queries, keys, values and of the output.
    """

    def __init__(self, query_features: int, memory_features: int, features: int) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(query_features)
        self.norm_memory = nn.LayerNorm(memory_features)
        self.w_q = nn.Linear(query_features, features, bias=False)
        self.w_k = nn.Linear(memory_features, features, bias=False)
        self.w_v = nn.Linear(memory_features, features, bias=False)
        self.zeta = nn.Linear(features, features, bias=False)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Attend from ``query`` ``(N, M, query_features)`` to ``memory`` ``(N, K, memory_features)``, ``(N, M, C)``."""
        memory = self.norm_memory(memory)
        attended = _attention(self.w_q(self.norm_query(query)), self.w_k(memory), self.w_v(memory))
        return self.zeta(attended)


class CasaOfficial(nn.Module):
    """A post-LN transformer decoder layer with residuals, as in Alice's released code.

    Args:
        query_features: width of the visible tokens, which has to be that of the output: it is added to it.
        memory_features: width of the tokens that are attended to.
        features: width of the output.
        heads: of the attention; they divide ``features``.

    Raises:
        ValueError: if query and output differ in width or the heads do not divide it.
    """

    def __init__(self, query_features: int, memory_features: int, features: int, heads: int = 8) -> None:
        super().__init__()
        if query_features != features or features % heads:
            raise ValueError(
                f"the released form adds the query to the output: both need one width that {heads} heads divide, got "
                f"{query_features} and {features}"
            )
        self.heads = heads
        self.w_q = nn.Linear(query_features, features, bias=False)
        self.w_k = nn.Linear(memory_features, features, bias=False)
        self.w_v = nn.Linear(memory_features, features, bias=False)
        self.out = nn.Linear(features, features, bias=False)
        self.norm_attention = nn.LayerNorm(features, eps=1e-6)
        self.feed_forward = nn.Sequential(
            nn.Linear(features, 2 * features), nn.ReLU(inplace=True), nn.Linear(2 * features, features)
        )
        self.norm_output = nn.LayerNorm(features, eps=1e-6)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """Attend from ``query`` ``(N, M, C)`` to ``memory`` ``(N, K, memory_features)``, ``(N, M, C)``."""
        q, k, v = (w(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w, t in self._projections(query, memory))
        attended = self.norm_attention(query + self.out(_attention(q, k, v).transpose(1, 2).flatten(-2)))
        return self.norm_output(attended + self.feed_forward(attended))

    def _projections(self, query: Tensor, memory: Tensor) -> tuple[tuple[nn.Linear, Tensor], ...]:
        return (self.w_q, query), (self.w_k, memory), (self.w_v, memory)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention ``(..., M, C), (..., K, C), (..., K, C) -> (..., M, C)``, softmax in float32."""
    weights = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) / sqrt(key.shape[-1])
    return weights.softmax(-1).to(value.dtype) @ value
