"""The collapse monitors against their definitions and on embeddings whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl_stc3d.training.monitors import MONITORS, collapse_monitors


def by_definition(pairs: np.ndarray) -> dict[str, float]:
    """Transcribed loop by loop."""
    z = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
    flat = z.reshape(-1, z.shape[-1])
    singular = np.linalg.svd(flat, compute_uv=False)
    p = singular / singular.sum()
    potentials = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(flat[i], flat[j])))
        for i in range(len(flat))
        for j in range(i + 1, len(flat))
    ]
    return {
        "effective_rank": math.exp(-sum(v * math.log(v) for v in p if v > 1e-12)),
        "embedding_std": float(np.mean([flat[:, d].std(ddof=1) for d in range(flat.shape[1])])) * flat.shape[1] ** 0.5,
        "alignment": float(np.mean([sum((a - b) ** 2 for a, b in zip(x, y)) for x, y in z])),
        "uniformity": math.log(np.mean(potentials)),
    }


@pytest.mark.parametrize("shape", [(6, 2, 5), (3, 2, 16), (20, 2, 3)])
def test_definitions(shape):
    pairs = np.random.default_rng(0).normal(size=shape) + 0.3
    expected = by_definition(pairs)
    measured = collapse_monitors(torch.from_numpy(pairs))
    assert set(measured) == set(MONITORS)
    for name in MONITORS:
        assert measured[name] == pytest.approx(expected[name], rel=1e-4), name


def test_collapsed_embeddings():
    pairs = torch.tensor([0.3, -1.0, 2.0, 0.1]).expand(10, 2, 4)
    measured = collapse_monitors(pairs)
    assert measured["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert measured["embedding_std"] == pytest.approx(0, abs=1e-5)
    assert measured["alignment"] == pytest.approx(0, abs=1e-6)
    assert measured["uniformity"] == pytest.approx(0, abs=1e-5)


def test_dimensional_collapse_shows_in_the_rank():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(50, 2, 1, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    plane = line + torch.randn(50, 2, 1, generator=generator) * torch.tensor([4.0, -3.0, 2.0, -1.0])
    assert collapse_monitors(line)["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert 1.5 < collapse_monitors(plane)["effective_rank"] <= 2.001


def test_isotropic_embeddings():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 1, 16, generator=generator)
    measured = collapse_monitors(z.expand(-1, 2, -1))
    assert measured["effective_rank"] == pytest.approx(16, abs=0.5)
    assert measured["embedding_std"] == pytest.approx(1, abs=0.02)
    assert measured["alignment"] == pytest.approx(0, abs=1e-6)
    independent = collapse_monitors(torch.randn(400, 2, 16, generator=generator))
    # Two random directions are sqrt(2) apart on average.
    assert independent["alignment"] == pytest.approx(2, abs=0.1)
    assert independent["uniformity"] < -3


def test_length_and_precision_of_the_embeddings_do_not_matter():
    z = torch.randn(10, 2, 8, generator=torch.Generator().manual_seed(0))
    reference = collapse_monitors(z)
    for other in (z * 100, z.half()):
        measured = collapse_monitors(other)
        for name in MONITORS:
            assert measured[name] == pytest.approx(reference[name], rel=1e-2), name


@pytest.mark.parametrize(("count", "step"), [(1024, 1), (1025, 2), (5120, 5)])
def test_the_uniformity_of_many_pairs_is_that_of_some(count, step, monkeypatch):
    """Its memory grows with the square of the pairs; the other monitors look at all of them."""
    pairs = torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(0))
    rows = []
    pdist = torch.pdist
    monkeypatch.setattr(torch, "pdist", lambda z: rows.append(len(z)) or pdist(z))
    measured, again, some = (collapse_monitors(p) for p in (pairs, pairs, pairs[::step]))
    assert measured == again and max(rows) <= 2048
    assert measured["uniformity"] == some["uniformity"]
    assert measured["uniformity"] == pytest.approx(
        float((-2 * pdist(F.normalize(pairs, dim=-1).flatten(0, 1)).square()).exp().mean().log()), abs=0.03
    )
    flat = F.normalize(pairs, dim=-1).flatten(0, 1)
    assert measured["embedding_std"] == pytest.approx(float(flat.std(0).mean() * 2), rel=1e-5)


def test_no_graph_and_plain_floats():
    z = torch.randn(4, 2, 3, requires_grad=True)
    assert all(type(v) is float for v in collapse_monitors(z).values())


def test_zero_embeddings_give_finite_numbers():
    assert all(math.isfinite(v) for v in collapse_monitors(torch.zeros(4, 2, 3)).values())
    assert math.isfinite(collapse_monitors(F.one_hot(torch.zeros(2, 2).long(), 3).float())["uniformity"])
