"""Places that are alike: within a case (PiMPiC Fig. 3) and in other cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from nnssl_stc3d.views.correspondence import cell_centers
from nnssl_stc3d.views.guide import Guide

_PCA_PLACES = 3000
# Best places of one case are at least this many cells apart: neighbours of the best one are no further finding.
_APART = 3


@dataclass(frozen=True)
class Similarity:
    """How similar the places of a case are to one of them.

    Attributes:
        cosines: ``(z, y, x)`` of the cells.
        pca: ``(T, 2)`` principal components of embeddings of the body.
        explained: ``(2,)`` shares of the variance.
        distances: ``(T,)`` mm from the reference.
        correlation: Spearman's, of cosine and distance over the body: -1 if the similarity falls with the distance.
    """

    cosines: np.ndarray
    pca: np.ndarray
    explained: np.ndarray
    distances: np.ndarray
    correlation: float

    def to_dict(self) -> dict:
        """Plain numbers for results.json."""
        return {
            "correlation_of_cosine_and_distance": self.correlation,
            "explained_variance": [float(v) for v in self.explained],
        }


@dataclass(frozen=True)
class Place:
    """A place of another case that resembles the point.

    Attributes:
        case: identifier.
        rank: 1 for the best of the case.
        voxel: ``(z, y, x)``.
        cosine: of the embeddings.
        way_back_mm: distance between the point and the place of its own case that is most similar to this one.
        label: at the place, None if nothing is labelled.
    """

    case: str
    rank: int
    voxel: tuple[float, float, float]
    cosine: float
    way_back_mm: float
    label: int | None = None


def vector_at(guide: Guide, voxel: np.ndarray) -> np.ndarray:
    """Embedding ``(D,)`` of the cell that holds a voxel."""
    z, y, x = guide.index(voxel)
    return np.asarray(guide.features)[:, z, y, x].astype(np.float32)


def cosines_to(guide: Guide, vector: np.ndarray) -> np.ndarray:
    """Cosine of each cell and a vector of length 1, ``(z, y, x)``; -inf outside the body."""
    features = np.asarray(guide.features)
    flat = features.reshape(len(features), -1)
    found = np.concatenate([vector @ part.astype(np.float32) for part in np.array_split(flat, 16, axis=1)])
    return np.where(guide.body, found.reshape(features.shape[1:]), -np.inf)


def similarity(guide: Guide, voxel: np.ndarray, spacing: tuple[float, float, float], seed: int) -> Similarity:
    """Compare the places of a case with one of them.

    Args:
        guide: of the case, with embeddings of length 1.
        voxel: ``(3,)`` the reference.
        spacing: mm per voxel, (z, y, x).
        seed: of the places that are drawn for the PCA.
    """
    cells = np.argwhere(guide.body)
    if len(cells) > _PCA_PLACES:
        cells = cells[np.random.default_rng(seed).permutation(len(cells))[:_PCA_PLACES]]
    z, y, x = cells.T
    rows = np.asarray(guide.features)[:, z, y, x].T.astype(np.float32)
    cosines = cosines_to(guide, vector_at(guide, voxel))
    start = cell_centers(guide, guide.index(voxel))
    distances = np.linalg.norm((cell_centers(guide, cells) - start) * np.asarray(spacing), axis=1)
    fitted = PCA(2, random_state=seed).fit(rows)
    return Similarity(
        cosines,
        fitted.transform(rows),
        np.nan_to_num(fitted.explained_variance_ratio_),
        distances,
        float(np.nan_to_num(spearmanr(cosines[z, y, x], distances).statistic)),
    )


def nearest_places(
    query: Guide,
    voxel: np.ndarray,
    others: Mapping[str, Guide],
    spacing: tuple[float, float, float],
    count: int,
    labels: Mapping[str, np.ndarray] | None = None,
) -> list[Place]:
    """The places of other cases that are most similar to a point.

    Args:
        query: case of the point, with embeddings of length 1.
        voxel: ``(3,)`` the point.
        others: the other cases, with embeddings.
        spacing: mm per voxel, (z, y, x).
        count: places in each case, at least 3 cells apart.
        labels: label maps of the other cases.

    Returns:
        Case by case, the best place first.
    """
    vector, mm = vector_at(query, voxel), np.asarray(spacing)
    start = cell_centers(query, query.index(voxel))
    found = []
    for name, guide in others.items():
        cosines = cosines_to(guide, vector)
        cells = np.stack(np.meshgrid(*(np.arange(n) for n in cosines.shape), indexing="ij"), axis=-1)
        for rank in range(1, count + 1):
            best = np.array(np.unravel_index(int(cosines.argmax()), cosines.shape))
            value = float(cosines[tuple(best)])
            if not np.isfinite(value):
                break
            place = cell_centers(guide, best)
            back = cosines_to(query, vector_at(guide, place))
            returned = cell_centers(query, np.array(np.unravel_index(int(back.argmax()), back.shape)))
            z, y, x = (float(v) for v in place)
            label = None
            if labels is not None and name in labels:
                label = int(labels[name][tuple(np.round(place).astype(int))])
            found.append(Place(name, rank, (z, y, x), value, float(np.linalg.norm((returned - start) * mm)), label))
            cosines[(np.abs(cells - best) < _APART).all(axis=-1)] = -np.inf
    return found
