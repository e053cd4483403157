"""Killed processes, unusable data and missing settings, through nnU-Net's own commands."""

from __future__ import annotations

import json
import shutil
import signal

import blosc2
import numpy as np
import pytest
import torch

CT, PLAIN, TRAINER = "Dataset901_TinyCT", "tinyPlain", "ShortPretrainTrainer"


def assert_equal(a, b, path="checkpoint"):
    """Bit-equality of nested checkpoints."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


def steps_of(folder):
    return [json.loads(line) for line in (folder / "steps.txt").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def resumed(workspace, pretrained):
    """The run ``plain`` again, killed twice, with another number of workers each time."""
    environment = {"nnUNet_results": str(workspace.root / "resumed_results")}
    folder = workspace.root / "resumed_results" / CT / f"{TRAINER}__{PLAIN}__3d_fullres" / "fold_all"

    def checkpoints():
        return {f.name: torch.load(f, weights_only=True)["current_epoch"] for f in folder.glob("*.pth")}

    def train(*arguments, **more):
        return workspace.train(CT, "all", TRAINER, PLAIN, *arguments, **environment, **more)

    first = train(nnUNet_n_proc_DA="1", TEST_DIE_AT="step:6")
    after_first = checkpoints()
    second = train("--c", nnUNet_n_proc_DA="0", TEST_DIE_AT="write:checkpoint_latest.pth")
    after_second = checkpoints()
    half_written = [f.name for f in folder.glob("*.tmp")]
    third = train("--c", nnUNet_n_proc_DA="1")
    return folder, (first, after_first), (second, after_second, half_written), third


def test_a_kill_in_the_middle_of_an_epoch_keeps_the_last_checkpoint(resumed):
    _, (run, checkpoints), _, _ = resumed
    assert run.returncode == -signal.SIGKILL, run.output[-3000:]
    assert checkpoints["checkpoint_latest.pth"] == 1
    assert "checkpoint_final.pth" not in checkpoints


def test_a_kill_while_writing_keeps_the_previous_checkpoint_readable(resumed):
    _, _, (run, checkpoints, half_written), _ = resumed
    assert run.returncode == -signal.SIGKILL, run.output[-3000:]
    assert half_written == ["checkpoint_latest.pth.tmp"]
    assert checkpoints["checkpoint_latest.pth"] == 1


def test_continuing_repeats_nothing_but_what_came_after_the_checkpoint(resumed, pretrained):
    folder, *_, third = resumed
    third.ok()
    whole = steps_of(pretrained["plain"].folder)
    assert [step for step, _ in whole] == list(range(12))
    # Epochs of 4 steps: died before step 6; then at the end of epoch 1; then ran to the end.
    expected = [*range(6), *range(4, 8), *range(4, 12)]
    again = steps_of(folder)
    assert [step for step, _ in again] == expected
    assert again == [whole[step] for step in expected], "the cases of a step must not depend on the interruption"


def test_continuing_ends_with_bit_equal_weights(resumed, pretrained):
    folder, *_, third = resumed
    third.ok()
    a, b = (torch.load(f / "checkpoint_final.pth", weights_only=True) for f in (pretrained["plain"].folder, folder))
    for checkpoint in (a, b):
        for key in ("epoch_start_timestamps", "epoch_end_timestamps"):
            assert len(checkpoint["logging"].pop(key)) == 3
    # The order in which keys of the log first appeared is not part of the result.
    a["logging"], b["logging"] = (dict(sorted(c["logging"].items())) for c in (a, b))
    assert_equal(a, b)
    assert not list(folder.glob("*.tmp")) and not (folder / "checkpoint_latest.pth").exists()


@pytest.fixture(scope="module")
def broken(workspace, pretrained, tmp_path_factory):
    """Runs that must fail, each in its own folders."""
    root = tmp_path_factory.mktemp("broken")
    for name in ("nan", "missing"):
        shutil.copytree(workspace.preprocessed(CT), root / name / CT)
    data = root / "nan" / CT / "nnUNetPlans_3d_fullres"
    image = np.array(blosc2.open(str(data / "case_2.b2nd"))[:])
    image[0, 3, 3, 3] = np.nan
    blosc2.asarray(image, urlpath=str(data / "case_2.b2nd"), mode="w")
    shutil.rmtree(root / "missing" / CT / "nnUNetPlans_3d_fullres")

    def train(**environment):
        results = {"nnUNet_results": str(root / "results")}
        return workspace.train(CT, "all", "OneStepPretrainTrainer", PLAIN, **{**results, **environment})

    return workspace.side_by_side(
        nan=lambda: train(nnUNet_preprocessed=str(root / "nan"), nnUNet_n_proc_DA="1"),
        missing=lambda: train(nnUNet_preprocessed=str(root / "missing")),
        no_preprocessed=lambda: train(nnUNet_preprocessed=None),
        no_results=lambda: train(nnUNet_results=None),
        full_disk=lambda: train(TEST_FILE_SIZE_LIMIT="300000", nnUNet_results=str(root / "full")),
    )


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("nan", ["case_2 holds NaN or infinite values", "preprocess again"]),
        ("missing", ["nnUNetv2_preprocess -d 901 -plans_name tinyPlain -c 3d_fullres"]),
        ("no_preprocessed", ["nnUNet_preprocessed"]),
        ("no_results", ["nnUNet_results"]),
        ("full_disk", ["Cannot write", "File too large", "Free some space"]),
    ],
)
def test_the_run_fails_with_a_message(broken, name, messages):
    run = broken[name]
    assert run.returncode != 0
    for message in messages:
        assert message in run.output, run.output[-3000:]


@pytest.mark.parametrize("name", ["nan", "missing", "no_preprocessed", "no_results"])
def test_it_fails_before_the_first_epoch(broken, name):
    assert "Epoch 0" not in broken[name].output
