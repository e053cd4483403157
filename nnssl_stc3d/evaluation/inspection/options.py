"""What an inspection shall look at."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from nnssl_stc3d.evaluation.inspection.scan_grid import ScanGrid

PARTS = ("spectrum", "similarity", "voxels", "invariance", "neighbours")
PYRAMIDS = ("auto", "encoder", "decoder")
EMBEDDINGS = ("features", "head")

_POINT = re.compile(r"\(?\s*([-+\d.]+)\s*,\s*([-+\d.]+)\s*,\s*([-+\d.]+)\s*\)?\s*(mm|scan)?")


@dataclass(frozen=True)
class Point:
    """A place that a user names.

    Attributes:
        case: identifier.
        position: ``(z, y, x)``.
        unit: "voxels" of the preprocessed case, "mm" from the centre of its first voxel, or "scan", voxels of the scan
            counted from 0.
    """

    case: str
    position: tuple[float, float, float]
    unit: str = "voxels"

    @classmethod
    def parse(cls, case: str, text: str) -> Point:
        """Read ``Z,Y,X``, ``Z,Y,Xmm`` or ``Z,Y,Xscan``.

        Raises:
            ValueError: if the text is something else.
        """
        found = _POINT.fullmatch(text.strip())
        try:
            if found is None:
                raise ValueError(text)
            z, y, x = (float(found.group(i)) for i in (1, 2, 3))
        except ValueError as error:
            raise ValueError(
                f"expected a point as Z,Y,X in voxels, Z,Y,Xmm or Z,Y,Xscan, such as 40,120,95, got {text!r}"
            ) from error
        return cls(case, (z, y, x), found.group(4) or "voxels")

    def voxel(
        self, spacing: tuple[float, float, float], shape: tuple[int, ...], grid: ScanGrid | None = None
    ) -> np.ndarray:
        """The place in voxels, ``(3,)``.

        Args:
            spacing: mm per voxel, (z, y, x).
            shape: ``(Z, Y, X)`` of the case.
            grid: of its scan, for the unit "scan".

        Raises:
            ValueError: if it lies outside the case, or where it lies is not known.
        """
        if self.unit == "scan":
            if grid is None:
                raise ValueError(
                    f"where the voxels of {self.case} lie in its scan is not known: its .pkl beside the preprocessed "
                    "image is missing or from elsewhere. Preprocess it again, or give the point without 'scan'."
                )
            place = grid.from_scan(self.position)
        else:
            place = np.asarray(self.position) / (np.asarray(spacing) if self.unit == "mm" else 1)
        if (place < -0.5).any() or (place > np.asarray(shape) - 0.5).any():
            if grid is not None and self.unit == "scan":
                ends = [grid.to_scan(np.zeros(3)), grid.to_scan(np.asarray(shape) - 1)]
                first, last = ([round(n, 1) for n in end] for end in ends)
                raise ValueError(
                    f"the point {self.position} lies outside the part of {self.case} that preprocessing has kept, "
                    f"{','.join(map(str, first))} to {','.join(map(str, last))} (z,y,x of the scan)"
                )
            last = [round(float((n - 1) * (s if self.unit == "mm" else 1)), 1) for n, s in zip(shape, spacing)]
            raise ValueError(
                f"the point {self.position} lies outside {self.case}, which goes from 0,0,0 to "
                f"{','.join(map(str, last))} {self.unit} (z,y,x of the preprocessed case)"
            )
        return place


@dataclass(frozen=True)
class InspectOptions:
    """What is looked at, and how closely.

    Attributes:
        parts: of :data:`PARTS`.
        pyramid: feature maps that are read at voxels: the encoder's stages, or the bottleneck and the decoder's stages;
            "auto" takes the decoder's if it was trained.
        embedding: of voxels, "features" of the network or "head", the method's own embedding.
        point: whose like is searched in other cases, and reference of the similarity map; None takes the middle of the
            body of the first case.
        max_cases: that are looked at.
        views: random views for the spectrum, over all cases.
        points: voxels in PCA and t-SNE.
        regions: of each case, for the invariance.
        neighbours: best places in each other case.
        width: principal directions of the voxel embeddings that are kept.
        cell_mm: distance of the places at which volumes are embedded; None chooses by the size of the cases.
        scratch: compare with the untrained network.
        seed: of everything that is drawn.
    """

    parts: tuple[str, ...] = PARTS
    pyramid: str = "auto"
    embedding: str = "features"
    point: Point | None = None
    max_cases: int = 12
    views: int = 512
    points: int = 2000
    regions: int = 4
    neighbours: int = 3
    width: int = 128
    cell_mm: float | None = None
    scratch: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be looked at."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
        for name, allowed in (("pyramid", PYRAMIDS), ("embedding", EMBEDDINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        lowest = {"max_cases": 2, "views": 8, "points": 20, "regions": 1, "neighbours": 1, "width": 2, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(self, name)}")
        if self.cell_mm is not None and not self.cell_mm > 0:
            raise ValueError(f"the size of a cell must be positive, got {self.cell_mm} mm")
