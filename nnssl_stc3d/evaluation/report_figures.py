"""Figures of the comparison report: curves, bars and overlays, each returned as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nnssl_stc3d.evaluation.training_log import Curves
from nnssl_stc3d.evaluation.volumes import read_volume

SCRATCH, PRETRAINED = "#8a8f98", "#1769aa"
_PICTURES_IN_A_ROW = 8
LABEL_COLOURS = (
    "#e6550d",
    "#31a354",
    "#756bb1",
    "#e7298a",
    "#e6ab02",
    "#1f9fd0",
    "#a65628",
    "#66a61e",
    "#f781bf",
    "#17becf",
)


@dataclass(frozen=True)
class Overlay:
    """Files of one test case.

    Attributes:
        name: identifier.
        image: first channel.
        truth: reference segmentation.
        predictions: title -> predicted segmentation.
    """

    name: str
    image: Path
    truth: Path
    predictions: Mapping[str, Path]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[Any]]:
    """A figure that draws without a display and leaves pyplot's state alone, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Renders a figure."""
    # Names of cases and structures are no formulas. Labels of ticks, which may be, have no text before it is drawn.
    for text in figure.findobj(Text):
        if "$" in text.get_text():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def tidy(axis: Axes, title: str, x_label: str = "", y_label: str = "") -> None:
    """Gives an axis its title, labels and grid."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    if x_label == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def pretraining_curves(curves: Curves, max_panels: int = 8) -> bytes:
    """Loss, its terms and further measures of the pretraining over its epochs.

    Args:
        curves: of the training log; a name "train_x" and "val_x" share a panel.
        max_panels: panels at most; the loss comes first.
    """
    panels: dict[str, dict[str, list[float]]] = {}
    for name, values in curves.items():
        kind, _, rest = name.partition("_")
        title, label = (
            (rest, {"train": "training", "val": "validation"}[kind]) if kind in ("train", "val") else (name, "")
        )
        panels.setdefault("loss" if title == "losses" else title.replace("_", " "), {})[label] = values
    names = sorted(panels, key=lambda name: name != "loss")[:max_panels]
    columns = min(4, max(1, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure, axes = new_figure(2.9 * columns, 2.3 * rows, rows, columns)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, values in panels[name].items():
            colour = SCRATCH if label == "validation" else PRETRAINED
            axis.plot(
                range(1, len(values) + 1), values, color=colour, label=label, marker="." if len(values) < 30 else None
            )
        tidy(axis, name, "epoch")
        if any(panels[name]):
            axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    return to_png(figure)


def finetuning_curves(scratch: Curves, pretrained: Curves) -> bytes:
    """Losses and nnU-Net's pseudo-Dice of both models over the epochs of finetuning."""
    figure, axes = new_figure(10.5, 2.9, 1, 3)
    titles = {
        "train_loss": "training loss",
        "val_loss": "validation loss",
        "pseudo_dice": "pseudo-Dice of the validation",
    }
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=True):
        for curves, colour, label in ((scratch, SCRATCH, "from scratch"), (pretrained, PRETRAINED, "pretrained")):
            values = curves.get(name, [])
            axis.plot(
                range(1, len(values) + 1), values, color=colour, label=label, marker="." if len(values) < 30 else None
            )
        tidy(axis, title, "epoch")
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[0, 2].set_ylim(0, 1)
    return to_png(figure)


def dice_bars(
    names: Sequence[str], scratch: Mapping[str, Sequence[float]], pretrained: Mapping[str, Sequence[float]]
) -> bytes:
    """Mean Dice of each organ with the single test cases as dots.

    Args:
        names: organs.
        scratch: organ -> Dice of each test case; NaN where a case has no such organ.
        pretrained: the same for the pretrained model.
    """
    figure, axes = new_figure(max(5.0, 1.25 * len(names) + 1.5), 3.2)
    axis = axes[0, 0]
    for offset, values, colour, label in (
        (-0.2, scratch, SCRATCH, "from scratch"),
        (0.2, pretrained, PRETRAINED, "pretrained"),
    ):
        valid = [np.array([v for v in values[name] if np.isfinite(v)]) for name in names]
        means = [float(v.mean()) if len(v) else 0.0 for v in valid]
        places = np.arange(len(names)) + offset
        axis.bar(places, means, 0.36, color=colour, label=label, alpha=0.85)
        for place, dots in zip(places, valid, strict=True):
            spread = np.linspace(-0.1, 0.1, len(dots)) if len(dots) > 1 else np.zeros(len(dots))
            axis.scatter(place + spread, dots, s=9, color="black", alpha=0.55, zorder=3, linewidths=0)
    axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_ylim(0, 1.02)
    tidy(axis, "Dice of the test cases (dots) and their mean (bars)")
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return to_png(figure)


def overlays(cases: Sequence[Overlay], labels: Mapping[str, int], is_ct: bool) -> bytes:
    """Each test case: the image, the truth and predictions, in the axial slice with most labelled voxels.

    A case takes one row, of more than six models several.

    Args:
        cases: test cases, with predictions of the same models.
        labels: organ -> value in the label maps, without the background.
        is_ct: uses a soft tissue window instead of the image's percentiles.
    """
    width = 2.7
    titles = ("image", "truth", *(cases[0].predictions if cases else ()))
    lines = -(-len(titles) // _PICTURES_IN_A_ROW)
    columns, rows = -(-len(titles) // lines), lines * len(cases)
    figure, grid = new_figure(columns * width, width * 0.92 * rows + 0.5, rows, columns)
    for axis in grid.flat:
        axis.axis("off")
    axes = grid.reshape(len(cases), lines * columns)
    # Of other values, such as those of ignored voxels, nothing is drawn.
    known = list(labels.values())
    highest = max(known, default=1)
    colours = ListedColormap([LABEL_COLOURS[i % len(LABEL_COLOURS)] for i in range(highest)])
    for row, case in zip(axes, cases, strict=True):
        image, spacing = read_volume(case.image, is_label_map=False)
        maps = [read_volume(path)[0] for path in (case.truth, *case.predictions.values())]
        truth = maps[0]
        index = int(np.isin(truth, known).sum(axis=(1, 2)).argmax())
        low, high = (-160.0, 240.0) if is_ct else np.percentile(image, (1, 99))
        for axis, (title, label) in zip(row, zip(titles, (None, *maps), strict=True)):
            axis.imshow(image[index], cmap="gray", vmin=low, vmax=high, aspect=spacing[1] / spacing[2])
            if label is not None:
                shown = np.ma.masked_where(~np.isin(label[index], known), label[index])
                axis.imshow(
                    shown,
                    cmap=colours,
                    vmin=0.5,
                    vmax=highest + 0.5,
                    alpha=0.6,
                    interpolation="nearest",
                    aspect=spacing[1] / spacing[2],
                )
            axis.set_title(title if axis is not row[0] else f"{case.name}, slice {index}", fontsize=9)
    patches = [Patch(color=colours(value - 1), label=name.replace("_", " ")) for name, value in labels.items()]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(6, max(1, len(patches))), fontsize=8, frameon=False
    )
    return to_png(figure)
