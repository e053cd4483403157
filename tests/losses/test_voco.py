"""The losses of VoCo against its printed equations and the values of its released code."""

from __future__ import annotations

import math

import pytest
import torch

from nnssl_stc3d.losses.voco import base_discrepancy, position_logits, position_prediction

# Overlap labels of the crops at (80, 144) and (111, 77) with 4 x 4 bases of 64 voxels.
LABELS = torch.zeros(2, 16, dtype=torch.float64)
LABELS[0, [1, 2, 5, 6]] = torch.tensor([0.0625, 0.1875, 0.1875, 0.5625], dtype=torch.float64)
LABELS[1, [4, 5, 8, 9]] = torch.tensor(
    [0.227294921875, 0.538330078125, 0.069580078125, 0.164794921875], dtype=torch.float64
)


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_prediction(logits: torch.Tensor, labels: torch.Tensor, form: str) -> float:
    """Equations 2 and 3, or the released loss, for one volume."""
    if form == "paper":
        terms = [
            -math.log(1 - abs(float(y) - float(p))) for row, truth in zip(logits, labels) for p, y in zip(row, truth)
        ]
        return sum(terms) / len(terms)
    weighted = weights = squared = apart = 0.0
    for row, truth in zip(logits.tolist(), labels.tolist()):
        for p, y in zip(row, truth):
            weighted -= y * math.log(1 - abs(y - p) + 1e-6)
            weights += y
            if y == 0:
                squared += p * p
                apart += 1
    return weighted / (weights + 1e-6) + squared / (apart + 1e-6)


