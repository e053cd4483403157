"""Means, intervals and tests against scipy and against slow arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nnssl_stc3d.evaluation.benchmark import statistics as module
from nnssl_stc3d.evaluation.benchmark.statistics import (
    Result,
    bootstrap_interval,
    compare,
    corrected,
    paired_p,
    t_interval,
)


def result(method, seed, values, labels=10, schedule="stc3d"):
    """One structure, so that a value is a case's mean."""
    return Result(method, schedule, labels, seed, {f"c{i}": {"organ": v} for i, v in enumerate(values)})


def test_a_case_is_the_mean_of_its_structures():
    mixed = Result("m", "stc3d", 5, 0, {"b": {"x": 10.0, "y": 30.0}, "a": {"x": 1.0, "y": 5.0}})
    np.testing.assert_array_equal(mixed.case_means(), [3.0, 20.0])


def test_a_structure_is_the_mean_over_seeds_and_cases():
    results = [
        Result("scratch", "stc3d", 5, seed, {"a": {"x": 10.0 + seed, "y": 20.0}, "b": {"x": 20.0 + seed, "y": 40.0}})
        for seed in (0, 1)
    ]
    assert compare(results)[0].structures == {"x": 15.5, "y": 30.0}


def test_differences_are_paired_by_seed_and_tested_like_scipy():
    rng = np.random.default_rng(0)
    scratch = {s: rng.normal(60, 5, 8) for s in range(5)}
    ours = {s: scratch[s] + rng.normal(3, 1, 8) for s in range(5)}
    rows = compare(
        [result("scratch", s, v) for s, v in scratch.items()] + [result("stc3d", s, v) for s, v in ours.items()]
    )
    assert [row.method for row in rows] == ["scratch", "stc3d"]
    per_seed = [ours[s].mean() - scratch[s].mean() for s in range(5)]
    expected = stats.ttest_rel([ours[s].mean() for s in range(5)], [scratch[s].mean() for s in range(5)])
    row = rows[1]
    assert row.difference_per_seed == pytest.approx(per_seed)
    assert row.difference == pytest.approx(np.mean(per_seed))
    assert row.p == pytest.approx(expected.pvalue)
    assert row.difference_interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert rows[0].difference is None and rows[0].p is None


def test_any_method_can_be_the_reference():
    results = [result(m, s, [v + s]) for m, v in (("scratch", 50.0), ("a", 60.0), ("b", 63.0)) for s in (0, 1)]
    rows = compare(results, reference="a")
    assert [(row.method, row.difference) for row in rows] == [("scratch", -10.0), ("a", None), ("b", 3.0)]
    assert {row.reference for row in rows} == {"a"}


def test_only_seeds_that_both_have_are_paired():
    rows = compare(
        [result("scratch", s, [50.0 + s]) for s in (0, 2)] + [result("voco", s, [60.0 + 3 * s]) for s in (0, 1, 2)]
    )
    assert rows[1].seeds == (0, 1, 2) and rows[1].difference_per_seed == (10.0, 14.0)
    assert rows[1].mean == pytest.approx(63.0)


def test_groups_are_compared_within_labels_and_schedule():
    results = [
        result(method, seed, [value + seed], labels, schedule)
        for schedule, labels, base in (("stc3d", 5, 40.0), ("stc3d", 20, 70.0), ("stock", 5, 30.0))
        for method, value in (("voco", base + 1), ("scratch", base))
        for seed in (0, 1)
    ]
    rows = compare(results)
    assert [(r.schedule, r.labels, r.method) for r in rows] == [
        ("stc3d", 5, "scratch"), ("stc3d", 5, "voco"), ("stc3d", 20, "scratch"), ("stc3d", 20, "voco"),
        ("stock", 5, "scratch"), ("stock", 5, "voco"),
    ]  # fmt: skip
    assert all(row.difference == pytest.approx(1.0) for row in rows if row.method == "voco")


def test_the_correction_is_scipys_over_all_rows_of_a_table():
    rng = np.random.default_rng(3)
    results = []
    for labels, effect in ((5, 8.0), (10, 1.0), (20, 0.0)):
        for seed in range(4):
            base = rng.normal(60, 4)
            results += [
                result("scratch", seed, [base], labels),
                result("a", seed, [base + effect + rng.normal()], labels),
            ]
    rows = corrected(compare(results))
    tested = [row for row in rows if row.p is not None]
    np.testing.assert_allclose(
        [row.p_adjusted for row in tested], stats.false_discovery_control([row.p for row in tested], method="bh")
    )
    assert [row.significant for row in tested] == [row.p_adjusted < 0.05 for row in tested]
    assert tested[0].significant and not tested[2].significant
    assert all(row.p_adjusted is None and not row.significant for row in rows if row.method == "scratch")


def test_one_seed_says_nothing_about_others():
    rows = corrected(compare([result("scratch", 0, [50.0, 60.0]), result("stc3d", 0, [70.0, 80.0])]))
    assert rows[1].difference == pytest.approx(20.0)
    assert rows[1].interval is None and rows[1].p is None and rows[1].difference_interval is None
    assert not rows[1].significant


def test_equal_runs_do_not_differ():
    rows = compare([result(m, s, [50.0, 60.0]) for m in ("scratch", "stc3d") for s in (0, 1, 2)])
    assert rows[1].difference == 0 and rows[1].p == 1.0
    assert paired_p([1.0]) is None and t_interval([1.0]) is None


def test_runs_on_different_cases_are_refused():
    with pytest.raises(ValueError, match="evaluated on different cases"):
        compare([result("scratch", 0, [1.0, 2.0]), result("stc3d", 0, [1.0])])


def test_the_bootstrap_resamples_seeds_and_cases():
    rng = np.random.default_rng(1)
    seeds_differ = np.repeat(rng.normal(60, 5, (6, 1)), 40, axis=1)
    low, high = bootstrap_interval(seeds_differ)
    # Without spread over cases, only seeds are resampled: the standard error is that of six numbers.
    error = seeds_differ[:, 0].std(ddof=1) / np.sqrt(6)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 5) * error, rel=0.1)
    assert low < seeds_differ.mean() < high
    cases_differ = np.repeat(rng.normal(60, 5, (1, 40)), 6, axis=0)
    low, high = bootstrap_interval(cases_differ)
    # The same cases are drawn for all seeds, as they are the same cases.
    assert (high - low) / 2 == pytest.approx(1.96 * cases_differ[0].std() / np.sqrt(40), rel=0.1)
    assert bootstrap_interval(cases_differ) == (low, high)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_a_mean_hold_it_as_often_as_they_say(monkeypatch, seeds):
    monkeypatch.setattr(module, "RESAMPLES", 500)
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=(seeds, 1)) + rng.normal(size=(1, 10)))
        held += low <= 0 <= high
    assert 0.9 <= held / 200 <= 1.0
