"""The benchmark command: its plan, and what it refuses before any run."""

from __future__ import annotations

import json
import re
import signal

import pytest

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.evaluation.benchmark.lock import held_alone

DATASET, OTHER = "Dataset004_Made", "Dataset801_Unlabelled"


@pytest.fixture(autouse=True)
def _signals():
    """The command handles SIGTERM; the tests that follow do not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def benchmark(raw, tmp_path, tiny_plans):
    """Runs the command on datasets whose cases are empty files; returns its exit code."""
    for name in (DATASET, OTHER):
        (raw / name).mkdir()
        (raw / name / "dataset.json").write_text("{}")
        folder = tmp_path / "nnUNet_preprocessed" / name
        (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True)
        (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
        for case in range(12):
            (folder / "nnUNetPlans_3d_fullres" / f"case_{case}_seg.b2nd").touch()

    def run(*arguments):
        output = ["-o", str(tmp_path / "benchmark")]
        return main(["benchmark", "-d", "4", *output, "--labels", "2,100%", *map(str, arguments)])

    return run


def test_the_plan_of_a_benchmark(benchmark, tmp_path, capsys):
    more = ["--gpus", "0,1", "--robustness", "noise"]
    assert benchmark("--seeds", 2, "--budget", "3h", "--finetuning-steps", 500, *more, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = "3 test cases, 2 validation cases, 7 to label"
    assert lines[0] == f"{DATASET}: {sizes}; test cases are predicted."
    first = [line for line in lines if line.startswith("seed 0: ")]
    assert first == [
        "seed 0: finetuning, scratch, 2 labelled cases, schedule stc3d",
        "seed 0: finetuning, scratch, 7 labelled cases, schedule stc3d",
        "seed 0: pretraining, stc3d",
        "seed 0: finetuning, stc3d, 2 labelled cases, schedule stc3d",
        "seed 0: finetuning, stc3d, 7 labelled cases, schedule stc3d",
    ]
    assert lines[-2:] == [
        "2 pretrainings of 3h each, 8 finetunings of 500 steps each (4000 steps in all), "
        "24 predictions of perturbed cases; 2 side by side.",
        "The pretrainings take 3 hours.",
    ]
    assert not (tmp_path / "benchmark").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretrain-dataset", "4"], "leave --pretrain-dataset out"),
        (["--labels", "8"], "expected 1 to 7 labelled cases"),
        (["--finetuning-steps", "25"], "must be a multiple of 10"),
        (["--budget", "25"], "must be a multiple of 10"),
        (["--finetuning", "fast"], "ways of finetuning of stc3d, stock"),
        (["--finetuning", "stock@0.01,stock@1e-2"], "different ways of finetuning"),
        (["--finetuning", "stc3d@fast"], "positive learning rate after @"),
        (["--reference", "voco"], "one of the compared methods, got voco"),
        (["--ablation", "lambda", "--cases", "test"], "evaluated on validation cases"),
        (["--set", "stc3d.pints=1"], "pints"),
        (["-p", "otherPlans"], "expected plans .*otherPlans.json"),
        (["-c", "2d"], "has no configuration 2d, but 3d_fullres"),
        (["--seeds", "0"], "at least one seed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(benchmark, tmp_path, capsys, arguments, message):
    assert benchmark(*arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "benchmark").exists()


def test_a_folder_that_is_in_use(benchmark, tmp_path, capsys):
    with held_alone(tmp_path / "benchmark"):
        assert benchmark() == 1
        assert "another benchmark is writing to" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "benchmark").iterdir()] == ["lock.txt"]
