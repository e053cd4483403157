"""The log of a pretraining and the figure that is drawn from it."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pytest
import torch

from nnssl_stc3d.training.logger import PretrainLogger
from nnssl_stc3d.training.monitors import MONITORS


def filled(epochs: int, terms=("pred", "reg"), monitors=MONITORS) -> PretrainLogger:
    logger = PretrainLogger()
    for epoch in range(epochs):
        logger.log("epoch_start_timestamps", 10.0 * epoch, epoch)
        logger.log("lrs", 1e-3, epoch)
        for key in ("train_losses", "val_losses", *(f"{s}_{t}" for s in ("train", "val") for t in terms), *monitors):
            logger.log(key, 1 / (epoch + 1), epoch)
        logger.log("epoch_end_timestamps", 10.0 * epoch + 7, epoch)
    return logger


def test_a_key_is_made_when_it_is_first_logged():
    logger = PretrainLogger()
    logger.log("train_dense", 2, 0)
    assert logger.get_value("train_dense", step=None) == [2.0]
    assert logger.get_value("train_dense", step=-1) == 2.0


def test_epochs_that_did_not_report_a_key_are_not_a_number():
    logger = PretrainLogger()
    logger.log("val_new", 5.0, 2)
    first, second, third = logger.get_value("val_new", step=None)
    assert math.isnan(first) and math.isnan(second) and third == 5.0


def test_repeating_an_epoch_after_a_resume_replaces_it_and_what_followed():
    logger = filled(4)
    logger.log("train_losses", 9.0, 2)
    assert logger.get_value("train_losses", step=None) == [1.0, 0.5, 9.0]


def test_the_checkpoint_of_the_log_is_plain_and_comes_back(tmp_path):
    logger = filled(3)
    logger.log("train_losses", torch.tensor(0.25), 3)
    torch.save(logger.get_checkpoint(), tmp_path / "log.pth")
    other = PretrainLogger()
    other.load_checkpoint(torch.load(tmp_path / "log.pth", weights_only=True))
    assert other.get_value("train_losses", step=None) == [1.0, 0.5, pytest.approx(1 / 3), 0.25]
    other.log("train_losses", 0.1, 4)
    assert len(other.get_value("train_losses", step=None)) == 5


def test_no_dice_is_pretended():
    assert not any("dice" in key for key in PretrainLogger().my_fantastic_logging)


@pytest.mark.parametrize("epochs", [1, 40])
@pytest.mark.parametrize(("terms", "monitors"), [((), ()), (("pred", "reg", "dense", "voxel_retrieval"), MONITORS)])
def test_progress_png_is_an_image_of_every_curve(tmp_path, monkeypatch, epochs, terms, monitors):
    titles = []
    original = plt.Axes.set_title
    monkeypatch.setattr(
        plt.Axes, "set_title", lambda axis, title, **options: titles.append(title) or original(axis, title, **options)
    )
    before = plt.get_fignums()
    filled(epochs, terms, monitors).plot_progress_png(tmp_path)
    image = plt.imread(tmp_path / "progress.png")
    assert min(image.shape[:2]) > 100 and image.std() > 0.01
    for name in ("loss", *terms, *(m.replace("_", " ") for m in monitors), "learning rate", "seconds per epoch"):
        assert name in titles
    assert plt.get_fignums() == before


def test_progress_png_while_the_first_epoch_is_incomplete(tmp_path):
    logger = PretrainLogger()
    logger.log("epoch_start_timestamps", 0.0, 0)
    logger.log("train_losses", 1.0, 0)
    logger.plot_progress_png(str(tmp_path))
    assert (tmp_path / "progress.png").stat().st_size > 1000
