"""The report: a table of every case, a figure, and words."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from nnssl_stc3d.prepare.case import Channel
from nnssl_stc3d.prepare.checks import ACCEPTABLE, ADVICE
from nnssl_stc3d.prepare.find import find_volumes
from nnssl_stc3d.prepare.report import draw, format_problems, format_summary, write_report
from nnssl_stc3d.prepare.scan import cases_by_name, look_at_some

CT = (Channel("CT", "CT"),)


@pytest.fixture
def cases(tmp_path, save, ct):
    for index in range(8):
        shape = (5, 16, 20) if index < 6 else (12 + index, 16, 20)
        direction = (1, 0, 0, 0, -1, 0, 0, 0, -1) if index == 7 else (1, 0, 0, 0, 1, 0, 0, 0, 1)
        save(tmp_path / "in" / f"s{index}.nii.gz", ct(index, shape), (1, 1, index + 0.5), direction=direction)
    (tmp_path / "in" / "s9.nii.gz").write_text("nothing")
    return look_at_some(cases_by_name(find_volumes(tmp_path / "in"), tmp_path / "in", CT), CT, 4, 1)


def test_table(cases, tmp_path):
    files = write_report(tmp_path / "report", "Dataset801_X", cases, CT)
    assert [f.name for f in files] == ["prepare_cases.csv", "prepare_report.png"]
    rows = {r["case"]: r for r in csv.DictReader(files[0].open(newline=""))}
    assert len(rows) == 9
    good, thin, bad = rows["s7"], rows["s0"], rows["s9"]
    assert (good["status"], good["size_z"], good["spacing_z_mm"], good["orientation"]) == ("new", "19", "7.5", "LAI")
    assert float(good["p0.5"]) < -900 < float(good["p99.5"]) and good["source"].endswith("s7.nii.gz")
    assert thin["status"] == "bad" and thin["problems"].startswith("[few-slices]") and "localiser" in thin["advice"]
    assert bad["status"] == "bad" and bad["size_x"] == "" and "[unreadable]" in bad["problems"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in (tmp_path / "report").iterdir()) == ["prepare_cases.csv", "prepare_report.png"]


def test_words(cases):
    text = format_summary(cases, CT, Counter({".txt": 3}))
    assert "9 cases with 1 channel (CT): 2 new, 7 bad" in text and "3 .txt" in text
    assert "orientation: LPS 7, LAI 1" in text and "does not turn images" in text
    problems = format_problems([p for c in cases for p in c.problems])
    assert "[few-slices] 6:" in problems and "and 1 more, see prepare_cases.csv" in problems
    assert problems.count("s5.nii.gz") == 0 and "s9.nii.gz" in problems


def test_figure_has_a_panel_for_each_question(cases):
    titles = [axis.get_title() for axis in draw("X", cases, CT).axes]
    assert [t.split()[0] for t in titles] == ["Size", "Spacing", "Extent", "Values:", "Orientation", "What"]
    assert len(draw("nothing", [], CT).axes) == 6


def test_every_problem_is_in_the_documentation(repository):
    page = (repository / "documentation" / "preparing_data.md").read_text(encoding="utf-8")
    assert [code for code in ADVICE if f"| `{code}` |" not in page] == []
    assert [code for code in ACCEPTABLE if f"`--accept {code}`" not in page] == []
