"""Normalised surface Dice of shapes whose surfaces are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.evaluation.benchmark import surface_dice as module
from nnssl_stc3d.evaluation.benchmark.surface_dice import folder_surface_dice, surface_dice

SPACING = (1.0, 1.0, 2.0)


def write(file, labels):
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(SPACING)
    file.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


@pytest.fixture
def boxes(tmp_path):
    """A box of label 1, and the same moved by two voxels of 2 mm along the first axis; label 2 only in the truth."""
    pytest.importorskip("monai", reason="MONAI is optional: pip install 'nnssl_stc3d[monai]'")
    truth, moved = np.zeros((24, 24, 24)), np.zeros((24, 24, 24))
    truth[4:14, 6:18, 6:18] = 1
    moved[6:16, 6:18, 6:18] = 1
    truth[20:22, 2:5, 2:5] = 2
    return write(tmp_path / "truth" / "a.nii.gz", truth), write(tmp_path / "moved" / "a.nii.gz", moved)


def test_moved_surfaces_count_where_they_are_near(boxes):
    names = {"box": 1, "small": 2, "both": [1, 2], "absent": 3}
    assert surface_dice(boxes[0], boxes[0], names, 0.5) == pytest.approx(
        {"box": 1.0, "small": 1.0, "both": 1.0, "absent": math.nan}, nan_ok=True
    )
    scores = {tolerance: surface_dice(*boxes, names, tolerance) for tolerance in (1.0, 4.1)}
    # 4 mm apart: within 4.1 mm everything is met; within 1 mm the ends are not, 2 x 12 x 12 mm2, nor of the sides
    # that are 4 x 12 x 20 mm2 the fifth that sticks out by more than 1 mm of 4.
    assert scores[4.1]["box"] == pytest.approx(1.0)
    ends, sides = 2 * 12 * 12, 4 * 12 * 20
    missed = ends / 2 * 2 + 2 * 4 * 12 * 3 / 2
    assert scores[1.0]["box"] == pytest.approx(1 - missed / (ends + sides), abs=0.08)
    assert scores[1.0]["small"] == 0.0 and math.isnan(scores[1.0]["absent"])
    assert 0 < scores[4.1]["both"] < 1


def test_a_folder_is_measured_once(boxes, monkeypatch):
    truths, predictions = (file.parent for file in boxes)
    first = folder_surface_dice(truths, predictions, {"box": 1}, 4.1, ".nii.gz")
    assert first == {"a": {"box": pytest.approx(1.0)}}
    monkeypatch.setattr(module, "surface_dice", None)
    assert folder_surface_dice(truths, predictions, {"box": 1}, 4.1, ".nii.gz") == first


def test_names_may_have_dots(boxes):
    for file in boxes:
        file.rename(file.with_name("1.3.6.1.nii.gz"))
    truths, predictions = (file.parent for file in boxes)
    assert list(folder_surface_dice(truths, predictions, {"box": 1}, 1.0, ".nii.gz")) == ["1.3.6.1"]


def test_what_is_predicted_where_nobody_has_labelled_does_not_count(boxes, tmp_path):
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(boxes[0])))
    predicted = truth.copy()
    truth[16:, 16:, 16:], predicted[18:22, 18:22, 18:22] = 9, 1
    files = write(tmp_path / "partly" / "a.nii.gz", truth), write(tmp_path / "more" / "a.nii.gz", predicted)
    assert surface_dice(*files, {"box": 1}, 0.5, ignored=9) == pytest.approx({"box": 1.0})
    assert surface_dice(*files, {"box": 1}, 0.5)["box"] < 0.96


def test_maps_of_other_sizes(boxes, tmp_path):
    other = write(tmp_path / "other" / "a.nii.gz", np.zeros((4, 4, 4)))
    with pytest.raises(ValueError, match=r"size of .*\(24, 24, 24\), got \(4, 4, 4\)"):
        surface_dice(boxes[0], other, {"box": 1}, 1.0)


def test_without_monai(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs MONAI: pip install 'nnssl_stc3d\[monai\]'"):
        surface_dice(tmp_path / "a", tmp_path / "b", {}, 1.0)
