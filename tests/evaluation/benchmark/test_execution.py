"""Runs side by side: order, failures, interruption, cost."""

from __future__ import annotations

import json
import threading
import time
import types

import pytest

from nnssl_stc3d.evaluation.benchmark import energy, execution
from nnssl_stc3d.evaluation.benchmark.execution import Programs, cost_file, execute, execute_all
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Pretraining


@pytest.fixture
def calls(monkeypatch, finish):
    """Runs instead of commands; a run whose name is in ``failing`` fails."""
    made, failing = [], set()

    def run_instead(run, settings, threads, workers, gpu, alone, programs):
        assert run.after is None or run.after in [r for r, _ in made], "it waits for what it starts from"
        time.sleep(0.002)
        if run.name in failing:
            raise RuntimeError("broken")
        finish(run)
        made.append((run, gpu))

    monkeypatch.setattr(execution, "execute", run_instead)
    # What a pretraining leaves behind is a checkpoint, which these runs do not write.
    monkeypatch.setattr(Pretraining, "commands", lambda self, settings: [["train"]])
    return made, failing


def test_all_runs_are_made_each_after_what_it_starts_from(calls, runs, settings):
    assert execute_all(runs, settings, 1, 0, jobs=2, gpus=("0", "1")) == []
    made, _ = calls
    assert {run for run, _ in made} == set(runs) and len(made) == len(runs)
    assert {gpu for _, gpu in made} == {"0", "1"}


def test_finished_runs_are_left_out(calls, runs, settings, finish):
    done = [run for run in runs if isinstance(run, Finetuning) and run.method == "scratch"]
    for run in done:
        finish(run)
    perturbed = [run for run in runs if isinstance(run, PerturbedPrediction) and run.finetuning in done]
    calls[0].extend((run, "") for run in done)
    execute_all([*done, *perturbed], settings, 1, 0, jobs=1)
    assert [run for run, _ in calls[0]] == [*done, *perturbed]


def test_a_failure_stops_only_what_starts_from_it(calls, runs, settings):
    made, failing = calls
    broken = next(run for run in runs if isinstance(run, Pretraining) and run.method.name == "voco")
    failing.add(broken.name)
    failures = execute_all(runs, settings, 1, 0, jobs=2)
    orphans = [r for r in runs if r.after == broken or (r.after is not None and r.after.after == broken)]
    assert len(orphans) == 4
    assert {run for run, _ in made} == set(runs) - {broken, *orphans}
    assert failures[0] == f"{broken.name}: broken"
    assert sorted(failures[1:]) == sorted(f"{r.name}: left out, what it starts from failed" for r in orphans)


def test_programs_are_ended_together_and_no_other_starts(tmp_path):
    programs, codes = Programs(), []
    threads = [
        threading.Thread(target=lambda i=i: codes.append(programs.run(["sleep", "60"], {}, tmp_path / f"{i}.log")))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    while len(programs._running) < 2:
        time.sleep(0.01)
    programs.end()
    for thread in threads:
        thread.join(20)
    assert len(codes) == 2 and all(code != 0 for code in codes)
    with pytest.raises(RuntimeError, match="interrupted"):
        programs.run(["true"], {}, tmp_path / "other.log")


def test_the_cost_of_a_continued_training_is_added(monkeypatch, settings, runs):
    run = next(r for r in runs if isinstance(r, Pretraining))
    used = iter([100.0, 150.0, 400.0, 425.0])
    monkeypatch.setattr(execution, "gpu_joules", lambda gpu: next(used))
    monkeypatch.setattr(execution, "call", lambda *a: 30.0)
    object.__setattr__(settings, "device", "cuda")
    monkeypatch.setattr(Pretraining, "commands", lambda self, settings: [["nnUNetv2_train"]])
    execute(run, settings, 1, 0, "0", True, Programs())
    monkeypatch.setattr(Pretraining, "commands", lambda self, settings: [["nnUNetv2_train", "--c"]])
    execute(run, settings, 1, 0, "0", True, Programs())
    kept = json.loads(cost_file(run, settings).read_text(encoding="utf-8"))
    assert kept == {"nnUNetv2_train": {"seconds": 60.0, "joules": 75.0}}
    execute(run, settings, 1, 0, "0", False, Programs())
    kept = json.loads(cost_file(run, settings).read_text(encoding="utf-8"))
    assert kept == {"nnUNetv2_train": {"seconds": 90.0, "joules": None}}


class FakeError(Exception):
    """NVML's."""


def test_energy_is_what_the_driver_counts(monkeypatch):
    asked = []

    def count(handle):
        asked.append(handle)
        if handle == 3:
            raise FakeError
        return 5500

    driver = types.SimpleNamespace(
        NVMLError=FakeError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=int, nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetTotalEnergyConsumption=count,
    )  # fmt: skip
    monkeypatch.setattr(energy.importlib, "import_module", lambda name: {"pynvml": driver}[name])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert energy.gpu_joules("1") == 5.5 and energy.gpu_joules("") == 5.5 and energy.gpu_joules("GPU-ab") == 5.5
    assert asked == [1, 2, "GPU-ab"]
    assert energy.gpu_joules("3") is None


def test_without_a_driver_there_is_no_energy(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(energy.importlib, "import_module", missing)
    assert energy.gpu_joules("0") is None
