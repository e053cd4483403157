"""``nnssl_stc3d benchmark`` from the command line: killed, continued, extended; and what it leaves alone."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

DATASET, PLANS = "Dataset901_TinyCT", "tinyPlain"
OPTIONS = [
    "-d", 901, "-p", PLANS, "--budget", "10steps", "--finetuning-steps", 10, "--test-cases", 2, "--validation-cases", 1,
    "--device", "cpu", "--threads", 1, "--jobs", 2, "--disable-tta",
]  # fmt: skip
# Of a finetuning that is not finished.
LATEST = "results/**/fold_[0-9]/checkpoint_latest.pth"
COMPARED = ["--methods", "scratch,stc3d", "--labels", "1,2", "--seeds", 2]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}


def programs_of(folder: Path) -> str:
    """Programs that still run with a folder among their arguments or in their environment."""
    listed = subprocess.run(["ps", "axeww", "-o", "pid=,args="], capture_output=True, encoding="utf-8", check=True)
    return "\n".join(line for line in listed.stdout.splitlines() if str(folder) in line)


@pytest.fixture(scope="module")
def benchmark(workspace, tmp_path_factory):
    """The output folder after a run that was killed and repeated, and what was done at the first time."""
    output = tmp_path_factory.mktemp("benchmark")
    data = [workspace.root / "nnUNet_raw" / DATASET, workspace.preprocessed(DATASET)]
    before = [contents(folder) for folder in data]
    command = ["benchmark", *OPTIONS, *COMPARED, "-o", output]
    process = workspace.start("nnssl_stc3d", *command)
    until = time.monotonic() + 600
    while not all(any(output.glob(f)) for f in ("predictions/**/summary.json", LATEST)) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.2)
    running = programs_of(output)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL and "nnUNetv2_train" in running
    while programs_of(output):
        assert time.monotonic() < until
        time.sleep(0.2)
    finished = contents(output / "predictions")
    run = workspace.run("nnssl_stc3d", *command).ok()
    assert [contents(folder) for folder in data] == before, "the user's data and folds are only read"
    return output, finished, run


def test_it_continues_where_it_was_ended(benchmark):
    output, finished, _ = benchmark
    done = [name for name in finished if name.endswith("summary.json")]
    assert 1 <= len(done) < 8
    after = contents(output / "predictions")
    assert all(after[name] == finished[name] for name in done)
    assert len(list(output.glob("predictions/**/summary.json"))) == 8
    commands = (output / "commands.txt").read_text(encoding="utf-8").splitlines()
    finetunings = [line for line in commands if "-tr STC3DFinetuneTrainer" in line and "nnUNetv2_train" in line]
    assert any("--c" in line for line in finetunings)
    assert not list(output.glob(LATEST)) and not list(output.glob("results/**/*.tmp"))


def test_the_test_cases_are_seen_by_no_training(benchmark, workspace):
    output, _, _ = benchmark
    split = json.loads((output / "split.json").read_text(encoding="utf-8"))
    cases = {f.name.split(".")[0] for f in workspace.preprocessed(DATASET).glob("gt_segmentations/*")}
    assert len(split["test"]) == 2 and {*split["test"], *split["validation"], *split["pool"]} == cases
    seen = output / "nnUNet_preprocessed" / DATASET
    linked = {f.name.split(".")[0].removesuffix("_seg") for f in seen.rglob("*.b2nd")}
    assert linked == cases - set(split["test"])
    folds = json.loads((seen / "splits_final.json").read_text(encoding="utf-8"))
    assert len(folds) == 4
    assert all(not {*fold["train"], *fold["val"]} & set(split["test"]) for fold in folds)
    predicted = {f.name.split(".")[0] for f in output.glob("predictions/**/test/*.nii.gz")}
    assert predicted == set(split["test"])


def test_the_report_is_about_the_runs(benchmark):
    output, _, run = benchmark
    folder = output / "report" / "test"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows = results["rows"]["Dice"]
    assert [(row["labels"], row["method"], row["seeds"]) for row in rows] == [
        (count, method, [0, 1]) for count in (1, 2) for method in ("scratch", "stc3d")
    ]
    for row in rows:
        means = []
        for seed in (0, 1):
            start = "scratch" if row["method"] == "scratch" else f"stc3d/10steps/seed{seed}"
            fold = [[1, 0], [2, 0], [1, 1], [2, 1]].index([row["labels"], seed])
            file = next((output / "predictions" / start).glob(f"STC3DFinetuneTrainer*/fold_{fold}/test/summary.json"))
            means.append(100 * json.loads(file.read_text(encoding="utf-8"))["foreground_mean"]["Dice"])
        assert row["per_seed"] == pytest.approx(means)
    assert rows[1]["difference"] == pytest.approx(rows[1]["mean"] - rows[0]["mean"])
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "8 finetunings" in page and "2 seeds for each figure" in page and page.count("data:image/png") == 3
    assert "| 2 | stc3d | stc3d | 2 |" in (folder / "table.md").read_text(encoding="utf-8")
    assert r"\toprule" in (folder / "table.tex").read_text(encoding="utf-8")
    assert len((folder / "runs.csv").read_text(encoding="utf-8").splitlines()) >= 9
    assert results["cost"]["scratch-stc3d-1labels-seed0"]["nnUNetv2_train"]["seconds"] > 0
    assert str(folder / "index.html") in run.output


def test_perturbed_cases_are_predicted_by_the_same_model(benchmark, workspace):
    output, _, _ = benchmark
    models = contents(output / "results")
    arguments = ["--methods", "scratch", "--labels", "1", "--seeds", 1, "--robustness", "noise", "-o", output]
    workspace.run("nnssl_stc3d", "benchmark", *OPTIONS, *arguments).ok()
    assert contents(output / "results") == models
    results = json.loads((output / "report" / "test" / "results.json").read_text(encoding="utf-8"))
    assert [(p["perturbation"], p["level"]) for p in results["perturbed"]] == [
        ("noise", level) for level in ("none", "low", "medium", "high")
    ]
    assert results["perturbed"][0]["rows"][0]["mean"] == results["rows"]["Dice"][0]["mean"]
    assert (output / "report" / "test" / "robustness.png").stat().st_size > 5000


def test_scratch_trains_for_as_long_as_a_pretraining_and_a_finetuning(workspace, tmp_path):
    options = [*OPTIONS, "--budget", "2s", "--methods", "scratch,scratch-longer", "--labels", "1", "--seeds", 1]
    run = workspace.run("nnssl_stc3d", "benchmark", *options, "-o", tmp_path / "b").ok()
    assert "scratch stc3d: " in run.output and "s a step" in run.output
    seconds = json.loads((tmp_path / "b" / "seconds_per_step.json").read_text(encoding="utf-8"))["scratch stc3d"]
    steps = 10 + max(1, round(2 / seconds / 10)) * 10
    results = json.loads((tmp_path / "b" / "report" / "test" / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in results["rows"]["Dice"]] == ["scratch", "scratch-longer"]
    assert results["rows"]["Dice"][1]["difference"] is not None
    trained = f"-tr STC3DFinetuneTrainer_{steps}steps "
    assert trained in (tmp_path / "b" / "commands.txt").read_text(encoding="utf-8")
    assert "scratch-longer-stc3d-1labels-seed0" in results["cost"]
