"""The readings of STC3D's regulariser against loops over the printed equation."""

from __future__ import annotations

import pytest
import torch

from nnssl_stc3d.losses.stc3d import REGULARISERS, eq12, overlap_weighted


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a / a.norm() - b / b.norm()).square().sum())


def slow_weighted(views: torch.Tensor, overlap: torch.Tensor, margin: float) -> float:
    """``o d^2 + (1 - o) max(0, m - d)^2``, mean over ordered pairs and volumes."""
    terms = []
    for z, o in zip(views, overlap):
        for i in range(len(z)):
            for j in range(len(z)):
                if i != j:
                    squared = squared_distance(z[i], z[j])
                    terms.append(float(o[i, j]) * squared + (1 - float(o[i, j])) * max(0.0, margin - squared**0.5) ** 2)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.9])
def test_overlap_weighted_is_the_formula(margin):
    views, overlap = embeddings(3, 4, 5), torch.rand(3, 4, 4, dtype=torch.float64)
    assert float(overlap_weighted(views, overlap, margin)) == pytest.approx(
        slow_weighted(views, overlap, margin), rel=1e-6
    )


def test_eq12_is_the_equation_averaged_over_volumes():
    """``1 / N`` times the sum over all ordered pairs of the ``N`` views."""
    views = embeddings(3, 4, 5)
    values = [sum(squared_distance(a, b) for a in z for b in z) / 4 for z in views]
    assert float(eq12(views)) == pytest.approx(sum(values) / 3, rel=1e-10)


def test_full_overlap_gives_the_distances_of_eq12():
    """A mean over the N (N - 1) ordered pairs instead of 1 / N times their sum."""
    views = embeddings(2, 5, 6)
    weighted = overlap_weighted(views, torch.ones(2, 5, 5))
    assert float(weighted) * (5 - 1) == pytest.approx(float(eq12(views)), rel=1e-10)


def test_no_overlap_is_a_bounded_discrepancy():
    apart = torch.zeros(4, 4)
    equal = torch.ones(4, 3, dtype=torch.float64)
    assert float(overlap_weighted(equal, apart, 1.5)) == pytest.approx(1.5**2, rel=1e-3)
    # Orthogonal embeddings are the square root of 2 apart, beyond the margin.
    far = torch.eye(4, dtype=torch.float64).requires_grad_()
    loss = overlap_weighted(far, apart, 1.0)
    loss.backward()
    assert loss.item() == 0 and not far.grad.any()


@pytest.mark.parametrize(("overlap", "closer"), [(1.0, True), (0.0, False)])
def test_the_overlap_decides_whether_views_attract_or_repel(overlap, closer):
    z = torch.tensor([[1.0, 0.0], [0.9, 0.5]], dtype=torch.float64, requires_grad=True)
    overlap_weighted(z, torch.full((2, 2), overlap)).backward()
    moved = z.detach() - 0.05 * z.grad
    before, after = squared_distance(*z.detach()), squared_distance(*moved)
    assert (after < before) == closer


def test_eq12_as_printed_pulls_views_together():
    z = embeddings(4, 3).requires_grad_()
    loss = eq12(z)
    loss.backward()
    assert eq12(z.detach() - 0.05 * z.grad) < loss
    assert float(eq12(torch.ones(4, 3, dtype=torch.float64))) == pytest.approx(0, abs=1e-9)


def test_the_length_of_embeddings_does_not_matter():
    z = embeddings(2, 4, 3)
    overlap = torch.rand(2, 4, 4)
    assert float(eq12(5 * z)) == pytest.approx(float(eq12(z)))
    assert float(overlap_weighted(5 * z, overlap)) == pytest.approx(float(overlap_weighted(z, overlap)))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_identical_views_keep_finite_gradients(value):
    for dtype in (torch.float32, torch.float64):
        z = torch.ones(2, 3, 4, dtype=dtype, requires_grad=True)
        loss = overlap_weighted(z, torch.full((2, 3, 3), value)) + eq12(z)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_a_single_view_has_nothing_to_differ_from():
    z = embeddings(2, 1, 4).requires_grad_()
    loss = overlap_weighted(z, torch.ones(2, 1, 1)) + eq12(z)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and z.grad.abs().max() < 1e-12


def test_gradients_are_those_of_the_functions():
    z, overlap = embeddings(2, 3, 4).requires_grad_(), embeddings(2, 3, 3, seed=1).sigmoid()
    assert torch.autograd.gradcheck(lambda x: overlap_weighted(x, overlap, 1.3), (z,))
    assert torch.autograd.gradcheck(eq12, (z,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z, overlap = embeddings(2, 4, 8).to(dtype), torch.rand(2, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        narrow = [overlap_weighted(z, overlap), eq12(z)]
        wide = [overlap_weighted(z.double(), overlap), eq12(z.double())]
    assert {v.dtype for v in narrow} == {torch.float32} and {v.dtype for v in wide} == {torch.float64}
    assert [float(v) for v in narrow] == pytest.approx([float(v) for v in wide], rel=1e-4)


def test_the_forms_have_names():
    assert REGULARISERS == ("discrepancy", "overlap_weighted", "eq12")
