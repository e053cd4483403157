"""Bases and transformed views in volumes of every shape."""

from __future__ import annotations

import dataclasses
import pickle
from itertools import product

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.geometry import bounding_half_extent, overlap_fraction
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import Sampled, TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs, view_to_source

STRONG = TransformRanges(60, 0.3, 0.5, (0.5, 2), True, 0.3)
OFF = TransformRanges(rotation=0, translation=0, scaling=(1, 1))
VIEW_SHAPE = (24, 32, 20)


def make_sampler(**changes) -> RegionSampler:
    options = {
        "view_shape": VIEW_SHAPE,
        "spacing": (2.0, 1.0, 1.3),
        "in_plane": False,
        "grid": (1, 2, 2),
        "region_scale": 1.0,
        "points": 16,
    }
    return RegionSampler(**(options | changes))


def in_volume(sampled: Sampled) -> ViewSpecs:
    """The views in voxels of the volume, with a batch axis."""
    start = torch.tensor(sampled.boxes[0][0], dtype=torch.float64)
    specs = sampled.specs
    return ViewSpecs(specs.source[None], specs.center[None] + start, specs.matrix[None])


VARIANTS = {
    "defaults": {},
    "strong": {"transforms": STRONG, "regions": 3, "views_per_region": 3},
    "cells as regions": {"region_scale": None, "base_scale": 1.5, "transforms": STRONG, "grid": (1, 4, 4)},
    "no bases": {"show_bases": False, "transforms": STRONG},
    "no grid": {"grid": None, "regions": 1, "transforms": STRONG},
    "in plane": {"in_plane": True, "transforms": STRONG, "spacing": (5.0, 0.7, 0.7), "view_shape": (8, 40, 40)},
    "center": {"placement": "center", "grid": (2, 2, 2)},
    "edge": {"placement": "edge", "grid": (2, 2, 2), "region_scale": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_view_lies_inside_volumes_of_every_shape(variant):
    sampler = make_sampler(**VARIANTS[variant])
    rng = np.random.default_rng(0)
    shapes = [(16, 16, 16), (16, 200, 31), (17, 16, 90), (300, 16, 16)] + [
        tuple(int(n) for n in rng.integers(16, 120, size=3)) for _ in range(12)
    ]
    for shape in shapes:
        sampled = sampler.sample([shape], rng)
        specs = in_volume(sampled)
        assert specs.source.shape == (1, sampler.n_views) and not specs.source.any()
        half = bounding_half_extent(specs.matrix, sampler.view_shape)
        size = torch.tensor(shape, dtype=torch.float64)
        assert (specs.center - half >= -0.5 - 1e-9).all(), shape
        assert (specs.center + half <= size - 0.5 + 1e-9).all(), shape
        (start, stop) = sampled.boxes[0]
        assert all(0 <= a < b <= n for a, b, n in zip(start, stop, shape))


@pytest.mark.parametrize("min_overlap", [0.3, 0.7])
def test_views_keep_the_overlap_with_their_region(min_overlap):
    """Two draws with one seed, with and without transformations, have the same regions as far as the first view."""
    ranges = dataclasses.replace(STRONG, min_overlap=min_overlap)
    for seed in range(30):
        shape = tuple(np.random.default_rng(seed).integers(16, 80, size=3))
        views, regions = (
            in_volume(make_sampler(transforms=t, grid=None, regions=1).sample([shape], np.random.default_rng(seed)))
            for t in (ranges, OFF)
        )
        overlap = overlap_fraction(views, regions.select([0]), VIEW_SHAPE)[0, :, 0]
        assert (overlap >= min_overlap - 1e-6).all(), (seed, shape)


def test_without_transformations_all_views_of_a_region_are_the_region():
    sampler = make_sampler(transforms=OFF, regions=3, views_per_region=4)
    specs = in_volume(sampler.sample([(60, 70, 50)], np.random.default_rng(0))).select(slice(sampler.n_bases, None))
    centers = specs.center[0].reshape(3, 4, 3)
    torch.testing.assert_close(centers, centers[:, :1].expand_as(centers))
    torch.testing.assert_close(specs.matrix, torch.eye(3, dtype=torch.float64).expand_as(specs.matrix))
    assert torch.pdist(centers[:, 0]).min() > 1


def test_in_plane_plans_keep_slices():
    sampler = make_sampler(**VARIANTS["in plane"])
    rng = np.random.default_rng(0)
    for shape in [(20, 90, 90), (16, 30, 200)]:
        matrix = in_volume(sampler.sample([shape], rng)).matrix
        assert not matrix[..., 0, 1:].any() and not matrix[..., 1:, 0].any()
    assert (matrix[..., 1, 2].abs() > 0.05).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_box_is_enough_to_render_from(variant):
    sampler = make_sampler(**VARIANTS[variant])
    rng = np.random.default_rng(1)
    for shape in [(16, 16, 16), (40, 70, 66), (18, 120, 50)]:
        volume = torch.randn(1, 1, 2, *shape, dtype=torch.float64)
        sampled = sampler.sample([shape], rng)
        (start, stop) = sampled.boxes[0]
        box = volume[(..., *(slice(a, b) for a, b in zip(start, stop)))]
        from_box = render_views(box, ViewSpecs(*(f[None] for f in sampled.specs)), sampler.view_shape)
        from_volume = render_views(volume, in_volume(sampled), sampler.view_shape)
        torch.testing.assert_close(from_box, from_volume, rtol=0, atol=1e-9)


def test_the_box_is_not_the_whole_volume():
    sampled = make_sampler(show_bases=False).sample([(200, 200, 200)], np.random.default_rng(0))
    (start, stop) = sampled.boxes[0]
    assert np.prod([b - a for a, b in zip(start, stop)]) < 0.02 * 200**3


@pytest.mark.parametrize("shape", [(200, 200, 200), (60, 300, 40)])
def test_bases_tile_a_window(shape):
    sampler = make_sampler(grid=(2, 3, 2), base_scale=1.5)
    specs = in_volume(sampler.sample([shape], np.random.default_rng(0))).select(slice(0, 12))
    # Along axes that are long enough a base has view_shape * base_scale voxels, otherwise its share of the volume.
    cell = [min(n, v * 1.5 * g) / g for n, v, g in zip(shape, VIEW_SHAPE, (2, 3, 2))]
    expected = torch.diag(torch.tensor([c / v for c, v in zip(cell, VIEW_SHAPE)], dtype=torch.float64))
    torch.testing.assert_close(specs.matrix, expected.expand_as(specs.matrix))
    centers = specs.center[0].reshape(2, 3, 2, 3)
    for axis, size in enumerate(cell):
        steps = centers.diff(dim=axis)[..., axis]
        torch.testing.assert_close(steps, torch.full_like(steps, size))
    overlap = overlap_fraction(specs, specs, VIEW_SHAPE)[0]
    torch.testing.assert_close(overlap, torch.eye(12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(200, 200, 200), (60, 70, 24)])
def test_without_its_bases_a_window_has_the_same_regions(shape):
    """Not all at one place, as in a window of a single view."""
    with_bases, without = (make_sampler(show_bases=show, transforms=STRONG) for show in (True, False))
    assert without.n_bases == 0 and without.n_views == with_bases.n_views - 4
    expected, got = (in_volume(s.sample([shape], np.random.default_rng(0))) for s in (with_bases, without))
    torch.testing.assert_close(got.center, expected.center[:, 4:], rtol=0, atol=1e-9)
    assert torch.equal(got.matrix, expected.matrix[:, 4:])
    targets = without.targets(got, np.random.default_rng(0))
    assert "position" not in targets and torch.equal(targets["overlap"], overlap_fraction(got, got, VIEW_SHAPE))


def test_position_labels_of_views_inside_the_window_sum_to_one():
    sampler = make_sampler(transforms=OFF, grid=(2, 2, 2))
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(90, 90, 90)], rng).specs for _ in range(4)])
    labels = sampler.targets(specs, rng)["position"]
    assert labels.shape == (4, 4, 8)
    torch.testing.assert_close(labels.sum(-1), torch.ones(4, 4), rtol=0, atol=1e-5)


