"""What is body and what is the air around it, in a volume or a coarse grid of one. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

CELL_MM = 4.0
"""Size of the guides' cells: fine enough for skin, coarse enough for thousands of volumes."""
BODY_HU = -500.0
"""Brighter than this is body in CT."""

# Of the range of intensities that nnU-Net's clipping leaves: noise of clipped air stays below it.
_CLIPPING_MARGIN = 0.02
# Air is the darkest there is: its mean lies this close to the minimum, as a share of the body's. Measured: at most .04
# in CT and .22 in MR; in crops that show no air, where Otsu separates tissue from tissue, at least .42.
_DARK = 1 / 3
_HISTOGRAM_BINS = 256


@dataclass(frozen=True)
class BodyRule:
    """How body is told from air in the values of a plan's preprocessed data.

    Attributes:
        kind: "threshold" above a fixed value, "otsu" above each volume's own, "nonzero" wherever the normalisation,
            which was restricted to nonzero voxels, did not leave zeros, or what resampling made of them.
        channel: that is looked at; None takes the mean of all.
        threshold: in preprocessed values, kind "threshold" only.
        spacing: mm per voxel, (z, y, x) of the preprocessed array.
        axial: axis of the array along which a scan cuts through the body, so that air at its ends may be lung.
        description: what the log says.
    """

    kind: str
    channel: int | None
    threshold: float | None
    spacing: tuple[float, float, float]
    axial: int
    description: str

    @classmethod
    def of_plan(cls, plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> BodyRule:
        """Read the rule from nnU-Net's plans.

        Args:
            plans: content of a plans file.
            configuration: the resolved configuration, with normalisation schemes and spacing.
        """
        z, y, x = configuration["spacing"]
        spacing, axial = (float(z), float(y), float(x)), list(plans["transpose_forward"]).index(0)
        schemes = list(configuration["normalization_schemes"])
        properties = plans.get("foreground_intensity_properties_per_channel") or {}
        for channel, scheme in enumerate(schemes):
            known = properties.get(str(channel))
            if scheme == "CTNormalization" and known:
                threshold, description = _ct_threshold(known)
                return cls("threshold", channel, threshold, spacing, axial, description)
        masked = [channel for channel, use in enumerate(configuration["use_mask_for_norm"]) if use]
        if masked:
            return cls("nonzero", masked[0], None, spacing, axial, "the nonzero voxels")
        description = "brighter than Otsu's threshold of each volume, since the plan has no CT normalisation"
        return cls("otsu", None, None, spacing, axial, description)

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Cells along each axis of a volume of ``(Z, Y, X)`` voxels."""
        z, y, x = (max(1, min(n, round(n * s / CELL_MM))) for n, s in zip(shape, self.spacing))
        return z, y, x


def _ct_threshold(properties: Mapping[str, float]) -> tuple[float, str]:
    """Preprocessed value that separates body and air, undoing nnU-Net's CT normalisation."""
    low, high = float(properties["percentile_00_5"]), float(properties["percentile_99_5"])
    hounsfield, description = BODY_HU, f"above {BODY_HU:g} HU"
    lowest = low + _CLIPPING_MARGIN * (high - low)
    if lowest > hounsfield:
        hounsfield = lowest
        description = f"above {lowest:.0f} HU, because the plan's normalisation clips at {low:.0f} HU"
    return (hounsfield - float(properties["mean"])) / max(float(properties["std"]), 1e-8), description


def body_mask(coarse: np.ndarray, rule: BodyRule) -> tuple[np.ndarray, bool]:
    """The body: everything but the air around it, largest component (vox2vec 3.1, on a coarse grid).

    Air belongs to the outside if it is connected to a side of the volume other than the two ends of the axial axis,
    where lungs may be cut: air inside the body is body.

    Args:
        coarse: ``(z, y, x)`` mean value of each cell; for kind "nonzero" the share of nonzero voxels.
        rule: how values tell body from air.

    Returns:
        ``(z, y, x)`` bool, and whether there was something to tell apart; if not, everything is body.
    """
    threshold = 0.5 if rule.kind == "nonzero" else rule.threshold
    if threshold is None:
        threshold = otsu_threshold(coarse)
    air = coarse <= threshold
    labels, _ = ndimage.label(air)
    sides = [np.take(labels, end, axis) for axis in range(3) if axis != rule.axial for end in (0, -1)]
    outside = np.unique(np.concatenate([side.ravel() for side in sides]))
    body = ~(air & np.isin(labels, outside[outside > 0]))
    parts, count = ndimage.label(body)
    if count > 1:
        body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    apart = bool(body.any() and not body.all())
    if apart and rule.kind == "otsu":
        dark, bright = (float(coarse[where].mean() - coarse.min()) for where in (~body, body))
        apart = dark < _DARK * bright
    return (body, True) if apart else (np.ones_like(body), False)


def otsu_threshold(values: np.ndarray) -> float:
    """Threshold of largest variance between two classes (Otsu 1979); the lowest value if all are equal."""
    counts, edges = np.histogram(values, bins=_HISTOGRAM_BINS)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    between = np.where((below > 0) & (above > 0), between, -1.0)
    if between.max() <= 0:
        return float(np.min(values))
    # Empty bins between the classes are equally good: their middle.
    return float(edges[1:][between >= between.max() * (1 - 1e-9)].mean())
