"""Figures with slices of cases and with embeddings in a plane, each returned as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nnssl_stc3d.evaluation.inspection.places import Place, Similarity
from nnssl_stc3d.evaluation.inspection.voxels import Drawn, VoxelMap
from nnssl_stc3d.evaluation.report_figures import LABEL_COLOURS, new_figure, to_png

_PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))
_BACKGROUND = "#c9ccd1"
_POINT_COLOUR = "#00e5ff"


def similarity_figure(
    image: np.ndarray, voxel: np.ndarray, spacing: tuple[float, float, float], found: Mapping[str, Similarity]
) -> bytes:
    """The case in three planes, then for each network the similarity map and the PCA coloured by distance.

    Args:
        image: ``(Z, Y, X)`` of the case, with the axes of the scan.
        voxel: ``(3,)`` the reference.
        spacing: mm per voxel, (z, y, x).
        found: of each network.
    """
    figure, axes = new_figure(12.5, 2.9 * len(found) + 3.1, len(found) + 1, 4)
    for axis, (plane, normal) in zip(axes[0], _PLANES):
        rest = show_slice(axis, image, normal, voxel, spacing)
        _cross(axis, voxel[rest[1]], voxel[rest[0]], _POINT_COLOUR)
        _orient(axis, normal)
        axis.set_title(f"the case, {plane}", fontsize=9)
    axes[0, 3].axis("off")
    for row, (name, result) in zip(axes[1:], found.items()):
        for axis, (plane, normal) in zip(row, _PLANES):
            rest = show_slice(axis, image, normal, voxel, spacing)
            cosines = np.ma.masked_invalid(_cut(result.cosines, normal, voxel, image.shape))
            height, width = (image.shape[a] for a in rest)
            shown = axis.imshow(
                cosines, cmap="inferno", vmin=-0.2, vmax=1, alpha=0.62, interpolation="nearest",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect=spacing[rest[0]] / spacing[rest[1]],
            )  # fmt: skip
            _orient(axis, normal)
            _cross(axis, voxel[rest[1]], voxel[rest[0]], "white")
            axis.set_title(plane if normal else f"{name}: similarity to the cross", fontsize=9)
        cloud = row[3]
        dots = cloud.scatter(*result.pca.T, c=result.distances, cmap="viridis_r", s=5, linewidths=0)
        nearest = int(result.distances.argmin())
        cloud.plot(*result.pca[nearest], marker="+", color="black", markersize=12, markeredgewidth=2)
        cloud.set_title(f"PCA of all places\nSpearman of cosine and distance {result.correlation:.2f}", fontsize=9)
        cloud.set_xlabel(f"first component ({result.explained[0]:.0%})", fontsize=8)
        cloud.set_ylabel(f"second ({result.explained[1]:.0%})", fontsize=8)
        cloud.set_xticks([])
        cloud.set_yticks([])
        figure.colorbar(dots, ax=cloud, label="distance to the cross (mm)", shrink=0.85)
    # All maps have one scale; beside a map it would make that map smaller than the others.
    scale = axes[0, 3].inset_axes((0.05, 0.45, 0.9, 0.08))
    figure.colorbar(shown, cax=scale, orientation="horizontal", label="cosine to the cross: bright places are similar")
    return to_png(figure)


def voxel_figure(drawn: Drawn, found: Mapping[str, VoxelMap]) -> bytes:
    """PCA and t-SNE of the voxel embeddings of each network, side by side."""
    figure, axes = new_figure(3.9 * len(found) + 0.3, 7.6, 2, len(found))
    palette = iter(LABEL_COLOURS * (1 + len(drawn.names) // len(LABEL_COLOURS)))
    colours = {group: _BACKGROUND if group == 0 else next(palette) for group in drawn.names}
    if drawn.labelled:
        shades: np.ndarray | list[str] = [colours[g] for g in drawn.groups.tolist()]
    else:
        shades = drawn.colours
    # Background first, so that it does not hide what is labelled; otherwise in random order.
    order = np.random.default_rng(0).permutation(len(drawn.groups))
    if drawn.labelled:
        order = order[np.argsort(drawn.groups[order] > 0, kind="stable")]
    shades = np.asarray(shades)[order]
    for index, (name, result) in enumerate(found.items()):
        column = axes[:, index]
        for axis, points, kind in zip(column, (result.pca, result.tsne), ("PCA", "t-SNE")):
            axis.scatter(*points[order].T, c=shades, s=6, linewidths=0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(
                f"{name}\n10 neighbours in other cases agree: {result.purity:.0%} (chance {result.chance:.0%})"
                if kind == "PCA"
                else f"silhouette {result.silhouette:.2f}",
                fontsize=9,
            )
            if index == 0:
                axis.set_ylabel(kind, fontsize=11)
    if drawn.labelled:
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colours[g], label=n.replace("_", " "))
            for g, n in drawn.names.items()
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(8, len(handles)), fontsize=8, frameon=False
        )
    else:
        figure.supxlabel("colour: position in the body, red along z, green along y, blue along x", fontsize=9)
    return to_png(figure)


def neighbours_figure(
    query: tuple[str, np.ndarray, np.ndarray],
    slices: Mapping[str, Mapping[str, np.ndarray]],
    found: Mapping[str, Sequence[Place]],
    spacing: tuple[float, float, float],
    outlines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    query_outline: np.ndarray | None = None,
    scan_layers: Mapping[str, Mapping[str, float]] | None = None,
) -> bytes:
    """The point, and for each network the best place of each other case in an axial slice.

    Args:
        query: name of the point's case, its axial slice ``(Y, X)`` and the point ``(3,)``.
        slices: network -> case -> axial slice through the best place.
        found: places of each network.
        spacing: mm per voxel, (z, y, x).
        outlines: like ``slices``, mask of the structure that holds the point.
        query_outline: the same in the point's slice.
        scan_layers: like ``slices``, the slice's number in the scan, counted from 0, where it is known.
    """
    cases = list(next(iter(slices.values())))
    aspect = spacing[1] / spacing[2]
    tallest = max(part.shape[0] / part.shape[1] for part in (query[1], *next(iter(slices.values())).values())) * aspect
    figure, axes = new_figure(2.5 * (len(cases) + 1), (2.5 * tallest + 0.45) * len(found), len(found), len(cases) + 1)
    for row, (name, places) in zip(axes, found.items()):
        _axial(row[0], query[1], query_outline, aspect)
        _cross(row[0], query[2][2], query[2][1], _POINT_COLOUR)
        row[0].set_title(f"{name}\nthe point in {query[0]}", fontsize=8)
        for axis, case in zip(row[1:], cases):
            outline = outlines[name].get(case) if outlines else None
            _axial(axis, slices[name][case], outline, aspect)
            best = next(place for place in places if place.case == case)
            _cross(axis, best.voxel[2], best.voxel[1], _POINT_COLOUR)
            layer = scan_layers[name].get(case) if scan_layers else None
            where = f"preprocessed slice {best.voxel[0]:.0f}" if layer is None else f"slice {layer:.0f} of the scan"
            axis.set_title(f"{case}, {where}\ncosine {best.cosine:.2f}, back {best.way_back_mm:.0f} mm", fontsize=8)
    return to_png(figure)


def show_slice(
    axis: Axes, image: np.ndarray, normal: int, voxel: np.ndarray, spacing: tuple[float, float, float]
) -> list[int]:
    """Draw the slice of a volume through a voxel, grey between its 1st and 99th percentile; returns its two axes."""
    rest = [a for a in range(3) if a != normal]
    low, high = np.percentile(image, (1, 99))
    axis.imshow(
        image.take(round(float(voxel[normal])), axis=normal), cmap="gray", vmin=low, vmax=high,
        aspect=spacing[rest[0]] / spacing[rest[1]],
    )  # fmt: skip
    axis.axis("off")
    return rest


def _cut(cells: np.ndarray, normal: int, voxel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The layer of a grid of cells that holds a voxel."""
    index = int((voxel[normal] + 0.5) / (shape[normal] / cells.shape[normal]))
    return cells.take(min(index, cells.shape[normal] - 1), axis=normal)


def _orient(axis: Axes, normal: int) -> None:
    """Upright: the first axis of the scan runs to the head."""
    low, high = sorted(axis.get_ylim())
    axis.set_ylim((low, high) if normal else (high, low))


def _cross(axis: Axes, x: float, y: float, colour: str) -> None:
    axis.plot(x, y, marker="+", color="black", markersize=15, markeredgewidth=3.5)
    axis.plot(x, y, marker="+", color=colour, markersize=14, markeredgewidth=1.8)


def _axial(axis: Axes, image: np.ndarray, outline: np.ndarray | None, aspect: float) -> None:
    low, high = np.percentile(image, (1, 99))
    axis.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    if outline is not None and outline.any() and not outline.all():
        axis.contour(outline.astype(float), levels=[0.5], colors="#ffb000", linewidths=1)
    axis.axis("off")
