"""The local log of a pretraining, in place of nnU-Net's Dice-bound one; W&B stays nnU-Net's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnssl_stc3d.training.monitors import MONITORS, ONLINE_PROBE

_BASIC = ("train_losses", "val_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps")


class PretrainLogger(LocalLogger):
    """One value per epoch for every key; terms of the loss get a key when a method first reports them."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(verbose)
        self.my_fantastic_logging: dict[str, list[float]] = {key: [] for key in _BASIC}

    def log(self, key: str, value: Any, epoch: int) -> None:
        """Log a value; earlier epochs that did not report the key count as not a number."""
        values = self.my_fantastic_logging.setdefault(key, [])
        values += [float("nan")] * (epoch - len(values))
        del values[epoch:]
        values.append(float(value))

    def plot_progress_png(self, output_folder: str) -> None:
        """Write ``progress.png``: loss, its terms, pretext measures, collapse monitors, learning rate and duration."""
        log = self.my_fantastic_logging
        terms = sorted({k.split("_", 1)[1] for k in log if k.startswith(("train_", "val_"))} - {"losses"})
        panels: list[tuple[str, dict[str, list[float]]]] = [
            ("loss", {"training": log["train_losses"], "validation": log["val_losses"]})
        ]
        splits = {"training": "train", "validation": "val"}
        panels += [(t, {k: log[f"{s}_{t}"] for k, s in splits.items() if f"{s}_{t}" in log}) for t in terms]
        panels += [(m.replace("_", " "), {"validation": log[m]}) for m in MONITORS if m in log]
        if ONLINE_PROBE in log:
            panels.append(("online probe: balanced accuracy", {"validation": log[ONLINE_PROBE]}))
        seconds = [e - s for s, e in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"])]
        panels += [("learning rate", {"": log["lrs"]}), ("seconds per epoch", {"": seconds})]
        columns = 3
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained")
        for axis, (title, curves) in zip(axes.flat, panels):
            for label, values in curves.items():
                # Epochs without a value are left out, so that a line runs from probe to probe.
                known = np.flatnonzero(~np.isnan(np.asarray(values, dtype=float)))
                axis.plot(known, np.take(values, known), marker="." if len(known) < 30 else None, label=label)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            if "" not in curves:
                axis.legend()
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        figure.savefig(Path(output_folder) / "progress.png", dpi=80)
        plt.close(figure)
