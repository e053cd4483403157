"""The losses of PiMPiC against its printed equations and the values of its released code."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_stc3d.losses.pimpic import intersection_contrast, intersection_measure, overlap_error

# Patches of 64^3 that start at (0, 0, 0), (32, 0, 0), (10, 20, 30), (64, 0, 0), (63, 63, 63), (40, 50, 7).
STARTS = [(0, 0, 0), (32, 0, 0), (10, 20, 30), (64, 0, 0), (63, 63, 63), (40, 50, 7)]
OVERLAP = torch.tensor(
    [
        [math.prod(max(0, 64 - abs(p - q)) for p, q in zip(a, b)) / 64**3 for b in STARTS]
        for a in STARTS
    ],
    dtype=torch.float64,
)  # fmt: skip
FORMS = ("paper", "official")


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_measure(embeddings: Tensor, overlap: Tensor, form: str) -> float:
    """Equation 1, or the released loss, for one volume."""
    n = len(embeddings)
    terms = []
    for i, j in product(range(n), range(n)):
        d = min(1.0, abs(float(overlap[i, j]) - cosine(embeddings[i], embeddings[j])))
        if form == "official":
            terms.append(-math.log(1 - d + 1e-6))
        elif j < i:
            terms.append(-math.log(1 - d))
    return sum(terms) / len(terms)


def slow_contrast(projections: Tensor, temperature: float, form: str) -> float:
    """Equation 2, or the released loss."""
    terms = []
    for parts in projections:
        e = {(i, j): math.exp(cosine(parts[i], parts[j]) / temperature) for i, j in combinations(range(4), 2)}
        if form == "paper":
            terms.append(-math.log(e[0, 1] / sum(e.values())))
        else:
            terms.append(-math.log(2 * e[0, 1] / (2 * e[0, 1] + e[0, 2] + e[0, 3] + e[1, 2] + e[1, 3])))
    return sum(terms) / len(terms)


# ---- intersection measure -------------------------------------------------------------------------------------------


def test_the_overlaps_of_the_reference():
    assert OVERLAP[0].tolist() == pytest.approx([1.0, 0.5, 0.30816650390625, 0.0, 3.814697265625e-06, 0.07305908203125])
    assert OVERLAP[2, 5].item() == 0.1808013916015625


def test_the_released_and_the_printed_measure():
    embeddings = wave((6, 8), 0.7)
    official = intersection_measure(embeddings, OVERLAP, "official").item()
    assert official == pytest.approx(0.5857191918469931, rel=1e-9)
    paper = intersection_measure(embeddings, OVERLAP, "paper").item()
    assert paper == pytest.approx(0.7028662637753591, rel=1e-9)
    # The released mean includes the diagonal.
    assert official == pytest.approx(5 / 6 * 0.7028632302162917 - math.log(1 + 1e-6) / 6, rel=1e-9)


def test_pairs_beyond_the_clamp_get_no_gradient():
    """Opposite patches that overlap: d is 1.3, cut off at 1, as released."""
    embeddings = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0.6, 0.8, 0, 0]], dtype=torch.float64).requires_grad_()
    overlap = torch.tensor([[1, 0.3, 0.2], [0.3, 1, 0], [0.2, 0, 1]], dtype=torch.float64)
    loss = intersection_measure(embeddings, overlap, "official")
    assert loss.item() == pytest.approx(3.387249165987337, rel=1e-9)
    loss.backward()
    released = torch.tensor(
        [
            [0.22222185185246907, 0.2962958024699588, 0.0, 0.0],
            [-0.3333325000020833, -0.44444333333611113, 0.0, 0.0],
            [0.9259239197575874, 0.0, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )
    # The released loss takes normalised rows; ours normalises, which leaves the gradient along the sphere.
    rows = embeddings.detach()
    expected = released - (released * rows).sum(1, keepdim=True) * rows
    torch.testing.assert_close(embeddings.grad, expected, rtol=1e-5, atol=1e-8)
    paper = intersection_measure(embeddings, overlap, "paper").item()
    assert paper == pytest.approx(-(math.log(1e-6) + math.log(0.6) + math.log(0.4)) / 3, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_measure_is_the_equation_averaged_over_volumes(form):
    embeddings = wave((3, 5, 4), 0.37)
    overlap = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 0.2
    overlap = (overlap + overlap.transpose(1, 2)) / 2
    # Only cosines that leave d below 1: the equation has no value beyond.
    embeddings = embeddings.abs()
    expected = sum(slow_measure(z, s, form) for z, s in zip(embeddings, overlap)) / 3
    assert intersection_measure(embeddings, overlap, form).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_right_overlaps_cost_nothing(form):
    embeddings = F.normalize(wave((6, 8), 0.7), dim=1)
    overlap = embeddings @ embeddings.T
    assert abs(intersection_measure(embeddings, overlap, form).item()) < 1e-5
    assert overlap_error(embeddings, overlap).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entirely_wrong_overlaps_stay_finite(form, dtype):
    """Equal embeddings where nothing overlaps: the gradient near d = 1 is 1 / (1 - d)."""
    embeddings = (torch.ones(4, 3, dtype=dtype) + torch.eye(4, 3, dtype=dtype) * 1e-4).requires_grad_()
    loss = intersection_measure(embeddings, torch.eye(4, dtype=dtype), form)
    loss.backward()
    assert loss.isfinite() and loss > 1 and embeddings.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_measure(form):
    embeddings = (wave((2, 4, 3), 0.7).abs() + 0.2).requires_grad_()
    overlap = torch.full((2, 4, 4), 0.31, dtype=torch.float64) + 0.6 * torch.eye(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: intersection_measure(z, overlap, form), (embeddings,))


def test_the_overlap_error_is_the_mean_over_different_patches():
    embeddings = wave((2, 4, 6), 0.7)
    overlap = OVERLAP[:4, :4].expand(2, 4, 4)
    errors = [abs(cosine(z[i], z[j]) - float(OVERLAP[i, j])) for z in embeddings for i, j in combinations(range(4), 2)]
    assert overlap_error(embeddings, overlap).item() == pytest.approx(sum(errors) / len(errors), rel=1e-9)


# ---- intersection contrast ------------------------------------------------------------------------------------------


def test_the_released_and_the_printed_contrast():
    projections = F.normalize(wave((3, 4, 8), 0.45, 0.2), dim=-1)
    assert intersection_contrast(projections, 1.0, "official").item() == pytest.approx(1.319277808966299, rel=1e-9)
    assert intersection_contrast(projections, 1.0, "paper").item() == pytest.approx(2.0396397803522106, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_contrast_is_the_equation(form, temperature):
    projections = wave((5, 4, 6), 0.31, 0.4, 2.0)
    expected = slow_contrast(projections, temperature, form)
    assert intersection_contrast(projections, temperature, form).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_shared_parts_that_agree_cost_less(form):
    apart = torch.eye(4, dtype=torch.float64)[None]
    together = apart.clone()
    together[0, 1] = together[0, 0]
    assert intersection_contrast(together, 0.1, form) < 0.01 < intersection_contrast(apart, 0.1, form)


@pytest.mark.parametrize("form", FORMS)
def test_no_pair_is_a_finite_loss(form):
    projections = torch.zeros(0, 4, 8, requires_grad=True)
    loss = intersection_contrast(projections, 1.0, form)
    loss.backward()
    assert loss == 0 and projections.grad.shape == projections.shape


@pytest.mark.parametrize("form", FORMS)
def test_parts_without_a_voxel_keep_finite_gradients(form):
    """Identical patches have no rest: a zero vector."""
    projections = wave((2, 4, 5), 0.3)
    projections[:, 2:] = 0
    projections.requires_grad_()
    loss = intersection_contrast(projections, 0.05, form)
    loss.backward()
    assert loss.isfinite() and projections.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_contrast(form):
    projections = wave((3, 4, 5), 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: intersection_contrast(q, 0.5, form), (projections,))


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    embeddings, projections = wave((6, 8), 0.7).to(dtype), wave((3, 4, 8), 0.45, 0.2).to(dtype)

    def losses(embeddings: Tensor, projections: Tensor) -> list[Tensor]:
        return [
            *(intersection_measure(embeddings, OVERLAP, form) for form in FORMS),
            *(intersection_contrast(projections, 1.0, form) for form in FORMS),
            overlap_error(embeddings, OVERLAP),
        ]

    with torch.autocast("cpu", dtype=dtype):
        narrow, wide = losses(embeddings, projections), losses(embeddings.double(), projections.double())
    assert {v.dtype for v in narrow} == {torch.float32} and {v.dtype for v in wide} == {torch.float64}
    assert [float(v) for v in narrow] == pytest.approx([float(v) for v in wide], rel=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"need overlaps \(..., N, N\), got \(3, 2\) and \(4, 4\)"):
        intersection_measure(torch.ones(3, 2), torch.ones(4, 4))
    with pytest.raises(ValueError, match="at least 2 patches of a volume, got 1"):
        intersection_measure(torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="'paper' or 'official', got 'eq1'"):
        intersection_measure(torch.ones(3, 2), torch.ones(3, 3), "eq1")
    with pytest.raises(ValueError, match="'paper' or 'official', got 'eq2'"):
        intersection_contrast(torch.ones(3, 4, 2), 1.0, "eq2")
    with pytest.raises(ValueError, match=r"must be \(P, 4, D\), got \(3, 3, 2\)"):
        intersection_contrast(torch.ones(3, 3, 2))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        intersection_contrast(torch.ones(3, 4, 2), 0)
