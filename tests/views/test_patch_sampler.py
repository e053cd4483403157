"""Patches around an anchor, and where views lie in each other."""

from __future__ import annotations

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from nnssl_stc3d.views.geometry import bounding_half_extent, intersection_boxes, overlap_fraction, relative_maps
from nnssl_stc3d.views.patch_sampler import PatchSampler
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import Sampled, TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, source_to_view, stack_specs, view_center, view_to_source

STRONG = TransformRanges(60, 0.3, 0.3, (0.5, 2), True, 0.3, 0.5)
VIEW_SHAPE = (64, 64, 64)


def make_sampler(**changes) -> PatchSampler:
    options = {"view_shape": VIEW_SHAPE, "spacing": (2.0, 1.0, 1.3), "in_plane": False, "patches": 32}
    return PatchSampler(**(options | changes))


def in_volume(sampled: Sampled) -> ViewSpecs:
    """The views in voxels of the volume, with a batch axis."""
    start = torch.tensor(sampled.boxes[0][0], dtype=torch.float64)
    specs = sampled.specs
    return ViewSpecs(specs.source[None], specs.center[None] + start, specs.matrix[None])


def starts_of(sampled: Sampled) -> Tensor:
    """Starts of patches that are neither turned nor scaled, in voxels of the volume."""
    return in_volume(sampled).center[0] - (torch.tensor(VIEW_SHAPE) - 1) / 2


# ---- where patches lie ----------------------------------------------------------------------------------------------


def test_patches_lie_around_an_anchor_as_released():
    """Within 51 voxels, four fifths of a patch of 64, of one start: any two within twice as much."""
    shape, seen = (100, 180, 200), []
    for seed in range(60):
        starts = starts_of(make_sampler().sample([shape], np.random.default_rng(seed)))
        torch.testing.assert_close(starts, starts.round(), rtol=0, atol=1e-9)
        assert (starts >= 0).all() and (starts <= torch.tensor(shape) - 64).all()
        assert (starts.amax(0) - starts.amin(0) <= 102).all()
        seen.append(starts)
    everywhere = torch.cat(seen)
    assert everywhere.amin(0).tolist() == [0, 0, 0]
    assert everywhere.amax(0).tolist() == [36, 116, 136]
    spread = torch.stack([s.amax(0) - s.amin(0) for s in seen]).amax(0)
    assert (spread[1:] > 90).all()


def test_most_pairs_overlap():
    """The released code's share of pairs with at least 1 %, 70 to 82 % in an abdomen."""
    sampler, shares = make_sampler(), []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        specs = stack_specs([sampler.sample([(200, 260, 260)], rng).specs])
        overlap = sampler.targets(specs, rng)["overlap"][0]
        shares.append(float((overlap[~torch.eye(32, dtype=torch.bool)] >= 0.01).float().mean()))
    assert 0.65 < np.mean(shares) < 0.85


def test_reach_bounds_the_distance():
    for reach, spread in ((0.0, 0), (0.25, 32)):
        starts = starts_of(make_sampler(reach=reach).sample([(300, 300, 300)], np.random.default_rng(0)))
        assert (starts.amax(0) - starts.amin(0)).max() <= spread


def test_patches_show_the_voxels_of_the_volume():
    volume = torch.randn(1, 1, 1, 80, 90, 100)
    sampler = make_sampler(patches=3)
    sampled = sampler.sample([(80, 90, 100)], np.random.default_rng(0))
    (start, stop) = sampled.boxes[0]
    box = volume[(..., *(slice(a, b) for a, b in zip(start, stop)))]
    views = render_views(box, ViewSpecs(*(f[None] for f in sampled.specs)), VIEW_SHAPE)[0, :, 0]
    for view, first in zip(views, starts_of(sampled).long().tolist()):
        z, y, x = first
        torch.testing.assert_close(view, volume[0, 0, 0, z : z + 64, y : y + 64, x : x + 64], rtol=0, atol=1e-4)


@pytest.mark.parametrize("transforms", [TransformRanges.none(), STRONG])
def test_patches_lie_inside_volumes_of_every_shape(transforms):
    sampler = make_sampler(transforms=transforms, patches=6)
    rng = np.random.default_rng(0)
    shapes = [(16, 16, 16), (16, 200, 31), (64, 64, 64), (300, 16, 16), (65, 64, 64)]
    for shape in shapes + [tuple(int(n) for n in rng.integers(16, 120, size=3)) for _ in range(10)]:
        specs = in_volume(sampler.sample([shape], rng))
        half = bounding_half_extent(specs.matrix, VIEW_SHAPE)
        size = torch.tensor(shape, dtype=torch.float64)
        assert (specs.center - half >= -0.5 - 1e-9).all() and (specs.center + half <= size - 0.5 + 1e-9).all(), shape


@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 64, 64), (20, 70, 64)])
def test_volumes_without_room_for_two_patches_get_smaller_ones_that_differ(shape):
    sampler = make_sampler()
    rng = np.random.default_rng(0)
    overlap = torch.cat(
        [sampler.targets(stack_specs([sampler.sample([shape], rng).specs]), rng)["overlap"] for _ in range(5)]
    )
    different = overlap[:, ~torch.eye(32, dtype=torch.bool)]
    assert different.max() < 1 and different.mean() < 0.8
    matrix = sampler.sample([shape], rng).specs.matrix[0].diagonal()
    # Magnified alike along all axes where the volume allows.
    assert (matrix < 1).any() and (shape[0] != shape[2] or matrix.max() - matrix.min() < 1e-9)