def test_labels_are_the_overlaps_of_the_views():
    sampler = make_sampler(transforms=STRONG, regions=2, views_per_region=3)
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(50, 60, 70)], rng).specs for _ in range(2)])
    targets = sampler.targets(specs, rng)
    bases, views = specs.select(slice(0, 4)), specs.select(slice(4, None))
    assert torch.equal(targets["position"], overlap_fraction(views, bases, VIEW_SHAPE))
    assert torch.equal(targets["overlap"], overlap_fraction(views, views, VIEW_SHAPE))


def test_small_volumes_keep_the_proportions_of_a_region_down_to_half():
    region = make_sampler(view_shape=(32, 32, 32), grid=None, transforms=OFF, regions=1)

    def scale(shape: tuple[int, int, int]) -> list[float]:
        return in_volume(region.sample([shape], np.random.default_rng(0))).matrix[0, 0].diagonal().tolist()

    assert scale((40, 50, 60)) == pytest.approx([1, 1, 1])
    assert scale((24, 50, 60)) == pytest.approx([0.75] * 3)
    assert scale((16, 50, 60)) == pytest.approx([0.5] * 3)
    assert scale((50, 20, 20)) == pytest.approx([0.625] * 3)
    long = make_sampler(view_shape=(64, 32, 32), grid=None, transforms=OFF, regions=1)
    matrix = in_volume(long.sample([(16, 50, 60)], np.random.default_rng(0))).matrix[0, 0]
    assert matrix.diagonal().tolist() == pytest.approx([0.25, 0.5, 0.5])


