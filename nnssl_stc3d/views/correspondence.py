"""Where a point of one volume lies in another one, from what their guides know."""

from __future__ import annotations

import numpy as np

from nnssl_stc3d.views.guide import Guide

# Columns of a feature map that are compared at a time: 32 MiB in float32 at 128 channels.
_CELLS_AT_ONCE = 2**16


def match_cells(
    query: Guide, key: Guide, cells: np.ndarray, max_cycle: float, min_score: float
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

    Returns:
        ``(T, 3)`` cells of the key and ``(T,)`` bool, the match is accepted.

    Raises:
        ValueError: if features are missing or of different widths.
    """
    if query.features is None or key.features is None or query.features.shape[0] != key.features.shape[0]:
        widths = [None if g.features is None else g.features.shape[0] for g in (query, key)]
        raise ValueError(f"both volumes need features of one width, got {widths[0]} and {widths[1]}")
    vectors = _features_of(query, cells)
    matches, scores = _most_similar(vectors, key)
    back, _ = _most_similar(_features_of(key, matches), query)
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


def _features_of(guide: Guide, cells: np.ndarray) -> np.ndarray:
    """Features of cells, ``(T, 3)`` indices to ``(T, D)``."""
    z, y, x = cells.T
    return np.asarray(guide.features)[:, z, y, x].T


def _most_similar(vectors: np.ndarray, guide: Guide) -> tuple[np.ndarray, np.ndarray]:
    """The cell of a guide's body that is most similar to each vector.

    Args:
        vectors: ``(T, D)`` of length 1.
        guide: with features ``(D, z, y, x)`` of length 1.

    Returns:
        ``(T, 3)`` cells and ``(T,)`` cosines.
    """
    features = np.asarray(guide.features)
    flat, grid = features.reshape(len(features), -1), features.shape[1:]
    inside = np.flatnonzero(guide.body) if guide.body.any() else np.arange(flat.shape[1])
    vectors = vectors.astype(np.float32)
    best, score = np.zeros(len(vectors), dtype=np.int64), np.full(len(vectors), -np.inf, dtype=np.float32)
    for start in range(0, len(inside), _CELLS_AT_ONCE):
        columns = inside[start : start + _CELLS_AT_ONCE]
        similarity = vectors @ flat[:, columns].astype(np.float32)
        winner = similarity.argmax(axis=1)
        value = similarity[np.arange(len(vectors)), winner]
        better = value > score
        best[better], score[better] = columns[winner[better]], value[better]
    return np.stack(np.unravel_index(best, grid), axis=-1), score
