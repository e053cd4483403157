"""The report: numbers that were put in come out, and the page says what stands behind them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from scipy import stats

from nnssl_stc3d.evaluation.benchmark.report import write_report
from nnssl_stc3d.evaluation.benchmark.runs import Finetuning, PerturbedPrediction, plan_runs

# Share of the scores that differ: that the first of three cases has no spleen is found by all.
FOUND = 5 / 6


@pytest.fixture
def report(settings, runs, finish, tmp_path):
    for run in runs:
        finish(run)
    folder = tmp_path / "report"
    rows = write_report(runs, settings, {"device": "<cpu>"}, folder)
    return folder, rows


def test_differences_that_were_put_in_come_out(report):
    folder, rows = report
    assert [(r.labels, r.method) for r in rows] == [(n, m) for n in (5, 10) for m in ("scratch", "stc3d", "voco")]
    for row in rows:
        if row.method != "scratch":
            assert row.difference == pytest.approx({"stc3d": 5.0, "voco": 0.0}[row.method] * FOUND, abs=0.3)
            assert row.significant == (row.method == "stc3d")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "Better than scratch: stc3d with 5 labels" in page and "Not significant after correction: 2 of 4" in page
    assert "30 finetunings, 5 seeds for each figure." in page and "rarely decide" not in page
    assert "&lt;cpu&gt;" in page and "<cpu>" not in page
    assert page.count("data:image/png") == 4
    for name in ("curves.png", "differences.png", "overlays.png", "robustness.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_files_for_further_use(report, settings):
    folder, rows = report
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["split"]["test"] == settings.split.test
    assert results["rows"]["Dice"][1]["mean"] == pytest.approx(rows[1].mean)
    assert results["cost"]["scratch-stc3d-5labels-seed3"]["nnUNetv2_train"]["seconds"] == 63.0
    with open(folder / "cases.csv", encoding="utf-8") as file:
        cases = list(csv.DictReader(file))
    assert len(cases) == 30 * 3 * 2
    of_run = [
        c for c in cases if (c["method"], c["labels"], c["seed"], c["structure"]) == ("stc3d", "10", "2", "liver")
    ]
    with open(folder / "runs.csv", encoding="utf-8") as file:
        (run,) = [r for r in csv.DictReader(file) if (r["method"], r["labels"], r["seed"]) == ("stc3d", "10", "2")]
    assert float(run["liver"]) == pytest.approx(np.mean([float(c["percent"]) for c in of_run]), abs=0.01)
    markdown = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(markdown) == 8 and markdown[0].startswith("| labels | finetuning | method | seeds | Dice |")
    assert r"95 \%" in (folder / "table.tex").read_text(encoding="utf-8")


def test_what_perturbation_costs(report):
    folder, _ = report
    perturbed = json.loads((folder / "results.json").read_text(encoding="utf-8"))["perturbed"]
    clean, noisy = perturbed
    assert (clean["level"], noisy["level"]) == ("none", "low")
    for before, after in zip(clean["rows"], noisy["rows"], strict=True):
        assert before["method"] == after["method"]
        assert after["mean"] - before["mean"] == pytest.approx(-10.0 * FOUND)
    assert "-8.3" in (folder / "index.html").read_text(encoding="utf-8")


def test_what_is_not_perturbed_is_corrected_with_the_other_table(report):
    """Counted again for every perturbation, it would make others significant."""
    folder, rows = report
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["perturbed"][0]["rows"] == results["rows"]["Dice"]
    noisy = results["perturbed"][1]["rows"]
    tested = [row for row in noisy if row["p"] is not None]
    adjusted = stats.false_discovery_control([row["p"] for row in tested])
    assert [row["p_adjusted"] for row in tested] == pytest.approx(list(adjusted))


def test_a_structure_that_is_not_there_counts_for_all_runs(settings, runs, finish, tmp_path):
    """Not only for the run that finds it by mistake: pairs and means have to be about the same cases."""
    few = [run for run in runs if isinstance(run, Finetuning) and run.labels == 5 and run.method != "voco"]
    for run in few:
        finish(run)
        if run.method == "scratch":
            file = run.predictions(settings) / "summary.json"
            summary = json.loads(file.read_text(encoding="utf-8"))
            summary["metric_per_case"][0]["metrics"]["2"]["Dice"] = 0.0
            file.write_text(json.dumps(summary), encoding="utf-8")
    scratch, stc3d = write_report(few, settings, {}, tmp_path / "report")
    assert stc3d.difference == pytest.approx(5 * FOUND + 100 / 6, abs=0.3)
    assert stc3d.difference == pytest.approx(stc3d.mean - scratch.mean)
    assert "NaN" not in (tmp_path / "report" / "results.json").read_text(encoding="utf-8")


def test_a_way_of_finetuning_that_failed_with_few_labels(settings, finish, tmp_path):
    runs = plan_runs(True, {}, ["stc3d", "stock"], [5, 10], range(1))
    for run in runs:
        if (run.schedule, run.labels) != ("stc3d", 5):
            finish(run)
    write_report(runs, settings, {}, tmp_path / "report")
    assert "stc3d finetuning, 10 labels" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_unfinished_runs_are_counted_and_few_seeds_named(settings, runs, finish, tmp_path):
    few = [run for run in runs if run.seed < 2 and not isinstance(run, PerturbedPrediction)]
    left_out = next(run for run in few if isinstance(run, Finetuning) and run.method == "voco" and run.seed == 1)
    for run in few:
        if run != left_out:
            finish(run)
    write_report(few, settings, {}, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "11 finetunings, 1 to 2 seeds for each figure. 1 planned finetunings are not finished." in page
    assert "Fewer than five seeds rarely decide anything" in page and "robustness" not in page.lower()


def test_scratch_alone_shows_its_ways_of_finetuning(settings, finish, tmp_path):
    runs = plan_runs(True, {}, ["stc3d", "stc3d@0.003"], [5], range(3))
    for run in runs:
        finish(run)
    rows = write_report(runs, settings, {}, tmp_path / "report")
    assert [(r.method, r.schedule, len(r.seeds)) for r in rows] == [("scratch", s, 3) for s in ("stc3d", "stc3d@0.003")]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Only scratch was run" in page and '<td class="">stc3d@0.003</td>' in page
    assert not (tmp_path / "report" / "differences.png").exists()


def test_nothing_to_report(settings, runs, tmp_path):
    with pytest.raises(ValueError, match=r"none of the \d+ runs in .* is finished"):
        write_report(runs, settings, {}, tmp_path / "report")
    assert not (tmp_path / "report").exists()
