"""Two processes train every method as one: nothing is left without a gradient, and the ranks stay equal."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

METHODS = (
    "stc3d", "stc3d paper", "voco", "voco official", "voco through the teacher", "pimpic", "vox2vec", "vox2vec paper",
    "alice", "alice official", "alice primus",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("ddp") / "results.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(Path(__file__).with_name("ddp_worker.py")), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_one_network(results, method):
    result = results[method]
    first, second = result["losses"]
    assert all(math.isfinite(loss) for loss in first + second) and first != second, "the ranks saw different views"
    assert result["without_gradient"] == 0
    assert result["moved"] > 0
    assert result["difference"] == 0, "parameters, those of teachers included, agree on both ranks"


def test_every_method_is_here(results):
    assert set(results) == {*METHODS, "classification"}


def test_ranks_share_the_cases_that_are_classified(results):
    """One rank alone would keep the others waiting for longer than a collective may take."""
    found = results["classification"]
    assert found["cases"] == [["1", "3"], ["2"]]
    first, second = found["logits"]
    assert first == second and set(first) == {"1", "2", "3"}
    assert first["3"] == pytest.approx(found["third"], rel=1e-5)