def test_one_seed_gives_one_sample_and_another_seed_another():
    sampler = make_sampler(transforms=STRONG)
    first, again, other = (sampler.sample([(50, 60, 70)], np.random.default_rng(s)) for s in (3, 3, 4))
    assert first.boxes == again.boxes and all(torch.equal(a, b) for a, b in zip(first.specs, again.specs))
    assert not torch.equal(first.specs.matrix, other.specs.matrix)
    batches = [sampler.targets(stack_specs([s.specs]), np.random.default_rng(0)) for s in (first, again)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_samplers_use_no_global_random_numbers():
    sampler = make_sampler(transforms=STRONG)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    rng = np.random.default_rng(0)
    sampler.targets(stack_specs([sampler.sample([(50, 60, 70)], rng).specs]), rng)
    assert np.array_equal(np.random.get_state()[1], numpy_state) and torch.equal(torch.get_rng_state(), torch_state)


def test_samplers_travel_to_worker_processes():
    sampler = make_sampler(transforms=STRONG, bins=(2, 2, 2))
    copy = pickle.loads(pickle.dumps(sampler))
    first, second = (s.sample([(50, 60, 70)], np.random.default_rng(0)) for s in (sampler, copy))
    assert torch.equal(first.specs.center, second.specs.center)
    assert copy.n_views == sampler.n_views and torch.equal(copy.pairs()[1], sampler.pairs()[1])


@pytest.mark.parametrize("shape", [(11, 64, 64), (64, 64, 1)])
def test_volumes_that_are_too_small_are_refused(shape):
    with pytest.raises(ValueError, match=r"at least \(12, 16, 10\) voxels"):
        make_sampler().sample([shape], np.random.default_rng(0))


# ---- corresponding points -------------------------------------------------------------------------------------------


def test_pairs_are_consecutive_views_of_one_region():
    first, second = make_sampler(regions=2, views_per_region=3).pairs()
    assert first.tolist() == [0, 1, 3, 4] and second.tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("name", ["points", "bins"])
def test_corresponding_points_name_one_position_of_the_volume(name):
    sampler = make_sampler(transforms=STRONG, views_per_region=3, points=32, bins=(2, 3, 2))
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(50, 60, 70)], rng).specs for _ in range(3)])
    targets = sampler.targets(specs, rng)
    points, inside = targets[name], targets[f"{name}_inside"]
    count = 32 if name == "points" else 12
    assert points.shape == (3, 4, 2, count, 3) and inside.shape == (3, 4, count) and inside.dtype == torch.bool
    first, second = (specs.select(sampler.n_bases + index) for index in sampler.pairs())
    here = view_to_source(first, points[:, :, 0].double(), VIEW_SHAPE)
    there = view_to_source(second, points[:, :, 1].double(), VIEW_SHAPE)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
    limit = torch.tensor(VIEW_SHAPE) - 1
    seen = ((points[:, :, 1] >= -1e-4) & (points[:, :, 1] <= limit + 1e-4)).all(-1)
    assert seen[inside].all() and inside.float().mean() > 0.3
    assert ((points[:, :, 0] >= 0) & (points[:, :, 0] <= limit)).all()


