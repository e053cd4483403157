"""Runs side by side: order, failures, interruption, cost."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace

import pytest
import torch

from nnssl_stc3d.evaluation import commands
from nnssl_stc3d.evaluation.benchmark import energy, execution
from nnssl_stc3d.evaluation.benchmark.execution import Programs, cost_file, execute, execute_all, read_cost
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, Pretraining
from nnssl_stc3d.evaluation.commands import end_programs


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


def test_it_tells_when_a_seed_is_over(calls, runs, settings):
    made, failing = calls
    broken = next(run for run in runs if isinstance(run, Finetuning) and run.seed == 0)
    failing.add(broken.name)
    told, without = [], {run for run in runs if run == broken or run.after == broken}

    def on_seed(left):
        told.append((left, {run for run, _ in made} | without))

    execute_all(runs, settings, 1, 0, jobs=2, on_seed=on_seed)
    assert [left for left, _ in told] == [{1, 2, 3, 4}, {2, 3, 4}, {3, 4}, {4}], "and not when everything is over"
    for left, over in told:
        assert {run for run in runs if run.seed not in left} <= over


def test_no_run_waits_for_a_report(calls, runs, settings):
    made, _ = calls
    reported = []

    def on_seed(left):
        until = time.monotonic() + 20
        while len(made) < len(runs) and time.monotonic() < until:
            time.sleep(0.01)
        reported.append(len(made))

    execute_all(runs, settings, 1, 0, jobs=1, on_seed=on_seed)
    assert reported == [len(runs)] * 4, "it waits for the reports at its end"


def test_an_interrupted_benchmark_ends_what_runs(monkeypatch, runs, settings, tmp_path):
    codes = []

    def run_instead(run, settings, threads, workers, gpu, alone, programs):
        codes.append(programs.run(["sleep", "60"], {"PATH": os.environ["PATH"]}, tmp_path / f"{run.name}.log"))

    def terminated(running, return_when):
        while len(list(tmp_path.glob("*.log"))) < 2:
            time.sleep(0.01)
        sys.exit(143)

    monkeypatch.setattr(execution, "execute", run_instead)
    monkeypatch.setattr(execution, "wait", terminated)
    with pytest.raises(SystemExit):
        execute_all(runs, settings, 1, 0, jobs=2)
    assert all(code != 0 for code in codes)
    assert len(list(tmp_path.glob("*.log"))) == 2


STAND_IN = """
import multiprocessing, pathlib, sys, time

def stay(fifo):
    with open(fifo, "w") as file:
        file.write("here ")
        file.flush()
        time.sleep(600)

def main():
    # As nnU-Net's loader workers are: forked, and daemons.
    multiprocessing.get_context("fork").Process(target=stay, args=(sys.argv[1],), daemon=True).start()
    stay(sys.argv[1])
"""
STARTER = """
import sys
from pathlib import Path
from nnssl_stc3d.evaluation.benchmark import execution
from nnssl_stc3d.evaluation.benchmark.runs import Settings
from nnssl_stc3d.evaluation.benchmark.workspace import Workspace

root, fifo = sys.argv[1:]
settings = Settings(Workspace(Path(root)), None, None, None, "cpu", True, "test", 10)
execution.call(["stand_in", fifo], settings, "scratch", Path(root) / "log", 0, 1, 0)
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_programs_and_their_workers_end_with_a_benchmark_that_is_killed(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    metadata = tmp_path / "stand_in-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[console_scripts]\nstand_in = stand_in:main\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Read without blocking: it ends when nobody has it open for writing, so that processes that were not waited for
    # do not count.
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path), str(fifo)], env=variables)
    try:
        said = b""
        while said != b"here here " and starter.poll() is None:
            if select.select([reading], [], [], 60)[0]:
                said += os.read(reading, 100)
            time.sleep(0.05)
        assert said == b"here here ", (tmp_path / "log").read_text(encoding="utf-8")
        starter.send_signal(signal.SIGKILL)
        starter.wait(60)
        assert select.select([reading], [], [], 60)[0] and os.read(reading, 100) == b"", "both have gone"
    finally:
        starter.kill()
        starter.wait()
        os.close(reading)


def test_an_interrupt_while_a_program_runs_ends_it(monkeypatch, tmp_path):
    waiting, wait = [], subprocess.Popen.wait

    def interrupted(process, timeout=None):
        waiting.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        # It ends when its standard input does.
        Programs().run(["cat"], {"PATH": os.environ["PATH"]}, tmp_path / "log")
    assert wait(waiting[0], 20) == 0


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


