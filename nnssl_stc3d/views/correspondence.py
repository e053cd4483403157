"""Where a point of one volume lies in another one, from what their guides know."""

from __future__ import annotations

import numpy as np

from nnssl_stc3d.views.guide import Guide

# Columns of a feature map that are compared at a time: 32 MiB in float32 at 128 channels.
_CELLS_AT_ONCE = 2**16


def match_cells(
    query: Guide,
    key: Guide,
    cells: np.ndarray,
    max_cycle: float,
    min_score: float,
    search: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the most similar cells of another volume and keep those that find their way back.

    The best match of a cell is the cell of the other body with the largest cosine. A match is accepted if the best
    match of the match lies close to where it started, and if the cosine reaches a threshold.

    Args:
        query: of the volume that the cells belong to, with features.
        key: of the other volume, with features.
        cells: ``(T, 3)`` indices of cells of the query.
        max_cycle: largest distance, in cells, between a cell and the match of its match.
        min_score: smallest cosine.
        search: half axes of an ellipsoid around the same place in the other body in which matches are looked for, there
            and back, as a share of the box around that body; None looks everywhere.

    Returns:
        ``(T, 3)`` cells of the key and ``(T,)`` bool, the match is accepted.

    Raises:
        ValueError: if features are missing or of different widths.
    """
    if query.features is None or key.features is None or query.features.shape[0] != key.features.shape[0]:
        widths = [None if g.features is None else g.features.shape[0] for g in (query, key)]
        raise ValueError(f"both volumes need features of one width, got {widths[0]} and {widths[1]}")
    matches, scores = _most_similar(query, cells, key, search)
    back, _ = _most_similar(key, matches, query, search)
    accepted = (np.linalg.norm(back - cells, axis=1) <= max_cycle) & (scores >= min_score)
    return matches, accepted


def match_points_by_body(query: Guide, key: Guide, points: np.ndarray) -> np.ndarray:
    """The same place relative to the box around the body: ``(..., 3)`` voxels of the query to voxels of the key.

    Holds for volumes that show the same part of the body in the same orientation.
    """
    (lower, upper), (key_lower, key_upper) = body_box(query), body_box(key)
    return key_lower + (points - lower) / (upper - lower) * (key_upper - key_lower)


def body_box(guide: Guide) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner ``(3,)`` in voxels of the box around the body, the whole volume if there is no body."""
    occupied = [np.flatnonzero(guide.body.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if not len(occupied[0]):
        occupied = [np.arange(n) for n in guide.body.shape]
    cell = np.asarray(guide.cell)
    lower, upper = (np.array([index[end] for index in occupied]) for end in (0, -1))
    return lower * cell - 0.5, (upper + 1) * cell - 0.5


def cell_centers(guide: Guide, cells: np.ndarray) -> np.ndarray:
    """Centres of cells, ``(..., 3)`` indices to ``(..., 3)`` voxels."""
    return (cells + 0.5) * np.asarray(guide.cell) - 0.5


def _most_similar(query: Guide, cells: np.ndarray, key: Guide, search: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The cells of the key's body that are most similar to some cells of the query.

    Args:
        query: with features ``(D, z, y, x)`` of length 1.
        cells: ``(T, 3)`` of the query.
        key: with features ``(D, z, y, x)`` of length 1.
        search: share of the box around the key's body, or None.

    Returns:
        ``(T, 3)`` cells and ``(T,)`` cosines, -inf where no cell lies within reach.
    """
    z, y, x = cells.T
    vectors = np.asarray(query.features)[:, z, y, x].T.astype(np.float32)
    if search is None:
        return _most_similar_anywhere(vectors, key)
    places = match_points_by_body(query, key, cell_centers(query, cells))
    lower, upper = body_box(key)
    # The place itself is rounded to a cell, so less than a cell could not find anything.
    radius = np.maximum(search * (upper - lower), key.cell)
    found = [_most_similar_around(vector, key, place, radius) for vector, place in zip(vectors, places)]
    return np.stack([cell for cell, _ in found]), np.array([score for _, score in found])


def _most_similar_anywhere(vectors: np.ndarray, guide: Guide) -> tuple[np.ndarray, np.ndarray]:
    """The most similar cells of a body, ``(T, D)`` to ``(T, 3)`` and cosines ``(T,)``."""
    features = np.asarray(guide.features)
    flat, grid = features.reshape(len(features), -1), features.shape[1:]
    inside = np.flatnonzero(guide.body) if guide.body.any() else np.arange(flat.shape[1])
    best, score = np.zeros(len(vectors), dtype=np.int64), np.full(len(vectors), -np.inf, dtype=np.float32)
    for start in range(0, len(inside), _CELLS_AT_ONCE):
        columns = inside[start : start + _CELLS_AT_ONCE]
        similarity = vectors @ flat[:, columns].astype(np.float32)
        winner = similarity.argmax(axis=1)
        value = similarity[np.arange(len(vectors)), winner]
        better = value > score
        best[better], score[better] = columns[winner[better]], value[better]
    return np.stack(np.unravel_index(best, grid), axis=-1), score


def _most_similar_around(
    vector: np.ndarray, guide: Guide, place: np.ndarray, radius: np.ndarray
) -> tuple[np.ndarray, float]:
    """The most similar cell of a body in an ellipsoid, ``(3,)`` and its cosine; -inf if no cell of the body is there.

    Args:
        vector: ``(D,)``.
        guide: with features.
        place: ``(3,)`` voxels, centre of the ellipsoid.
        radius: ``(3,)`` voxels, its half axes.
    """
    lower, upper = guide.index(place - radius), guide.index(place + radius) + 1
    z, y, x = (slice(a, b) for a, b in zip(lower.tolist(), upper.tolist()))
    axes = np.meshgrid(*(np.arange(a, b) for a, b in zip(lower, upper)), indexing="ij")
    cells = np.stack(axes, axis=-1)
    near = (((cell_centers(guide, cells) - place) / radius) ** 2).sum(-1) <= 1
    near &= guide.body[z, y, x]
    if not near.any():
        return guide.index(place), -np.inf
    similarity = vector @ np.asarray(guide.features)[:, z, y, x][:, near].astype(np.float32)
    winner = int(similarity.argmax())
    return cells[near][winner], float(similarity[winner])
