"""Pairs of crops: they show the same place, have the same size in mm and lie inside their volumes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.crop_pair_sampler import CropPairSampler, draw_mask
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs, view_to_source

VIEW = (8, 8, 12)
SPACING = (3.0, 1.5, 1.5)


def sampler(**changes) -> CropPairSampler:
    options = {
        "view_shape": VIEW, "spacing": SPACING, "in_plane": False, "mask_grid": (2, 4, 3), "search": None,
        "transforms": TransformRanges.none(),
    }  # fmt: skip
    return CropPairSampler(**(options | changes))


def features(places: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    waves, phases = rng.normal(scale=0.35, size=(3, 48)), rng.uniform(0, 2 * np.pi, size=48)
    waved = np.moveaxis(np.cos(places @ waves + phases), -1, 0)
    return (waved / np.linalg.norm(waved, axis=0)).astype(np.float16)


def person(offset, shape=(32, 40, 44), with_features=True) -> Guide:
    """A volume of cells of 2 voxels that shows an atlas, shifted by ``offset`` voxels."""
    grid = tuple(n // 2 for n in shape)
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1)
    found = features(cells * 2.0 + 0.5 + np.asarray(offset)) if with_features else None
    return Guide((2.0, 2.0, 2.0), np.ones(grid, dtype=bool), found)


def in_volumes(sampled) -> ViewSpecs:
    """The specifications in voxels of the volumes instead of the boxes that are read."""
    boxes = torch.tensor([start for start, _ in sampled.boxes], dtype=torch.float64)
    return sampled.specs._replace(center=sampled.specs.center + boxes[sampled.specs.source])


def test_crops_of_two_people_show_the_same_anatomy():
    """The key's point p + offset is the query's p: every pair of crops differs by the offset."""
    offset, shape = np.array([4.0, -6.0, 2.0]), (32, 40, 44)
    guides, rng = [person((0, 0, 0)), person(-offset)], np.random.default_rng(0)
    for _ in range(20):
        # Without tolerance: what lies beyond the key's border would be taken for its border.
        sampled = sampler(max_cycle=0.0).sample([shape, shape], rng, guides)
        assert bool(sampled.targets["matched"])
        center = in_volumes(sampled).center.numpy()
        np.testing.assert_allclose(center[1] - center[0], offset, atol=1e-6)


def test_without_features_the_place_in_the_body_decides():
    """The key's body is twice as large: the crop lies at the same share of it."""
    body, key_body = np.zeros((30, 40, 40), dtype=bool), np.zeros((60, 80, 80), dtype=bool)
    body[5:25, 10:30, 10:30], key_body[10:50, 20:60, 20:60] = True, True
    guides = [Guide((1.0, 1.0, 1.0), b) for b in (body, key_body)]
    for seed in range(10):
        sampled = sampler().sample([body.shape, key_body.shape], np.random.default_rng(seed), guides)
        assert not bool(sampled.targets["matched"])
        query, key = in_volumes(sampled).center[:2].numpy()
        np.testing.assert_allclose((key + 0.5) / 2, query + 0.5, atol=1e-6)


@pytest.mark.parametrize("missing", [0, 1])
def test_one_map_is_not_enough(missing):
    guides = [person((0, 0, 0), with_features=missing != index) for index in (0, 1)]
    sampled = sampler().sample([(32, 40, 44)] * 2, np.random.default_rng(0), guides)
    assert not bool(sampled.targets["matched"])


def test_attempts_are_bounded():
    """No score is ever good enough: after the attempts the place in the body decides."""
    guides, rng = [person((0, 0, 0)), person((500, 0, 0))], np.random.default_rng(0)
    for attempts in (1, 8, 20):
        sampled = sampler(attempts=attempts, min_score=0.999).sample([(32, 40, 44)] * 2, rng, guides)
        assert not bool(sampled.targets["matched"])


def test_online_crops_have_one_size_in_mm():
    rng = np.random.default_rng(0)
    for shapes in ([(32, 40, 44), (30, 60, 50)], [(16, 40, 44), (64, 64, 64)], [(16, 16, 16), (20, 64, 17)]):
        specs = sampler().sample(shapes, rng).specs
        assert torch.equal(specs.matrix[0], specs.matrix[1])
        assert specs.source.tolist() == [0, 1, 0, 1]
        extent = np.diag(specs.matrix[0].numpy()) * VIEW
        assert (extent <= np.min(shapes, axis=0) + 1e-9).all()
        if min(shapes[0]) > max(VIEW) and min(shapes[1]) > max(VIEW):
            np.testing.assert_allclose(extent, VIEW)


