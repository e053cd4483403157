"""Curves from nnU-Net's text logs."""

from __future__ import annotations

import os

import numpy as np
import pytest

from nnssl_stc3d.evaluation.training_log import read_training_log

FINETUNING = """
2026-01-01 10:00:00.000001: Epoch 0
2026-01-01 10:00:00.000002: Current learning rate: 0.01
2026-01-01 10:00:00.000003: train_loss -0.25
2026-01-01 10:00:00.000004: val_loss 1e-05
2026-01-01 10:00:00.000005: Pseudo dice [np.float32(0.5), np.float32(nan), np.float32(0.1)]
2026-01-01 10:00:00.000006: train_loss nan
2026-01-01 10:00:00.000007: val_loss 0.5
2026-01-01 10:00:00.000008: Pseudo dice [0.2, 0.4]
2026-01-01 10:00:00.000009: Epoch time: 3.2 s
"""
PRETRAINING = """
  "pred_weight": 1.0,
2026-01-01 10:00:00.000001: train_losses 6.4822
2026-01-01 10:00:00.000002: effective_rank 36.4569
"""


def test_finetuning(tmp_path):
    (tmp_path / "training_log_2026_1_1.txt").write_text(FINETUNING)
    curves = read_training_log(tmp_path)
    assert set(curves) == {"train_loss", "val_loss", "pseudo_dice"}
    np.testing.assert_allclose(curves["train_loss"], [-0.25, np.nan])
    np.testing.assert_allclose(curves["val_loss"], [1e-5, 0.5])
    np.testing.assert_allclose(curves["pseudo_dice"], [0.3, 0.3])


def test_the_newest_log_counts(tmp_path):
    for name, text, age in (("training_log_2026_9.txt", FINETUNING, 1), ("training_log_2026_10.txt", PRETRAINING, 2)):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (age, age))
    assert read_training_log(tmp_path) == {"train_losses": [6.4822], "effective_rank": [36.4569]}


def test_no_log(tmp_path):
    with pytest.raises(ValueError, match=r"no training_log"):
        read_training_log(tmp_path)
