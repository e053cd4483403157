"""All samplers in volumes of few slices, as thick-slice targets make them: views against their analytic positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.crop_pair_sampler import CropPairSampler
from nnssl_stc3d.views.geometry import matching_points
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.patch_sampler import PatchSampler
from nnssl_stc3d.views.point_sampler import PointPairSampler
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import Sampled, TransformRanges, ViewSampler, least_volume
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs, view_to_source

SPACING = (6.0, 0.9, 0.8)
STRONG = TransformRanges(rotation=40, translation=0.3, scaling=(0.6, 1.6), scaling_per_axis=True, flips=0.5)
NONE = TransformRanges.none()
FLAT_VIEW, THICKER_VIEW = (4, 32, 32), (16, 24, 32)
CASES = [
    (FLAT_VIEW, (4, 48, 60)),
    (FLAT_VIEW, (10, 40, 37)),
    (THICKER_VIEW, (8, 70, 64)),
    (THICKER_VIEW, (10, 16, 90)),
    (THICKER_VIEW, (13, 24, 32)),
]
SAMPLERS = ("regions", "whole volume", "points", "patches", "pairs")


def make(name: str, view: tuple[int, int, int], transforms: TransformRanges = STRONG) -> ViewSampler:
    common = {"view_shape": view, "spacing": SPACING, "in_plane": True, "transforms": transforms}
    if name == "regions":
        return RegionSampler(grid=(1, 2, 2), region_scale=1.0, points=12, bins=(1, 2, 2), **common)
    if name == "whole volume":
        return RegionSampler(grid=(2, 2, 2), base_scale=None, turn_bases=True, points=12, **common)
    if name == "points":
        return PointPairSampler(points=50, pairs=2, **common)
    if name == "patches":
        return PatchSampler(patches=4, **common)
    return CropPairSampler(mask_grid=(1, 4, 4), **common)


def guides_of(sampler: ViewSampler, shape: Sequence[int]) -> list[Guide]:
    """Bodies in some of the slices, on a grid of one cell a slice, with features for whoever wants them."""
    grid = (shape[0], shape[1] // 4, shape[2] // 4)
    body = np.zeros(grid, dtype=bool)
    body[shape[0] // 4 : -1, 1:-1, 2:-1] = True
    features = np.random.default_rng(0).normal(size=(8, *grid)).astype(np.float16) if sampler.wants_features else None
    if features is not None:
        features /= np.linalg.norm(features.astype(np.float32), axis=0)
    cell = tuple(n / g for n, g in zip(shape, grid))
    return [Guide(cell, body, features)] * sampler.n_sources if sampler.guided else []


def draw(sampler: ViewSampler, shape: Sequence[int], seed: int) -> Sampled:
    return sampler.sample([shape] * sampler.n_sources, np.random.default_rng(seed), guides_of(sampler, shape))


def in_volumes(sampled: Sampled) -> ViewSpecs:
    """The views in voxels of their volumes, without a batch axis."""
    starts = torch.tensor([start for start, _ in sampled.boxes], dtype=torch.float64)
    return sampled.specs._replace(center=sampled.specs.center + starts[sampled.specs.source])


def voxels_of(view: Sequence[int]) -> torch.Tensor:
    axes = [torch.arange(n, dtype=torch.float64) for n in view]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@pytest.mark.parametrize(("view", "shape"), CASES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_views_lie_inside_and_show_what_their_specifications_say(name, view, shape):
    sampler = make(name, view)
    volume = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))
    last = torch.tensor(shape, dtype=torch.float64) - 1
    for seed in range(4):
        sampled = draw(sampler, shape, seed)
        specs = in_volumes(sampled)
        corners = (torch.tensor(list(np.ndindex(2, 2, 2))).double()) * torch.tensor(view) - 0.5
        batch = ViewSpecs(*(field[None] for field in specs))
        reached = view_to_source(batch, corners.expand(1, sampler.n_views, -1, 3), view)
        assert (reached >= -0.5 - 1e-6).all() and (reached <= last + 0.5 + 1e-6).all()
        # Slices stay slices, and every slice of a view is one of the volume or lies between two.
        assert not specs.matrix[:, 0, 1:].any() and not specs.matrix[:, 1:, 0].any()
        assert (specs.matrix[:, 0, 0].abs() > 0.1).all()
        expected = view_to_source(batch, voxels_of(view).expand(1, sampler.n_views, -1, 3), view)[0]
        # Beyond the outermost voxel centres the border goes on.
        expected = expected.clamp(torch.zeros(3).double(), last)
        for index, source in enumerate(sampled.specs.source.tolist()):
            start, stop = sampled.boxes[source]
            crop = volume[(slice(None), *(slice(a, b) for a, b in zip(start, stop)))]
            alone = ViewSpecs(torch.zeros(1, 1, dtype=torch.long), *(f[None, [index]] for f in sampled.specs[1:]))
            shown = render_views(crop[None, None], alone, view)[0, 0].flatten(1).T
            torch.testing.assert_close(shown.double(), expected[index], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("view", "shape"), CASES)
def test_matching_points_of_regions_are_one_place(view, shape):
    sampler = make("regions", view)
    sampled = [draw(sampler, shape, seed) for seed in range(4)]
    specs = stack_specs([in_volumes(s) for s in sampled])
    targets = sampler.targets(stack_specs([s.specs for s in sampled]), np.random.default_rng(0))
    views = specs.select(slice(sampler.n_bases, None))
    first, second = (views.select(index) for index in sampler.pairs())
    for name in ("points", "bins"):
        inside = targets[f"{name}_inside"]
        places = [
            view_to_source(of, targets[name][:, :, side].double(), view) for side, of in enumerate((first, second))
        ]
        assert inside.any()
        torch.testing.assert_close(places[0][inside], places[1][inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("view", "shape"), CASES)
def test_both_views_of_a_pair_see_the_same_voxels_of_the_body(view, shape):
    for transforms in (NONE, STRONG):
        sampler, count = make("points", view, transforms), 0
        (guide,) = guides_of(sampler, shape)
        for seed in range(3):
            sampled = draw(sampler, shape, seed)
            specs = in_volumes(sampled)
            for pair in range(sampler.pairs):
                found = sampled.targets["points"][pair, :, sampled.targets["points_inside"][pair]].double()
                both = ViewSpecs(*(field[None, 2 * pair : 2 * pair + 2] for field in specs))
                places = view_to_source(both, found[None], view)[0]
                count += len(places[0])
                torch.testing.assert_close(places[0], places[1], atol=1e-4, rtol=0)
                torch.testing.assert_close(places[0], places[0].round(), atol=1e-4, rtol=0)
                assert guide.in_body(places[0].round().numpy()).all()
        # Transformed views of a pair may have left each other.
        assert count > 100, transforms


@pytest.mark.parametrize(("view", "shape"), CASES)
def test_overlaps_and_boxes_of_patches_are_those_of_their_corners(view, shape):
    sampler = make("patches", view, NONE)
    sampled = [draw(sampler, shape, seed) for seed in range(4)]
    specs = stack_specs([in_volumes(s) for s in sampled])
    targets = sampler.targets(stack_specs([s.specs for s in sampled]), np.random.default_rng(0))
    half = specs.matrix.diagonal(dim1=-2, dim2=-1) * torch.tensor(view) / 2
    lower, upper = specs.center - half, specs.center + half
    low = torch.maximum(lower[:, :, None], lower[:, None])
    shared = (torch.minimum(upper[:, :, None], upper[:, None]) - low).clamp(min=0)
    expected = (shared / (2 * half)[:, :, None]).prod(-1)
    torch.testing.assert_close(targets["overlap"].double(), expected, atol=1e-6, rtol=0)
    touching = expected > 0
    assert touching.sum() > touching.shape[0] * touching.shape[1]
    start = ((low - lower[:, :, None]) / (2 * half)[:, :, None] * torch.tensor(view))[touching]
    torch.testing.assert_close(targets["boxes"][touching][:, 0].double(), start, atol=1e-4, rtol=0)


def test_crops_of_two_volumes_show_corresponding_slices():
    """Without transformations the views of a pair differ by a shift, and the same place in both bodies is shown."""
    sampler, shape = make("pairs", THICKER_VIEW, NONE), (10, 60, 64)
    specs = in_volumes(draw(sampler, shape, 0))
    points = torch.rand(1, 1, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10
    online, target = (ViewSpecs(*(field[None, [index]] for field in specs)) for index in (0, 2))
    matched, _ = matching_points(online, target, points, THICKER_VIEW)
    torch.testing.assert_close(matched, points)
    assert torch.equal(specs.matrix[0], specs.matrix[1])


def test_half_a_view_keeps_the_proportions_of_what_it_shows():
    """The reason for the smallest volume: there a view is magnified alike along all axes, and no further."""
    for view in (THICKER_VIEW, (8, 40, 40), (30, 32, 32)):
        shape = (least_volume(view)[0], 120, 120)
        for name in ("regions", "points", "patches", "pairs"):
            sampler = make(name, view, NONE)
            shown = draw(sampler, shape, 0).specs.matrix[getattr(sampler, "n_bases", 0) :]
            torch.testing.assert_close(shown, torch.eye(3).double().expand_as(shown) / 2)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("view", "shape", "least"),
    [(FLAT_VIEW, (3, 40, 40), r"\(4, 16, 16\)"), (THICKER_VIEW, (7, 40, 40), r"\(8, 12, 16\)")],
)
def test_one_slice_less_is_refused_by_every_sampler(name, view, shape, least):
    with pytest.raises(ValueError, match=rf"at least {least} voxels.*got shape \({shape[0]}, 40, 40\)"):
        draw(make(name, view), shape, 0)
