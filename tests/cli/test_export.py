"""The export command from end to end."""

from __future__ import annotations

import pytest
import torch

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.transfer.checkpoint import save_checkpoint_atomically


@pytest.fixture
def checkpoint_file(tiny_plans, pretraining_checkpoint, tmp_path):
    file = tmp_path / "fold_all" / "checkpoint_final.pth"
    file.parent.mkdir()
    save_checkpoint_atomically(pretraining_checkpoint(tiny_plans()), file)
    return file


def test_default_is_the_nnunet_form(checkpoint_file, tmp_path, capsys):
    out = tmp_path / "encoder.pth"
    assert main(["export", str(checkpoint_file), "-o", str(out), "--channels", "2"]) == 0
    assert f"-pretrained_weights {out}" in capsys.readouterr().out
    assert torch.load(out, weights_only=True)["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 2


def test_safetensors(checkpoint_file, tmp_path, capsys):
    out = tmp_path / "encoder.safetensors"
    assert main(["export", str(checkpoint_file), "-o", str(out), "--format", "safetensors"]) == 0
    assert out.is_file() and str(out) in capsys.readouterr().out


def test_pretraining_is_refused_as_a_model(checkpoint_file, tmp_path, capsys):
    code = main(["export", str(checkpoint_file), "-o", str(tmp_path / "shared"), "--format", "stock-trainer"])
    assert code == 1
    assert "Finetune it first" in capsys.readouterr().err


def test_overwriting_needs_the_flag(checkpoint_file, tmp_path, capsys):
    arguments = ["export", str(checkpoint_file), "-o", str(tmp_path / "encoder.pth")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_missing_checkpoint_is_explained(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nothing.pth"), "-o", str(tmp_path / "encoder.pth")]) == 1
    assert "nothing.pth is not there" in capsys.readouterr().err


def test_channels_belong_to_one_format(checkpoint_file, tmp_path, capsys):
    out = str(tmp_path / "encoder.safetensors")
    assert main(["export", str(checkpoint_file), "-o", out, "--format", "safetensors", "--channels", "2"]) == 1
    assert "--channels belongs to --format nnunet" in capsys.readouterr().err
