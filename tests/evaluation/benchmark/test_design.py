"""Splits are disjoint, nested and stable; numbers of labels and budgets are read as users write them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nnssl_stc3d.evaluation.benchmark.design import Budget, draw_split, fix_split, label_counts

CASES = [f"case_{i:02d}" for i in range(30)]


@pytest.fixture
def split():
    return draw_split(CASES, test=6, validation=4, seed=0)


def test_every_case_is_in_one_part_only(split):
    assert (len(split.test), len(split.validation), len(split.pool)) == (6, 4, 20)
    assert sorted(split.test + split.validation + split.pool) == CASES
    assert split.development == sorted(set(CASES) - set(split.test))


def test_labelled_cases_are_nested_and_from_the_pool(split):
    for seed in range(4):
        draws = [set(split.labelled(count, seed)) for count in (1, 5, 12, 20)]
        assert [len(draw) for draw in draws] == [1, 5, 12, 20]
        assert all(few < many for few, many in zip(draws, draws[1:]))
        assert draws[-1] == set(split.pool)
    assert split.labelled(5, 0) != split.labelled(5, 1)
    # Another benchmark draws other cases with the same seed of a run.
    assert split.labelled(5, 0) != replace(split, seed=1).labelled(5, 0)


def test_a_fold_trains_and_validates_on_different_development_cases(split):
    fold = split.fold(20, 3)
    assert not {*fold["train"], *fold["val"]} & set(split.test)
    assert not set(fold["train"]) & set(fold["val"]) and set(fold["val"]) <= set(split.validation)


def test_the_split_does_not_depend_on_the_order_of_cases(split):
    assert draw_split(CASES[::-1], 6, 4, 0) == split != draw_split(CASES, 6, 4, 1)


def test_too_few_cases():
    with pytest.raises(ValueError, match="at least 11 labelled cases.*got 10.*--test-cases"):
        draw_split(CASES[:10], 6, 4, 0)
    with pytest.raises(ValueError, match="1 to 20 labelled cases, got 21"):
        draw_split(CASES, 6, 4, 0).labelled(21, 0)


def test_a_written_split_stays(tmp_path, split):
    file = tmp_path / "b" / "split.json"
    fix_split(file, split)
    before = file.read_bytes()
    assert json.loads(before)["test"] == split.test
    fix_split(file, draw_split(CASES, 6, 4, 0))
    for cases, test, validation in ((CASES[:-1], 6, 4), (CASES, 5, 4), (CASES, 6, 3)):
        with pytest.raises(ValueError, match="other cases or with other numbers"):
            fix_split(file, draw_split(cases, test, validation, 0))
    assert file.read_bytes() == before


def test_numbers_of_labels():
    assert label_counts(["100%", "5", "10%", "5"], 20) == [2, 5, 20]
    assert label_counts(["1%"], 20) == [1]
    for wrong in (["21"], ["0"], ["110%"], ["-1"], ["0%"], ["-5%"]):
        with pytest.raises(ValueError, match="1 to 20 labelled cases"):
            label_counts(wrong, 20)
    with pytest.raises(ValueError, match="numbers of cases or percentages such as 10%, got 'ten'"):
        label_counts(["ten"], 20)


@pytest.mark.parametrize(
    ("text", "amount", "seconds"),
    [
        ("5000", 5000, False),
        ("5000steps", 5000, False),
        ("240s", 240, True),
        ("1.5 min", 90, True),
        ("12h", 43200, True),
    ],
)
def test_budgets(text, amount, seconds):
    assert Budget.parse(text) == Budget(amount, seconds)


@pytest.mark.parametrize("text", ["", "many", "5 days", "0s", "-3steps"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match=r"5000steps, 240s, 30min or 12h|must be positive"):
        Budget.parse(text)
