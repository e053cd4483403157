"""The quickstart's commands: the comparison is matched, and what is printed can be repeated."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nnssl_stc3d.evaluation.quickstart_run import (
    PRETRAIN_TRAINERS,
    QuickstartPaths,
    QuickstartSettings,
    arm,
    child_environment,
    preparation,
    pretraining,
)

SETTINGS = QuickstartSettings()
PATHS = QuickstartPaths(Path("/q"), "Dataset801_U", "Dataset802_L")


def test_both_models_differ_in_their_start_only():
    checkpoint = Path("/q/c.pth")
    pretrained, scratch = (
        arm(SETTINGS, PATHS, name, start, "0", 3, "cpu")
        for name, start in (("pretrained", checkpoint), ("scratch", None))
    )
    assert pretrained[0].words == (*scratch[0].words, "-pretrained_weights", str(checkpoint))
    for first, second in zip(pretrained[1:], scratch[1:], strict=True):
        assert first.words == tuple(word.replace("scratch", "pretrained") for word in second.words)
    assert PATHS.results_of("pretrained") != PATHS.results_of("scratch")
    assert all(c.environment == {"nnUNet_results": str(PATHS.results_scratch)} for c in scratch)
    assert all(not c.environment for c in pretrained)


def test_pretraining_sees_the_unlabelled_dataset_only():
    words = pretraining(SETTINGS, "stc3d", "cuda").words
    assert words[:4] == ("nnUNetv2_train", "801", "3d_fullres", "all")
    assert words[-2:] == ("-device", "cuda")


def test_shown_commands_can_be_pasted():
    for command in preparation(SETTINGS):
        assert shlex.split(command.shown()) == list(command.words)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_environment_holds_text_and_keeps_to_its_folder(device):
    environment = child_environment(PATHS, Path("/t"), device)
    assert all(isinstance(v, str) for v in environment.values())
    assert environment["nnUNet_extTrainer"] == "/t"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert Path(environment[name]).parent == PATHS.root
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_trainers_have_the_schedule_that_the_settings_name(repository):
    import importlib.util

    found = {}
    for file in ("stc3d", "finetune"):
        spec = importlib.util.spec_from_file_location(file, repository / "trainers" / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= vars(module)
    assert found[PRETRAIN_TRAINERS["stc3d"]].epochs == SETTINGS.pretrain_epochs
    assert found[SETTINGS.finetune_trainer].epochs == SETTINGS.finetune_epochs
