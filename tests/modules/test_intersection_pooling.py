"""Pooling over intersections: the released values, a mask for each pair, and turned and scaled views."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.pimpic import intersection_contrast
from nnssl_stc3d.modules.heads import Projector
from nnssl_stc3d.modules.intersection_pooling import box_weights, pool_boxes, pool_masks, soft_masks
from nnssl_stc3d.views.geometry import intersection_boxes, overlap_fraction, relative_maps
from nnssl_stc3d.views.samplers import TransformRanges, transformation
from nnssl_stc3d.views.spec import ViewSpecs

# Three patches of 16^3, as in the reference values.
VIEW_SHAPE = (16, 16, 16)
STARTS = [(0, 0, 0), (5, 3, 9), (14, 1, 2)]


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def specs_of(starts: list[tuple[float, ...]], view_shape: tuple[int, ...] = VIEW_SHAPE) -> ViewSpecs:
    """Patches of one volume that start at these voxels."""
    start = torch.tensor(starts, dtype=torch.float64)[None]
    center = start + (torch.tensor(view_shape) - 1) / 2
    source = torch.zeros(center.shape[:2], dtype=torch.long)
    return ViewSpecs(source, center, torch.eye(3, dtype=torch.float64).expand(1, len(starts), 3, 3))


def boxes_of(specs: ViewSpecs, view_shape: tuple[int, ...] = VIEW_SHAPE) -> Tensor:
    return intersection_boxes(specs, specs, view_shape)[0].float()


def reference_features() -> list[Tensor]:
    return [
        wave((3, 2, 16, 16, 16), 0.013), wave((3, 4, 8, 8, 8), 0.031, 0.4), wave((3, 8, 4, 4, 4), 0.11, 0.9),
    ]  # fmt: skip


def parts_of_pairs(inside: Tensor, outside: Tensor) -> Tensor:
    """Shared part in the first and the second, rest of the first and the second, of each pair i < j."""
    return torch.stack(
        [
            torch.stack((inside[i, j], inside[j, i], outside[i, j], outside[j, i]))
            for i, j in combinations(range(len(inside)), 2)
        ]
    )


def reference_parts() -> Tensor:
    boxes = boxes_of(specs_of(STARTS))
    pooled = [pool_boxes(f, boxes, VIEW_SHAPE) for f in reference_features()]
    return parts_of_pairs(*(torch.cat(part, dim=-1) for part in zip(*pooled)))


def masked_means(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means of one map ``(C, Z, Y, X)`` inside and outside a mask."""
    return tuple(((features * m).sum((1, 2, 3)) / m.sum() if m.sum() > 0 else features[:, 0, 0, 0] * 0)
                 for m in (mask, 1 - mask))  # fmt: skip


# ---- the released values --------------------------------------------------------------------------------------------


def test_the_boxes_of_the_reference():
    boxes = boxes_of(specs_of(STARTS))
    expected = {
        (0, 1): [[5, 3, 9], [16, 16, 16]],
        (1, 0): [[0, 0, 0], [11, 13, 7]],
        (0, 2): [[14, 1, 2], [16, 16, 16]],
        (2, 0): [[0, 0, 0], [2, 15, 14]],
        (1, 2): [[9, 0, 0], [16, 14, 9]],
        (2, 1): [[0, 2, 7], [7, 16, 16]],
        (1, 1): [[0, 0, 0], [16, 16, 16]],
    }
    for (i, j), box in expected.items():
        torch.testing.assert_close(boxes[i, j], torch.tensor(box).float(), rtol=0, atol=1e-5)


def test_the_released_features():
    parts = reference_parts()
    assert parts.shape == (3, 4, 14) and parts.dtype == torch.float64
    expected = {
        0: [
            [0.012878719331783155, -0.002137583083067326, 0.014044385361900462, -0.000640793815012012],
            [0.027811576866561345, 0.010514755554111372, 0.012154001213881414, 0.013082125587594258],
            [0.03897952426053549, 0.0041718879538969675, -0.011979750442263414, 0.015191812637644792],
        ],
        5: [
            [-0.01094540120211176, 0.07828341823354237, 0.08994230401757272, 0.054071540125285006],
            [0.45102864833224915, 0.5702305140016092, 0.008429212441017181, -0.03777624258892763],
            [0.04687171601852002, 0.12512947073524586, 0.06771554791332829, -0.0075569455348936275],
        ],
        13: [
            [0.04912012925197211, -0.2437903587385338, 0.17992031783001317, -0.3337860955489403],
            [0.7805425010340438, 0.4078357425769471, -0.08568717087005538, 0.2160165337095651],
            [-0.6027418054900483, 0.25396193953081897, -0.11841522749444208, 0.2699769737662635],
        ],
    }
    for channel, values in expected.items():
        torch.testing.assert_close(
            parts[..., channel], torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )
    assert parts.sum().item() == pytest.approx(0.020846387550147782, rel=1e-7)


