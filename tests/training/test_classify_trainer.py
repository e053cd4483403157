"""Classification learns what can be seen, validates whole cases and continues."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from nnunetv2.run import run_training
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl_stc3d.evaluation.classification import Classifier
from nnssl_stc3d.training.classify_trainer import ClassifyTrainer

CASES = 12


class Short(ClassifyTrainer):
    epochs = 2
    steps_per_epoch = 15
    validation_steps = 2
    learning_rate = 1e-2


@pytest.fixture
def phantoms(nnunet):
    """Noise with a bright ball in every other case, preprocessed; returns the file of the labels."""
    for file in nnunet.iterdir():
        file.unlink()
    rng = np.random.default_rng(0)
    lines = ["case,label,fold"]
    for case in range(CASES):
        image = rng.normal(size=(1, 16, 18, 20)).astype(np.float32)
        if case % 2:
            center = rng.uniform(7, 9, size=3)
            axes = np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij")
            image[0] += 4 * (sum((a - c) ** 2 for a, c in zip(axes, center)) < 16)
        nnUNetDatasetBlosc2.save_case(
            image, np.zeros(image.shape, np.int16), {"class_locations": {1: []}}, str(nnunet / f"case_{case}")
        )
        lines.append(f"case_{case},{('empty', 'ball')[case % 2]},{case // 2 % 3}")
    file = nnunet.parent / "classification.csv"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(autouse=True)
def stock_loader(monkeypatch):
    # What the test process imported must not be changed for the tests that follow.
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)


def log_of(trainer) -> str:
    return open(trainer.log_file, encoding="utf-8").read()


def test_a_visible_class_is_learned(make_trainer, phantoms, tmp_path):
    np.random.seed(0)
    trainer = make_trainer(Short, fold=0)
    trainer.run_training()
    trainer.perform_actual_validation()
    folder = tmp_path / "nnUNet_results/Dataset801_Unlabelled/Short__nnUNetPlans__3d_fullres"
    summary = json.loads((folder / "fold_0/validation/summary.json").read_text(encoding="utf-8"))
    assert summary["cases"] == 4 and summary["classes"] == ["ball", "empty"]
    assert summary["accuracy"] == summary["auc"] == summary["f1"] == 1 and summary["balanced_accuracy"] == 1
    assert summary["confusion_matrix"] == [[2, 0], [0, 2]]
    with open(folder / "fold_0/validation/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["case_0", "case_1", "case_6", "case_7"]
    for row in rows:
        assert row["predicted"] == row["label"] and float(row[f"p_{row['label']}"]) > 0.5
        assert float(row["p_ball"]) + float(row["p_empty"]) == pytest.approx(1, abs=1e-5)
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["classification"] == {
        "classes": ["ball", "empty"]
    }
    assert (folder / "fold_0/progress.png").is_file() and (folder / "fold_0/checkpoint_best.pth").is_file()
    assert "8 training cases (ball: 4, empty: 4), 4 validation cases (ball: 2, empty: 2)" in log_of(trainer)
    assert "val_balanced_accuracy" in log_of(trainer)
    # Continuing finds everything and only validates.
    resumed = make_trainer(Short, fold=0)
    resumed.load_checkpoint(str(folder / "fold_0/checkpoint_final.pth"))
    assert resumed.current_epoch == 2 and resumed.logger.get_value("val_losses", None) != []
    resumed.perform_actual_validation()
    assert json.loads((folder / "fold_0/validation/summary.json").read_text(encoding="utf-8")) == summary
    # With "ball" called "round", the outputs would mean the other class.
    phantoms.write_text(phantoms.read_text().replace("ball", "round"))
    with pytest.raises(ValueError, match="final.pth was trained with the classes ball, empty, .*empty, round"):
        make_trainer(Short, fold=0).load_checkpoint(str(folder / "fold_0/checkpoint_final.pth"))
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    description["classification"]["classes"] = ["empty", "round"]
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="train all folds with the same one"):
        Classifier(folder, None, "checkpoint_final.pth", torch.device("cpu"))


def test_pretrained_weights_fill_the_encoder(make_trainer, phantoms, tiny_plans, pretraining_checkpoint, tmp_path):
    checkpoint = pretraining_checkpoint(tiny_plans())
    torch.save(checkpoint, tmp_path / "pretrained.pth")
    trainer = make_trainer(Short, fold=0)
    trainer.initialize()
    run_training.load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    for name, value in trainer.network.backbone.state_dict().items():
        assert torch.equal(value, checkpoint["network_weights"][name]), name
    assert "0 adapted, 0 fresh" in log_of(trainer)


def test_schedule_is_that_of_finetuning_and_the_encoder_may_start_frozen(make_trainer, phantoms):
    trainer = make_trainer(type("Frozen", (Short,), {"frozen_share": 0.5}), fold=0)
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.on_train_epoch_start()
    batch = {"data": torch.randn(2, 1, 16, 16, 16), "keys": np.array(["case_0", "case_1"])}
    for _ in range(2):
        trainer.train_step(batch)
    changed = {k for k, v in trainer.network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}


def test_the_best_checkpoint_is_the_one_of_the_lowest_smoothed_validation_loss(make_trainer, phantoms, monkeypatch):
    trainer = make_trainer(Short, fold=0)
    trainer.initialize()
    written = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path: written.append((trainer.current_epoch, path)))
    for epoch, loss in enumerate([3.0, 1.0, 10.0, 1.0]):
        assert trainer.current_epoch == epoch
        trainer.on_epoch_start()
        trainer.logger.log("lrs", 0.1, epoch)
        trainer.logger.log("train_losses", loss, epoch)
        trainer.logger.log("val_losses", loss, epoch)
        trainer.logger.log("val_balanced_accuracy", 0.5, epoch)
        trainer.on_epoch_end()
    # Smoothed: 3, 2.8, 3.52, 3.27.
    assert [epoch for epoch, path in written if path.endswith("/checkpoint_best.pth")] == [0, 1]
    assert trainer._best_ema == pytest.approx(2.8)


def test_labels_are_checked_before_anything_is_made(make_trainer, nnunet, tmp_path):
    with pytest.raises(ValueError, match="Expected the table .*classification.csv, a CSV file with the columns"):
        make_trainer(Short, fold=0)
    (nnunet.parent / "classification.csv").write_text("case,label\ncase_0,a\ncase_9,b\n")
    with pytest.raises(ValueError, match="not in the data, such as case_9"):
        make_trainer(Short, fold=0)
    assert not list((tmp_path / "nnUNet_results").iterdir())


def test_prediction_of_segmentations_says_what_to_use():
    with pytest.raises(RuntimeError, match="nnssl_stc3d classify -i FOLDER"):
        ClassifyTrainer.build_network_architecture(None, None, 1, 2, enable_deep_supervision=False)


def test_flat_configurations_are_refused(make_trainer, phantoms, tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["patch_size"] = [16, 16]
    with pytest.raises(NotImplementedError, match="classification supports 3D"):
        make_trainer(Short, plans, fold=0)
