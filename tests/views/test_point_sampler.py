"""Pairs of overlapping boxes and the body voxels that both see."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.point_sampler import PointPairSampler, _box_start, body_voxel
from nnssl_stc3d.views.samplers import Sampled, TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, view_to_source

VIEW = (8, 12, 10)
ROTATED = TransformRanges(rotation=40, translation=0.1, scaling=(0.7, 1.3), min_overlap=0.3)


def make(**changes) -> PointPairSampler:
    return PointPairSampler(
        **({"view_shape": VIEW, "spacing": (2.0, 1.0, 1.0), "in_plane": False, "points": 50} | changes)
    )


def seen_voxels(sampled: Sampled, view_shape=VIEW) -> tuple[torch.Tensor, torch.Tensor]:
    """Volume positions of the points in the first and in the second view of each pair, each ``(pairs, P, 3)``."""
    specs = ViewSpecs(*(field[None] for field in sampled.specs))
    points = sampled.targets["points"].flatten(0, 1)[None].double()
    positions = view_to_source(specs, points, view_shape)[0].unflatten(0, (-1, 2))
    positions = positions + torch.tensor(sampled.boxes[0][0])
    return positions[:, 0], positions[:, 1]


def half_body(shape) -> Guide:
    """Cells of about 4 voxels; the upper half along x is body."""
    cells = tuple(max(1, n // 4) for n in shape)
    body = np.zeros(cells, dtype=bool)
    body[..., cells[2] // 2 :] = True
    return Guide(tuple(n / c for n, c in zip(shape, cells)), body)


# ---- boxes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voxel", "low", "high"),
    [
        ((150, 20, 40), (23, 0, 9), (73, 21, 29)),
        ((0, 0, 0), (0, 0, 0), (1, 1, 1)),
        ((199, 179, 59), (72, 52, 28), (73, 53, 29)),
        ((100, 90, 30), (0, 0, 0), (73, 53, 29)),
    ],
)
def test_boxes_start_where_those_of_the_released_code_do(voxel, low, high):
    """Image (200, 180, 60), patch (128, 128, 32): lowest and highest start, the latter exclusive."""
    rng = np.random.default_rng(0)
    for axis, (length, extent) in enumerate(zip((200, 180, 60), (128.0, 128.0, 32.0))):
        starts = {_box_start(voxel[axis], length, extent, rng) for _ in range(2000)}
        assert (min(starts), max(starts) + 1) == (low[axis], high[axis])


def test_a_box_of_no_whole_size_holds_the_voxel_and_stays_inside():
    rng = np.random.default_rng(0)
    for voxel in range(20):
        for extent in (6.3, 19.5):
            start = _box_start(voxel, 20, extent, rng)
            assert 0 <= start <= 20 - extent and start - 0.5 <= voxel <= start + extent - 0.5


def test_untransformed_views_are_crops_on_whole_voxels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sampled = make(pairs=2).sample([(20, 30, 25)], rng)
        assert sampled.specs.source.tolist() == [0] * 4
        assert torch.equal(sampled.specs.matrix, torch.eye(3).double().expand(4, 3, 3))
        start = sampled.specs.center - (torch.tensor(VIEW) - 1) / 2
        assert torch.equal(start, start.round()) and (start >= 0).all()
        (low, high) = sampled.boxes[0]
        assert (start + torch.tensor(VIEW) <= torch.tensor(high) - torch.tensor(low)).all()


@pytest.mark.parametrize("transforms", [TransformRanges.none(), ROTATED])
@pytest.mark.parametrize("shape", [(40, 50, 45), (16, 16, 16), (17, 70, 16)])
def test_views_lie_inside_the_volume_even_where_it_is_smaller(transforms, shape):
    sampler = make(view_shape=(16, 24, 24), pairs=3, transforms=transforms)
    rng = np.random.default_rng(0)
    for _ in range(10):
        sampled = sampler.sample([shape], rng, [half_body(shape)])
        half = sampled.specs.matrix.abs() @ torch.tensor((8.0, 12.0, 12.0)).double()
        center = sampled.specs.center + torch.tensor(sampled.boxes[0][0])
        assert (center - half >= -0.5 - 1e-6).all() and (center + half <= torch.tensor(shape) - 0.5 + 1e-6).all()
        assert sampled.targets["points_inside"].any()


def test_volumes_that_show_next_to_nothing_are_refused():
    with pytest.raises(ValueError, match=r"at least \(4, 6, 5\) voxels"):
        make().sample([(3, 16, 70)], np.random.default_rng(0))


# ---- points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transforms", [TransformRanges.none(), ROTATED, TransformRanges(quarter_turns=1.0, scaling_per_axis=True)]
)
def test_both_views_see_the_same_body_voxels_without_repetition(transforms):
    shape, rng = (40, 50, 45), np.random.default_rng(0)
    guide, count = half_body(shape), 0
    for _ in range(10):
        sampled = make(pairs=2, transforms=transforms).sample([shape], rng, [guide])
        first, second = seen_voxels(sampled)
        for a, b, inside in zip(first, second, sampled.targets["points_inside"]):
            a, b = a[inside], b[inside]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
            torch.testing.assert_close(a, a.round(), atol=1e-4, rtol=0)
            assert len({tuple(v) for v in a.round().int().tolist()}) == len(a)
            assert guide.in_body(a.round().numpy()).all()
            count += len(a)
        inside = sampled.targets["points_inside"]
        points = sampled.targets["points"].transpose(1, 2)[inside]
        assert (points >= -0.5 - 1e-4).all() and (points <= torch.tensor(VIEW) - 0.5 + 1e-4).all()
    assert count > 300


def test_all_body_voxels_of_the_overlap_are_taken_if_they_are_few():
    shape, rng = (16, 16, 16), np.random.default_rng(1)
    sampler = make(view_shape=(12, 12, 12), points=3000)
    guide = half_body(shape)
    for _ in range(5):
        sampled = sampler.sample([shape], rng, [guide])
        start = (sampled.specs.center - 5.5 + torch.tensor(sampled.boxes[0][0])).int()
        low, high = start.amax(0), start.amin(0) + 12
        grid = np.stack(
            np.meshgrid(*[np.arange(a, b) for a, b in zip(low.tolist(), high.tolist())], indexing="ij"), axis=-1
        )
        expected = int(guide.in_body(grid).sum())
        assert 0 < expected < 3000
        assert int(sampled.targets["points_inside"].sum()) == expected
        assert sampled.targets["points_inside"][0, :expected].all()


def test_points_are_spread_evenly_over_the_overlap():
    sampler = make(view_shape=(16, 16, 16), points=200)
    positions = []
    for seed in range(40):
        points = sampler.sample([(16, 16, 16)], np.random.default_rng(seed)).targets["points"]
        positions.append(points[0, 0])
    mean = torch.cat(positions).mean(0)
    assert (mean - 7.5).abs().max() < 0.4


@pytest.mark.parametrize("body", ["empty", "full", "one voxel"])
def test_any_body_is_survived(body):
    shape = (20, 20, 20)
    mask = np.full(shape, body == "full")
    if body == "one voxel":
        mask[3, 19, 7] = True
    sampled = make(pairs=2).sample([shape], np.random.default_rng(0), [Guide((1.0, 1.0, 1.0), mask)])
    counts = sampled.targets["points_inside"].sum(1).tolist()
    if body == "one voxel":
        assert counts == [1, 1]
        first, second = seen_voxels(sampled)
        assert first[:, 0].tolist() == second[:, 0].tolist() == [[3.0, 19.0, 7.0]] * 2
    else:
        assert counts == ([0, 0] if body == "empty" else [50, 50])


def test_body_voxels_lie_in_the_body_whatever_the_cells():
    rng = np.random.default_rng(0)
    for shape in ((16, 31, 20), (50, 17, 23)):
        guide = half_body(shape)
        drawn = np.stack([body_voxel(guide, shape, rng) for _ in range(300)])
        assert guide.in_body(drawn).all() and (drawn >= 0).all() and (drawn < shape).all()
        # Also the first and the last voxel of the body.
        assert set(drawn[:, 0]) == set(range(shape[0]))
    nowhere = Guide((4.0, 4.0, 4.0), np.zeros((4, 4, 4), dtype=bool))
    assert (body_voxel(nowhere, (16, 16, 16), rng) < 16).all()


def test_without_guides_points_lie_anywhere():
    sampler = make(guided=False, points=400, view_shape=(16, 16, 16))
    inside = sampler.sample([(16, 16, 16)], np.random.default_rng(0)).targets["points_inside"]
    assert inside.all()


def test_anisotropic_plans_rotate_in_plane():
    sampled = make(in_plane=True, transforms=ROTATED).sample([(40, 50, 45)], np.random.default_rng(0))
    assert (sampled.specs.matrix[:, 0, 1:] == 0).all() and (sampled.specs.matrix[:, 1:, 0] == 0).all()
    assert (sampled.specs.matrix[:, 1, 2].abs() > 1e-3).any()


def test_samples_follow_from_the_seed_and_samplers_travel_to_workers():
    sampler = pickle.loads(pickle.dumps(make(transforms=ROTATED)))
    samples = [s.sample([(40, 50, 45)], np.random.default_rng(3)) for s in (sampler, make(transforms=ROTATED))]
    assert torch.equal(samples[0].targets["points"], samples[1].targets["points"])
    assert torch.equal(samples[0].specs.center, samples[1].specs.center)
