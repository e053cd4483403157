r"""Do pretrainings learn what they ask, and does the embedding keep its rank? Curves of their logs, and a table.

    python benchmarks/pretext_curves.py OUT.png stc3d=RESULTS/.../fold_all stc3d=... voco=RESULTS/.../fold_all ...

Several folders of one name are repetitions: thin lines, and their mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from nnssl_stc3d.evaluation.report_figures import new_figure, tidy, to_png
from nnssl_stc3d.evaluation.training_log import Curves, read_training_log

# What a log calls each measure of the validation -> its title, and whether lower is better.
MEASURES = {
    "val_position_accuracy": ("position accuracy", False),
    "val_voxel_retrieval": ("voxel retrieval", False),
    "val_overlap_error": ("overlap error", True),
    "val_masked_error": ("masked error", True),
    "effective_rank": ("effective rank", False),
}


def main() -> None:
    """Draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="method and folder of a training")
    args = parser.parse_args()
    runs: dict[str, list[Curves]] = {}
    for run in args.runs:
        name, _, folder = run.partition("=")
        if not folder:
            sys.exit(f"expected NAME=FOLDER, got {run!r}")
        runs.setdefault(name, []).append(read_training_log(Path(folder)))
    args.output.write_bytes(figure(runs))
    print(table(runs))


def figure(runs: dict[str, list[Curves]]) -> bytes:
    """A panel for each measure that some method has."""
    shown = [m for m in MEASURES if any(m in curves for some in runs.values() for curves in some)]
    drawing, axes = new_figure(2.7 * len(shown), 2.6, 1, len(shown))
    for axis, measure in zip(axes.flat, shown, strict=True):
        for index, (name, some) in enumerate(runs.items()):
            values = [curves[measure] for curves in some if measure in curves]
            if values:
                epochs = range(1, len(values[0]) + 1)
                axis.plot(epochs, np.transpose(values), color=f"C{index}", linewidth=0.6, alpha=0.5)
                axis.plot(epochs, np.mean(values, axis=0), color=f"C{index}", label=name)
        title, lower = MEASURES[measure]
        tidy(axis, f"{title}{' (lower is better)' if lower else ''}", "epoch")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, frameon=False)
    return to_png(drawing)


def table(runs: dict[str, list[Curves]]) -> str:
    """First, middle and last epoch, mean of the repetitions, in Markdown."""
    lines = ["| Method | Measure | first epoch | middle | last |", "|---|---|---|---|---|"]
    for name, some in runs.items():
        for measure, (title, _) in MEASURES.items():
            values = [curves[measure] for curves in some if measure in curves]
            if values:
                mean = np.mean(values, axis=0)
                cells = [f"{mean[i]:.3g}" for i in (0, len(mean) // 2, -1)]
                lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
