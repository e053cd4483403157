"""Two benchmarks in one folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nnssl_stc3d.evaluation.benchmark.lock import held_alone

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such locks")

HOLDER = """
import sys
from pathlib import Path
from nnssl_stc3d.evaluation.benchmark.lock import held_alone
with held_alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_benchmark_is_refused_and_told_which_process_is_there(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"another benchmark is writing to {tmp_path}: process {holder.pid} on "):
            with held_alone(tmp_path):
                raise AssertionError("entered")


def test_a_benchmark_that_was_killed_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    with held_alone(tmp_path):
        with pytest.raises(ValueError, match="another benchmark"), held_alone(tmp_path):
            pass
    with held_alone(tmp_path):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr("nnssl_stc3d.evaluation.benchmark.lock.fcntl.flock", refuse)
    with held_alone(tmp_path), held_alone(tmp_path):
        assert (tmp_path / "lock.txt").is_file()
