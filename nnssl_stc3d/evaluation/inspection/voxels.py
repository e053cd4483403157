"""Voxel embeddings of several cases in two dimensions, and how well neighbours agree (vox2vec's figure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from nnssl_stc3d.data.voxel_labels import UNKNOWN
from nnssl_stc3d.evaluation.benchmark.statistics import t_interval
from nnssl_stc3d.views.correspondence import body_box, cell_centers
from nnssl_stc3d.views.guide import Guide

NEIGHBOURS = 10
_PERPLEXITY = 30.0
_PRINCIPAL = 50


@dataclass(frozen=True)
class Drawn:
    """Cells that are compared, drawn once for all networks.

    Attributes:
        cells: case -> ``(T, 3)``.
        groups: ``(N,)`` group of each cell, cases in order: its label, or the octant of the body.
        colours: ``(N, 3)`` position in the box around the body, 0 to 1, (z, y, x).
        names: group -> name.
        labelled: whether groups are labels.
    """

    cells: dict[str, np.ndarray]
    groups: np.ndarray
    colours: np.ndarray
    names: dict[int, str]
    labelled: bool

    @property
    def case_index(self) -> np.ndarray:
        """``(N,)`` index of the case of each cell."""
        return np.repeat(np.arange(len(self.cells)), [len(cells) for cells in self.cells.values()])


@dataclass(frozen=True)
class VoxelMap:
    """Embeddings of the drawn cells.

    Attributes:
        pca: ``(N, 2)``.
        tsne: ``(N, 2)``.
        explained: ``(2,)`` shares of the variance.
        purity: share of the 10 nearest neighbours in other cases that are of the same group; mean over groups and
            cases.
        interval: 95 % interval of the purity over cases.
        chance: purity if neighbours were drawn at random.
        silhouette: of the groups, by cosine; -1 to 1.
    """

    pca: np.ndarray
    tsne: np.ndarray
    explained: np.ndarray
    purity: float
    interval: tuple[float, float] | None
    chance: float
    silhouette: float

    def to_dict(self) -> dict:
        """Plain numbers for results.json."""
        return {
            "neighbour_purity": self.purity,
            "interval": self.interval,
            "chance": self.chance,
            "silhouette": self.silhouette,
            "explained_variance": [float(v) for v in self.explained],
        }


def draw_cells(
    guides: Mapping[str, Guide],
    labels: Mapping[str, np.ndarray],
    names: Mapping[int, str],
    count: int,
    rng: np.random.Generator,
) -> Drawn:
    """Draw cells of bodies, as many of each label as there are, or everywhere alike.

    Args:
        guides: bodies of the cases.
        labels: structures ``(Z, Y, X)`` of all cases, as of ``read_structures``, or of none.
        names: value -> name of the structures, without the background.
        count: cells in all.
        rng: source of randomness.

    Raises:
        ValueError: if fewer than two groups have cells in at least two cases.
    """
    everything, groups, colours, case_of = [], [], [], []
    for index, (name, guide) in enumerate(guides.items()):
        cells = np.argwhere(guide.body)
        places = cell_centers(guide, cells)
        lower, upper = body_box(guide)
        position = ((places - lower) / (upper - lower)).clip(0, 1)
        group = (position > 0.5).astype(int) @ np.array([4, 2, 1])
        if labels:
            z, y, x = np.round(places).astype(int).T
            group = labels[name][z, y, x]
            known = group != UNKNOWN
            cells, position, group = cells[known], position[known], group[known]
        everything.append(cells)
        groups.append(group)
        colours.append(position)
        case_of.append(np.full(len(cells), index))
    group, case = np.concatenate(groups), np.concatenate(case_of)
    present = [g for g in np.unique(group).tolist() if len(np.unique(case[group == g])) >= 2]
    if len(present) < 2:
        raise ValueError(
            f"expected at least two labels that occur in two cases each, got {len(present)} in "
            f"{len(guides)} cases. Look at more cases (--cases), or leave out the part voxels."
        )
    keep = np.zeros(len(group), dtype=bool)
    for g in present:
        mine = np.flatnonzero(group == g)
        keep[rng.permutation(mine)[: max(2, count // len(present))]] = True
    cells = np.concatenate(everything)
    chosen = {name: cells[keep & (case == index)] for index, name in enumerate(guides)}
    known = {0: "background", **names} if labels else {g: _octant(g) for g in range(8)}
    return Drawn(
        chosen, group[keep], np.concatenate(colours)[keep], {g: known[g] for g in present}, labelled=bool(labels)
    )


def rows_of(drawn: Drawn, maps: Mapping[str, Guide]) -> np.ndarray:
    """Embeddings ``(N, D)`` of the drawn cells, cases in order."""
    parts = []
    for name, cells in drawn.cells.items():
        z, y, x = cells.T
        parts.append(np.asarray(maps[name].features)[:, z, y, x].T)
    return np.concatenate(parts).astype(np.float32)


def neighbour_purity(
    rows: np.ndarray, groups: np.ndarray, cases: np.ndarray
) -> tuple[float, tuple[float, float] | None, float]:
    """How many of the nearest neighbours in other cases are of the same group.

    Neighbours of the same case are left out: that a structure resembles itself is no finding.

    Args:
        rows: ``(N, D)`` of length 1.
        groups: ``(N,)``.
        cases: ``(N,)`` index of the case.

    Returns:
        Mean over the groups of a case, then over cases; its interval over cases; the same by chance.
    """
    per_case, by_chance = [], []
    for case in np.unique(cases):
        mine, rest = np.flatnonzero(cases == case), np.flatnonzero(cases != case)
        cosines = rows[mine] @ rows[rest].T
        count = min(NEIGHBOURS, len(rest))
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        same = (groups[rest][nearest] == groups[mine][:, None]).mean(axis=1)
        present = np.unique(groups[mine])
        per_case.append(float(np.mean([same[groups[mine] == g].mean() for g in present])))
        by_chance.append(float(np.mean([(groups[rest] == g).mean() for g in present])))
    return float(np.mean(per_case)), t_interval(per_case), float(np.mean(by_chance))


def embed_in_plane(rows: np.ndarray, drawn: Drawn, seed: int) -> VoxelMap:
    """PCA, t-SNE and the numbers that belong to them.

    Args:
        rows: ``(N, D)`` of length 1, of :func:`rows_of`.
        drawn: the cells.
        seed: of PCA and t-SNE.
    """
    wide = PCA(min(_PRINCIPAL, *rows.shape), random_state=seed).fit(rows)
    principal = wide.transform(rows)
    flat = TSNE(
        2, perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3), init="pca", learning_rate="auto", random_state=seed
    ).fit_transform(principal)
    purity, interval, chance = neighbour_purity(rows, drawn.groups, drawn.case_index)
    return VoxelMap(
        principal[:, :2],
        flat,
        wide.explained_variance_ratio_[:2],
        purity,
        interval,
        chance,
        float(silhouette_score(rows, drawn.groups, metric="cosine")),
    )


def _octant(index: int) -> str:
    ends = (("low", "high")[index // step % 2] for step in (4, 2, 1))
    return ", ".join(f"{axis} {end}" for axis, end in zip("zyx", ends))
