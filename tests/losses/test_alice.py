"""The losses of Alice against its printed equations and the values of its released code."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nnssl_stc3d.losses.alice import (
    blocks_to_image,
    dino_cross_entropy,
    image_to_blocks,
    masked_reconstruction,
    normalised_blocks,
    normalised_views,
    paired_cosine,
)


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


# Inputs of the reference values: two crops of 4^3 in blocks of 2^3.
IMAGES = torch.cat((wave((1, 1, 4, 4, 4), 0.05).abs(), wave((1, 1, 4, 4, 4), 0.07, 0.5).abs()))
DECODED = wave((2, 1, 4, 4, 4), 0.09, 0.2, 0.5)
BLOCKS = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
for h, w in ((0, 0), (1, 1), (1, 0)):
    BLOCKS[0, h, w] = BLOCKS[1, 1 - h, w] = True
MASK = BLOCKS.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
STUDENT_CLS, TEACHER_CLS = wave((2, 8), 0.7), wave((2, 8), 0.45, 0.3, 0.05)
STUDENT_TOKENS, TEACHER_TOKENS = wave((2, 5, 8), 0.21), wave((2, 5, 8), 0.17, 0.4, 0.05)


# ---- reconstruction -------------------------------------------------------------------------------------------------


def test_reconstruction_reference():
    query, key = (masked_reconstruction(DECODED[i], IMAGES[i], MASK[i]) for i in (0, 1))
    assert query.item() == pytest.approx(0.4785512057395162, rel=1e-12)
    assert key.item() == pytest.approx(0.6436879998366862, rel=1e-12)
    assert (query + key).item() == pytest.approx(1.1222392055762025, rel=1e-12)
    everywhere = masked_reconstruction(DECODED, IMAGES, torch.ones_like(MASK))
    assert 10 * everywhere.item() / 2 == pytest.approx(2.813059701816454, rel=1e-12)


def test_reconstruction_of_normalised_blocks_reference():
    target = normalised_blocks(IMAGES, (2, 2, 2))
    query, key = (masked_reconstruction(DECODED[i], target[i], MASK[i]) for i in (0, 1))
    assert (query + key).item() == pytest.approx(1.5230002642654026, rel=1e-9)


def test_reconstruction_is_eq1_voxel_by_voxel():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 4, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 1, 4, 3, 4, generator=generator) < 0.4
    total, count = 0.0, 0
    for n, c, z, y, x in product(*(range(s) for s in prediction.shape)):
        if mask[n, 0, z, y, x]:
            total += float(prediction[n, c, z, y, x] - target[n, c, z, y, x]) ** 2
            count += 1
    for given in (mask, mask.double(), mask.expand(prediction.shape)):
        assert masked_reconstruction(prediction, target, given).item() == pytest.approx(total / count, rel=1e-12)


def test_what_is_visible_does_not_matter():
    changed = torch.where(MASK, DECODED, 100.0)
    assert masked_reconstruction(changed, IMAGES, MASK) == masked_reconstruction(DECODED, IMAGES, MASK)
    changed.requires_grad_()
    masked_reconstruction(changed, IMAGES, MASK).backward()
    assert (changed.grad[~MASK] == 0).all() and (changed.grad[MASK] != 0).any()


def test_nothing_masked_is_zero_with_a_zero_gradient():
    prediction = DECODED.clone().requires_grad_()
    loss = masked_reconstruction(prediction, IMAGES, torch.zeros_like(MASK))
    loss.backward()
    assert loss == 0 and (prediction.grad == 0).all()


def test_constant_blocks_can_be_normalised():
    images = torch.full((1, 2, 4, 4, 4), 3.0)
    assert (normalised_blocks(images, (2, 2, 2)) == 0).all()


def test_blocks_are_normalised_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 6, 4, generator=generator) * 5 + 7
    result = normalised_blocks(images, (2, 3, 4))
    for n, z, y, x in product(range(2), (0, 2), (0, 3), (0,)):
        block = result[n, :, z : z + 2, y : y + 3, x : x + 4]
        assert block.mean().abs() < 1e-5 and block.std() == pytest.approx(1, abs=1e-4)
        original = images[n, :, z : z + 2, y : y + 3, x : x + 4]
        assert torch.allclose(block, (original - original.mean()) / original.std(), atol=1e-4)


def test_views_are_normalised_each_on_its_own_over_all_channels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    images = images * torch.tensor([0.1, 3.0]).view(2, 1, 1, 1, 1) + torch.arange(3.0).view(1, 3, 1, 1, 1)
    for image, result in zip(images, normalised_views(images)):
        torch.testing.assert_close(result, (image - image.mean()) / (image.var() + 0.01).sqrt())


def test_blocks_come_in_c_order_and_go_back():
    images = torch.arange(2 * 2 * 4 * 4 * 6.0).reshape(2, 2, 4, 4, 6)
    blocks = image_to_blocks(images, (2, 4, 3))
    assert blocks.shape == (2, 2 * 1 * 2, 2 * 2 * 4 * 3)
    assert torch.equal(blocks[1, 1], images[1, :, :2, :, 3:].flatten())
    assert torch.equal(blocks_to_image(blocks, (2, 1, 2), (2, 4, 3)), images)


def test_shapes_have_to_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 4, 4, 4\) and \(1, 1, 4, 4, 4\)"):
        masked_reconstruction(DECODED, IMAGES[:1], MASK)


# ---- agreement ------------------------------------------------------------------------------------------------------


def test_cosine_reference():
    """Eq. 2 across volumes, Eq. 5 within them, with SimSiam's loss; BYOL's is 2 - 2 cos per pair."""
    across = paired_cosine(STUDENT_CLS[None], TEACHER_CLS[None].flip(1)).item()
    assert across == pytest.approx(0.2114134271283299, rel=1e-9)
    assert 2 * across + 4 == pytest.approx(4.42282685425666, rel=1e-9)
    within = paired_cosine(STUDENT_TOKENS[None], TEACHER_TOKENS[None]).item()
    assert within == pytest.approx(-0.47060621937246466, rel=1e-9)


def test_cosine_is_eq5_token_by_token():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=torch.float64)
    total = 0.0
    for volume in range(3):
        for crop in range(2):
            for token in range(4):
                a, b = student[volume, crop, token], teacher[volume, crop, token]
                total -= float(a @ b / (a.norm() * b.norm())) / 4
    assert paired_cosine(student, teacher).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize(("warm", "cls", "tokens"), [
    (0.008, 10.77547467479829, 6.244076480141745),
    (0.01, 10.95610439666679, 6.454668794564682),
])  # fmt: skip
def test_dino_reference(warm, cls, tokens):
    centre = torch.zeros(8, dtype=torch.float64)
    across = dino_cross_entropy(STUDENT_CLS, TEACHER_CLS.flip(0), centre, 0.1, warm)
    within = dino_cross_entropy(STUDENT_TOKENS, TEACHER_TOKENS, centre, 0.1, warm)
    assert across.item() == pytest.approx(cls, rel=1e-9)
    assert within.item() == pytest.approx(tokens, rel=1e-9)
    everywhere = masked_reconstruction(DECODED, IMAGES, torch.ones_like(MASK))
    if warm == 0.008:
        assert (across + within + 5 * everywhere).item() == pytest.approx(19.832610856756485, rel=1e-9)
    else:
        assert (across + within + 5 * everywhere).item() == pytest.approx(20.223832895047924, rel=1e-9)


def test_dino_is_a_cross_entropy_of_centred_distributions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    centre = torch.randn(4, generator=generator, dtype=torch.float64)
    total = 0.0
    for row in range(3):
        target = [math.exp(float(t - c) / 0.5) for t, c in zip(teacher[row], centre)]
        guess = [math.exp(float(s) / 0.2) for s in student[row]]
        total -= sum(t / sum(target) * math.log(g / sum(guess)) for t, g in zip(target, guess))
    assert dino_cross_entropy(student, teacher, centre, 0.2, 0.5).item() == pytest.approx(total / 3, rel=1e-12)


def losses(student: Tensor, teacher: Tensor) -> list[Tensor]:
    return [
        paired_cosine(student, teacher),
        dino_cross_entropy(student, teacher, torch.zeros(student.shape[-1]), 0.1, 0.01),
    ]


def test_only_the_student_learns():
    for index in (0, 1):
        student, teacher = torch.randn(2, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
        student.requires_grad_(), teacher.requires_grad_()
        losses(student, teacher)[index].backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_gradients_are_finite_at_the_edges(value):
    """Embeddings of length 0, and logits that saturate both distributions."""
    for index in (0, 1):
        student, teacher = torch.full((2, 2, 3, 4), value), torch.zeros(2, 2, 3, 4)
        teacher[..., 0] = value
        student.requires_grad_()
        loss = losses(student, teacher)[index]
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 2, 3, 8, generator=generator).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [*losses(student.to(dtype), teacher.to(dtype))]
        found.append(masked_reconstruction(DECODED.to(dtype), IMAGES.to(dtype), MASK))
    expected = losses(student.to(dtype).float(), teacher.to(dtype).float())
    expected.append(masked_reconstruction(DECODED.to(dtype).float(), IMAGES.to(dtype).float(), MASK))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and a.item() == pytest.approx(b.item(), rel=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"must both be \(B, 2, ..., D\), got \(3, 4\)"):
        paired_cosine(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="must both be"):
        paired_cosine(torch.ones(1, 2, 4), torch.ones(1, 2, 5))
    with pytest.raises(ValueError, match="one shape"):
        dino_cross_entropy(torch.ones(1, 4), torch.ones(2, 4), torch.zeros(4), 0.1, 0.1)
    with pytest.raises(ValueError, match="temperatures must be positive, got 0.1 and 0"):
        dino_cross_entropy(torch.ones(1, 4), torch.ones(1, 4), torch.zeros(4), 0.1, 0)
