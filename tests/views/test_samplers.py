"""Controlled transformations, windows and boxes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from nnssl_stc3d.views.geometry import bounding_half_extent, overlap_fraction
from nnssl_stc3d.views.samplers import (
    TransformRanges,
    check_volume,
    controlled_view,
    grid_cells,
    is_anisotropic,
    least_volume,
    place_window,
    to_sampled,
    transformation,
)
from nnssl_stc3d.views.spec import ViewSpecs

SPACING = (3.0, 0.8, 1.3)
P = np.diag(SPACING)
OFF = TransformRanges(rotation=0, translation=0, scaling=(1, 1))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw_in_mm(ranges: TransformRanges, seed: int, in_plane: bool = False) -> np.ndarray:
    """A drawn transformation as a map of millimetres."""
    return P @ transformation(ranges, SPACING, in_plane, rng_of(seed)) @ np.linalg.inv(P)


# ---- the drawn transformation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rotations_are_rigid_in_millimetres(seed):
    turn = draw_in_mm(TransformRanges(rotation=90, scaling=(1, 1)), seed)
    np.testing.assert_allclose(turn.T @ turn, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert np.abs(turn - np.eye(3)).max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_uniform_scaling_scales_every_length_alike(seed):
    drawn = draw_in_mm(TransformRanges(rotation=40, scaling=(0.5, 2)), seed)
    scale = np.cbrt(np.linalg.det(drawn))
    np.testing.assert_allclose(drawn.T @ drawn, scale**2 * np.eye(3), atol=1e-12)
    assert 0.5 <= scale <= 2 and scale != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_scaling_per_axis_acts_along_the_axes_of_the_view(seed):
    drawn = draw_in_mm(TransformRanges(rotation=40, scaling=(0.5, 2), scaling_per_axis=True), seed)
    gram = drawn.T @ drawn
    scales = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(gram, np.diag(scales**2), atol=1e-12)
    assert (scales >= 0.5).all() and (scales <= 2).all()
    assert all(abs(a - b) > 1e-3 for a, b in combinations(scales, 2))


def test_scaling_is_drawn_evenly_for_shrinking_and_growing():
    scales = [np.linalg.det(draw_in_mm(TransformRanges(0, scaling=(0.5, 2)), seed)) ** (1 / 3) for seed in range(400)]
    assert np.mean(np.array(scales) > 1) == pytest.approx(0.5, abs=0.1)
    assert min(scales) < 0.53 and max(scales) > 1.9


def test_angles_stay_in_their_range_and_fill_it():
    ranges = TransformRanges(rotation=25, scaling=(1, 1))
    angles = np.array(
        [np.degrees(Rotation.from_matrix(draw_in_mm(ranges, seed)).as_euler("xyz")) for seed in range(300)]
    )
    assert np.abs(angles).max() <= 25 + 1e-9
    assert (angles.max(0) > 22).all() and (angles.min(0) < -22).all()


@pytest.mark.parametrize("quarter_turns", [0.0, 1.0])
def test_in_plane_rotation_leaves_the_first_axis_alone(quarter_turns):
    ranges = TransformRanges(rotation=60, scaling=(0.8, 1.25), scaling_per_axis=True, quarter_turns=quarter_turns)
    turned = 0
    for seed in range(20):
        matrix = transformation(ranges, SPACING, True, rng_of(seed))
        assert not matrix[0, 1:].any() and not matrix[1:, 0].any()
        assert 0.8 <= matrix[0, 0] <= 1.25
        turned += abs(matrix[1, 2]) > 0.05
    assert turned > 10


def test_quarter_turns_reach_all_24_orientations():
    ranges = TransformRanges(rotation=0, scaling=(1, 1), quarter_turns=1)
    seen = set()
    for seed in range(400):
        turn = draw_in_mm(ranges, seed)
        np.testing.assert_allclose(np.sort(np.abs(turn), axis=1), [[0, 0, 1]] * 3, atol=1e-12)
        assert np.linalg.det(turn) == pytest.approx(1)
        seen.add(tuple(turn.round().astype(int).flatten()))
    assert len(seen) == 24


def test_quarter_turns_come_with_their_probability():
    ranges = TransformRanges(rotation=0, scaling=(1, 1), quarter_turns=0.3)
    turned = [np.abs(draw_in_mm(ranges, seed) - np.eye(3)).max() > 0.5 for seed in range(600)]
    # Some combinations of quarter turns are the identity: 1 in 16.
    assert np.mean(turned) == pytest.approx(0.3 * 15 / 16, abs=0.06)


def test_zero_ranges_give_the_identity():
    np.testing.assert_allclose(transformation(OFF, SPACING, False, rng_of(0)), np.eye(3), atol=1e-15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotation": -1}, r"0\.\.180 degrees, got -1"),
        ({"rotation": 181}, r"0\.\.180 degrees, got 181"),
        ({"quarter_turns": 1.5}, r"probability in \[0, 1\], got 1.5"),
        ({"translation": -0.1}, r"\[0, 1\] \(fraction of the view\), got -0.1"),
        ({"scaling": (1.2, 0.8)}, r"0 < low <= high, got \(1.2, 0.8\)"),
        ({"scaling": (0, 1)}, "0 < low <= high"),
        ({"scaling": (1,)}, "0 < low <= high"),
        ({"min_overlap": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_ranges_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        TransformRanges(**values)


# ---- views under control --------------------------------------------------------------------------------------------


def one(center: np.ndarray, matrix: np.ndarray) -> ViewSpecs:
    return ViewSpecs(
        torch.zeros(1, 1, dtype=torch.long), torch.tensor(center)[None, None], torch.tensor(matrix)[None, None]
    )


@pytest.mark.parametrize("min_overlap", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("shape", [(40, 40, 40), (16, 50, 70), (20, 24, 17)])
def test_views_stay_inside_and_keep_their_region(shape, min_overlap):
    ranges = TransformRanges(90, 0.5, 0.5, (0.5, 2), True, min_overlap)
    view_shape, size = (16, 20, 24), np.array(shape)
    moved = 0
    for seed in range(25):
        rng = rng_of(seed)
        extent = np.minimum(size, view_shape)
        center = extent / 2 - 0.5 + rng.uniform(size=3) * (size - extent)
        region = np.diag(extent / view_shape)
        view, matrix = controlled_view(center, region, ranges, shape, view_shape, SPACING, False, rng)
        half = bounding_half_extent(torch.tensor(matrix), view_shape).numpy()
        assert (view - half >= -0.5 - 1e-9).all() and (view + half <= size - 0.5 + 1e-9).all()
        overlap = float(overlap_fraction(one(view, matrix), one(center, region), view_shape))
        assert overlap >= min_overlap - 1e-6
        moved += overlap < 0.999
    assert moved > 10


def test_a_region_that_is_coarser_along_one_axis_is_turned_rigidly_in_millimetres():
    """The box of the region turns, not the grid of its voxels: cells of a base grid are rarely cubes."""
    region = np.diag([1.5, 1.0, 0.7])
    ranges = TransformRanges(rotation=30, translation=0, scaling=(1, 1), min_overlap=0)
    center = np.full(3, 100.0)
    _, matrix = controlled_view(center, region, ranges, (200,) * 3, (16,) * 3, SPACING, False, rng_of(1))
    expected, got = P @ region, P @ matrix
    assert np.abs(got - expected).max() > 0.1
    np.testing.assert_allclose(got.T @ got, expected.T @ expected, atol=1e-9)


@pytest.mark.parametrize("quarter_turns", [0, 1])
def test_translation_is_a_fraction_of_the_view_along_its_own_axes(quarter_turns):
    ranges = TransformRanges(rotation=0, translation=0.25, scaling=(1, 1), min_overlap=0, quarter_turns=quarter_turns)
    center, view_shape = np.full(3, 100.0), (8, 16, 32)
    views = [
        controlled_view(center, 2 * np.eye(3), ranges, (200,) * 3, view_shape, SPACING, False, rng_of(seed))
        for seed in range(200)
    ]
    shifts = np.array([np.linalg.inv(matrix) @ (view - center) for view, matrix in views])
    limit = 0.25 * np.array(view_shape)
    assert (np.abs(shifts) <= limit + 1e-9).all() and (np.abs(shifts).max(0) > 0.9 * limit).all()
    if not quarter_turns:
        np.testing.assert_allclose([matrix for _, matrix in views], [2 * np.eye(3)] * 200, atol=1e-12)


def test_without_transformations_the_view_is_the_region():
    center, region = np.array([20.0, 21.5, 19.0]), np.diag([1.0, 0.5, 1.2])
    view, matrix = controlled_view(center, region, OFF, (40,) * 3, (16,) * 3, SPACING, False, rng_of(0))
    np.testing.assert_allclose(view, center, atol=1e-12)
    np.testing.assert_allclose(matrix, region, atol=1e-12)


# ---- windows, cells and boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["random", "center", "edge"])
def test_windows_lie_inside_the_volume(placement):
    shape, size = (30, 20, 16), np.array([10.0, 20.0, 4.5])
    starts = np.array([place_window(shape, size, placement, rng_of(seed)) for seed in range(100)])
    assert (starts >= 0).all() and (starts + size <= np.array(shape) + 1e-12).all()
    if placement == "center":
        np.testing.assert_allclose(starts, [[10, 0, 5.75]] * 100)
    elif placement == "edge":
        assert {tuple(s) for s in starts} == {(z, 0.0, x) for z in (0.0, 20.0) for x in (0.0, 11.5)}
    else:
        assert starts[:, 0].min() < 2 and starts[:, 0].max() > 18 and len({s[0] for s in starts}) == 100


def test_cells_tile_the_window():
    start, size, grid = np.array([2.0, 3.0, 0.0]), np.array([10.0, 9.0, 8.0]), (2, 3, 1)
    centers, cell = grid_cells(start, size, grid)
    np.testing.assert_allclose(cell, [5, 3, 8])
    expected = [(2 + 5 * (i + 0.5) - 0.5, 3 + 3 * (j + 0.5) - 0.5, 3.5) for i in range(2) for j in range(3)]
    np.testing.assert_allclose(centers, expected)


def test_boxes_hold_the_views_and_specs_are_in_their_voxels():
    shapes = [(30, 30, 30), (20, 40, 16)]
    centers = [np.array([10.2, 10, 10]), np.array([3.5, 30, 3.5]), np.array([12.0, 14, 20])]
    matrices = [np.eye(3), np.diag([1.0, 0.5, 1.0]), 0.5 * np.eye(3)]
    boxes, specs, _ = to_sampled(centers, matrices, [0, 1, 0], shapes, (8, 8, 8))
    # The first source is seen from 10.2 - 4 and 12 - 2 to 14.2 and 16, and so on; rounded outwards.
    assert boxes[0] == ((6, 6, 6), (16, 17, 23))
    assert boxes[1] == ((0, 28, 0), (9, 33, 9))
    np.testing.assert_allclose(specs.center[0] + torch.tensor(boxes[0][0]), centers[0])
    np.testing.assert_allclose(specs.center[1] + torch.tensor(boxes[1][0]), centers[1])
    assert specs.source.tolist() == [0, 1, 0] and torch.equal(specs.matrix, torch.tensor(np.stack(matrices)))


def test_boxes_end_at_the_volume():
    boxes, _, _ = to_sampled([np.full(3, 7.5)], [np.eye(3)], [0], [(16, 16, 16)], (16, 16, 16))
    assert boxes == [((0, 0, 0), (16, 16, 16))]


def test_a_source_that_no_view_sees_is_an_error():
    with pytest.raises(ValueError, match="no view looks into source volume 1"):
        to_sampled([np.full(3, 7.5)], [np.eye(3)], [0], [(16,) * 3] * 2, (8, 8, 8))


@pytest.mark.parametrize(
    ("patch_size", "expected"),
    [
        ((64, 64, 64), False),
        ((20, 60, 60), False),
        ((20, 61, 60), True),
        ((16, 320, 320), True),
        ((320, 16, 16), False),
    ],
)
def test_dummy_2d_rule(patch_size, expected):
    assert is_anisotropic(patch_size) == expected


@pytest.mark.parametrize(
    ("view", "least"),
    [
        ((64, 64, 64), (16, 16, 16)),
        ((96, 33, 32), (16, 16, 16)),
        ((31, 30, 29), (16, 15, 15)),
        ((16, 64, 64), (8, 16, 16)),
        ((14, 9, 8), (7, 5, 4)),
        ((4, 2, 1), (4, 4, 4)),
    ],
)
def test_a_volume_needs_half_of_a_view_but_no_more_than_16_voxels(view, least):
    assert least_volume(view) == least
    check_volume(least, view)
    for axis in range(3):
        shape = tuple(n - (a == axis) for a, n in enumerate(least))
        with pytest.raises(
            ValueError, match=rf"at least \({least[0]}, .*views of \({view[0]}, .*\({shape[0]}, .*finer"
        ):
            check_volume(shape, view)


def test_a_slice_is_no_volume():
    with pytest.raises(ValueError, match=r"got shape \(64, 64\)"):
        check_volume((64, 64), (4, 32, 32))
