"""Checkpoint files: complete or untouched, and readable without running code."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_stc3d.transfer.checkpoint import load_checkpoint, save_checkpoint_atomically, to_plain


def small_checkpoint(value: float = 1.0) -> dict:
    return {"network_weights": {"encoder.weight": torch.full((3,), value)}, "current_epoch": 3}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint_atomically(small_checkpoint(2.0), path)
    read = load_checkpoint(path)
    assert read["current_epoch"] == 3
    assert torch.equal(read["network_weights"]["encoder.weight"], torch.full((3,), 2.0))
    assert os.listdir(tmp_path) == ["checkpoint_final.pth"]


def test_failure_while_writing_keeps_the_previous_file_and_removes_the_temporary_one(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint_atomically(small_checkpoint(1.0), path)
    with pytest.raises(Exception, match="lambda|pickle"):
        save_checkpoint_atomically({**small_checkpoint(2.0), "bad": lambda: None}, path)
    assert load_checkpoint(path)["network_weights"]["encoder.weight"][0] == 1.0
    assert os.listdir(tmp_path) == ["checkpoint_latest.pth"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_is_explained_and_keeps_the_previous_file(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    save_checkpoint_atomically(small_checkpoint(), path)
    before = path.read_bytes()
    # A limit on file sizes makes real writes fail half-way, as a full disk does.
    script = f"""
        import resource, torch
        from nnssl_stc3d.transfer.checkpoint import save_checkpoint_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint_atomically({{"network_weights": {{"w": torch.zeros(1_000_000)}}}}, {str(path)!r})
        except RuntimeError as error:
            print("MESSAGE", error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, encoding="utf-8")
    assert "MESSAGE Cannot write" in result.stdout, result.stderr
    assert "MiB are free" in result.stdout and "previous file of that name is untouched" in result.stdout
    assert "File too large" in result.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint_latest.pth"]


def test_temporary_file_of_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    (tmp_path / "checkpoint_latest.pth.tmp").write_bytes(b"half of a checkpoint")
    save_checkpoint_atomically(small_checkpoint(), path)
    assert os.listdir(tmp_path) == ["checkpoint_latest.pth"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="folder does not exist"):
        save_checkpoint_atomically(small_checkpoint(), tmp_path / "nowhere" / "checkpoint_final.pth")


def test_numpy_values_of_nnunet_checkpoints_are_read(tmp_path):
    logging = {"loss": [np.float64(1.5), np.float32(2.0), np.int64(3)], "curve": np.arange(4.0), "flag": np.bool_(True)}
    torch.save({**small_checkpoint(), "logging": logging}, tmp_path / "checkpoint_final.pth")
    read = load_checkpoint(tmp_path / "checkpoint_final.pth")
    assert read["logging"]["loss"] == [1.5, 2.0, 3]
    np.testing.assert_array_equal(read["logging"]["curve"], np.arange(4.0))


def test_to_plain_leaves_nothing_that_weights_only_refuses(tmp_path):
    value = {"a": np.float32(1.5), "b": [np.int64(2), (np.bool_(True), torch.ones(2))], "c": np.arange(3)}
    torch.save(to_plain(value), tmp_path / "plain.pth")
    read = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert read["a"] == 1.5 and read["b"][0] == 2 and read["c"] == [0, 1, 2]
    assert read["b"][1][0] is True and torch.equal(read["b"][1][1], torch.ones(2))


def test_missing_file_says_what_the_folder_has(tmp_path):
    save_checkpoint_atomically(small_checkpoint(), tmp_path / "checkpoint_best.pth")
    with pytest.raises(ValueError, match=r"checkpoint_final.pth is not there.*has checkpoint_best.pth"):
        load_checkpoint(tmp_path / "checkpoint_final.pth")


@pytest.mark.parametrize("kept", [10, 200, -1])
def test_truncated_file_is_called_truncated(tmp_path, kept):
    path = tmp_path / "checkpoint_final.pth"
    save_checkpoint_atomically(small_checkpoint(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is neither"),
        (b"\x1f\x8b\x08" * 30, "is neither"),
    ],
)
def test_foreign_file_is_refused(tmp_path, content, message):
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_objects_that_could_run_code_are_named_and_refused(tmp_path):
    torch.save({**small_checkpoint(), "model": nn.Linear(1, 1)}, tmp_path / "checkpoint_final.pth")
    with pytest.raises(ValueError, match=r"torch.nn.modules.linear.Linear"):
        load_checkpoint(tmp_path / "checkpoint_final.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"network_weights": {"encoder": [1.0]}}])
def test_something_else_in_a_torch_file_is_described(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint_final.pth")
    with pytest.raises(ValueError, match="Expected a checkpoint of nnU-Net or nnssl_stc3d.*got a"):
        load_checkpoint(tmp_path / "checkpoint_final.pth")


def test_pretraining_can_be_insisted_on(tmp_path):
    save_checkpoint_atomically({**small_checkpoint(), "trainer_name": "nnUNetTrainer"}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="Expected a pretraining checkpoint.*written by nnUNetTrainer"):
        load_checkpoint(tmp_path / "a.pth", pretraining=True)
