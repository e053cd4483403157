"""Similar places where the answer is known: fingerprints of an atlas that every case shows shifted."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl_stc3d.evaluation.inspection.places import cosines_to, nearest_places, similarity, vector_at
from nnssl_stc3d.evaluation.inspection.voxels import (
    Drawn,
    draw_cells,
    embed_in_plane,
    neighbour_purity,
    rows_of,
)
from nnssl_stc3d.views.correspondence import cell_centers
from nnssl_stc3d.views.guide import Guide

CELL = (2.0, 3.0, 2.0)
SPACING = (1.5, 1.0, 0.5)
GRID = (9, 8, 10)


def unit(features: np.ndarray) -> np.ndarray:
    return (features / np.linalg.norm(features, axis=0)).astype(np.float16)


def case(shift=(0, 0, 0), grid=GRID) -> Guide:
    """Cell ``c`` shows the place ``c + shift`` of an atlas of random vectors."""
    atlas = np.random.default_rng(0).normal(size=(24, 16, 16, 16))
    z, y, x = (slice(s, s + n) for s, n in zip(shift, grid))
    return Guide(CELL, np.ones(grid, dtype=bool), unit(atlas[:, z, y, x]))


def smooth(grid=GRID) -> Guide:
    """Embeddings whose cosine falls with the distance in mm, as far as there are cells: waves of long lengths."""
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1)
    mm = (cells + 0.5) * np.array(CELL) * np.array(SPACING)
    waves = np.random.default_rng(0).normal(scale=0.03, size=(3, 256))
    features = np.concatenate((np.cos(mm @ waves), np.sin(mm @ waves)), axis=-1)
    return Guide(CELL, np.ones(grid, dtype=bool), unit(np.moveaxis(features, -1, 0)))


def test_the_nearest_place_of_a_point_in_a_copy_is_the_same_place():
    voxel = cell_centers(case(), np.array([4, 5, 6]))
    (place,) = nearest_places(case(), voxel, {"copy": case()}, SPACING, 1)
    assert place.voxel == tuple(voxel) and place.cosine == pytest.approx(1, abs=2e-3)
    assert (place.case, place.rank, place.way_back_mm, place.label) == ("copy", 1, 0, None)


def test_the_nearest_place_moves_with_the_anatomy():
    voxel = np.array([8.7, 16.2, 13.1])  # in cell (4, 5, 6)
    others = {"a": case((2, 0, 1)), "b": case((0, 3, 4))}
    labels = {name: np.full([int(n * c) for n, c in zip(GRID, CELL)], index) for index, name in enumerate(others)}
    found = nearest_places(case(), voxel, others, SPACING, 2, labels)
    assert [(p.case, p.rank) for p in found] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert found[0].voxel == tuple(cell_centers(case(), np.array([2, 5, 5])))
    assert found[2].voxel == tuple(cell_centers(case(), np.array([4, 2, 2])))
    assert [p.label for p in found] == [0, 0, 1, 1]
    assert found[0].cosine > found[1].cosine and found[0].way_back_mm == 0 < found[1].way_back_mm


def test_further_places_are_no_neighbours_of_the_best():
    guide = smooth()
    found = nearest_places(guide, np.array([9.0, 12.0, 9.0]), {"other": guide}, SPACING, 4)
    cells = np.array([guide.index(np.array(p.voxel)) for p in found])
    apart = np.abs(cells[:, None] - cells[None]).max(-1)
    assert len(found) == 4 and (apart[~np.eye(4, dtype=bool)] >= 3).all()


def test_places_lie_in_the_body_and_run_out():
    body = np.zeros(GRID, dtype=bool)
    body[0, 0, :2] = True
    other = Guide(CELL, body, case().features)
    found = nearest_places(case(), np.array([8.0, 12.0, 9.0]), {"other": other}, SPACING, 3)
    assert len(found) == 1 and tuple(other.index(np.array(found[0].voxel)))[:2] == (0, 0)
    assert np.isneginf(cosines_to(other, vector_at(other, np.zeros(3)))[1:]).all()


def test_similarity_falls_with_the_distance_where_embeddings_are_smooth():
    guide, voxel = smooth(), np.array([8.5, 10.0, 8.5])
    found = similarity(guide, voxel, SPACING, 0)
    assert found.correlation < -0.98 and found.cosines.shape == GRID
    assert found.cosines[tuple(guide.index(voxel))] == pytest.approx(1, abs=2e-3) == found.cosines.max()
    assert found.pca.shape == (np.prod(GRID), 2) and found.distances.min() == 0
    cells = np.argwhere(guide.body)
    np.testing.assert_allclose(found.distances, np.linalg.norm((cells - guide.index(voxel)) * [3, 3, 1], axis=1))
    noise = similarity(case(), voxel, SPACING, 0)
    assert abs(noise.correlation) < 0.15


# ---- voxels ---------------------------------------------------------------------------------------------------------


def test_purity_counts_neighbours_of_other_cases_only():
    groups, cases = np.array([0, 1, 0, 1, 0, 1]), np.array([0, 0, 1, 1, 2, 2])
    pure, interval, chance = neighbour_purity(np.eye(2)[groups].astype(np.float32), groups, cases)
    # Two of the four others are of the own group, and all four are among the ten nearest.
    assert (pure, chance) == (0.5, 0.5) and interval == pytest.approx((0.5, 0.5))


def test_purity_of_separated_and_of_mixed_groups():
    rng = np.random.default_rng(0)
    groups, cases = np.tile([0, 1, 2], 100), np.repeat([0, 1, 2], 100)
    apart = np.eye(3)[groups] + 0.01 * rng.normal(size=(300, 3))
    purity, interval, chance = neighbour_purity(unit(apart.T).T.astype(np.float32), groups, cases)
    assert purity == 1 and chance == pytest.approx(1 / 3) and interval == pytest.approx((1, 1))
    mixed, _, _ = neighbour_purity(unit(rng.normal(size=(20, 300))).T.astype(np.float32), groups, cases)
    assert mixed == pytest.approx(1 / 3, abs=0.05)


def draw(labels=None, count=300, names=None) -> Drawn:
    guides = {"a": case(), "b": case((1, 1, 1))}
    return draw_cells(guides, labels or {}, names or {}, count, np.random.default_rng(0))


def test_cells_are_drawn_alike_from_all_labels_of_two_cases():
    shape = tuple(int(n * c) for n, c in zip(GRID, CELL))
    labels = {name: np.zeros(shape, dtype=np.int8) for name in ("a", "b")}
    for name in labels:
        labels[name][:, :6] = 1
        labels[name][:, 6:12] = -1  # labelled by nobody
    labels["a"][:, 20:] = 2  # in one case only
    drawn = draw(labels, 200, {1: "liver", 2: "spleen"})
    assert drawn.labelled and drawn.names == {0: "background", 1: "liver"}
    assert np.bincount(drawn.groups).tolist() == [100, 100]
    for name, cells in drawn.cells.items():
        places = cell_centers(case(), cells).round().astype(int)
        mine = drawn.groups[drawn.case_index == list(drawn.cells).index(name)]
        np.testing.assert_array_equal(labels[name][tuple(places.T)], mine)


def test_without_labels_the_octants_of_the_body_are_groups():
    drawn = draw(count=400)
    assert not drawn.labelled and len(drawn.names) == 8 and drawn.names[4] == "z high, y low, x low"
    np.testing.assert_array_equal(drawn.groups, (drawn.colours > 0.5) @ np.array([4, 2, 1]))
    assert drawn.colours.min() >= 0 and drawn.colours.max() <= 1


def test_labels_that_are_too_few_are_named():
    shape = tuple(int(n * c) for n, c in zip(GRID, CELL))
    with pytest.raises(ValueError, match="at least two labels that occur in two cases each, got 1 in 2 cases"):
        draw({name: np.zeros(shape, dtype=np.int8) for name in ("a", "b")}, names={1: "liver"})


def test_rows_follow_the_cells_and_the_plane_is_reproducible():
    drawn = draw(count=80)
    maps = {"a": case(), "b": case((1, 1, 1))}
    rows = rows_of(drawn, maps)
    start = len(drawn.cells["a"])
    np.testing.assert_array_equal(rows[start], vector_at(maps["b"], cell_centers(case(), drawn.cells["b"][0])))
    first, second = (embed_in_plane(rows, drawn, 0) for _ in range(2))
    np.testing.assert_array_equal(first.tsne, second.tsne)
    assert first.pca.shape == first.tsne.shape == (len(rows), 2) and -1 <= first.silhouette <= 1
