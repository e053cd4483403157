"""Each method through ``nnUNetv2_train``, then stock finetuning from its checkpoint."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nnssl_stc3d.training.monitors import MONITORS

CT, PLAIN, FOLD = "Dataset901_TinyCT", "tinyPlain", 0
# Trainer, name of the method, what it logs, submodules beside the network.
METHODS = {
    "voco": ("ShortVoCoTrainer", "VoCo", ("pred", "reg", "position_accuracy"), {"projector", "teacher"}),
    "pimpic": (
        "ShortPiMPiCTrainer",
        "PiMPiC",
        ("pim", "pic", "overlap_error", "overlapping_pairs"),
        {"pim_projector", "pic_projector"},
    ),
}


@pytest.fixture(scope="module")
def runs(workspace):
    """A pretraining with each method, and the start of a stock finetuning from it."""
    pretrained = workspace.side_by_side(
        **{
            name: lambda trainer=trainer: workspace.train(CT, "all", trainer, PLAIN)
            for name, (trainer, *_) in METHODS.items()
        }
    )
    finetuned = workspace.side_by_side(
        **{
            name: lambda name=name, run=run: workspace.train(
                CT, FOLD, "ShortStockTrainer", PLAIN,
                "-pretrained_weights", run.ok().folder / "checkpoint_final.pth",
                nnUNet_results=str(workspace.root / f"finetuned_{name}"),
            )
            for name, run in pretrained.items()
        }
    )  # fmt: skip
    return {name: (pretrained[name], finetuned[name]) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_the_pretraining_writes_what_every_pretraining_writes(runs, name):
    _, method, terms, modules = METHODS[name]
    folder = runs[name][0].folder
    summary = json.loads((folder / "pretraining_summary.json").read_text(encoding="utf-8"))
    assert summary["method"] == method
    assert all(np.isfinite(summary["last"][key]) for key in MONITORS)
    for term in (*terms, "losses"):
        assert np.isfinite([summary["last"][f"{split}_{term}"] for split in ("train", "val")]).all(), term
    for figure in ("views.png", "progress.png"):
        image = plt.imread(folder / figure)
        assert min(image.shape[:2]) > 200 and image.std() > 0.01
    saved = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert saved["method"]["name"] == method and saved["method"]["transfers"] == summary["transfers"]
    assert {key.split(".")[0] for key in saved["method_state"]} == modules


@pytest.mark.parametrize("name", METHODS)
def test_stock_finetuning_starts_from_it(runs, workspace, name):
    pretraining, finetuning = runs[name]
    finetuning.ok()
    source = torch.load(pretraining.folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    (path,) = (workspace.root / f"finetuned_{name}").rglob("initial_weights.pt")
    start = torch.load(path, weights_only=True)
    assert set(source) == set(start)
    encoder = [key for key in start if key.startswith("encoder.")]
    assert encoder and all(torch.equal(start[key], source[key]) for key in encoder)
    (final,) = (workspace.root / f"finetuned_{name}").rglob("checkpoint_final.pth")
    trained = torch.load(final, weights_only=False)["network_weights"]
    assert any(not torch.equal(trained[key], start[key]) for key in encoder)
