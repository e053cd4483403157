"""Correspondences between volumes whose true matching points are known."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl_stc3d.prepare.phantom import LABELS, PhantomConfig, generate_case
from nnssl_stc3d.views import correspondence
from nnssl_stc3d.views.correspondence import body_box, cell_centers, match_cells, match_points_by_body
from nnssl_stc3d.views.guide import Guide

CELL = (2.0, 3.0, 2.5)
SHAPE = (8, 9, 10)


def unit(features: np.ndarray) -> np.ndarray:
    return (features / np.linalg.norm(features, axis=0)).astype(np.float16)


def anatomy(points: np.ndarray) -> np.ndarray:
    """A fingerprint of each place of an atlas, ``(..., 3)`` to ``(D, ...)``: random waves, like those of a network."""
    rng = np.random.default_rng(0)
    waves, phases = rng.normal(scale=0.35, size=(3, 48)), rng.uniform(0, 2 * np.pi, size=48)
    return unit(np.moveaxis(np.cos(points @ waves + phases), -1, 0))


def person(offset: np.ndarray, grid=SHAPE, cell=CELL) -> Guide:
    """A volume that shows the atlas, shifted by ``offset`` voxels: its point ``p`` is the atlas' ``p + offset``."""
    cells = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1)
    places = (cells + 0.5) * np.asarray(cell) - 0.5 + offset
    return Guide(cell, np.ones(grid, dtype=bool), anatomy(places))


def all_cells(guide: Guide) -> np.ndarray:
    return np.argwhere(guide.body)


# ---- features -------------------------------------------------------------------------------------------------------


def test_cells_are_matched_with_where_the_anatomy_lies():
    """The key shows the same anatomy two cells further on along each axis."""
    shift = np.array([2, 2, 2])
    query, key = person(np.zeros(3)), person(-shift * CELL)
    cells = all_cells(query)
    seen = ((cells + shift) < SHAPE).all(axis=1)
    matches, accepted = match_cells(query, key, cells, max_cycle=2.0, min_score=0.9)
    np.testing.assert_array_equal(matches[seen], cells[seen] + shift)
    assert accepted[seen].all()
    assert not accepted[~seen].any(), "what the other volume does not show has no match"


