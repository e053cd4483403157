"""CASA against its equations, a loop, and the values of the released code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnssl_stc3d.modules.casa import CasaOfficial, CasaPaper


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


QUERY, STUDENT, TEACHER = wave((1, 3, 8), 0.5), wave((1, 5, 8), 0.33, 0.2), wave((1, 5, 8), 0.29, 0.9)


def test_paper_reference():
    """Eqs. 3 and 4 with W_q = W_k = W_v = zeta = identity."""
    casa = CasaPaper(8, 8, 8).double()
    with torch.no_grad():
        for layer in (casa.w_q, casa.w_k, casa.w_v, casa.zeta):
            layer.weight.copy_(torch.eye(8))
    student, teacher = casa(QUERY, STUDENT)[0], casa(QUERY, TEACHER)[0]
    assert student[0, :4].tolist() == pytest.approx(
        [-1.6432098659570662, -0.548196817142925, 0.3777229599385405, 0.9753463380335471], rel=1e-9
    )
    assert student[2, 4:].tolist() == pytest.approx(
        [-0.8697336674962769, -0.568804634418028, 0.0545395923035769, 0.8842999896298871], rel=1e-9
    )
    assert teacher[1, :4].tolist() == pytest.approx(
        [-0.42623012849600117, -0.7733444741604274, -0.8565120415873959, -0.6481517468324761], rel=1e-9
    )


def test_official_reference():
    casa = CasaOfficial(8, 8, 8, heads=2).double()
    first, _, second = casa.feed_forward
    ordered = [
        casa.w_q.weight, casa.w_k.weight, casa.w_v.weight, casa.out.weight, first.weight, first.bias, second.weight,
        second.bias,
    ]  # fmt: skip
    with torch.no_grad():
        for index, parameter in enumerate(ordered):
            parameter.copy_(wave(tuple(parameter.shape), 0.37, index, 0.5))
    student, teacher = casa(QUERY, STUDENT)[0], casa(QUERY, TEACHER)[0]
    assert student[0, :4].tolist() == pytest.approx(
        [-0.6892981372483232, 1.1038514918414861, -0.02595144525242907, 0.5965917447802427], rel=1e-9
    )
    assert teacher[2, 4:].tolist() == pytest.approx(
        [0.7419775838412297, -0.3648573020613711, 0.7900875918815669, -0.9794097912556724], rel=1e-9
    )


def slow_casa(casa: CasaPaper, query: Tensor, memory: Tensor) -> Tensor:
    """Eqs. 3 and 4 token by token."""

    def normalised(row: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        scaled = (row - row.mean()) / (row.var(unbiased=False) + norm.eps).sqrt()
        return scaled * norm.weight + norm.bias

    rows = []
    for v in query:
        q = casa.w_q.weight @ normalised(v, casa.norm_query)
        keys = [casa.w_k.weight @ normalised(h, casa.norm_memory) for h in memory]
        values = [casa.w_v.weight @ normalised(h, casa.norm_memory) for h in memory]
        scores = [math.exp((q @ k).item() / math.sqrt(len(k))) for k in keys]
        attended = sum(s / sum(scores) * v for s, v in zip(scores, values))
        rows.append(casa.zeta.weight @ attended)
    return torch.stack(rows)


def test_paper_form_token_by_token():
    torch.manual_seed(0)
    casa = CasaPaper(query_features=6, memory_features=4, features=5).double()
    with torch.no_grad():
        for parameter in casa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    query, memory = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    result = casa(query, memory)
    for index in range(2):
        assert torch.allclose(result[index], slow_casa(casa, query[index], memory[index]), atol=1e-12)


def test_nothing_but_the_attention_takes_the_query_to_the_output():
    """With one token to attend to, the output is that token's, whatever the query: there is no residual."""
    torch.manual_seed(0)
    casa = CasaPaper(6, 4, 5)
    memory = torch.randn(2, 1, 4)
    assert torch.allclose(casa(torch.randn(2, 3, 6), memory), casa(torch.randn(2, 3, 6), memory), atol=1e-6)
    official = CasaOfficial(8, 8, 8, heads=2)
    memory = torch.randn(2, 1, 8)
    assert not torch.allclose(official(torch.randn(2, 3, 8), memory), official(torch.randn(2, 3, 8), memory), atol=0.1)


@pytest.mark.parametrize("casa", [CasaPaper(8, 8, 8), CasaOfficial(8, 8, 8, heads=2)], ids=["paper", "official"])
def test_the_order_of_what_is_attended_to_does_not_matter(casa):
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    assert torch.allclose(casa(query, memory), casa(query, memory.flip(1)), atol=1e-5)
    assert not torch.allclose(casa(query, memory), casa(query, memory + torch.randn(2, 5, 8)), atol=1e-2)


@pytest.mark.parametrize("casa", [CasaPaper(8, 8, 8), CasaOfficial(8, 8, 8, heads=2)], ids=["paper", "official"])
def test_autocast_and_extreme_scores(casa):
    query = (1e4 * torch.randn(2, 3, 8)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = casa(query, 1e4 * torch.randn(2, 5, 8))
    result.float().sum().backward()
    assert result.isfinite().all() and query.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in casa.parameters())


def test_the_released_form_needs_one_width():
    with pytest.raises(ValueError, match="one width that 8 heads divide, got 6 and 8"):
        CasaOfficial(6, 8, 8)
    with pytest.raises(ValueError, match="one width that 3 heads divide, got 8 and 8"):
        CasaOfficial(8, 8, 8, heads=3)
