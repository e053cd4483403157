"""The table of classes: what it says, what is refused, and which cases a fold gets."""

from __future__ import annotations

import pytest

from nnssl_stc3d.data.case_labels import FOLDS_FILE, cases_of_fold, read_case_labels

KNOWN = {f"case_{i:02d}" for i in range(30)}


@pytest.fixture
def table(tmp_path):
    """Function ``(text) -> labels``."""

    def read(text: str, **arguments):
        file = tmp_path / "classification.csv"
        file.write_text(text, encoding="utf-8")
        return read_case_labels(file, KNOWN, **arguments)

    return read


def test_a_table_is_read(table):
    labels = table("case,label\ncase_00,sick\ncase_01, healthy\ncase_02,sick\n")
    assert labels.classes == ("healthy", "sick")
    assert labels.labels == {"case_00": 1, "case_01": 0, "case_02": 1}
    assert not labels.patients and not labels.folds and not labels.splits
    assert labels.counts(["case_00", "case_02"]) == "healthy: 0, sick: 2"


def test_numbers_are_sorted_by_value_and_spreadsheets_may_differ(table):
    labels = table("\ufeffLabel;Case\r\n10;case_00\r\n9;case_01\r\n2;case_02\r\n")
    assert labels.classes == ("2", "9", "10") and labels.labels["case_00"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,label\ncase_00,a\ncase_77,b\n", r"1 cases that are not in the data, such as case_77.*have case_00"),
        ("case,label\ncase_00,a\ncase_01,\n", "line 3: label is empty"),
        ("case,label\n\ncase_00,a\n,b\n", "line 4: case is empty"),
        ("case,label\ncase_00,a\ncase_01\n", "line 3: label is empty"),
        ("case,label\ncase_00,a\ncase_01,a\n", "at least 2 different labels in .*got a"),
        ("case,label\n", "got none"),
        ("case,label\ncase_00,a\ncase_01,b\ncase_00,a\n", "more than once, such as case_00 in the lines 2, 4"),
        ("name,class\ncase_00,a\n", "columns case .* and label.*has the columns name, class"),
        ("", r"has the columns \(none\)"),
        ("case,label,fold,split\ncase_00,a,0,val\n", "a column fold and a column split"),
        ("case,label,fold\ncase_00,a,x\ncase_01,b,1\n", "numbers 0, 1, .* in the column fold .*'x'"),
        ("case,label,split\ncase_00,a,training\ncase_01,b,val\n", "train, val, test in the column split .*'training'"),
        ("case,label,patient\ncase_00,a,p\ncase_01,b,\n", "line 3: patient is empty"),
    ],
)
def test_what_is_wrong_is_named(table, text, message):
    with pytest.raises(ValueError, match=message):
        table(text)


def test_a_missing_table_says_what_it_should_hold(tmp_path):
    with pytest.raises(ValueError, match="columns case .* and label.*There is no such file"):
        read_case_labels(tmp_path / "classification.csv", KNOWN)


def test_another_encoding_is_named(tmp_path):
    file = tmp_path / "classification.csv"
    file.write_bytes("case;label\r\ncase_00;Entzündung\r\n".encode("cp1252"))
    with pytest.raises(ValueError, match="classification.csv in UTF-8, got another encoding .byte 24.*CSV UTF-8"):
        read_case_labels(file, KNOWN)


def test_one_class_may_be_enough(table):
    assert table("case,label\ncase_00,a\n", min_classes=1).classes == ("a",)


@pytest.fixture
def kept(tmp_path):
    return tmp_path / FOLDS_FILE


def rows(cases: int = len(KNOWN), **columns) -> str:
    lines = [",".join(("case", "label", *columns))]
    for i, case in enumerate(sorted(KNOWN)[:cases]):
        lines.append(",".join((case, "ab"[i % 2], *(str(values(i)) for values in columns.values()))))
    return "\n".join(lines)


def test_folds_of_the_table_decide(table, kept):
    labels = table(rows(fold=lambda i: i % 3))
    training, validation = cases_of_fold(labels, 1, kept)
    assert validation == [f"case_{i:02d}" for i in range(30) if i % 3 == 1]
    assert sorted(training + validation) == sorted(KNOWN)
    with pytest.raises(ValueError, match="folds 0, 1, 2, got 3"):
        cases_of_fold(labels, 3, kept)


