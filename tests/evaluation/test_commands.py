"""Running programs: progress, log, script, failures."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from nnssl_stc3d.evaluation import commands
from nnssl_stc3d.evaluation.commands import (
    Command,
    CommandRunner,
    bar_named,
    cases_predicted,
    epochs_done,
    find_program,
)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "find_program", lambda name: [sys.executable])
    return CommandRunner({"QUICK_A": "one two"}, tmp_path / "log.txt", tmp_path / "commands.sh")


def python(code, **options):
    return Command("a test", ("python", "-c", code), **options)


def test_output_goes_to_the_log_and_variables_to_the_program(runner, capsys):
    code = "import os; print(os.environ['QUICK_A'], os.environ['QUICK_B'])"
    runner.run(python(code, environment={"QUICK_B": "3"}))
    assert "one two 3" in runner.log.read_text(encoding="utf-8")
    shown = f"QUICK_B=3 python -c {commands.shlex.quote(code)}"
    assert f"$ {shown}" in capsys.readouterr().out
    script = runner.script.read_text(encoding="utf-8")
    assert script.startswith("#!/bin/sh") and "export QUICK_A='one two'\n" in script and script.endswith(f"{shown}\n")
    assert [done.command.title for done in runner.finished] == ["a test"] and runner.finished[0].seconds > 0


def test_a_failure_shows_the_command_and_the_end_of_the_output(runner):
    code = "for i in range(60): print('line', i)\nraise SystemExit('the disk is full')"
    with pytest.raises(RuntimeError) as error:
        runner.run(python(code))
    message = str(error.value)
    assert "exit code 1" in message and "the disk is full" in message and "line 59" in message
    assert "line 20\n" not in message and str(runner.log) in message
    assert runner.finished == []


def test_bars_of_a_program_are_followed(runner, capsys):
    code = "import sys; [sys.stdout.write(f'\\rwork: {i}0%|#| {i}/4 [00:0{i}<?]') for i in range(5)]"
    runner.run(python(code, progress=bar_named("work")))
    assert "4/4" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_an_interrupt_ends_the_program_and_its_workers(runner, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    child = f"import time, os; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('x'); sys.stdout.flush()"
    )

    def interrupted(self, process, command):
        until = time.monotonic() + 20
        while not (pid.is_file() and pid.read_text(encoding="utf-8")) and time.monotonic() < until:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandRunner, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(python(code + "; import time; time.sleep(60)"))
    until = time.monotonic() + 20
    while _runs(int(pid.read_text(encoding="utf-8"))) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(int(pid.read_text(encoding="utf-8")))


def _runs(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, encoding="utf-8").stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_readers():
    epochs = epochs_done()
    assert [epochs(line) for line in ("Epoch 0", "x: Epoch time: 3 s", "x: Epoch time: 3 s")] == [
        None,
        (1, None),
        (2, None),
    ]
    cases = cases_predicted()
    assert cases("Predicting a:") is None and cases("done with a") == (1, None)
    read = bar_named("Preprocessing cases")
    assert read("Preprocessing cases:  40%|####      | 2/5 [00:02<00:02,  1.17it/s]") == (2, 5)
    assert read("Other:  40%|####      | 2/5 [00:02<00:02]") is None


def test_programs_are_those_of_this_python(tmp_path, monkeypatch):
    assert find_program("nnUNetv2_train")[0].startswith(str(commands.Path(sys.executable).parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(commands.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"pip install nnunetv2"):
        find_program("nnUNetv2_train")
    assert find_program("nnssl_stc3d") == [str(tmp_path / "python"), "-m", "nnssl_stc3d"]