def test_a_second_interrupt_kills_what_does_not_end(tmp_path, monkeypatch):
    """Programs that take their time to end, as a training that saves something."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    stubborn = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    wait = subprocess.Popen.wait

    def interrupted(process, timeout=None):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        raise KeyboardInterrupt

    with stubborn[0].stdout, stubborn[1].stdout:
        assert [process.stdout.readline() for process in stubborn] == ["on\n"] * 2
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            end_programs(stubborn)
    assert all(process.poll() not in (None, 0) for process in stubborn)


def test_programs_that_do_not_end_are_killed(monkeypatch):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    monkeypatch.setattr(commands, "SECONDS_TO_END", 0.2)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process.stdout:
        assert process.stdout.readline() == "on\n"
        end_programs([process])
    assert process.poll() == -signal.SIGKILL


def test_an_interrupted_finetuning_continues_where_it_can(settings, runs):
    run = next(r for r in runs if isinstance(r, Finetuning) and r.method == "stc3d")
    fold = settings.workspace.fold(settings.target, settings.split, run.labels, run.seed)
    model = settings.workspace.results(run.start) / settings.target.name / run._model(settings) / f"fold_{fold}"
    model.mkdir(parents=True)
    weights = ["-pretrained_weights", str(run.pretraining.checkpoint(settings))]

    def train():
        words = run.commands(settings)[0]
        return words[words.index("-device") + 2 :] if words[0] == "nnUNetv2_train" else None

    assert train() == weights
    latest = model / "checkpoint_latest.pth"
    torch.save({"current_epoch": 3, "weights": torch.zeros(1000)}, latest)
    assert train() == ["--c"]
    # The machine went down while it was written.
    latest.write_bytes(latest.read_bytes()[:2000])
    assert train() == weights
    # Trained and not yet validated by nnU-Net, whose validation the benchmark does not need.
    (model / "checkpoint_final.pth").touch()
    assert train() is None


def test_the_cost_of_a_continued_training_is_added(monkeypatch, settings, runs):
    run = next(r for r in runs if isinstance(r, Pretraining))
    object.__setattr__(settings, "device", "cuda")
    arguments, clock, counter, failing = [], [0.0], [100.0], []

    def call(*_):
        clock[0] += 30
        counter[0] += 50
        if failing:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(execution, "time", lambda: clock[0])
    monkeypatch.setattr(execution, "gpu_joules", lambda gpu: counter[0])
    monkeypatch.setattr(execution, "call", call)
    monkeypatch.setattr(Pretraining, "commands", lambda self, settings: [["nnUNetv2_train", *arguments]])

    def cost(alone=True):
        try:
            execute(run, settings, 1, 0, "0", alone, Programs())
        except RuntimeError:
            pass
        return json.loads(cost_file(run, settings).read_text(encoding="utf-8"))

    failing.append(True)
    assert cost() == {"nnUNetv2_train, unfinished": {"seconds": 30.0, "joules": 50.0}}
    # It began again: what the first attempt took is lost with it.
    assert cost() == {"nnUNetv2_train, unfinished": {"seconds": 30.0, "joules": 50.0}}
    arguments.append("--c")
    assert cost() == {"nnUNetv2_train, unfinished": {"seconds": 60.0, "joules": 100.0}}
    failing.clear()
    last = cost(alone=False)
    assert last == {"nnUNetv2_train": {"seconds": 90.0, "joules": None}}
    # A report on other cases finds what the same training took.
    assert read_cost(run, replace(settings, cases="validation")) == last


def test_a_training_that_was_interrupted_after_its_last_checkpoint_is_paid_for(monkeypatch, settings, runs):
    kept = {"nnUNetv2_train, unfinished": {"seconds": 30.0, "joules": None}}
    monkeypatch.setattr(execution, "execute", lambda *_: None)
    pretraining, finetuning = (next(r for r in runs if isinstance(r, kind)) for kind in (Pretraining, Finetuning))
    left = {Pretraining: [], Finetuning: [["nnUNetv2_predict"]]}
    for run in (pretraining, finetuning):
        cost_file(run, settings).parent.mkdir(parents=True, exist_ok=True)
        for words in ([["nnUNetv2_train", "--c"]], left[type(run)]):
            cost_file(run, settings).write_text(json.dumps(kept))
            monkeypatch.setattr(type(run), "commands", lambda self, settings, words=words: words)
            execute_all([run], settings, 1, 0, jobs=1)
            name = "nnUNetv2_train" + (", unfinished" if words == [["nnUNetv2_train", "--c"]] else "")
            assert read_cost(run, settings) == {name: {"seconds": 30.0, "joules": None}}


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
