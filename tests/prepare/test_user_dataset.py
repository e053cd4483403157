"""The user's own dataset: validation, split, links; nothing of theirs changes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare.user_dataset import read_raw_dataset, split_cases, write_split_datasets


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def dataset(tmp_path):
    """Eight cases of two channels: a bright block in the dark."""
    folder = tmp_path / "Dataset123_Mine"
    rng = np.random.default_rng(0)
    for index in range(8):
        label = np.zeros((8, 10, 12), dtype=np.uint8)
        label[2:6, 3:7, 3 : 6 + index % 3] = 1
        for channel in range(2):
            image = (label * 100 + rng.normal(0, 3, label.shape)).astype(np.float32)
            write(folder / "imagesTr" / f"c{index}_{channel:04d}.nii.gz", image)
        write(folder / "labelsTr" / f"c{index}.nii.gz", label)
    description = {
        "channel_names": {"0": "CT", "1": "PET"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def contents(folder):
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_split_datasets(dataset, tmp_path):
    before = contents(dataset)
    data = read_raw_dataset(dataset)
    assert [case.name for case in data.cases] == [f"c{i}" for i in range(8)]
    split = split_cases(data.cases)
    unlabelled, labelled = tmp_path / "Dataset801_U", tmp_path / "Dataset802_L"
    write_split_datasets(data, split, unlabelled, labelled)
    assert contents(dataset) == before
    test = {case.name for case in split.test}
    for folder, images, cases in (
        (unlabelled, "imagesTr", split.pretraining),
        (labelled, "imagesTr", split.labelled),
        (labelled, "imagesTs", split.test),
    ):
        files = sorted(f.name for f in (folder / images).iterdir())
        assert files == [f"{case.name}_{channel:04d}.nii.gz" for case in cases for channel in range(2)]
        assert (images == "imagesTs") or not test & {f[:2] for f in files}
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(unlabelled / "labelsTr" / f"{split.pretraining[0].name}.nii.gz")))
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(split.pretraining[0].label)))
    np.testing.assert_array_equal(mask, truth)
    assert json.loads((unlabelled / "dataset.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "body": 1,
    }
    written = json.loads((labelled / "dataset.json").read_text(encoding="utf-8"))
    assert written["labels"] == {"background": 0, "tumour": 1} and written["numTraining"] == len(split.labelled)
    assert written["channel_names"] == {"0": "CT", "1": "PET"}


@pytest.mark.parametrize(("count", "sizes"), [(4, (2, 2, 2)), (7, (5, 5, 2)), (8, (6, 5, 2)), (60, (52, 5, 8))])
def test_split_sizes_and_seed(dataset, count, sizes):
    case = read_raw_dataset(dataset).cases[0]
    cases = [_named(case, index) for index in range(count)]
    split = split_cases(cases)
    assert (len(split.pretraining), len(split.labelled), len(split.test)) == sizes
    assert not {c.name for c in split.test} & {c.name for c in split.pretraining}
    assert {c.name for c in split.labelled} <= {c.name for c in split.pretraining}
    assert split_cases(cases) == split
    if count == 60:
        assert split_cases(cases, seed=1) != split


def _named(case, index):
    return type(case)(f"x{index:02d}", case.images, case.label)


def test_missing_parts_are_named(dataset, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_raw_dataset(tmp_path / "Dataset999_None")
    (dataset / "labelsTr" / "c3.nii.gz").unlink()
    (dataset / "imagesTr" / "c5_0001.nii.gz").unlink()
    with pytest.raises(ValueError) as error:
        read_raw_dataset(dataset)
    assert "c3.nii.gz is missing" in str(error.value)
    assert "c5: 1 image files, but dataset.json names 2 channels" in str(error.value)


def test_too_few_cases(dataset):
    for index in range(5):
        (dataset / "labelsTr" / f"c{index}.nii.gz").unlink()
        for channel in range(2):
            (dataset / "imagesTr" / f"c{index}_{channel:04d}.nii.gz").unlink()
    with pytest.raises(ValueError, match="Found 3 labelled cases .* at least 4"):
        read_raw_dataset(dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"labels": {}}', "has no channel_names, file_ending"),
        (None, "dataset.json is missing"),
    ],
)
def test_broken_description(dataset, content, message):
    file = dataset / "dataset.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_raw_dataset(dataset)


def test_missing_folder(dataset):
    (dataset / "labelsTr").rename(dataset / "labels")
    with pytest.raises(ValueError, match="labelsTr is missing"):
        read_raw_dataset(dataset)


def test_2d_images_are_refused(dataset):
    for file in (dataset / "imagesTr").iterdir():
        write(file, np.zeros((10, 12), dtype=np.float32))
    with pytest.raises(ValueError, match="2D image"):
        read_raw_dataset(dataset)


def test_a_useless_image_is_named(dataset, tmp_path):
    data = read_raw_dataset(dataset)
    split = split_cases(data.cases)
    case = split.pretraining[1]
    write(case.images[0], np.full((8, 10, 12), 5, dtype=np.float32))
    with pytest.raises(ValueError, match=f"{case.name} .*Every voxel of the image is 5"):
        write_split_datasets(data, split, tmp_path / "u", tmp_path / "l")
