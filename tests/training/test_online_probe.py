"""The online probe: what it measures on known features, and that pretraining does not notice it."""

from __future__ import annotations

import types

import blosc2
import numpy as np
import pytest
import torch
from torch import nn

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.training import online_probe
from nnssl_stc3d.training.logger import PretrainLogger
from nnssl_stc3d.training.online_probe import ONLINE_VARIABLE, online_interval, probe_online, read_points

CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Returns what the image shows, at full and half resolution."""

    output_channels, strides = (1, 1), ((1, 1, 1), (2, 2, 2))

    def forward(self, images):
        return [images, nn.functional.avg_pool3d(images, 2)]


@pytest.fixture
def labelled(nnunet):
    """The cases of ``nnunet``, with two blocks of labels that their images show."""
    rng = np.random.default_rng(0)
    for index in range(6):
        labels = np.zeros((1, 20, 22, 24), dtype=np.int8)
        labels[0, 4:10, 4:12, 4:12], labels[0, 10:16, 6:14, 10:18] = 1, 2
        image = (labels + 0.2 * rng.normal(size=labels.shape)).astype(np.float32)
        for suffix, content in (("", image), ("_seg", labels)):
            file = nnunet / f"case_{index}{suffix}.b2nd"
            file.unlink()
            blosc2.asarray(content, urlpath=str(file))
    return nnunet


def trained(make_trainer, every: int, trainer_class, folder):
    trainer = make_trainer(type("Probed", (trainer_class,), {"online_probe_every": every}))
    trainer.disable_checkpointing = True
    trainer.run_training()
    return trainer


def test_pretraining_is_bit_equal_with_and_without_the_probe(make_trainer, tiny_trainer, labelled):
    runs, states = [], []
    for every in (0, 1):
        torch.manual_seed(0)
        np.random.seed(0)
        runs.append(trained(make_trainer, every, tiny_trainer, labelled))
        states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))
    without, probed = runs
    for (name, a), b in zip(without.method.state_dict().items(), probed.method.state_dict().values()):
        assert torch.equal(a, b), name
    assert torch.equal(states[0][0], states[1][0]) and (states[0][1] == states[1][1]).all()
    logs = [run.logger.local_logger.my_fantastic_logging for run in runs]
    assert logs[0]["train_losses"] == logs[1]["train_losses"] and logs[0]["val_losses"] == logs[1]["val_losses"]
    assert "online_probe" not in logs[0]
    # The image shows the labels, so even hardly trained features tell them apart far better than by chance, 1 / 3.
    assert len(logs[1]["online_probe"]) == 2 and all(0.5 < v <= 1 for v in logs[1]["online_probe"])


@pytest.mark.parametrize(("shown", "expected"), [(False, pytest.approx(1 / 3, abs=0.15)), (True, 1.0)])
def test_cases_that_were_not_fitted_are_scored(make_trainer, tiny_trainer, monkeypatch, shown, expected):
    """More features than points: a probe that is scored on what it was fitted to gets noise right, too."""
    rng = np.random.default_rng(0)

    def read(*_):
        rows, groups = rng.normal(size=(30, 200)), rng.integers(0, 3, 30)
        return (np.eye(3)[groups] if shown else rows), groups

    monkeypatch.setattr(online_probe, "read_points", read)
    trainer = make_trainer(type("Probed", (tiny_trainer,), {"online_probe_every": 1}))
    trainer.initialize()
    trainer._datasets()
    probe_online(trainer)
    assert trainer.logger.local_logger.my_fantastic_logging["online_probe"] == [expected]


def test_points_are_read_where_the_labels_are(labelled):
    method = types.SimpleNamespace(network=types.SimpleNamespace(encoder=Encoder()), transfers=("encoder",))
    dataset = CaseDataset(labelled, ["case_0"])
    rows, groups = read_points(method, dataset, "case_0", [1, 2], (16, 16, 16), CPU, 3)
    assert rows.shape == (len(groups), 2) and set(np.unique(groups)) == {0, 1, 2}
    assert np.bincount(groups).max() <= 64
    assert np.abs(rows[:, 0] - groups).mean() < 0.25 and np.corrcoef(rows[:, 0], groups)[0, 1] > 0.95
    again = read_points(method, dataset, "case_0", [1, 2], (16, 16, 16), CPU, 3)
    np.testing.assert_array_equal(rows, again[0])
    # A window that is larger than the case is filled up, and its points stay where they are.
    wide, groups = read_points(method, dataset, "case_0", [1, 2], (32, 32, 32), CPU, 3)
    assert np.corrcoef(wide[:, 0], groups)[0, 1] > 0.95


def test_no_point_is_taken_where_nobody_has_labelled(labelled):
    method = types.SimpleNamespace(network=types.SimpleNamespace(encoder=Encoder()), transfers=("encoder",))
    dataset = CaseDataset(labelled, ["case_0"])
    rows, groups = read_points(method, dataset, "case_0", [1], (16, 16, 16), CPU, 3, ignored=2)
    assert set(np.unique(groups)) == {0, 1} and not (rows[:, 0] > 1.75).any()
    rows, _ = read_points(method, dataset, "case_0", [1], (16, 16, 16), CPU, 3)
    assert (rows[:, 0] > 1.75).any()


def test_without_labels_it_says_so_once_and_pretraining_goes_on(make_trainer, tiny_trainer, nnunet):
    trainer = make_trainer(type("Probed", (tiny_trainer,), {"online_probe_every": 1}))
    lines: list[str] = []
    trainer.initialize()
    trainer._datasets()
    trainer.dataset_json = {**trainer.dataset_json, "labels": {"background": 0, "body": 1}}
    trainer.print_to_log_file = lambda *a, **k: lines.append(" ".join(map(str, a)))
    for epoch in (0, 1):
        trainer.current_epoch = epoch
        probe_online(trainer)
    assert [line for line in lines if "No online probe" in line] == [
        "No online probe: it needs two validation cases with labels of structures"
    ]
    assert "online_probe" not in trainer.logger.local_logger.my_fantastic_logging


def test_the_interval_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv(ONLINE_VARIABLE, raising=False)
    assert online_interval(7) == 7
    monkeypatch.setenv(ONLINE_VARIABLE, "5")
    assert online_interval(0) == 5
    monkeypatch.setenv(ONLINE_VARIABLE, "often")
    with pytest.raises(ValueError, match="must be a number of epochs, or 0 for no probe, got 'often'"):
        online_interval(0)


def test_progress_is_drawn_with_epochs_that_were_not_probed(tmp_path):
    logger = PretrainLogger()
    for epoch in range(5):
        for key in ("train_losses", "val_losses", "lrs", "epoch_start_timestamps", "epoch_end_timestamps"):
            logger.log(key, epoch, epoch)
        if epoch % 3 == 0:
            logger.log("online_probe", 0.5 + epoch / 10, epoch)
    logger.plot_progress_png(str(tmp_path))
    assert (tmp_path / "progress.png").stat().st_size > 0
    assert np.isnan(logger.my_fantastic_logging["online_probe"]).sum() == 2
