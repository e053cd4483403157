"""Guides: which cell holds a point, and whether it lies in the body."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl_stc3d.views.guide import Guide


def test_a_cell_covers_its_voxels():
    """Cell i covers [i * cell - .5, (i + 1) * cell - .5], also where cells are no whole number of voxels."""
    cell = (2.5, 3.0, 1.0)
    guide = Guide(cell, np.ones((4, 2, 3), dtype=bool))
    rng = np.random.default_rng(0)
    for _ in range(50):
        index = rng.integers(0, guide.body.shape)
        point = (index + rng.uniform(0.01, 0.99, size=3)) * cell - 0.5
        np.testing.assert_array_equal(guide.index(point), index)


def test_points_outside_take_the_nearest_cell():
    guide = Guide((2.0, 2.0, 2.0), np.zeros((3, 3, 3), dtype=bool))
    np.testing.assert_array_equal(guide.index(np.array([[-4.0, 0, 99.0]])), [[0, 0, 2]])


def test_points_are_in_the_body_where_their_cell_is():
    body = np.zeros((2, 3, 4), dtype=bool)
    body[1, 2, 3] = True
    guide = Guide((2.0, 2.0, 2.0), body)
    points = np.array([[[3.0, 5.0, 7.0], [3.0, 5.0, 5.0]], [[2.0, 4.0, 6.0], [0.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(guide.in_body(points), [[True, False], [True, False]])


@pytest.mark.parametrize("shape", [(16, 20, 31), (1, 1, 1)])
def test_everywhere_is_body_of_the_whole_volume(shape):
    guide = Guide.everywhere(shape)
    assert guide.in_body(np.array([[0, 0, 0], np.asarray(shape) - 1])).all()
    assert guide.cell == shape and guide.features is None


def test_voxels_of_a_box_are_those_that_single_points_give():
    body = np.random.default_rng(0).uniform(size=(4, 5, 3)) > 0.5
    guide = Guide((2.5, 3.0, 4.1), body)
    start, stop = np.array([1, 2, 0]), np.array([10, 15, 12])
    grid = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in zip(start, stop)], indexing="ij"), axis=-1)
    np.testing.assert_array_equal(guide.voxels(start, stop), guide.in_body(grid))
