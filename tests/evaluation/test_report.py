"""The comparison report: numbers, honesty, one file that holds everything."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.evaluation.report import (
    Comparison,
    caveat,
    compare,
    format_table,
    read_dice,
    verdict,
    write_report,
)
from nnssl_stc3d.evaluation.report_figures import Overlay, overlays

NAN = float("nan")
SCRATCH = {"a": {"liver": 0.8, "spleen": 0.2}, "b": {"liver": 0.6, "spleen": NAN}}
PRETRAINED = {"a": {"liver": 0.9, "spleen": 0.1}, "b": {"liver": 0.8, "spleen": NAN}}
CURVES = {"train_loss": [1.0, 0.5], "val_loss": [1.0, 0.6], "pseudo_dice": [0.1, 0.4]}
PRETRAINING = {"train_losses": [3.0, 2.0], "val_losses": [3.0, 2.5], "train_pred": [1.0, 0.8], "effective_rank": [9, 8]}


def write_volume(path, array):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(path))
    return path


def make_comparison(tmp_path, **changes):
    label = np.zeros((4, 8, 8), dtype=np.uint8)
    label[2, 2:5, 2:5] = 1
    label[2, 6, 6] = 2
    files = [
        write_volume(tmp_path / f"{i}.nii.gz", array) for i, array in enumerate([label * 100.0, label, label, label])
    ]
    values = {
        "title": "scratch <b>against</b> pretrained",
        "facts": {"cases & more": "<script>alert(1)</script>"},
        "scratch": SCRATCH,
        "pretrained": PRETRAINED,
        "labels": {"liver": 1, "spleen": 2},
        "pretraining": PRETRAINING,
        "scratch_curves": CURVES,
        "pretrained_curves": CURVES,
        "overlay_cases": [
            Overlay("case <1> p$1_$2", files[0], files[1], {"from scratch": files[2], "pretrained": files[3]})
        ],
        "commands": "nnUNetv2_train > out && echo 'done'",
        "stages": [("pretrain", 61.0), ("finetune", 39.0)],
    }
    return Comparison(**(values | changes))


def test_rows_hold_means_over_the_cases_that_have_the_organ():
    liver, spleen, mean = compare(SCRATCH, PRETRAINED)
    assert (liver.name, liver.better, liver.cases) == ("liver", 2, 2)
    assert liver.scratch == pytest.approx(0.7) and liver.pretrained == pytest.approx(0.85)
    assert liver.difference == pytest.approx(0.15)
    assert (spleen.better, spleen.cases, spleen.difference) == (0, 1, pytest.approx(-0.1))
    assert mean.name == "mean" and mean.scratch == pytest.approx(0.45) and mean.pretrained == pytest.approx(0.475)


def test_unequal_tests_are_refused():
    with pytest.raises(ValueError, match="same cases"):
        compare(SCRATCH, {"a": PRETRAINED["a"]})
    with pytest.raises(ValueError, match="same organs"):
        compare(SCRATCH, {"a": PRETRAINED["a"], "b": {"liver": 0.8}})
    with pytest.raises(ValueError, match="same cases"):
        compare({}, {})


def test_table_lines_up_and_shows_missing_values():
    empty = {"a": {"liver": NAN}}
    assert " - " in format_table(compare(empty, empty))
    lines = format_table(compare(SCRATCH, PRETRAINED)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["liver", "0.700", "0.850", "+0.150", "2", "of", "2"]
    assert lines[-1].startswith("mean") and "+0.025" in lines[-1]


@pytest.mark.parametrize(
    ("scratch", "pretrained", "words"),
    [
        (0.5, 0.7, "Pretraining won"),
        (0.7, 0.5, "Pretraining lost"),
        (0.7, 0.705, "no difference worth naming"),
        (NAN, NAN, "nothing can be compared"),
    ],
)
def test_verdict_says_plainly_who_won(scratch, pretrained, words):
    rows = compare({"a": {"x": scratch}}, {"a": {"x": pretrained}})
    assert words in verdict(rows)


def test_report_is_one_file_with_all_pictures(tmp_path):
    views = tmp_path / "views.png"
    views.write_bytes(b"\x89PNG\r\n\x1a\n")
    path = tmp_path / "report.html"
    rows = write_report(make_comparison(tmp_path, views=views), path)
    page = path.read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5 and all(s.startswith("data:image/png;base64,iVBOR") for s in sources)
    assert not re.search(r"https?://|<link|<script|url\(", page)
    assert verdict(rows) in page and "+0.150" in page
    assert caveat(2) in page and "2 test cases" in page and "one seed" in page and "not evidence" in page


def test_user_strings_are_escaped(tmp_path):
    path = tmp_path / "report.html"
    organs = {"a": {"<i>liver</i>": 0.5}}
    write_report(make_comparison(tmp_path, scratch=organs, pretrained=organs, labels={"<i>liver</i>": 1}), path)
    page = path.read_text(encoding="utf-8")
    for raw in ("<script", "<i>", "<b>", "echo 'done'"):
        assert raw not in page
    assert "&lt;i&gt;liver&lt;/i&gt;" in page and "cases &amp; more" in page


def test_report_does_without_overlays_views_and_validation(tmp_path):
    path = tmp_path / "report.html"
    write_report(make_comparison(tmp_path, overlay_cases=(), labels={}, stages=(), commands="", pretraining={}), path)
    assert path.read_text(encoding="utf-8").count("<img") == 3


def test_a_loss_is_marked_as_one(tmp_path):
    path = tmp_path / "report.html"
    worse = {"a": {"liver": 0.65, "spleen": 0.1}, "b": {"liver": 0.45, "spleen": NAN}}
    write_report(make_comparison(tmp_path, pretrained=worse), path)
    page = path.read_text(encoding="utf-8")
    assert "Pretraining lost in this run" in page and '<td class="loss">-0.150</td>' in page


def test_summaries_of_nnunet_are_read(tmp_path):
    file = tmp_path / "summary.json"
    metrics = {"1": {"Dice": 0.5}, "(1, 2)": {"Dice": NAN}}
    file.write_text(json.dumps({"metric_per_case": [{"reference_file": "/x/c.nii.gz", "metrics": metrics}]}))
    dice = read_dice(file, {"1": "liver", "(1, 2)": "all"})
    assert dice["c.nii.gz"]["liver"] == 0.5 and np.isnan(dice["c.nii.gz"]["all"])
    with pytest.raises(ValueError, match="kidney"):
        read_dice(file, {"3": "kidney"})
    with pytest.raises(ValueError, match="nothing.json"):
        read_dice(tmp_path / "nothing.json", {"1": "liver"})


def test_many_models_are_drawn_in_several_rows(tmp_path):
    (case,) = make_comparison(tmp_path).overlay_cases
    widths, heights = [], []
    for models in (6, 15):
        predictions = {f"model {i}": case.predictions["pretrained"] for i in range(models)}
        png = overlays([replace(case, predictions=predictions)] * 2, {"liver": 1, "spleen": 2}, is_ct=False)
        width, height = struct.unpack(">II", png[16:24])
        widths.append(width)
        heights.append(height)
    assert widths[1] < widths[0], "17 pictures as three rows of six, 8 as one"
    assert heights[1] > 2.5 * heights[0]
