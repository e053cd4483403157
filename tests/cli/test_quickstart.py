"""The quickstart: what it refuses, what it leaves alone, and one whole run with tiny trainings."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl_stc3d.cli import quickstart
from nnssl_stc3d.cli.main import main
from nnssl_stc3d.evaluation.quickstart_run import QuickstartPaths, QuickstartSettings

# Trainings of two steps, under the names of the real ones.
TRAINERS = """
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

import torch


class STC3DPretrainTrainer_quickstart(PretrainTrainer):
    method_class = STC3D
    config = STC3DConfig(dense_points=16)
    epochs, steps_per_epoch, validation_steps = 2, 1, 1


class STC3DFinetuneTrainer_quickstart(FinetuneTrainer):
    epochs = 2

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1
"""


def parse(*arguments):
    parser = argparse.ArgumentParser()
    quickstart.add_parser(parser.add_subparsers())
    return parser.parse_args(["quickstart", *map(str, arguments)])


@pytest.mark.parametrize("arguments", [["--method", "nothing"], ["--device", "tpu"], ["--data"]])
def test_argument_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", *arguments])
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err


def test_data_are_checked_before_anything_is_written(tmp_path, capsys):
    keep = tmp_path / "keep"
    assert main(["quickstart", "--data", str(tmp_path / "Dataset001_None"), "--keep", str(keep)]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert not keep.exists()


def test_missing_device_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quickstart.choose_device("auto") == "cpu"
    with pytest.raises(RuntimeError, match="--device cuda was asked for"):
        quickstart.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quickstart.choose_device("auto") == "cuda"


@pytest.fixture
def paths(tmp_path):
    return QuickstartPaths(tmp_path / "keep", "Dataset801_U", "Dataset802_L")


def test_folders_of_others_are_left_alone(paths):
    paths.root.mkdir()
    mine = paths.root / "report.html"
    mine.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="no quickstart wrote"):
            quickstart.prepare_folder(paths, overwrite, None)
    assert mine.read_text(encoding="utf-8") == "mine"


def test_earlier_results_are_replaced_only_on_request(paths):
    quickstart.prepare_folder(paths, False, None)
    old, note = paths.results / "old.txt", paths.root / "note.txt"
    old.write_text("old")
    note.write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        quickstart.prepare_folder(paths, False, None)
    assert old.is_file()
    quickstart.prepare_folder(paths, True, None)
    assert not old.exists() and paths.results.is_dir() and note.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("data", ["keep", "keep/Dataset001_X", "."])
def test_data_and_results_must_be_apart(paths, data, tmp_path):
    with pytest.raises(ValueError, match="must not lie in one another"):
        quickstart.prepare_folder(paths, True, tmp_path / data)


def test_links_to_data_are_removed_without_the_data(paths, tmp_path):
    image = tmp_path / "data" / "image.nii.gz"
    image.parent.mkdir()
    image.write_text("voxels")
    quickstart.prepare_folder(paths, False, image.parent)
    (paths.raw / "link").symlink_to(image)
    (paths.raw / "folder").symlink_to(image.parent)
    quickstart.prepare_folder(paths, True, image.parent)
    assert image.read_text(encoding="utf-8") == "voxels" and not list(paths.raw.iterdir())


def test_whole_run(tmp_path, capsys):
    """Data, planning, pretraining, two finetunings, predictions, evaluation and report, through nnU-Net's commands."""
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "tiny.py").write_text(TRAINERS)
    settings = dataclasses.replace(
        QuickstartSettings(), num_unlabelled=2, num_labelled=5, num_test=1, base_features=4, max_patch_voxels=9000,
        pretrain_epochs=2, finetune_epochs=2,
    )  # fmt: skip
    keep = tmp_path / "with space"
    paths = quickstart.execute(parse("--keep", keep, "--device", "cpu"), settings, trainers)
    printed = capsys.readouterr()
    assert re.search(r"^mean +\d\.\d{3} +\d\.\d{3}", printed.out, re.MULTILINE)
    assert "not evidence" in printed.out
    for stage in ("pretrain without labels: 100%", "finetune from scratch: 100%", "predict (pretrained): 100%"):
        assert stage in printed.err
    page = paths.report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5 and "stand 1 test case and" in page
    assert (keep / "nnUNet_results_scratch" / "Dataset802_QuickstartLabelled").is_dir()
    log = (keep / "log.txt").read_text(encoding="utf-8")
    assert "STC3DFinetuneTrainer_quickstart" in log

    # The script is what a user repeats: its syntax is right and it names every command that ran.
    script = keep / "commands.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    shown = [line.removeprefix("$ ") for line in printed.out.splitlines() if line.startswith("$ ")]
    assert len(shown) == 12
    assert [
        line for line in script.read_text(encoding="utf-8").splitlines() if "nnUNetv2_" in line or "small-plans" in line
    ] == shown
    assert str(Path(sys.executable).parent) not in "".join(shown)
