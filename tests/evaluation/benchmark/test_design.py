"""Splits are disjoint, nested and stable; numbers of labels and budgets are read as users write them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nnssl_stc3d.evaluation.benchmark.design import Budget, draw_split, fix_split, label_counts, read_split

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


def test_patients_are_in_one_part_only():
    patients = {case: f"p{i // 3}" for i, case in enumerate(CASES)}
    drawn = [draw_split(CASES, 6, 4, seed, patients) for seed in range(5)]
    for split in drawn:
        of = [{patients[case] for case in part} for part in (split.test, split.validation, split.pool)]
        assert [len(part) for part in of] == [2, 2, 6] and len(set.union(*of)) == 10
        assert sorted(split.test + split.validation + split.pool) == CASES
    assert len({tuple(split.test) for split in drawn}) > 1
    # A patient with one case each is what happens without patients.
    assert draw_split(CASES, 6, 4, 1, {case: case[::-1] for case in CASES}) == draw_split(CASES, 6, 4, 1)
    with pytest.raises(ValueError, match="cases of 2 patients are too few for 6 test and 4 validation"):
        draw_split(CASES, 6, 4, 0, {case: "ab"[i % 2] for i, case in enumerate(CASES)})


@pytest.fixture
def table(tmp_path):
    """Function ``(header, line of a case's number, ...) -> split``."""

    def read(header, line, cases=CASES, test=None, validation=None):
        file = tmp_path / "split.csv"
        file.write_text("\n".join([header, *(line(i).format(case) for i, case in enumerate(cases))]), encoding="utf-8")
        return read_split(file, CASES, test, validation, 0)

    return read


def test_a_table_of_patients(table):
    patients = {case: f"p{i // 3}" for i, case in enumerate(CASES)}
    split = table("case,patient", lambda i: f"{{}},p{i // 3}")
    assert split == draw_split(CASES, 8, 5, 0, patients)
    assert table("case,patient", lambda i: f"{{}},p{i // 3}", test=3, validation=3) == draw_split(
        CASES, 3, 3, 0, patients
    )
    few = table("case,patient", lambda i: f"{{}},p{i}", cases=CASES[:12])
    assert sorted(few.test + few.development) == CASES[:12] and (len(few.test), len(few.validation)) == (3, 2)


def test_a_table_with_a_split(table):
    split = table("case;split", lambda i: f"{{}};{('TEST', 'val', 'train')[i % 3]}", cases=CASES[:27])
    assert (split.test, split.validation, split.pool) == (CASES[0:27:3], CASES[1:27:3], CASES[2:27:3])
    both = table("case,patient,split", lambda i: f"{{}},p{i // 10},{('test', 'val', 'train')[i // 10]}")
    assert (both.test, both.validation, both.pool) == (CASES[:10], CASES[10:20], CASES[20:])


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("case", lambda i: "{}", "and split .*, or case and patient, .* has the columns case"),
        ("case,split", lambda i: f"{{}},{'test' if i else 'dev'}", "train, val, test in the column split .*'dev'"),
        ("case,split", lambda i: f"{{}},{'test' if i else 'train'}", "cases of train, val and test .*got 1, 0 and 29"),
        (
            "case,patient,split",
            lambda i: f"{{}},p{i // 9},{('test', 'val', 'train')[i // 10]}",
            "1 patients have cases in both train or val and test, such as p1",
        ),
        (
            "case,patient,split",
            lambda i: f"{{}},{i if i < 10 else 'p'},{('test', 'val', 'train')[i // 10]}",
            "both train and val, such as p",
        ),
        ("case,patient", lambda i: f"{{}},{i or ''}", "line 2: patient is empty"),
    ],
)
def test_tables_that_cannot_be(table, header, line, message):
    with pytest.raises(ValueError, match=message):
        table(header, line)


def test_a_split_of_the_table_leaves_nothing_to_draw(table):
    with pytest.raises(ValueError, match="leave --test-cases and --validation-cases out"):
        table("case,split", lambda i: f"{{}},{('test', 'val', 'train')[i % 3]}", test=3)


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
