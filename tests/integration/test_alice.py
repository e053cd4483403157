"""Alice through nnU-Net's commands: embeddings, pretraining and finetuning, on a U-Net and on a transformer."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

CT = "Dataset901_TinyCT"
PLAIN, PRIMUS = "tinyPlain", "tinyPrimus"
FOLD = 0


@pytest.fixture(scope="module")
def embedded(workspace, pretrained):
    """The command that makes maps of all cases, from the STC3D pretraining ``plain``."""
    checkpoint = pretrained["plain"].folder
    return workspace.run("nnssl_stc3d", "embed", checkpoint, "-d", 901, "-p", PLAIN, "--device", "cpu").ok()


@pytest.fixture(scope="module")
def primus_plans(workspace):
    """Plans with a transformer instead of the U-Net, as the page says to write them."""
    folder = workspace.preprocessed(CT)
    plans = json.loads((folder / f"{PLAIN}.json").read_text(encoding="utf-8"))
    plans["plans_name"] = PRIMUS
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"] = {
        "network_class_name": "nnssl_stc3d.modules.primus.PlansPrimus",
        "arch_kwargs": {
            "embed_dim": 24, "eva_depth": 1, "eva_numheads": 1, "patch_embed_size": [8, 8, 8],
            "input_shape": configuration["patch_size"],
        },
        "_kw_requires_import": [],
    }  # fmt: skip
    (folder / f"{PRIMUS}.json").write_text(json.dumps(plans))


@pytest.fixture(scope="module")
def alice(workspace, embedded, primus_plans):
    return workspace.side_by_side(
        unet=lambda: workspace.train(CT, "all", "ShortAlicePretrainTrainer", PLAIN),
        primus=lambda: workspace.train(CT, "all", "ShortAlicePrimusPretrainTrainer", PRIMUS),
    )


@pytest.fixture(scope="module")
def alice_finetuned(workspace, alice):
    weights = {name: run.ok().folder / "checkpoint_final.pth" for name, run in alice.items()}
    # Where the stock trainer's folder is not that of the other tests.
    apart = str(workspace.root / "alice_results")
    return workspace.side_by_side(
        unet=lambda: workspace.train(
            CT, FOLD, "ShortStockTrainer", PLAIN, "-pretrained_weights", weights["unet"], nnUNet_results=apart
        ),
        primus=lambda: workspace.train(
            CT, FOLD, "ShortFinetuneTrainer", PRIMUS, "-pretrained_weights", weights["primus"]
        ),
    )


def log_of(run) -> str:
    (file,) = run.folder.glob("training_log_*.txt")
    return file.read_text(encoding="utf-8")


def test_maps_of_all_cases_are_made(workspace, embedded):
    folder = workspace.preprocessed(CT) / "nnUNetPlans_3d_fullres_embeddings"
    assert {f.name for f in folder.iterdir()} == {"embeddings.json"} | {f"case_{i}.npz" for i in range(6)}
    with np.load(folder / "case_2.npz") as file:
        assert file["features"].dtype == np.float16 and file["volume"].tolist() == [32, 32, 32]
        assert file["features"].shape[1:] == (8, 8, 8)
    assert "AlicePretrainTrainer" in embedded.output


def test_the_embeddings_decide_where_crops_correspond(alice):
    run = alice["unet"].ok()
    assert "correspond by their embeddings (STC3D" in log_of(run)
    summary = json.loads((run.folder / "pretraining_summary.json").read_text(encoding="utf-8"))
    assert summary["method"] == "Alice" and summary["transfers"] == ["encoder", "decoder"]
    assert summary["last"]["train_matched"] > 0 and np.isfinite(summary["last"]["val_masked_error"])
    assert (run.folder / "views.png").stat().st_size > 10_000 and (run.folder / "progress.png").is_file()


def test_stock_finetuning_from_alice(alice, alice_finetuned):
    run = alice_finetuned["unet"].ok()
    source = torch.load(alice["unet"].folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    (start,) = run.folder.parents[3].rglob("alice_results/**/initial_weights.pt")
    weights = torch.load(start, weights_only=True)
    assert set(weights) == set(source)
    for key, value in weights.items():
        assert ".seg_layers." in key or torch.equal(value, source[key]), key


def test_a_transformer_is_pretrained_and_finetuned(alice, alice_finetuned):
    summary = json.loads((alice["primus"].ok().folder / "pretraining_summary.json").read_text(encoding="utf-8"))
    assert summary["transfers"] == ["down_projection", "eva"]
    run = alice_finetuned["primus"].ok()
    assert re.search(r"Pretrained weights from .*\(Alice, 1 epochs\): down_projection, eva", log_of(run))
    assert (run.folder / "checkpoint_final.pth").is_file() and (run.folder / "validation" / "summary.json").is_file()