@pytest.mark.parametrize("transforms", [TransformRanges.none(), TransformRanges(flips=0.5)], ids=["none", "strong"])
def test_views_lie_inside_what_is_read(transforms):
    rng = np.random.default_rng(0)
    corners = torch.tensor(np.stack(np.meshgrid(*((0.0, n - 1.0) for n in VIEW), indexing="ij"), -1).reshape(-1, 3))
    for shapes in ([(32, 40, 44), (30, 60, 50)], [(16, 40, 44), (64, 64, 64)], [(16, 16, 16), (20, 64, 17)]):
        for _ in range(10):
            boxes, specs, _ = sampler(transforms=transforms).sample(shapes, rng)
            for (start, stop), shape in zip(boxes, shapes):
                assert all(0 <= a < b <= n for a, b, n in zip(start, stop, shape))
            batched = ViewSpecs(*(f[None] for f in specs))
            points = view_to_source(batched, corners.expand(1, 4, -1, 3), VIEW)[0]
            for view, source in enumerate(specs.source.tolist()):
                size = torch.tensor(boxes[source][1]) - torch.tensor(boxes[source][0])
                assert (points[view] >= -0.5 - 1e-6).all() and (points[view] <= size - 0.5 + 1e-6).all()


def test_target_views_are_transformed_and_online_views_are_not():
    rng = np.random.default_rng(0)
    plain = sampler().sample([(40, 40, 44)] * 2, rng).specs
    assert torch.equal(plain.matrix[:2], plain.matrix[2:]) and torch.allclose(plain.center[:2], plain.center[2:])
    specs = sampler(transforms=TransformRanges(rotation=30)).sample([(40, 40, 44)] * 2, rng).specs
    online = specs.matrix[:2]
    assert torch.equal(online, torch.diag_embed(online.diagonal(dim1=-2, dim2=-1)))
    assert not torch.allclose(specs.matrix[2:], online, atol=0.05)


def test_a_volume_that_is_too_small():
    with pytest.raises(ValueError, match=r"at least \(4, 4, 6\) voxels.*\(3, 40, 40\)"):
        sampler().sample([(32, 40, 44), (3, 40, 40)], np.random.default_rng(0))


@pytest.mark.parametrize("value", [True, False])
def test_bodies_that_are_everything_or_nothing(value):
    guides = [Guide((4.0, 4.0, 4.0), np.full((8, 10, 11), value)) for _ in range(2)]
    sampled = sampler().sample([(32, 40, 44)] * 2, np.random.default_rng(0), guides)
    assert sampled.specs.center.isfinite().all()


def test_it_asks_for_guides_with_features_and_travels():
    made = sampler()
    assert made.guided and made.wants_features and (made.n_sources, made.n_views) == (2, 4)
    copy = pickle.loads(pickle.dumps(made))
    first, second = (s.sample([(32, 40, 44)] * 2, np.random.default_rng(3)) for s in (made, copy))
    assert torch.equal(first.specs.center, second.specs.center)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_the_released_masks():
    """Columns of a 4 x 4 grid from the released code's stream of random numbers, constant along depth."""
    mask = draw_mask((4, 4, 4), 0.75, True, np.random.RandomState(0))
    assert mask[0].astype(int).tolist() == [[0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert (mask == mask[:1]).all() and mask.mean() == 0.75


@pytest.mark.parametrize(("grid", "ratio", "expected"), [
    ((4, 4, 4), 0.75, 48), ((2, 1, 1), 0.75, 1), ((2, 1, 1), 0.01, 1), ((3, 3, 3), 0.999, 26), ((4, 2, 2), 0.6, 10),
])  # fmt: skip
def test_as_many_blocks_as_the_ratio_says_but_never_all_or_none(grid, ratio, expected):
    rng = np.random.default_rng(0)
    masks = [draw_mask(grid, ratio, False, rng) for _ in range(5)]
    assert all(mask.shape == grid and mask.sum() == expected for mask in masks)


def test_masks_of_a_batch():
    made, rng = sampler(mask_ratio=0.6), np.random.default_rng(0)
    specs = stack_specs([made.sample([(32, 40, 44)] * 2, rng).specs for _ in range(3)])
    masks = made.targets(specs, rng)["masked"]
    assert masks.shape == (3, 2, 2, 4, 3) and masks.dtype == torch.bool
    assert (masks.flatten(2).sum(-1) == 14).all()
    assert len({tuple(m.flatten().tolist()) for m in masks.flatten(0, 1)}) > 1
    columns = sampler(mask_columns=True).targets(specs, rng)["masked"]
    assert (columns == columns[:, :, :1]).all()