def test_points_that_both_views_see_come_first():
    """Four times as many candidates are drawn, so that most pairs have all the points they asked for."""
    sampler = make_sampler(points=64)
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(60, 70, 80)], rng).specs for _ in range(8)])
    inside = sampler.targets(specs, rng)["points_inside"]
    assert inside.float().mean() > 0.95
    assert not (inside[..., 1:] & ~inside[..., :-1]).any()


def test_bins_of_the_first_view_are_the_centres_of_its_parts():
    sampler = make_sampler(transforms=OFF, view_shape=(8, 8, 8), bins=(2, 1, 4), points=0)
    rng = np.random.default_rng(0)
    targets = sampler.targets(stack_specs([sampler.sample([(30, 30, 30)], rng).specs]), rng)
    expected = [(z, 3.5, x) for z, x in product((1.5, 5.5), (0.5, 2.5, 4.5, 6.5))]
    for view in range(2):
        torch.testing.assert_close(targets["bins"][0, 0, view], torch.tensor(expected), rtol=0, atol=1e-5)
    assert targets["bins_inside"].all() and "points" not in targets


@pytest.mark.parametrize(
    ("view_shape", "bins", "size"), [((8, 8, 8), (2, 2, 2), (4, 4, 4)), ((8, 12, 8), (2, 2, 4), (4, 6, 2))]
)
def test_bins_overlap_where_they_lie_in_the_volume(view_shape, bins, size):
    sampler = make_sampler(view_shape=view_shape, bins=bins, points=0, views_per_region=3, transforms=STRONG)
    rng = np.random.default_rng(0)
    specs = stack_specs([sampler.sample([(20, 22, 24)], rng).specs for _ in range(2)])
    targets = sampler.targets(specs, rng)
    views = specs.select(sampler.n_bases + sampler.pairs()[0])
    centers = view_to_source(views, targets["bins"][:, :, 0].double(), view_shape).flatten(1, 2)
    found, seen, count = targets["bins_overlap"], set(), bins[0] * bins[1] * bins[2]
    assert found.shape == (2, 4 * count, 4 * count)
    to_view, length = torch.linalg.inv(views.matrix), torch.tensor(size)
    for b, i, j in product(range(2), range(4 * count), range(4 * count)):
        # Bins have one size in voxels of their view; boxes of one size overlap by what is left along each axis.
        apart = to_view[b, i // count] @ (centers[b, j] - centers[b, i])
        expected = (1 - apart.abs() / length).clamp(min=0).prod().item()
        assert found[b, i, j].item() == pytest.approx(expected, abs=1e-5)
        seen.add((i == j, i // count == j // count, expected > 0.2))
    # A bin overlaps with itself, with none of its own view, and with some of other views.
    assert {(True, True, True), (False, False, True), (False, False, False)} <= seen
    assert (False, True, True) not in seen


def test_only_what_is_asked_for_is_computed():
    sampler = make_sampler(show_bases=False, points=0)
    rng = np.random.default_rng(0)
    assert set(sampler.targets(stack_specs([sampler.sample([(50,) * 3], rng).specs]), rng)) == {"overlap"}
