"""Flips and quarter turns: of transformed views, and of bases that keep their cell; bases over the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.geometry import overlap_fraction
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges, controlled_view, orientation, transformation
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

NONE = TransformRanges.none()
ALWAYS = TransformRanges(rotation=0, quarter_turns=1, translation=0, scaling=(1, 1), flips=0.5)


def drawn(ranges: TransformRanges, in_plane: bool = False, count: int = 400) -> list[np.ndarray]:
    return [orientation(ranges, in_plane, np.random.default_rng(seed)) for seed in range(count)]


def make_sampler(**changes) -> RegionSampler:
    options = {"view_shape": (12, 16, 20), "spacing": (1.0, 1.0, 1.0), "in_plane": False, "grid": (1, 3, 2)}
    return RegionSampler(**(options | {"transforms": ALWAYS, "regions": 1, "views_per_region": 1} | changes))


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_orientations_permute_and_mirror_axes():
    for matrix in drawn(ALWAYS):
        np.testing.assert_array_equal(np.sort(np.abs(matrix), axis=1), [[0, 0, 1]] * 3)


def test_all_orientations_and_mirror_images_are_reached():
    assert len({tuple(m.flatten().astype(int)) for m in drawn(ALWAYS, count=1500)}) == 48


def test_in_plane_turns_leave_the_first_axis_in_its_place():
    matrices = drawn(ALWAYS, in_plane=True)
    assert all(abs(m[0, 0]) == 1 for m in matrices)
    assert {m[0, 0] for m in matrices} == {-1, 1} and any(m[1, 2] for m in matrices)


@pytest.mark.parametrize("flips", [0.0, 0.2, 1.0])
def test_flips_come_with_their_probability_along_each_axis(flips):
    matrices = np.stack(drawn(TransformRanges(flips=flips), count=1500))
    mirrored = (np.diagonal(matrices, axis1=1, axis2=2) < 0).mean(0)
    np.testing.assert_allclose(mirrored, flips, atol=0.04 if 0 < flips < 1 else 0)


def test_a_mirrored_view_keeps_its_scale_and_loses_its_handedness():
    ranges = TransformRanges(rotation=40, scaling=(1.5, 1.5), flips=1.0)
    matrix = transformation(ranges, (2.0, 1.0, 1.0), False, np.random.default_rng(0))
    assert np.linalg.det(matrix) == pytest.approx(-(1.5**3))


def test_flips_do_not_change_the_other_draws_of_a_run_without_them():
    ranges = TransformRanges(rotation=30, quarter_turns=0.5)
    rng = np.random.default_rng(3)
    matrix = transformation(ranges, (1, 1, 1), False, rng)
    again = np.random.default_rng(3)
    # Angles, whether to turn, the turns, the scaling: nothing else is drawn.
    again.uniform(-1, 1, size=3)
    if again.uniform() < 0.5:
        again.integers(0, 4, size=3)
    low, high = np.log(ranges.scaling)
    assert np.cbrt(np.linalg.det(matrix)) == pytest.approx(np.exp(again.uniform(low, high, size=3))[0])
    assert rng.uniform() == again.uniform()


def test_no_transformation_is_the_region_itself():
    center, matrix = np.array([9.5, 10.0, 11.0]), np.diag([1.0, 1.2, 0.8])
    moved, same = controlled_view(
        center, matrix, NONE, (30, 30, 30), (8, 8, 8), (1, 1, 1), False, np.random.default_rng(0)
    )
    np.testing.assert_allclose(moved, center)
    np.testing.assert_allclose(same, matrix)


def test_impossible_flips_are_refused():
    with pytest.raises(ValueError, match=r"flips is a probability in \[0, 1\], got 1.5"):
        TransformRanges(flips=1.5)


# ---- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 70, 50), (16, 16, 16), (60, 40, 200)])
def test_turned_bases_show_exactly_their_cell(shape):
    turned, straight = (
        make_sampler(turn_bases=turn).sample([shape], np.random.default_rng(0)).specs for turn in (True, False)
    )
    pair = [ViewSpecs(*(f[None] for f in specs)).select(slice(0, 6)) for specs in (turned, straight)]
    overlap = overlap_fraction(*pair, (12, 16, 20))[0]
    torch.testing.assert_close(overlap, torch.eye(6), rtol=0, atol=1e-6)
    assert (pair[0].matrix - pair[1].matrix).abs().amax() > 0.1


def test_each_base_is_turned_on_its_own():
    specs = make_sampler(turn_bases=True, view_shape=(16, 16, 16)).sample([(99,) * 3], np.random.default_rng(0)).specs
    assert len({tuple(m.flatten().round().int().tolist()) for m in specs.matrix[:6]}) > 3


def test_a_turned_base_is_the_rendered_base_turned():
    sampler = make_sampler(view_shape=(8, 8, 8), turn_bases=True, grid=(1, 2, 2))
    volume = torch.randn(1, 1, 1, 40, 40, 40)
    views = []
    for turn in (True, False):
        sampler.turn_bases = turn
        (box,), specs, *_ = sampler.sample([(40, 40, 40)], np.random.default_rng(2))
        source = volume[(..., *(slice(a, b) for a, b in zip(*box)))]
        views.append((render_views(source, ViewSpecs(*(f[None] for f in specs)), (8, 8, 8))[0, :4, 0], specs.matrix))
    for (shown, straight), matrix in zip(zip(views[0][0], views[1][0]), views[0][1]):
        order = matrix.abs().argmax(0).tolist()
        mirrored = [axis for axis in range(3) if matrix[order[axis], axis] < 0]
        torch.testing.assert_close(shown, straight.permute(order).flip(mirrored), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 30, 400), (16, 16, 16), (90, 61, 47)])
def test_bases_can_tile_the_whole_volume(shape):
    sampler = make_sampler(base_scale=None, transforms=NONE, regions=4)
    specs = stack_specs([sampler.sample([shape], np.random.default_rng(seed)).specs for seed in range(5)])
    cell = torch.tensor(shape) / torch.tensor([1, 3, 2])
    expected = torch.diag(cell.double() / torch.tensor([12, 16, 20]))
    torch.testing.assert_close(specs.matrix, expected.expand_as(specs.matrix), check_dtype=False)
    torch.testing.assert_close(
        specs.center[0, :6].mean(0), (torch.tensor(shape) - 1) / 2, check_dtype=False, rtol=0, atol=1e-6
    )
    labels = sampler.targets(specs, np.random.default_rng(0))["position"]
    torch.testing.assert_close(labels.sum(-1), torch.ones(5, 4), rtol=0, atol=1e-5)
