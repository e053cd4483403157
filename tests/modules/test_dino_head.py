"""DINO's head against the values of the released code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnssl_stc3d.modules.dino_head import DinoHead


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def test_reference():
    head = DinoHead(6, 5, hidden_features=8, bottleneck_features=4).double()
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(8, 6), (8,), (8, 8), (8,), (4, 8), (4,), (5, 4)]
    with torch.no_grad():
        for index, parameter in enumerate(head.parameters()):
            parameter.copy_(wave(tuple(parameter.shape), 0.37, index, 0.5))
    expected = [
        [-0.06478953900037016, -0.8759481826814959, 0.12962745796781378, 0.9228930338015588, -0.5183398678696155],
        [0.01792865625339532, -0.6947624373418146, 0.0355898669211869, 0.7430238763576784, -0.36440758079011215],
    ]
    result = head(wave((2, 6), 0.8))
    for row, values in zip(result.tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-9)


def test_outputs_are_cosines():
    """Neither the length of the bottleneck nor that of the last rows can grow: the output stays in [-1, 1]."""
    torch.manual_seed(0)
    head = DinoHead(6, 5, 8, 4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(100)
    assert head(torch.randn(2, 7, 6) * 100).abs().max() <= 1 + 1e-5


def test_every_parameter_learns():
    torch.manual_seed(0)
    head = DinoHead(6, 5, 8, 4)
    head(torch.randn(3, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())