def random_case(volumes: int = 3, views: int = 4, bases: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(volumes, views, bases, generator=generator, dtype=torch.float64) * 0.9
    labels = torch.rand(volumes, views, bases, generator=generator, dtype=torch.float64) * 0.9
    return logits, labels * (labels > 0.4)


# ---- position prediction --------------------------------------------------------------------------------------------


def test_logits_are_rectified_cosines():
    views, bases = wave((2, 8), 0.7), wave((16, 8), 0.3, 0.5)
    logits = position_logits(views, bases)
    expected = [[max(0.0, cosine(v, b)) for b in bases] for v in views]
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    # From the released code.
    assert logits[0, :3].tolist() == pytest.approx([0.25259704953574424, 0, 0.04000836171133687], rel=1e-9, abs=1e-15)
    assert logits[1, -3:].tolist() == pytest.approx([0.5335174997485199, 0.0, 0.5774925461002192], rel=1e-9, abs=1e-15)


def test_logits_of_each_volume_use_its_own_bases():
    views, bases = wave((3, 2, 8), 0.7), wave((3, 5, 8), 0.3, 0.5)
    logits = position_logits(views, bases)
    for volume in range(3):
        torch.testing.assert_close(logits[volume], position_logits(views[volume], bases[volume]))


def test_the_released_values():
    logits = position_logits(wave((2, 8), 0.7), wave((16, 8), 0.3, 0.5))
    official = float(position_prediction(logits, LABELS, "official"))
    assert official == pytest.approx(0.6131549139033352, rel=1e-9)
    assert official == pytest.approx(0.5307778952522071 + 0.08237701865112812, rel=1e-9)
    assert float(position_prediction(logits, LABELS, "paper")) == pytest.approx(0.2653725242406789, rel=1e-9)


def test_a_full_step_of_the_released_head():
    """Two volumes with two crops each: student and EMA teacher, symmetric logits, mean over volumes."""
    student = wave((8, 8), 0.37)
    teacher = 0.9 * wave((8, 8), 0.23, 1.0) + 0.1 * student
    assert teacher[0, :4].tolist() == pytest.approx(
        [0.7573238863271069, 0.8855796234251252, 0.963921327486779, 0.9811358032559321]
    )
    crops, bases = wave((2, 2, 8), 0.9), wave((2, 16, 8), 0.11, 0.3)
    labels = torch.zeros(2, 2, 16, dtype=torch.float64)
    labels[0] = LABELS
    labels[1, 0, 0] = 1
    labels[1, 1, [9, 10, 13, 14]] = torch.tensor([0.0078125, 0.0078125, 0.4921875, 0.4921875], dtype=torch.float64)
    logits = (
        position_logits(crops @ student.T, bases @ teacher.T) + position_logits(crops @ teacher.T, bases @ student.T)
    ) / 2
    assert float(position_prediction(logits, labels, "official")) == pytest.approx(
        0.7015407937399064 + 0.037144536726288147, rel=1e-9
    )
    assert float(base_discrepancy(bases @ student.T, "official")) == pytest.approx(0.2398446101934109, rel=1e-9)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_prediction_is_the_equation_averaged_over_volumes(form):
    logits, labels = random_case()
    expected = sum(slow_prediction(p, y, form) for p, y in zip(logits, labels)) / len(logits)
    assert float(position_prediction(logits, labels, form)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_a_perfect_prediction_costs_nothing(form):
    _, labels = random_case()
    assert float(position_prediction(labels, labels, form)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["official", "paper"])
def test_a_view_that_is_entirely_wrong_stays_finite(form, dtype):
    """d = 1: the equation's logarithm of 0 is cut off at 1e-6, as released."""
    labels = torch.zeros(1, 16, dtype=dtype)
    labels[0, 0] = 1
    logits = torch.zeros(1, 16, dtype=dtype, requires_grad=True)
    loss = position_prediction(logits, labels, form)
    loss.backward()
    assert logits.grad.isfinite().all()
    if form == "official":
        assert loss.item() == pytest.approx(13.815496742467532, rel=1e-6)
        # The wrong view is still pulled towards its base.
        assert logits.grad[0, 0] < 0
    else:
        assert loss.item() == pytest.approx(-math.log(1e-6) / 16, rel=1e-6)


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_views_outside_all_bases_stay_finite(form, value):
    logits = torch.full((2, 3, 4), value, requires_grad=True)
    loss = position_prediction(logits, torch.zeros(2, 3, 4), form)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    if value == 0:
        assert loss.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_gradients_of_the_prediction(form):
    logits, labels = random_case(2, 2, 3)
    # Away from the kinks at logit = label.
    logits = torch.where((logits - labels).abs() < 0.05, logits + 0.1, logits).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: position_prediction(x, labels, form), (logits,))


def test_identical_embeddings_keep_finite_gradients():
    z = torch.ones(2, 6, 4, requires_grad=True)
    loss = position_prediction(position_logits(z[:, 4:], z[:, :4]), torch.eye(4)[:2].expand(2, 2, 4))
    (loss + base_discrepancy(z[:, :4], "symmetric")).backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# ---- discrepancy ----------------------------------------------------------------------------------------------------


def test_the_released_discrepancy_and_its_gradient():
    bases = wave((16, 8), 0.3, 0.5).requires_grad_()
    loss = base_discrepancy(bases, "official")
    assert loss.item() == pytest.approx(0.10068476666167409, rel=1e-9)
    loss.backward()
    norms = [
        0.008220420245910217, 0.00825907943871305, 0.005265444027515126, 0.009893373414091718, 0.0041695407380840524,
        0.004017627477008165, 0.004895382435309829, 0.0021357957699324527, 0.004418746835597606, 0.0019030357993714319,
        0.004146923477094325, 0.0024732856479123965, 0.0003542430893559341, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert bases.grad.norm(dim=1).tolist() == pytest.approx(norms, rel=1e-6, abs=1e-15)


def test_the_printed_discrepancy():
    bases = wave((16, 8), 0.3, 0.5)
    assert float(base_discrepancy(bases, "paper")) == pytest.approx(0.4043757899404098, rel=1e-9)


@pytest.mark.parametrize("form", ["paper", "official", "symmetric"])
def test_discrepancy_is_the_equation_averaged_over_volumes(form):
    bases = wave((3, 5, 4), 0.37)
    values = []
    for volume in bases:
        pairs = [cosine(volume[i], volume[j]) for i in range(5) for j in range(i + 1, 5)]
        values.append(sum(abs(c) if form == "paper" else max(0.0, c) ** 2 for c in pairs) / len(pairs))
    assert float(base_discrepancy(bases, form)) == pytest.approx(sum(values) / 3, rel=1e-10)


def test_the_symmetric_form_moves_every_base():
    bases = wave((6, 4), 0.3, 0.5)
    gradients = {}
    for form in ("official", "symmetric"):
        leaf = bases.clone().requires_grad_()
        base_discrepancy(leaf, form).backward()
        gradients[form] = leaf.grad.norm(dim=1)
    assert gradients["official"][-1] == 0 and gradients["symmetric"].min() > 0


def test_different_bases_cost_nothing_and_equal_ones_the_most():
    # Simplex corners: all cosines are negative.
    different = torch.eye(4, dtype=torch.float64) - 0.25
    assert float(base_discrepancy(different, "symmetric")) == 0
    assert float(base_discrepancy(torch.ones(4, 3, dtype=torch.float64), "symmetric")) == pytest.approx(1)


@pytest.mark.parametrize("form", ["paper", "symmetric"])
def test_gradients_of_the_discrepancy(form):
    bases = wave((4, 3), 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: base_discrepancy(x, form), (bases,))


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    views, bases = wave((2, 2, 8), 0.7).to(dtype), wave((2, 16, 8), 0.3, 0.5).to(dtype)

    def losses(views: torch.Tensor, bases: torch.Tensor) -> list[torch.Tensor]:
        logits = position_logits(views, bases)
        return [
            logits.sum(),
            *(position_prediction(logits, LABELS.expand(2, 2, 16), form) for form in ("official", "paper")),
            *(base_discrepancy(bases, form) for form in ("paper", "official", "symmetric")),
        ]

    with torch.autocast("cpu", dtype=dtype):
        narrow, wide = losses(views, bases), losses(views.double(), bases.double())
    assert {v.dtype for v in narrow} == {torch.float32} and {v.dtype for v in wide} == {torch.float64}
    assert [float(v) for v in narrow] == pytest.approx([float(v) for v in wide], rel=1e-4)


def test_float64_labels_do_not_widen_the_loss():
    logits, labels = random_case()
    assert position_prediction(logits.float(), labels).dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        position_prediction(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="'paper' or 'official', got 'printed'"):
        position_prediction(torch.ones(2, 3), torch.ones(2, 3), "printed")
    with pytest.raises(ValueError, match="at least 2 bases, got 1"):
        base_discrepancy(torch.ones(1, 3))
    with pytest.raises(ValueError, match="'symmetric', got 'eq5'"):
        base_discrepancy(torch.ones(2, 3), "eq5")
