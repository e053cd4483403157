"""Overlaps and corresponding points against independent computations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection
from scipy.spatial.transform import Rotation

from nnssl_stc3d.modules.heads import sample_features
from nnssl_stc3d.views.geometry import (
    bounding_half_extent,
    is_axis_aligned,
    matching_points,
    normalised_points,
    overlap_fraction,
)
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.spec import ViewSpecs, source_to_view, view_to_source

QUARTER_TURNS = [Rotation.from_euler("xyz", turns, degrees=True).as_matrix().round() for turns in
                 ((90, 0, 0), (0, 90, 0), (0, 0, 270), (90, 180, 0))]  # fmt: skip


def specs_of(centers, matrices, sources=None) -> ViewSpecs:
    """One sample from lists of centres, matrices and sources."""
    center, matrix = torch.tensor(np.array(centers, dtype=float)), torch.tensor(np.array(matrices, dtype=float))
    source = torch.zeros(len(center), dtype=torch.long) if sources is None else torch.tensor(sources)
    return ViewSpecs(source[None], center[None], matrix[None])


def crops(starts, size: int = 64) -> ViewSpecs:
    """Unscaled cubes that begin at the given voxels."""
    centers = np.array(starts, dtype=float) + size / 2 - 0.5
    return specs_of(centers, [np.eye(3)] * len(centers))


def halfspaces(center: np.ndarray, matrix: np.ndarray, view_shape: tuple[int, ...]) -> np.ndarray:
    """The six faces of a view in the source as ``normal . x + offset <= 0``."""
    inverse, half = np.linalg.inv(matrix), np.array(view_shape) / 2
    faces = []
    for axis, sign in product(range(3), (-1, 1)):
        normal = sign * inverse[axis]
        faces.append([*normal, -normal @ center - half[axis]])
    return np.array(faces)


def polyhedron_overlap(center_a, matrix_a, center_b, matrix_b, view_shape) -> float:
    """|a intersect b| / |a| as the volume of a convex polyhedron."""
    faces = np.concatenate([halfspaces(center_a, matrix_a, view_shape), halfspaces(center_b, matrix_b, view_shape)])
    length = np.linalg.norm(faces[:, :3], axis=1, keepdims=True)
    # The centre of the largest ball that fits is a point inside; without one the views do not overlap.
    result = linprog(
        [0, 0, 0, -1],
        A_ub=np.hstack([faces[:, :3], length]),
        b_ub=-faces[:, 3],
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    if not result.success or result.x[3] < 1e-6:
        return 0.0
    vertices = HalfspaceIntersection(faces, result.x[:3]).intersections
    return ConvexHull(vertices).volume / (np.prod(view_shape) * abs(np.linalg.det(matrix_a)))


def box_overlap(center_a, matrix_a, center_b, matrix_b, view_shape) -> float:
    """The same for matrices with one entry per row: overlap of intervals, axis by axis."""
    share = 1.0
    for axis in range(3):
        half_a = sum(abs(matrix_a[axis][k]) * view_shape[k] / 2 for k in range(3))
        half_b = sum(abs(matrix_b[axis][k]) * view_shape[k] / 2 for k in range(3))
        low = max(center_a[axis] - half_a, center_b[axis] - half_b)
        high = min(center_a[axis] + half_a, center_b[axis] + half_b)
        share *= max(0.0, high - low) / (2 * half_a)
    return share


# ---- overlap --------------------------------------------------------------------------------------------------------

# Position labels of VoCo's released code: crops of 64 voxels at centres (y, x), 4 x 4 bases that tile 256 x 256.
VOCO_64_OF_256 = {
    (32, 32): {0: 1.0},
    (80, 144): {1: 0.0625, 2: 0.1875, 5: 0.1875, 6: 0.5625},
    (111, 77): {4: 0.227294921875, 5: 0.538330078125, 8: 0.069580078125, 9: 0.164794921875},
    (223, 128): {9: 0.0078125, 10: 0.0078125, 13: 0.4921875, 14: 0.4921875},
}
VOCO_96_OF_384 = {
    (48, 48): {0: 1.0},
    (96, 96): {0: 0.25, 1: 0.25, 4: 0.25, 5: 0.25},
    (120, 200): {1: 0.10416666666666667, 2: 0.14583333333333334, 5: 0.3125, 6: 0.4375},
    (335, 335): {
        10: 0.00010850694444444444,
        11: 0.010308159722222222,
        14: 0.010308159722222222,
        15: 0.9792751736111112,
    },
}


@pytest.mark.parametrize(("size", "labels"), [(64, VOCO_64_OF_256), (96, VOCO_96_OF_384)])
def test_position_labels_of_voco(size, labels):
    bases = crops([(0, size * i, size * j) for i, j in product(range(4), range(4))], size)
    for (y, x), expected in labels.items():
        view = crops([(0, y - size / 2, x - size / 2)], size)
        got = overlap_fraction(view, bases, (size,) * 3)[0, 0]
        torch.testing.assert_close(got, torch.tensor([expected.get(k, 0.0) for k in range(16)]), rtol=1e-6, atol=0)
        assert float(got.sum()) == pytest.approx(1, abs=1e-6)


def test_overlap_matrix_of_pimpic():
    starts = [(0, 0, 0), (32, 0, 0), (10, 20, 30), (64, 0, 0), (63, 63, 63), (40, 50, 7)]
    expected = [
        [1.0, 0.5, 0.30816650390625, 0.0, 3.814697265625e-06, 0.07305908203125],
        [0.5, 1.0, 0.23968505859375, 0.5, 0.000125885009765625, 0.17047119140625],
        [0.30816650390625, 0.23968505859375, 1.0, 0.05706787109375, 0.027317047119140625, 0.1808013916015625],
        [0.0, 0.5, 0.05706787109375, 1.0, 0.000240325927734375, 0.12176513671875],
        [3.814697265625e-06, 0.000125885009765625, 0.027317047119140625, 0.000240325927734375, 1.0, 0.063812255859375],
        [0.07305908203125, 0.17047119140625, 0.1808013916015625, 0.12176513671875, 0.063812255859375, 1.0],
    ]
    patches = crops(starts)
    torch.testing.assert_close(
        overlap_fraction(patches, patches, (64,) * 3)[0], torch.tensor(expected), rtol=1e-6, atol=0
    )


def test_axis_aligned_pairs_are_exact():
    """Scalings per axis, flips and quarter turns of views that are no cubes."""
    rng = np.random.default_rng(0)
    view_shape = (12, 20, 7)

    def draw(count: int):
        matrices = []
        for k in range(count):
            turn = np.eye(3) if k % 2 else QUARTER_TURNS[rng.integers(4)]
            matrices.append(turn @ np.diag(rng.uniform(0.3, 2, 3) * rng.choice([-1, 1], 3)))
        return rng.uniform(-8, 8, (count, 3)), matrices

    (centers_a, matrices_a), (centers_b, matrices_b) = draw(8), draw(11)
    got = overlap_fraction(specs_of(centers_a, matrices_a), specs_of(centers_b, matrices_b), view_shape)
    assert got.shape == (1, 8, 11) and got.dtype == torch.float32
    expected = [
        [box_overlap(ca, ma, cb, mb, view_shape) for cb, mb in zip(centers_b, matrices_b)]
        for ca, ma in zip(centers_a, matrices_a)
    ]
    assert 20 < np.count_nonzero(expected)
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-7)


def test_pairs_that_are_rotated_alike_are_exact():
    turn = Rotation.from_euler("xyz", (20, 35, -50), degrees=True).as_matrix()
    shift = np.array([3.0, -2.0, 5.0])
    got = overlap_fraction(
        specs_of([[7.0, 8, 9]], [turn]), specs_of([np.array([7.0, 8, 9]) + turn @ shift], [turn * 1.5]), (16,) * 3
    )
    assert float(got) == pytest.approx(box_overlap([0] * 3, np.eye(3), shift, 1.5 * np.eye(3), (16,) * 3), abs=1e-6)


def test_rotated_and_scaled_pairs_against_polyhedra():
    rng = np.random.default_rng(1)
    view_shape = (16, 24, 12)
    spacing = np.diag([2.5, 1.0, 1.2])
    errors, sizes = [], []
    for draw in range(120):
        pair = []
        for _ in range(2):
            turn = Rotation.from_euler("xyz", rng.uniform(-180, 180, 3), degrees=True).as_matrix()
            scale = np.diag(rng.uniform(0.5, 1.8, 3))
            pair.append((rng.uniform(-7, 7, 3), np.linalg.inv(spacing) @ turn @ scale @ spacing))
        if draw % 3 == 0:
            # A base against a transformed view, what position labels are made of.
            pair[1] = (pair[1][0], np.eye(3))
        (center_a, matrix_a), (center_b, matrix_b) = pair
        got = overlap_fraction(specs_of([center_a], [matrix_a]), specs_of([center_b], [matrix_b]), view_shape)
        expected = polyhedron_overlap(center_a, matrix_a, center_b, matrix_b, view_shape)
        errors.append(abs(float(got) - expected))
        sizes.append(expected)
    assert min(sizes) < 0.05 and max(sizes) > 0.8
    assert max(errors) < 0.01
    assert np.mean(errors) < 0.002


def test_overlap_of_rotated_views_is_symmetric_in_volume():
    turn = Rotation.from_euler("xyz", (30, 20, 10), degrees=True).as_matrix()
    a, b = specs_of([[0.0, 0, 0]], [np.eye(3)]), specs_of([[4.0, 2, -3]], [turn * 0.6])
    assert float(overlap_fraction(a, b, (10,) * 3)) == pytest.approx(
        float(overlap_fraction(b, a, (10,) * 3)) * 0.6**3, abs=0.01
    )


def test_a_rotated_view_inside_another_overlaps_completely_and_outside_not_at_all():
    turn = Rotation.from_euler("xyz", (30, 20, 10), degrees=True).as_matrix()
    small = specs_of([[5.0, 5, 5], [30.0, 5, 5]], [0.4 * turn, 0.4 * turn])
    large = specs_of([[5.0, 5, 5]], [np.eye(3)])
    assert overlap_fraction(small, large, (16,) * 3)[0, :, 0].tolist() == [1.0, 0.0]


def test_overlap_is_reproducible():
    turn = Rotation.from_euler("xyz", (30, 20, 10), degrees=True).as_matrix()
    a, b = specs_of([[0.0, 0, 0]], [turn]), specs_of([[4.0, 2, -3]], [np.eye(3)])
    first = overlap_fraction(a, b, (10,) * 3)
    torch.manual_seed(5)
    assert torch.equal(first, overlap_fraction(a, b, (10,) * 3))


def test_views_of_different_sources_do_not_overlap():
    turn = Rotation.from_euler("xyz", (30, 20, 10), degrees=True).as_matrix()
    a = specs_of([[5.0, 5, 5]] * 3, [np.eye(3), np.eye(3), turn], [0, 1, 1])
    result = overlap_fraction(a, a, (8,) * 3)[0]
    assert result[0].tolist() == [1, 0, 0] and result[1, 0] == 0 and result[2, 0] == 0
    assert result[1, 1] == 1 and result[1, 2] > 0.5


def test_samples_of_a_batch_do_not_mix():
    rng = np.random.default_rng(2)
    singles = [
        specs_of(rng.uniform(-4, 4, (3, 3)), Rotation.random(3, random_state=seed).as_matrix()) for seed in range(4)
    ]
    batch = ViewSpecs(*(torch.cat(fields) for fields in zip(*singles)))
    together = overlap_fraction(batch, batch.select([0, 2]), (9, 8, 7))
    assert together.shape == (4, 3, 2)
    for b, single in enumerate(singles):
        assert torch.equal(together[b], overlap_fraction(single, single.select([0, 2]), (9, 8, 7))[0])


def test_is_axis_aligned():
    turn = Rotation.from_euler("xyz", (0, 0.01, 0), degrees=True).as_matrix()
    matrices = torch.tensor(np.array([np.eye(3), QUARTER_TURNS[3] @ np.diag([0.01, -2, 100]), turn]))
    assert is_axis_aligned(matrices).tolist() == [True, True, False]


def test_bounding_half_extent_reaches_the_corners():
    matrix = torch.randn(5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view_shape = (4, 7, 10)
    corners = torch.tensor(list(product((-0.5, 0.5), repeat=3)), dtype=torch.float64) * torch.tensor(view_shape)
    expected = (corners @ matrix.transpose(1, 2)).amax(1)
    torch.testing.assert_close(bounding_half_extent(matrix, view_shape), expected, rtol=0, atol=1e-12)


# ---- corresponding points -------------------------------------------------------------------------------------------


def random_pair(seed: int, views: int = 3) -> tuple[ViewSpecs, ViewSpecs]:
    rng = np.random.default_rng(seed)

    def draw() -> ViewSpecs:
        turns = Rotation.from_euler("xyz", rng.uniform(-40, 40, (views, 3)), degrees=True).as_matrix()
        return specs_of(15 + rng.uniform(-1.5, 1.5, (views, 3)), turns * rng.uniform(0.7, 1.3, (views, 1, 3)))

    return draw(), draw()


def test_matching_points_name_one_source_position():
    a, b = random_pair(0)
    points = torch.rand(1, 3, 50, 3, dtype=torch.float64) * 11
    matched, inside = matching_points(a, b, points, (12, 12, 12))
    torch.testing.assert_close(
        view_to_source(b, matched, (12, 12, 12)), view_to_source(a, points, (12, 12, 12)), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        source_to_view(a, view_to_source(b, matched, (12, 12, 12)), (12, 12, 12)), points, rtol=0, atol=1e-10
    )
    expected = ((matched >= 0) & (matched <= 11)).all(-1)
    assert torch.equal(inside, expected) and inside.any() and not inside.all()


def test_matching_points_of_a_known_pair():
    """The second view is turned by a quarter about z, twice as coarse and moved by (1, 2, 3) source voxels."""
    turn = Rotation.from_euler("xyz", (90, 0, 0), degrees=True).as_matrix().round()
    a, b = specs_of([[10.0, 10, 10]], [np.eye(3)]), specs_of([[11.0, 12, 13]], [2 * turn])
    points = torch.tensor([[[[2.0, 3, 3], [0, 3, 3]]]], dtype=torch.float64)
    matched, inside = matching_points(a, b, points, (5, 7, 7))
    # Offsets (0, 0, 0) and (-2, 0, 0) from a's centre are (-1, -2, -3) and (-3, -2, -3) from b's, in source voxels;
    # turned back by -90 degrees about z, (y, x) becomes (x, -y).
    expected = torch.tensor([[-0.5 + 2, -1.5 + 3, 1 + 3], [-1.5 + 2, -1.5 + 3, 1 + 3]], dtype=torch.float64)
    torch.testing.assert_close(matched[0, 0], expected)
    assert inside.all()


def test_points_of_another_source_do_not_match():
    a = specs_of([[5.0, 5, 5]] * 2, [np.eye(3)] * 2, [0, 1])
    b = specs_of([[5.0, 5, 5]] * 2, [np.eye(3)] * 2, [1, 1])
    _, inside = matching_points(a, b, torch.full((1, 2, 4, 3), 3.0, dtype=torch.float64), (8, 8, 8))
    assert not inside[0, 0].any() and inside[0, 1].all()


def smooth_volume(shape: tuple[int, int, int]) -> torch.Tensor:
    """Waves of at least 13 voxels, which trilinear interpolation follows closely, ``(1, 1, 2, Z, Y, X)``."""
    generator = torch.Generator().manual_seed(3)
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"), -1)
    waves = (torch.rand(2, 6, 3, generator=generator, dtype=torch.float64) - 0.5) * (2 * torch.pi / 12)
    phases = torch.rand(2, 6, 1, 1, 1, generator=generator, dtype=torch.float64) * 6
    return torch.sin(torch.einsum("zyxk,cwk->cwzyx", grid, waves) + phases).sum(1)[None, None]


def test_renderings_agree_at_matching_points():
    """Two views of one random smooth volume show the same intensity wherever their specifications say they should."""
    shape, view_shape = (30, 30, 30), (12, 12, 12)
    volume = smooth_volume(shape)
    a, b = random_pair(4, views=4)
    points = torch.rand(1, 4, 400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 11
    matched, inside = matching_points(a, b, points, view_shape)

    def seen(specs: ViewSpecs, at: torch.Tensor) -> torch.Tensor:
        views = render_views(volume, specs, view_shape)[0]
        return sample_features([views], normalised_points(at[0], view_shape))

    first, second = seen(a, points), seen(b, matched)
    spread = float(first.std())
    assert inside.float().mean() > 0.3
    assert (first - second)[inside[0]].abs().max() < 0.1 * spread
    assert (first - second.flip(0))[inside[0]].abs().mean() > 0.5 * spread


def test_normalised_points_name_one_position_at_every_stride():
    view_shape = (8, 16, 4)
    corners = normalised_points(torch.tensor([[-0.5, -0.5, -0.5], [7.5, 15.5, 3.5], [3.5, 7.5, 1.5]]), view_shape)
    torch.testing.assert_close(corners, torch.tensor([[-1.0, -1, -1], [1, 1, 1], [0, 0, 0]]))
    # The order is (x, y, z): moving along z moves the last coordinate.
    one = normalised_points(torch.tensor([[5.5, 7.5, 1.5]]), view_shape)
    torch.testing.assert_close(one, torch.tensor([[0.0, 0, 0.5]]))
