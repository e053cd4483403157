"""How far an embedding moves when its view is rotated, shifted or scaled (STC3D Eqs. 8, 9 and 15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from nnssl_stc3d.evaluation.benchmark.statistics import t_interval
from nnssl_stc3d.evaluation.inspection.views import random_center, to_specs
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.spec import ViewSpecs

STRENGTHS: dict[str, tuple[float, ...]] = {
    "rotation": (0.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0),
    "translation": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "scaling": (1.0, 1.1, 1.25, 1.5, 1.75, 2.0),
}
"""Degrees about a random axis; share of the view's extent along a random axis; factor, as often larger as smaller."""

_PER_REGION = 2 + sum(len(s) for s in STRENGTHS.values())


@dataclass(frozen=True)
class Curve:
    """Similarity of views of one region over the strength of a transformation.

    Attributes:
        strengths: of the transformation.
        mean: cosine at each strength, mean over cases.
        interval: 95 % interval of each mean over cases, None for a single case.
        kept: mean over the strengths above none of (cosine - random crop) / (1 - random crop): 1 is invariant, 0 is no
            closer than a random crop of the case.
    """

    strengths: tuple[float, ...]
    mean: list[float]
    interval: list[tuple[float, float] | None]
    kept: float


@dataclass(frozen=True)
class Invariance:
    """Curves of all transformations and their reference.

    Attributes:
        curves: transformation -> curve.
        crop: cosine of a region and a random crop of the same case, mean over cases.
        crop_interval: its 95 % interval.
        cases: number of cases.
        regions: of each case.
    """

    curves: dict[str, Curve]
    crop: float
    crop_interval: tuple[float, float] | None
    cases: int
    regions: int

    def to_dict(self) -> dict:
        """Plain numbers for results.json."""
        return {
            "random_crop": {"mean": self.crop, "interval": self.crop_interval},
            "cases": self.cases,
            "regions_per_case": self.regions,
        } | {
            name: {"strengths": c.strengths, "mean": c.mean, "interval": c.interval, "kept": c.kept}
            for name, c in self.curves.items()
        }


def invariance_views(
    shape: Sequence[int],
    view_shape: Sequence[int],
    spacing: Sequence[float],
    in_plane: bool,
    regions: int,
    rng: np.random.Generator,
    guide: Guide | None = None,
) -> tuple[ViewSpecs, float]:
    """Views of regions of one volume under growing transformations; all of them lie inside the volume.

    For each region: itself, a random crop of the volume, then each transformation of :data:`STRENGTHS` in one random
    direction. Rotation and scaling are about the region's centre, in millimetres.

    Args:
        shape: ``(Z, Y, X)`` of the volume.
        view_shape: ``(Z, Y, X)`` of the views.
        spacing: mm per voxel, (z, y, x).
        in_plane: rotate about the first axis only.
        regions: number of regions.
        rng: source of randomness.
        guide: where the body is.

    Returns:
        The views, and the scale that made them fit: source voxels per view voxel, 1 where the volume is large enough.
    """
    view, volume = np.asarray(view_shape, dtype=float), np.asarray(shape, dtype=float)
    mm = np.asarray(spacing, dtype=float)
    # Room that the strongest transformations take, in halves of the view.
    turned = np.full(3, float(np.linalg.norm(view * mm))) / mm
    if in_plane:
        turned = np.array([view[0], *(np.full(2, float(np.linalg.norm((view * mm)[1:]))) / mm[1:])])
    room = np.maximum(turned, view * max(1 + 2 * STRENGTHS["translation"][-1], STRENGTHS["scaling"][-1]))
    scale = min(1.0, float((volume / room).min()))
    extent, half = view * scale, room * scale / 2
    plain = np.eye(3) * scale
    centers, matrices = [], []
    for _ in range(regions):
        center = random_center(shape, half, rng, guide)
        crop = random_center(shape, extent / 2, rng, guide)
        turn_about = np.array([rng.choice((-1.0, 1.0)), 0, 0]) if in_plane else rng.normal(size=3)
        turn_about = turn_about / np.linalg.norm(turn_about)
        shift = np.eye(3)[rng.integers(3)] * rng.choice((-1.0, 1.0)) * extent
        zoom = rng.choice((-1.0, 1.0))
        centers += [center, crop]
        matrices += [plain, plain]
        for angle in STRENGTHS["rotation"]:
            turn = Rotation.from_rotvec(np.deg2rad(angle) * turn_about).as_matrix()
            centers.append(center)
            matrices.append(turn * (mm / mm[:, None]) @ plain)
        for share in STRENGTHS["translation"]:
            centers.append(center + share * shift)
            matrices.append(plain)
        for factor in STRENGTHS["scaling"]:
            centers.append(center)
            matrices.append(plain * factor**zoom)
    return to_specs(centers, matrices), scale


def case_similarities(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Mean cosines over the regions of one case.

    Args:
        rows: ``(V, D)`` embeddings of the views of :func:`invariance_views`.

    Returns:
        "crop" -> ``()``, and each transformation -> ``(strengths,)``.
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    by_region = unit.reshape(-1, _PER_REGION, unit.shape[1])
    cosines = np.einsum("rd,rvd->rv", by_region[:, 0], by_region[:, 1:]).mean(axis=0)
    result, start = {"crop": cosines[0]}, 1
    for name, strengths in STRENGTHS.items():
        result[name] = cosines[start : start + len(strengths)]
        start += len(strengths)
    return result


def summarise(cases: Sequence[Mapping[str, np.ndarray]], regions: int) -> Invariance:
    """Curves with intervals from the similarities of each case."""
    crops = [float(case["crop"]) for case in cases]
    crop = float(np.mean(crops))
    curves = {}
    for name, strengths in STRENGTHS.items():
        values = np.stack([case[name] for case in cases])
        mean = values.mean(axis=0)
        curves[name] = Curve(
            strengths,
            [float(v) for v in mean],
            [t_interval(column.tolist()) for column in values.T],
            float((mean[1:] - crop).mean() / max(1 - crop, 1e-12)),
        )
    return Invariance(curves, crop, t_interval(crops), len(cases), regions)
