"""Figures of spectra and invariance, each returned as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnssl_stc3d.evaluation.inspection.invariance import STRENGTHS, Invariance
from nnssl_stc3d.evaluation.inspection.models import SCRATCH
from nnssl_stc3d.evaluation.inspection.spectrum import Spectrum
from nnssl_stc3d.evaluation.report_figures import LABEL_COLOURS, PRETRAINED, new_figure, tidy, to_png
from nnssl_stc3d.evaluation.report_figures import SCRATCH as GREY

_AXES = {
    "rotation": "angle (degrees)",
    "translation": "shift (share of the view)",
    "scaling": "factor (larger or smaller)",
}
_LOWEST_SHARE = 1e-8


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each network, grey for the untrained one."""
    palette = iter((PRETRAINED, *LABEL_COLOURS * (1 + len(names) // len(LABEL_COLOURS))))
    return {name: GREY if name == SCRATCH else next(palette) for name in names}


def spectrum_figure(spectra: Mapping[str, Spectrum]) -> bytes:
    """Eigenvalues over their index, and their distribution (STC3D Fig. 5)."""
    figure, axes = new_figure(10.5, 3.8, 1, 2)
    left, right = axes[0]
    colours = model_colours(list(spectra))
    logs = {name: np.log10(np.maximum(s.shares, _LOWEST_SHARE)) for name, s in spectra.items()}
    low = min(float(values.min()) for values in logs.values())
    edges = np.linspace(low - 0.05, max(float(values.max()) for values in logs.values()) + 0.05, 22)
    for name, s in spectra.items():
        left.plot(
            np.arange(1, len(s.shares) + 1),
            10 ** logs[name],
            color=colours[name],
            label=f"{name}: effective rank {s.effective_rank:.1f} of {s.dimension}",
        )
        right.hist(logs[name], edges, histtype="stepfilled", alpha=0.25, color=colours[name])
        right.hist(logs[name], edges, histtype="step", linewidth=1.6, color=colours[name], label=name)
    left.set_yscale("log")
    tidy(left, "Eigenvalues: a slow fall uses many directions, a cliff few", "index", "share of the variance")
    tidy(right, "Their distribution: collapsed directions pile up on the left", "log10 of the share", "directions")
    left.legend(fontsize=8, frameon=False)
    right.legend(fontsize=8, frameon=False)
    return to_png(figure)


def invariance_figure(found: Mapping[str, Invariance]) -> bytes:
    """Similarity over the strength of each transformation, with the random crop as a dashed line."""
    figure, axes = new_figure(11.5, 3.7, 1, len(STRENGTHS))
    colours = model_colours(list(found))
    for axis, (kind, label) in zip(axes[0], _AXES.items()):
        for name, result in found.items():
            curve, colour = result.curves[kind], colours[name]
            axis.plot(curve.strengths, curve.mean, color=colour, marker=".", label=name)
            if all(curve.interval):
                lower, upper = zip(*(i for i in curve.interval if i is not None))
                axis.fill_between(curve.strengths, lower, upper, color=colour, alpha=0.15, linewidth=0)
            axis.axhline(result.crop, color=colour, linestyle="--", linewidth=1)
        tidy(axis, kind.capitalize(), label, "cosine to the same view unchanged" if axis is axes[0, 0] else "")
        # A cosine above 1 is the interval of a mean near 1.
        axis.set_ylim(top=1.04)
    handles, names = axes[0, 0].get_legend_handles_labels()
    crop = axes[0, 0].plot([], [], color="0.4", linestyle="--", linewidth=1)[0]
    figure.legend(
        [*handles, crop], [*names, "random crop of the same case"], loc="outside lower center",
        ncols=min(6, len(names) + 1), fontsize=8, frameon=False,
    )  # fmt: skip
    lowest = min(axis.get_ylim()[0] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(bottom=lowest)
    return to_png(figure)