def test_matches_that_do_not_come_back_are_rejected():
    """Two places of the query look alike: both are matched with one cell of the key, which goes back to one of them."""
    query, key = person(np.zeros(3)), person(np.zeros(3))
    features = query.features.copy()
    features[:, 7, 8, 9] = features[:, 1, 1, 1]
    query = Guide(CELL, query.body, features)
    cells = np.array([[1, 1, 1], [7, 8, 9]])
    matches, accepted = match_cells(query, key, cells, max_cycle=2.0, min_score=0.9)
    np.testing.assert_array_equal(matches, [[1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(accepted, [True, False])
    _, anywhere = match_cells(query, key, cells, max_cycle=20.0, min_score=0.9)
    assert anywhere.all()


def test_the_round_trip_may_end_two_cells_away():
    query, key = person(np.zeros(3)), person(np.zeros(3))
    features = query.features.copy()
    # The true cell of the query is less like the key's than its neighbour, two cells away.
    features[:, 4, 4, 6] = features[:, 4, 4, 4]
    features[:, 4, 4, 4] = unit(features[:, 4, 4, 4].astype(np.float32) + 0.1 * features[:, 4, 4, 5])
    query = Guide(CELL, query.body, features)
    for max_cycle, expected in ((2.0, True), (1.9, False)):
        matches, accepted = match_cells(query, key, np.array([[4, 4, 4]]), max_cycle, 0.5)
        assert matches.tolist() == [[4, 4, 4]] and accepted[0] == expected


def test_weak_matches_are_rejected():
    query, key = person(np.zeros(3)), person(np.array([200.0, 0, 0]))
    cells = all_cells(query)
    _, strict = match_cells(query, key, cells, max_cycle=2.0, min_score=0.95)
    _, lax = match_cells(query, key, cells, max_cycle=2.0, min_score=-1.0)
    assert not strict.any() and lax.any()


def test_air_is_no_match():
    query = person(np.zeros(3))
    body = np.zeros(SHAPE, dtype=bool)
    body[:4] = True
    key = Guide(CELL, body, query.features)
    matches, accepted = match_cells(query, key, all_cells(query), max_cycle=0.0, min_score=0.9)
    assert matches[:, 0].max() < 4
    assert accepted.sum() == body.sum()


def test_many_cells_are_compared_piece_by_piece(monkeypatch):
    query, key = person(np.zeros(3)), person(np.array([-4.0, 0, 0]))
    expected = match_cells(query, key, all_cells(query), 2.0, 0.7)
    monkeypatch.setattr(correspondence, "_CELLS_AT_ONCE", 17)
    for a, b in zip(match_cells(query, key, all_cells(query), 2.0, 0.7), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_search_finds_what_is_best_within_reach():
    """Against a loop over all cells of the body."""
    query, key = person(np.zeros(3)), person(np.array([5.0, -4.0, 3.0]))
    body = key.body.copy()
    body[:, 3] = False
    key = Guide(CELL, body, key.features)
    lower, upper = body_box(key)
    radius = 0.3 * (upper - lower)
    cells = all_cells(query)[::13]
    matches, _ = match_cells(query, key, cells, 2.0, 0.7, 0.3)
    for cell, match in zip(cells, matches):
        place = match_points_by_body(query, key, cell_centers(query, cell))
        vector = query.features[(slice(None), *cell)].astype(np.float32)
        best, best_score = None, -np.inf
        for candidate in np.argwhere(body):
            if (((cell_centers(key, candidate) - place) / radius) ** 2).sum() > 1:
                continue
            score = float(vector @ key.features[(slice(None), *candidate)].astype(np.float32))
            if score > best_score:
                best, best_score = candidate, score
        np.testing.assert_array_equal(match, best)


def test_the_way_back_is_searched_within_reach_too():
    """A far cell of the query is even more like the match than the cell itself: anywhere, the way would end there."""
    query, key = person(np.zeros(3)), person(np.zeros(3))
    features = query.features.copy()
    features[:, 0, 0, 0] = features[:, 4, 4, 4]
    features[:, 4, 4, 4] = unit(features[:, 4, 4, 4].astype(np.float32) + 0.1 * features[:, 4, 4, 5])
    query, cells = Guide(CELL, query.body, features), np.array([[4, 4, 4]])
    for search, expected in ((0.2, True), (None, False)):
        matches, accepted = match_cells(query, key, cells, 2.0, 0.9, search)
        assert matches.tolist() == [[4, 4, 4]] and accepted[0] == expected


def test_a_search_reaches_at_least_one_cell():
    query = person(np.zeros(3))
    matches, accepted = match_cells(query, query, np.array([[0, 0, 0]]), 2.0, -1.0, 1e-3)
    assert accepted.all() and matches.tolist() == [[0, 0, 0]]


def test_nothing_within_reach_is_no_match():
    query = person(np.zeros(3))
    body = np.zeros(SHAPE, dtype=bool)
    body[0, 0, 0] = body[-1, -1, -1] = True
    key = Guide(CELL, body, query.features)
    matches, accepted = match_cells(query, key, np.array([[4, 4, 4]]), 2.0, -1.0, 0.05)
    assert not accepted.any() and (matches >= 0).all() and (matches < SHAPE).all()


@pytest.mark.parametrize("widths", [(None, 4), (4, None), (4, 5)])
def test_features_of_one_width_are_needed(widths):
    guides = [
        Guide(CELL, np.ones((2, 2, 2), dtype=bool), None if w is None else np.ones((w, 2, 2, 2), np.float16))
        for w in widths
    ]
    with pytest.raises(ValueError, match=f"features of one width, got {widths[0]} and {widths[1]}"):
        match_cells(*guides, np.array([[0, 0, 0]]), 2.0, 0.7)


# ---- place in the body ----------------------------------------------------------------------------------------------


def test_the_same_place_in_a_larger_body_elsewhere():
    body, key_body = np.zeros((10, 10, 10), dtype=bool), np.zeros((20, 12, 10), dtype=bool)
    body[2:6, 1:9, :5] = True
    key_body[10:18, 2:6, 5:] = True
    query, key = Guide((1.0, 2.0, 3.0), body), Guide((1.5, 2.0, 1.0), key_body)
    lower, upper = body_box(query)
    np.testing.assert_allclose(lower, [1.5, 1.5, -0.5])
    np.testing.assert_allclose(upper, [5.5, 17.5, 14.5])
    fractions = np.random.default_rng(0).uniform(size=(5, 3))
    key_lower, key_upper = body_box(key)
    matched = match_points_by_body(query, key, lower + fractions * (upper - lower))
    np.testing.assert_allclose(matched, key_lower + fractions * (key_upper - key_lower))
    np.testing.assert_allclose(match_points_by_body(key, query, matched), lower + fractions * (upper - lower))


def test_an_empty_body_is_the_whole_volume():
    empty, full = (Guide((2.0, 2.0, 2.0), value) for value in (np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)))
    for a, b in zip(body_box(empty), body_box(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_organs_of_phantoms_lie_at_the_same_place_in_the_body():
    """Anatomy of two people: the centre of an organ is found within 3 cm, most within 2 cm."""
    config = PhantomConfig(shape=(40, 40, 48), spacing=(7.0, 6.2, 6.6))
    cases = [generate_case(seed, config) for seed in range(4)]
    guides = [Guide((1.0, 1.0, 1.0), case.body.astype(bool)) for case in cases]
    errors = []
    for query in range(3):
        for label in LABELS.values():
            if label == 0:
                continue
            centers = [np.argwhere(case.labels == label).mean(axis=0) for case in cases]
            found = match_points_by_body(guides[query], guides[query + 1], centers[query])
            errors.append(np.linalg.norm((found - centers[query + 1]) * cases[query + 1].spacing))
    assert max(errors) < 45 and np.median(errors) < 22