def test_a_split_of_the_table_decides_and_test_cases_stay_out(table, kept):
    labels = table(rows(split=lambda i: ("train", "val", "test")[i // 10]))
    training, validation = cases_of_fold(labels, 0, kept)
    assert len(training) == len(validation) == 10 and "case_20" not in training + validation
    assert cases_of_fold(labels, "all", kept) == ([f"case_{i:02d}" for i in range(20)],) * 2
    with pytest.raises(ValueError, match="which is fold 0; got fold 1"):
        cases_of_fold(labels, 1, kept)


def test_patients_are_kept_together_in_stratified_folds(table, kept):
    labels = table(rows(patient=lambda i: f"p{i // 2}"))
    validated: list[str] = []
    for fold in range(5):
        training, validation = cases_of_fold(labels, fold, kept)
        assert not {labels.patients[c] for c in training} & {labels.patients[c] for c in validation}
        assert len(validation) == 6 and sum(labels.labels[c] for c in validation) == 3
        assert cases_of_fold(labels, fold, kept) == (training, validation)
        validated += validation
    assert sorted(validated) == sorted(KNOWN)
    with pytest.raises(ValueError, match="at least 5 patients, got 2"):
        cases_of_fold(table(rows(patient=lambda i: i % 2)), 0, kept.with_name("other.json"))


def test_what_the_table_says_later_moves_no_case(table, kept):
    def validated(labels):
        return {case: fold for fold in range(5) for case in cases_of_fold(labels, fold, kept)[1]}

    early = validated(table(rows(cases=22, patient=lambda i: f"p{i // 2}")))
    corrected = table(rows(cases=22, patient=lambda i: f"p{i // 2}").replace("case_03,b", "case_03,a"))
    assert validated(corrected) == early

    # Two patients more, and a further case of an early one; the smallest folds get them.
    late = table(rows(cases=27, patient=lambda i: f"p{i // 2}" if i < 26 else "p0"))
    folds = validated(late)
    assert {case: folds[case] for case in early} == early and len(folds) == 27
    assert folds["case_26"] == early["case_00"] and folds["case_22"] == folds["case_23"]
    before = [list(early.values()).count(fold) for fold in range(5)]
    assert sorted(before) == [4, 4, 4, 4, 6] and folds["case_22"] != folds["case_24"]
    assert before[folds["case_22"]] == before[folds["case_24"]] == 4

    # Cases that leave the table and come back are where they were.
    validated(table(rows(cases=20, patient=lambda i: f"p{i // 2}")))
    assert validated(late) == folds


def test_only_drawn_folds_are_kept(table, kept):
    cases_of_fold(table(rows(fold=lambda i: i % 3)), 1, kept)
    cases_of_fold(table(rows(patient=lambda i: i)), "all", kept)
    assert not kept.exists()


def test_a_patient_on_both_sides_is_refused(table, kept):
    labels = table(rows(patient=lambda i: f"p{i // 2}", fold=lambda i: i % 5))
    with pytest.raises(ValueError, match="patients have cases in both training and validation of fold 0, such as p0"):
        cases_of_fold(labels, 0, kept)
    tested = table(
        rows(patient=lambda i: f"p{i % 15}", split=lambda i: ("train", "test")[i // 15] if i % 15 else "val")
    )
    for fold in (0, "all"):
        with pytest.raises(ValueError, match="14 patients have cases in both training or validation and test"):
            cases_of_fold(tested, fold, kept)


def test_without_columns_nnunets_split_is_used_for_the_labelled_cases(table, kept):
    labels = table("case,label\ncase_00,a\ncase_01,b\ncase_02,a\n")
    given = (["case_00", "case_01", "case_09"], ["case_02", "case_10"])
    assert cases_of_fold(labels, 0, kept, given) == (["case_00", "case_01"], ["case_02"])
    with pytest.raises(ValueError, match="no training case of the class b .1 training and 1 validation"):
        cases_of_fold(labels, 0, kept, (["case_00"], ["case_02"]))
    with pytest.raises(ValueError, match="no validation case"):
        cases_of_fold(labels, 0, kept, (["case_00", "case_01"], ["case_09"]))