def test_a_volume_that_is_flat_along_one_axis_keeps_its_resolution():
    matrix = make_sampler().sample([(64, 200, 200)], np.random.default_rng(0)).specs.matrix
    torch.testing.assert_close(matrix, torch.eye(3, dtype=torch.float64).expand_as(matrix))


def test_one_seed_gives_one_sample_and_another_seed_another():
    sampler = pickle.loads(pickle.dumps(make_sampler(transforms=STRONG)))
    first, again, other = (sampler.sample([(90, 80, 70)], np.random.default_rng(s)) for s in (3, 3, 4))
    assert first.boxes == again.boxes and all(torch.equal(a, b) for a, b in zip(first.specs, again.specs))
    assert not torch.equal(first.specs.center, other.specs.center)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"patches": 1}, "at least 2 patches of a volume, got patches=1"), ({"reach": -1}, "must not be negative")],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**changes)


def test_volumes_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"at least \(16, 16, 16\) voxels.*\(15, 64, 64\)"):
        make_sampler().sample([(15, 64, 64)], np.random.default_rng(0))


# ---- targets --------------------------------------------------------------------------------------------------------


def test_overlaps_are_those_of_the_boxes():
    sampler = make_sampler(patches=6)
    rng = np.random.default_rng(0)
    samples = [sampler.sample([(100, 120, 110)], rng) for _ in range(3)]
    targets = sampler.targets(stack_specs([s.specs for s in samples]), rng)
    assert set(targets) == {"overlap", "boxes"} and targets["boxes"].dtype == torch.float32
    for index, sample in enumerate(samples):
        starts = starts_of(sample)
        for i, j in product(range(6), range(6)):
            shared = (64 - (starts[i] - starts[j]).abs()).clamp(min=0)
            assert targets["overlap"][index, i, j].item() == pytest.approx(float(shared.prod()) / 64**3, abs=1e-6)
            if shared.min() > 0:
                low = (starts[j] - starts[i]).clamp(min=0)
                expected = torch.stack((low, low + shared)).float()
                torch.testing.assert_close(targets["boxes"][index, i, j], expected, rtol=0, atol=1e-4)


def test_overlaps_are_symmetric_under_transformations():
    sampler = make_sampler(transforms=STRONG, patches=5)
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(100, 120, 110)], rng).specs for _ in range(2)])
    targets = sampler.targets(specs, rng)
    assert set(targets) == {"overlap", "frame_matrix", "frame_shift"}
    overlap, share = targets["overlap"], overlap_fraction(specs, specs, VIEW_SHAPE)
    assert torch.equal(overlap, overlap.transpose(1, 2)) and (overlap <= share).all()
    torch.testing.assert_close(overlap.diagonal(dim1=1, dim2=2), torch.ones(2, 5))
    assert not torch.allclose(share, share.transpose(1, 2), atol=0.05)


def test_scaled_and_mirrored_patches_still_share_boxes():
    ranges = TransformRanges(rotation=0, quarter_turns=0.5, scaling=(0.5, 2), flips=0.5, translation=0)
    sampler = make_sampler(transforms=ranges, patches=5)
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(150, 150, 150)], rng).specs])
    targets = sampler.targets(specs, rng)
    volume = (targets["boxes"][..., 1, :] - targets["boxes"][..., 0, :]).prod(-1) / 64**3
    torch.testing.assert_close(volume, overlap_fraction(specs, specs, VIEW_SHAPE), rtol=0, atol=1e-5)


# ---- where views lie in each other ----------------------------------------------------------------------------------


def test_relative_maps_take_voxels_of_one_view_to_the_other():
    rng = np.random.default_rng(0)
    specs = stack_specs(
        [make_sampler(transforms=STRONG, patches=4).sample([(90, 80, 99)], rng).specs for _ in range(2)]
    )
    matrix, shift = relative_maps(specs.select(slice(0, 2)), specs)
    assert matrix.shape == (2, 2, 4, 3, 3) and shift.shape == (2, 2, 4, 3)
    points = torch.rand(2, 1, 5, 3, dtype=torch.float64) * 63
    middle = view_center(VIEW_SHAPE, points)
    for i, j in product(range(2), range(4)):
        source = view_to_source(specs.select([i]), points, VIEW_SHAPE)
        expected = source_to_view(specs.select([j]), source, VIEW_SHAPE)[:, 0]
        got = (points[:, 0] - middle) @ matrix[:, i, j].transpose(1, 2) + shift[:, i, j, None] + middle
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_the_box_around_a_turned_view_holds_what_it_shares():
    rng = np.random.default_rng(0)
    specs = stack_specs([make_sampler(transforms=STRONG, patches=4).sample([(90, 80, 99)], rng).specs])
    boxes = intersection_boxes(specs, specs, VIEW_SHAPE)[0]
    assert (boxes >= 0).all() and (boxes <= 64).all()
    points = torch.rand(1, 1, 4000, 3, dtype=torch.float64) * 64 - 0.5
    for i, j in product(range(4), range(4)):
        there = source_to_view(specs.select([j]), view_to_source(specs.select([i]), points, VIEW_SHAPE), VIEW_SHAPE)
        shared = points[((there > -0.5) & (there < 63.5)).all(-1)] + 0.5
        assert (shared >= boxes[i, j, 0] - 1e-9).all() and (shared <= boxes[i, j, 1] + 1e-9).all()