def test_the_released_loss_from_feature_maps_on():
    projector = Projector(14, 6, 6).double()
    with torch.no_grad():
        linear = [m for m in projector if isinstance(m, nn.Linear)]
        for index, layer in enumerate(linear):
            layer.weight.copy_(wave(tuple(layer.weight.shape), 0.37, 2 * index, 0.5))
        linear[-1].bias.copy_(wave((6,), 0.37, 5, 0.5))
    projections = projector(reference_parts().flatten(0, 1)).unflatten(0, (3, 4))
    first = nn.functional.normalize(projections, dim=-1)[..., 0]
    expected = [
        [-0.7825059295176868, -0.6534642136077129, -0.876086325128858, -0.8722980989993669],
        [-0.7868789739845077, -0.5453826354123505, -0.60258260533242, -0.8702352600163696],
        [-0.6713750621273904, -0.8917231091040986, -0.8897345943120404, -0.8795314650989001],
    ]
    torch.testing.assert_close(first, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    assert intersection_contrast(projections, 1.0, "official").item() == pytest.approx(1.13534266124875, rel=1e-6)


def test_identical_patches_have_no_rest():
    boxes = boxes_of(specs_of([(3, 4, 5), (3, 4, 5)]))
    inside, outside = pool_boxes(wave((2, 3, 8, 8, 8), 0.1).float(), boxes, VIEW_SHAPE)
    assert not outside.any() and inside.abs().min() > 0


# ---- boxes against a mask for each pair -----------------------------------------------------------------------------


@pytest.mark.parametrize("map_shape", [(16, 24, 20), (16, 12, 10), (4, 6, 5), (1, 2, 1)])
def test_boxes_are_pooled_as_with_a_mask_for_each_pair(map_shape):
    """Per-axis strides, boxes between voxels, and views that do not overlap at all."""
    view_shape = (16, 24, 20)
    rng = np.random.default_rng(0)
    specs = specs_of([tuple(rng.uniform(0, 20, size=3)) for _ in range(5)] + [(90.0, 90.0, 90.0)], view_shape)
    boxes = boxes_of(specs, view_shape)
    features = wave((6, 3, *map_shape), 0.7)
    inside, outside = pool_boxes(features, boxes, view_shape)
    for i, j in product(range(6), range(6)):
        mask = torch.zeros(map_shape, dtype=torch.float64)
        # As released: from floor to ceil, in voxels of the map.
        ends = [
            (math.floor(a * n / v + 1e-3), math.ceil(b * n / v - 1e-3))
            for (a, b), n, v in zip(boxes[i, j].T.tolist(), map_shape, view_shape)
        ]
        mask[tuple(slice(a, b) for a, b in ends)] = 1
        expected = masked_means(features[i], mask)
        torch.testing.assert_close(inside[i, j], expected[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(outside[i, j], expected[1], rtol=1e-9, atol=1e-12)


def test_weights_cover_every_voxel_that_the_box_touches():
    box = torch.tensor([[[[3.0, 0.0, 5.9], [7.0, 0.5, 6.0001]]]])
    z, y, x = box_weights(box, (8, 8, 8), (4, 8, 8))
    assert z[0, 0].tolist() == [0, 1, 1, 1]
    assert y[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert x[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("pool", ["boxes", "masks"])
def test_gradients_of_pooling(pool):
    specs = specs_of([(0, 0, 0), (1, 2, 1), (3, 0, 2)], (4, 4, 4))
    features = wave((3, 2, 4, 2, 4), 0.7).requires_grad_()
    if pool == "boxes":
        boxes = boxes_of(specs, (4, 4, 4))
        assert torch.autograd.gradcheck(lambda f: pool_boxes(f, boxes, (4, 4, 4)), (features,))
    else:
        matrix, shift = (m[0] for m in relative_maps(specs, specs))
        assert torch.autograd.gradcheck(lambda f: pool_masks(f, matrix, shift, (4, 4, 4)), (features,))


def test_half_precision_is_pooled_in_float32():
    specs = specs_of(STARTS)
    features = wave((3, 4, 16, 16, 16), 0.013)
    matrix, shift = (m[0] for m in relative_maps(specs, specs))
    for pool, arguments in ((pool_boxes, (boxes_of(specs),)), (pool_masks, (matrix, shift))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = pool(features.bfloat16(), *arguments, VIEW_SHAPE)
        wide = pool(features.bfloat16().double(), *arguments, VIEW_SHAPE)
        for a, b in zip(narrow, wide):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


# ---- turned and scaled views ----------------------------------------------------------------------------------------


def turned(seed: int, ranges: TransformRanges, count: int = 4) -> ViewSpecs:
    """Views of 16^3 around one place, each turned and scaled on its own."""
    rng = np.random.default_rng(seed)
    matrices = [transformation(ranges, (2.0, 1.0, 1.3), False, rng) for _ in range(count)]
    centers = [rng.uniform(20, 30, size=3) for _ in range(count)]
    return ViewSpecs(
        torch.zeros(1, count, dtype=torch.long), torch.tensor(np.stack(centers))[None],
        torch.tensor(np.stack(matrices))[None],
    )  # fmt: skip


def test_soft_masks_of_parallel_views_are_the_covered_fraction_of_each_voxel():
    specs = specs_of([(0, 0, 0), (2.25, -3.5, 1.0)])
    matrix, shift = (m[0, 0, 1:] for m in relative_maps(specs, specs))
    (mask,) = soft_masks(matrix, shift, VIEW_SHAPE, (8, 8, 16))
    # Covered from 2.25 to 16, from 0 to 12.5 and from 1 to 16, in voxels of the view.
    z = torch.tensor([0, 0.875, 1, 1, 1, 1, 1, 1])
    y = torch.tensor([1, 1, 1, 1, 1, 1, 0.25, 0])
    x = torch.tensor([0] + [1] * 15)
    torch.testing.assert_close(mask, (z[:, None, None] * y[:, None] * x).double())


@pytest.mark.parametrize("map_shape", [(16, 16, 16), (8, 8, 8), (4, 4, 4)])
def test_soft_masks_hold_the_overlap_of_turned_and_scaled_views(map_shape):
    for seed in range(5):
        specs = turned(seed, TransformRanges(rotation=40, scaling=(0.8, 1.25)))
        matrix, shift = (m[0] for m in relative_maps(specs, specs))
        overlap = overlap_fraction(specs, specs, VIEW_SHAPE)[0]
        for i in range(4):
            share = soft_masks(matrix[i], shift[i], VIEW_SHAPE, map_shape).mean((1, 2, 3))
            torch.testing.assert_close(share.float(), overlap[i], rtol=0, atol=0.04)


def test_masks_follow_the_points_of_the_other_view():
    """A voxel counts fully where its centre lies deep inside the other view, and not at all where it lies far out."""
    specs = turned(1, TransformRanges(rotation=40, scaling=(0.8, 1.25)))
    matrix, shift = (m[0] for m in relative_maps(specs, specs))
    masks = soft_masks(matrix[0], shift[0], VIEW_SHAPE, VIEW_SHAPE)
    axes = torch.arange(16.0, dtype=torch.float64) - 7.5
    offsets = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij"), dim=-1)
    for j in range(4):
        places = (offsets @ specs.matrix[0, 0].T + specs.center[0, 0] - specs.center[0, j]) @ torch.linalg.inv(
            specs.matrix[0, j]
        ).T
        depth = 8 - places.abs().amax(-1)
        assert (masks[j][depth > 1.5] == 1).all() and not masks[j][depth < -1.5].any()
        assert ((masks[j] > 0) & (masks[j] < 1)).any() or j == 0


def test_masks_are_pooled_as_weighted_means():
    specs = turned(2, TransformRanges(rotation=30, scaling=(0.8, 1.25)))
    matrix, shift = (m[0] for m in relative_maps(specs, specs))
    features = wave((4, 3, 8, 8, 8), 0.7)
    inside, outside = pool_masks(features, matrix, shift, VIEW_SHAPE)
    for i, j in product(range(4), range(4)):
        (mask,) = soft_masks(matrix[i, j : j + 1], shift[i, j : j + 1], VIEW_SHAPE, (8, 8, 8))
        expected = masked_means(features[i], mask)
        torch.testing.assert_close(inside[i, j], expected[0], rtol=1e-9, atol=1e-9)
        if i == j:
            assert not outside[i, j].any()
        else:
            torch.testing.assert_close(outside[i, j], expected[1], rtol=1e-9, atol=1e-9)


def test_both_ways_agree_where_patches_lie_on_the_voxels_of_the_map():
    specs = specs_of([(0, 0, 0), (4, 8, 2), (6, 2, 4)])
    features = wave((3, 5, 8, 8, 8), 0.7)
    matrix, shift = (m[0] for m in relative_maps(specs, specs))
    for a, b in zip(pool_boxes(features, boxes_of(specs), VIEW_SHAPE), pool_masks(features, matrix, shift, VIEW_SHAPE)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
