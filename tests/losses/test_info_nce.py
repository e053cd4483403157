"""InfoNCE against loops over the printed equation and against the released code of vox2vec."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnssl_stc3d.losses.info_nce import info_nce, masked_info_nce, retrieval


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_info_nce(z1: torch.Tensor, z2: torch.Tensor, temperature: float, groups=None) -> float:
    """STC3D Eq. 11 for each of the 2 N anchors, averaged."""
    z, n = [*z1, *z2], len(z1)
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        denominator = 0.0
        for k in range(2 * n):
            if k != i and (k == partner or groups is None or groups[k % n] == groups[i % n]):
                denominator += math.exp(cosine(z[i], z[k]) / temperature)
        total -= math.log(math.exp(cosine(z[i], z[partner]) / temperature) / denominator)
    return total / (2 * n)


def slow_masked(z: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, temperature: float) -> float:
    terms = []
    for a in range(len(z)):
        repelled = sum(math.exp(cosine(z[a], z[k]) / temperature) for k in range(len(z)) if negatives[a, k])
        for p in range(len(z)):
            if positives[a, p]:
                attracted = math.exp(cosine(z[a], z[p]) / temperature)
                terms.append(-math.log(attracted / (attracted + repelled)))
    return sum(terms) / max(1, len(terms))


def random_masks(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    relation = torch.randint(0, 3, (count, count), generator=torch.Generator().manual_seed(seed))
    return relation == 1, relation == 2


def test_the_released_value_of_vox2vec():
    k = torch.arange(48, dtype=torch.float64)
    z1 = wave((6, 8), 0.5)
    z2 = z1 + 0.2 * torch.cos(1.3 * k).reshape(6, 8)
    loss = info_nce(z1, z2, 0.1)
    assert loss.item() == pytest.approx(0.3118045532265337, rel=1e-12)
    # The paper sums over the 2 N anchors.
    assert info_nce(z1, z2, 0.1, form="paper").item() == pytest.approx(3.741654638718403, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_info_nce_is_the_equation(temperature):
    z1, z2 = wave((7, 5), 0.7), wave((7, 5), 0.31, 1.0, 3.0)
    assert float(info_nce(z1, z2, temperature)) == pytest.approx(slow_info_nce(z1, z2, temperature), rel=1e-10)


def test_negatives_can_be_restricted_to_groups():
    z1, z2 = wave((6, 5), 0.7), wave((6, 5), 0.31, 1.0)
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    loss = info_nce(z1, z2, 0.2, groups)
    assert loss.item() == pytest.approx(slow_info_nce(z1, z2, 0.2, groups.tolist()), rel=1e-10)
    assert torch.equal(info_nce(z1, z2, 0.2, torch.zeros(6)), info_nce(z1, z2, 0.2))
    # A point that is alone in its group has nothing to be told apart from.
    assert float(info_nce(z1, z2, 0.2, torch.arange(6))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_masked_info_nce_is_the_equation(seed):
    z = wave((9, 6), 0.43, seed)
    positives, negatives = random_masks(9, seed)
    expected = slow_masked(z, positives, negatives, 0.3)
    assert float(masked_info_nce(z, positives, negatives, 0.3)) == pytest.approx(expected, rel=1e-10)


def test_pairs_that_are_neither_do_not_count():
    z = wave((6, 4), 0.43)
    positives, negatives = torch.zeros(6, 6, dtype=torch.bool), torch.zeros(6, 6, dtype=torch.bool)
    positives[0, 1] = negatives[0, 2] = True
    loss = masked_info_nce(z, positives, negatives, 0.3)
    z[3:] = 100.0
    assert torch.equal(masked_info_nce(z, positives, negatives, 0.3), loss)


def test_the_length_of_embeddings_does_not_matter():
    z1, z2 = wave((5, 4), 0.7), wave((5, 4), 0.31, 1.0)
    scaled = z1 * torch.tensor([1e-3, 1, 10, 1e3, 7])[:, None]
    assert float(info_nce(scaled, z2, 0.1)) == pytest.approx(float(info_nce(z1, z2, 0.1)), rel=1e-9)


def test_identical_embeddings_give_the_entropy_of_a_guess():
    z = torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    loss = info_nce(z, z, 0.1)
    assert loss.item() == pytest.approx(math.log(15), rel=1e-9)
    loss.backward()
    assert z.grad.isfinite().all()


def test_a_step_along_the_gradient_helps():
    z1 = wave((6, 4), 0.7).requires_grad_()
    z2 = wave((6, 4), 0.31, 1.0)
    loss = info_nce(z1, z2, 0.1)
    loss.backward()
    assert info_nce(z1.detach() - 0.01 * z1.grad, z2, 0.1) < loss


def test_gradients_are_those_of_the_function():
    positives, negatives = random_masks(6)
    z = wave((6, 3), 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: masked_info_nce(x, positives, negatives, 0.5), (z,))
    assert torch.autograd.gradcheck(lambda x: info_nce(x[:3], x[3:], 0.5), (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case", ["no positives", "no negatives", "neither", "nothing", "zero vectors", "tiny temperature"]
)
def test_edge_cases_have_finite_gradients(case, dtype):
    count = 0 if case == "nothing" else 6
    positives, negatives = random_masks(count)
    if case in ("no positives", "neither"):
        positives = torch.zeros_like(positives)
    if case in ("no negatives", "neither"):
        negatives = torch.zeros_like(negatives)
    z = (wave((count, 4), 0.7) * (case != "zero vectors")).to(dtype).requires_grad_()
    loss = masked_info_nce(z, positives, negatives, 1e-3 if case == "tiny temperature" else 0.1)
    loss.backward()
    assert loss.dtype == dtype and loss.isfinite() and z.grad.isfinite().all()
    if case in ("no positives", "no negatives", "neither", "nothing"):
        assert loss.item() == 0 and not z.grad.any()


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_pairs_have_no_negatives(count):
    z = wave((count, 4), 0.7).requires_grad_()
    loss = info_nce(z, z * 2, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and not z.grad.abs().gt(1e-12).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    z1, z2 = wave((16, 8), 0.7).to(dtype), wave((16, 8), 0.31, 1.0).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = info_nce(z1, z2, 0.05)
        wide = info_nce(z1.double(), z2.double(), 0.05)
    assert loss.dtype == torch.float32 and wide.dtype == torch.float64
    assert loss.item() == pytest.approx(float(wide), rel=1e-5)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3, 2), (4, 3, 2)), ((4,), (4,))])
def test_shapes_are_checked(shapes):
    with pytest.raises(ValueError, match=r"must both be \(N, D\), got"):
        info_nce(torch.ones(shapes[0]), torch.ones(shapes[1]), 0.1)


@pytest.mark.parametrize("temperature", [0, -0.1])
def test_the_temperature_is_checked(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        info_nce(F.normalize(torch.ones(2, 3)), torch.ones(2, 3), temperature)


# ---- some rows at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 26, 1000])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_rows_at_a_time_give_what_all_at_once_gives(rows, grouped, form):
    groups = torch.arange(13) // 4 if grouped else None
    results = []
    for at_once in (rows, None):
        z1, z2 = wave((13, 6), 0.7).requires_grad_(), wave((13, 6), 0.31, 1.0).requires_grad_()
        loss = info_nce(z1, z2, 0.1, groups, form, at_once)
        loss.backward()
        results.append((loss.detach(), z1.grad, z2.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_half_precision_in_rows_is_computed_in_float32():
    z1, z2 = wave((16, 8), 0.7).bfloat16().requires_grad_(), wave((16, 8), 0.31, 1.0).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(z1, z2, 0.05, rows=5)
    loss.backward()
    assert loss.dtype == torch.float32 and z1.grad.isfinite().all()
    assert loss.item() == pytest.approx(info_nce(z1.detach().double(), z2.double(), 0.05).item(), rel=1e-5)


def test_similarities_are_never_held_all_at_once():
    """The largest tensor that is made has ``rows`` rows."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen = max(self.seen, result.numel())
            return result

    z = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Largest() as chunked:
        info_nce(z, z * 2, 0.1, rows=20).backward()
    with Largest() as dense:
        info_nce(z, z * 2, 0.1, rows=None).backward()
    assert chunked.seen == 20 * 600 and dense.seen == 600 * 600


@pytest.mark.parametrize("options", [{"rows": 0}, {"form": "mean"}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), 0.1, **options)


# ---- retrieval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 100])
def test_retrieval_counts_the_points_that_find_themselves(rows):
    first = torch.eye(5)
    second = 3 * torch.eye(5)
    assert retrieval(first, second, rows) == 1
    # Two that are swapped miss each other.
    assert retrieval(first, second[[1, 0, 2, 3, 4]], rows) == pytest.approx(0.6)
    assert retrieval(first[:0], second[:0]) == 0


def test_retrieval_looks_for_the_first_points_among_the_second():
    first, second = torch.eye(2), torch.tensor([[1.0, 0.1], [1.0, 0.2]])
    assert retrieval(first, second) == 1
    # Both of the others lie nearest to the first point.
    assert retrieval(second, first) == 0.5


def test_retrieval_of_random_embeddings_is_chance():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(400, 8, generator=generator).bfloat16() for _ in range(2))
    assert retrieval(first, second) < 0.02
