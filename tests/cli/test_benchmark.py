"""The benchmark command: its plan, and what it refuses before any run."""

from __future__ import annotations

import json
import re
import signal

import pytest

from nnssl_stc3d.cli.benchmark import _visible
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
def benchmark(raw, tmp_path, tiny_plans, tiny_dataset_json):
    """Runs the command on datasets whose cases are empty files; returns its exit code."""
    for name in (DATASET, OTHER):
        for part in ("imagesTr/case_{}_0000", "labelsTr/case_{}"):
            for case in range(12):
                file = raw / name / f"{part.format(case)}{tiny_dataset_json()['file_ending']}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        folder = tmp_path / "nnUNet_preprocessed" / name
        (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True)
        (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
        for place in (raw / name, folder):
            (place / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
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
        "Pretrainings left: about 3 hours. How long finetunings and predictions of perturbed cases take is known when "
        "one is finished.",
    ]
    assert not (tmp_path / "benchmark").exists()


def test_scratch_for_as_long_as_pretraining_and_finetuning(benchmark, tmp_path, capsys):
    output = tmp_path / "benchmark"
    output.mkdir()
    compared = ["--methods", "scratch,scratch-longer,stc3d", "--seeds", 2, "--finetuning-steps", 500, "--labels", "2"]
    assert benchmark(*compared, "--budget", "1h", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("scratch-longer, 2 labelled cases, schedule stc3d, so far an unknown number of steps") == 2
    (output / "seconds_per_step.json").write_text(json.dumps({"stc3d": 2.0, "scratch stc3d": 0.5}))
    assert benchmark(*compared, "--budget", "1h", "--reference", "scratch-longer", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("scratch-longer, 2 labelled cases, schedule stc3d, 7700 steps") == 2
    assert "2 pretrainings of 1h each, 4 finetunings of 500 steps each and 2 longer ones (17400 steps in all)" in out
    assert benchmark(*compared, "--budget", "5000steps") == 1
    assert "scratch-longer trains for as long as a pretraining: give a --budget in time" in capsys.readouterr().err
    assert [f.name for f in output.iterdir()] == ["seconds_per_step.json"]


def test_a_split_of_ones_own(benchmark, tmp_path, capsys):
    table, parts = tmp_path / "parts.csv", ("test", "val", "train", "train")
    table.write_text("\n".join(["case,split", *(f"case_{i},{parts[i % 4]}" for i in range(12))]), encoding="utf-8")
    assert benchmark("--split", table, "--labels", "100%", "--dry-run") == 0
    assert "3 test cases, 3 validation cases, 6 to label" in capsys.readouterr().out
    assert benchmark("--split", table, "--test-cases", "2") == 1
    assert "leave --test-cases and --validation-cases out" in capsys.readouterr().err
    assert not (tmp_path / "benchmark").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "no.csv"], "the table no.csv, a CSV file with the columns case .* There is no such file"),
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
        (["--test-cases", "0"], "for 0 test and 2 validation cases"),
        (["--pretrain-plans", "noPlans"], "plans of --pretrain-dataset, which is not given"),
        (["--methods", "scratch,vox2vec-paper", "--dry-run"], "vox2vec-paper: "),
        (["--pretrain-dataset", "801", "--pretrain-plans", "noPlans"], "expected plans .*801_Unlabelled/noPlans.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(benchmark, tmp_path, capsys, arguments, message):
    assert benchmark(*arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "benchmark").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": [16, 16]}, "the benchmark supports 3D configurations"),
        ({"previous_stage": "3d_lowres"}, "the benchmark does not support cascades"),
    ],
)
def test_configurations_that_cannot_be_pretrained(benchmark, tmp_path, tiny_plans, capsys, change, message):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"].update(change)
    (tmp_path / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert benchmark("--dry-run") == 1
    assert message in capsys.readouterr().err


def test_a_case_without_its_label_can_be_left_out(benchmark, tmp_path, raw, tiny_dataset_json, capsys):
    ending = tiny_dataset_json()["file_ending"]
    for case in range(12):
        (raw / DATASET / "labelsTr" / f"case_{case}{ending}").unlink()
    assert benchmark() == 1
    assert "found 1 and no label map" in capsys.readouterr().err
    assert not (tmp_path / "benchmark").exists(), "so that the same folder takes another split"


def test_the_plan_knows_what_is_finished_and_how_long_it_took(benchmark, tmp_path, capsys):
    cost = tmp_path / "benchmark" / "cost"
    cost.mkdir(parents=True)
    for labels, seconds in ((2, 3000.0), (7, 4200.0)):
        spent = {"nnUNetv2_train": {"seconds": seconds - 100}, "nnUNetv2_evaluate_folder test": {"seconds": 100.0}}
        (cost / f"scratch-stc3d-{labels}labels-seed0-500steps.json").write_text(json.dumps(spent))
    options = ["--seeds", 2, "--budget", "100steps", "--finetuning-steps", 500, "--jobs", 2, "--dry-run"]
    assert benchmark(*options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 of 10 runs are finished. Finetunings left: about 3 hours. How long pretrainings take is known when one is "
        "finished."
    )


@pytest.mark.parametrize(
    ("change", "property"),
    [({"spacing": [3.0, 1.0, 1.0]}, "spacing"), ({"strides": [[1, 1, 1], [1, 2, 2]]}, "strides")],
)
def test_plans_that_no_finetuning_could_use_are_refused_before_pretraining(
    benchmark, tmp_path, tiny_plans, capsys, change, property
):
    folder = tmp_path / "nnUNet_preprocessed" / OTHER
    other = tiny_plans()
    configuration = other["configurations"]["3d_fullres"]
    configuration.update({"spacing": change["spacing"]} if "spacing" in change else {})
    configuration["architecture"]["arch_kwargs"].update({"strides": change["strides"]} if "strides" in change else {})
    (folder / "nnUNetPlans.json").write_text(json.dumps(other))
    assert benchmark("--pretrain-dataset", "801") == 1
    message = capsys.readouterr().err
    assert property in message and "align-plans --pretrain 801 --target 4 -p nnUNetPlans -c 3d_fullres" in message
    assert not (tmp_path / "benchmark").exists()
    # What that command writes is found by its name.
    (folder / "nnUNetPlans_Dataset004.json").write_text(json.dumps(tiny_plans() | {"plans_name": "other"}))
    assert benchmark("--pretrain-dataset", "801", "--dry-run") == 0


def test_methods_are_measured_under_the_same_conditions(benchmark, tmp_path, raw, capsys, monkeypatch):
    """A budget in seconds is translated for every method alike."""
    from nnssl_stc3d.evaluation.benchmark import command

    measured = []
    monkeypatch.setattr(command.Workspace, "link_datasets", lambda *_: None)
    monkeypatch.setattr(
        command, "_seconds_per_step", lambda method, steps, *_: measured.append((method.name, steps)) or 1.0
    )
    monkeypatch.setattr(command, "execute_all", lambda *_: [])
    working = command._seconds_per_step
    monkeypatch.setattr(
        command, "_seconds_per_step", lambda *_: (_ for _ in ()).throw(RuntimeError("too many workers"))
    )
    assert benchmark("--budget", "100s", "--threads", 1, "--workers", 20) == 1
    monkeypatch.setattr(command, "_seconds_per_step", working)
    # No run is finished, so that there is nothing to report.
    assert benchmark("--budget", "100s", "--threads", 1, "--workers", 2) == 1
    assert benchmark("--budget", "100s", "--threads", 2) == 1
    assert measured == [("stc3d", 60)]
    capsys.readouterr()
    assert benchmark("--budget", "100s", "--methods", "stc3d,voco", "--threads", 2, "--workers", 2) == 1
    assert "expected --threads 1 --workers 2" in capsys.readouterr().err and len(measured) == 1
    assert benchmark("--budget", "100s", "--methods", "stc3d,voco", "--threads", 1, "--workers", 2) == 1
    assert measured[1:] == [("voco", 60)]


def test_gpus_are_counted_among_those_that_may_be_used():
    assert _visible("0,1", "") == ("0", "1") and _visible("", "2,3") == ()
    assert _visible("0,1", "2,3") == ("2", "3") and _visible("1", "GPU-a,GPU-b") == ("GPU-b",)
    with pytest.raises(ValueError, match=r"numbers below 2 after --gpus \(CUDA_VISIBLE_DEVICES=2,3\), got 2"):
        _visible("2", "2,3")


def test_a_folder_that_is_in_use(benchmark, tmp_path, capsys):
    with held_alone(tmp_path / "benchmark"):
        assert benchmark() == 1
        assert "another benchmark is writing to" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "benchmark").iterdir()] == ["lock.txt"]
