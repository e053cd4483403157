"""Datasets are complete or untouched: links, labels, continuing, and disks that fill up."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare import convert
from nnssl_stc3d.prepare.case import Case, Channel, DatasetTarget
from nnssl_stc3d.prepare.formats import FileVolume
from nnssl_stc3d.prepare.writer import (
    CasesFailed,
    WriteOptions,
    choose_ending,
    open_record,
    staging_folder,
    write_dataset,
)

CT = (Channel("CT", "CT"),)


@pytest.fixture
def target(raw):
    return DatasetTarget(raw / "Dataset801_X", CT)


def contents(folder):
    return {
        str(f.relative_to(folder)): (f.lstat().st_mtime_ns, f.read_bytes())
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture
def scans(tmp_path, save, ct, rotated):
    """Function ``(name, seed=0, ending=".nii.gz") -> Case``."""

    def make(name, seed=0, ending=".nii.gz", array=None):
        path = save(tmp_path / "in" / f"{name}{ending}", ct(seed) if array is None else array, direction=rotated)
        return Case(name, (FileVolume(path),))

    return make


def test_links_conversions_and_masks(target, scans, corners):
    cases = [scans("a", 0), scans("b", 1), scans("c", 2, ".mhd")]
    result = write_dataset(cases, target)
    assert (result.total, result.ending, [r.linked for r in result.new]) == (3, ".nii.gz", [True, True, False])
    folder = target.folder
    assert files(folder) == [
        "dataset.json", "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "imagesTr/c_0000.nii.gz",
        "labelsTr/a.nii.gz", "labelsTr/b.nii.gz", "labelsTr/c.nii.gz", "prepare.json",
    ]  # fmt: skip
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8")) == {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "numTraining": 3, "file_ending": ".nii.gz"
    }  # fmt: skip
    for case in cases:
        source = sitk.ReadImage(str(case.channels[0].path))
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            written = sitk.ReadImage(str(folder / part / f"{case.name}{ending}"))
            np.testing.assert_allclose(corners(written), corners(source), atol=1e-3)
        np.testing.assert_array_equal(
            read(folder / "imagesTr" / f"{case.name}_0000.nii.gz"), sitk.GetArrayFromImage(source)
        )
        assert set(np.unique(read(folder / "labelsTr" / f"{case.name}.nii.gz"))) == {0, 1}
    assert not staging_folder(folder).exists()


@pytest.mark.parametrize("links", ["absolute", "relative", "copy"])
def test_kinds_of_links(target, scans, links):
    case = scans("a")
    write_dataset([case], target, WriteOptions(links=links))
    image = target.folder / "imagesTr" / "a_0000.nii.gz"
    assert image.read_bytes() == case.channels[0].path.read_bytes()
    assert image.is_symlink() == (links != "copy")
    if links != "copy":
        assert os.path.isabs(os.readlink(image)) == (links == "absolute")


def test_a_copy_is_made_where_no_relative_path_leads(target, scans, monkeypatch):
    """From one Windows drive to another."""

    def other_drive(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    case = scans("a")
    write_dataset([case], target, WriteOptions(links="relative"))
    image = target.folder / "imagesTr" / "a_0000.nii.gz"
    assert not image.is_symlink() and image.read_bytes() == case.channels[0].path.read_bytes()


def test_ending_that_needs_fewest_conversions(target, scans):
    cases = [scans("a", 0, ".nrrd"), scans("b", 1, ".nrrd"), scans("c", 2, ".nii.gz")]
    assert choose_ending(cases) == ".nrrd" and choose_ending(cases[1:]) == ".nii.gz"
    assert choose_ending([scans("d", 3, ".mhd")]) == ".nii.gz"
    assert write_dataset(cases, target).ending == ".nrrd"
    assert not (target.folder / "imagesTr" / "c_0000.nrrd").is_symlink()
    # The ending stays when more of another kind arrive.
    more = [scans(name, 5, ".nii.gz") for name in "xyz"]
    assert write_dataset([*cases, *more], target).ending == ".nrrd"


def test_nii_needs_a_reader_that_is_named(target, scans):
    write_dataset([scans("a", 0, ".nii")], target)
    description = json.loads((target.folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["file_ending"] == ".nii" and description["overwrite_image_reader_writer"] == "SimpleITKIO"


def test_another_run_adds_what_is_new_and_changes_nothing(target, scans):
    cases = [scans("a", 0), scans("b", 1, ".nrrd")]
    write_dataset(cases, target)
    (target.folder / "dataset.json").write_text(
        (target.folder / "dataset.json").read_text(encoding="utf-8").replace("{", '{"description": "mine",', 1)
    )
    before = contents(target.folder)
    assert write_dataset(cases, target).new == ()
    assert contents(target.folder) == before
    result = write_dataset([*cases, scans("c", 2)], target)
    assert [r.name for r in result.new] == ["c"] and result.total == 3
    after = contents(target.folder)
    assert {k: v for k, v in after.items() if k in before and "json" not in k} == {
        k: v for k, v in before.items() if "json" not in k
    }
    description = json.loads((target.folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["numTraining"] == 3 and description["description"] == "mine"


def test_a_changed_source_is_refused(target, scans):
    write_dataset([scans("a", 0)], target)
    before = contents(target.folder / "labelsTr")
    with pytest.raises(CasesFailed, match="is not what case a was made of"):
        write_dataset([scans("a", 5, ".nrrd")], target)
    assert contents(target.folder / "labelsTr") == before


def test_other_settings_are_refused(target, scans):
    write_dataset([scans("a")], target)
    with pytest.raises(ValueError, match="was written with other channels"):
        open_record(DatasetTarget(target.folder, (Channel("T1", "MR"),)))


def test_foreign_folders_are_refused(target, scans):
    target.folder.mkdir()
    (target.folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by this command"):
        write_dataset([scans("a")], target)
    assert files(target.folder) == ["dataset.json"]


def test_a_bad_case_leaves_nothing_behind(target, scans, ct):
    array = ct().astype(np.float32)
    array[1, 2, 3] = np.nan
    cases = [scans("a"), scans("bad", array=array), scans("c", 2, ".nrrd")]
    with pytest.raises(CasesFailed, match="(?s)bad.*1 voxels that are NaN.*2 cases are ready") as error:
        write_dataset(cases, target)
    assert [o.problems[0].code for o in error.value.failed] == ["not-finite"]
    assert not target.folder.exists()
    assert not [f for f in files(staging_folder(target.folder)) if "bad" in f or "part" in f]
    result = write_dataset(cases, target, WriteOptions(skip_bad=True))
    assert [r.name for r in result.new] == ["a", "c"] and [o.name for o in result.failed] == ["bad"]
    assert not [f for f in files(target.folder) if "bad" in f]
    # The dataset is as it was, too, when an addition fails.
    before = contents(target.folder)
    with pytest.raises(CasesFailed):
        write_dataset([*cases, scans("d", 7)], target)
    assert contents(target.folder) == before


def test_every_case_is_bad(target, scans):
    with pytest.raises(CasesFailed, match="every voxel is 0"):
        write_dataset([scans("a", array=np.zeros((9, 9, 9), np.int16))], target, WriteOptions(skip_bad=True))
    assert not target.folder.exists()
    with pytest.raises(ValueError, match="no case"):
        write_dataset([], target)


def test_a_full_disk(target, scans, monkeypatch):
    cases = [scans(name, seed, ".nrrd") for seed, name in enumerate("abc")]
    write_dataset([scans("z", 9, ".nii.gz")], target)
    before = contents(target.folder)
    write, count = sitk.WriteImage, []

    def full(image, path, *args, **kwargs):
        count.append(path)
        if len(count) == 4:  # the label of the second case
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(image, path, *args, **kwargs)

    monkeypatch.setattr(convert.sitk, "WriteImage", full)
    with pytest.raises(OSError, match="(?s)No space left.*1 cases are ready.*make room"):
        write_dataset(cases, target)
    assert contents(target.folder) == before
    assert files(staging_folder(target.folder)) == [
        "cases/a.json", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "settings.json"
    ]  # fmt: skip
    monkeypatch.setattr(convert.sitk, "WriteImage", lambda *args, **kw: count.append(args[1]) or write(*args, **kw))
    done = len(count)
    assert len(write_dataset(cases, target).new) == 3
    assert len(count) - done == 4, "the finished case is not made again"


def test_a_folder_that_may_not_be_written_to(target, scans, monkeypatch):
    staging, make = staging_folder(target.folder), type(target.folder).mkdir

    def refuse(self, *args, **options):
        if self == staging:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        make(self, *args, **options)

    monkeypatch.setattr(type(staging), "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"{staging.parent} may not be written to .*Change its permissions"):
        write_dataset([scans("a")], target)
    assert not target.folder.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_without_a_word_from_itk(tmp_path, ct):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 999, (64, 64, 64)).astype(np.int16))
    path = tmp_path / "scan.nii.gz"
    (tmp_path / f"part_{os.getpid()}_scan.nii.gz").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not be written"):
        convert.write_image(image, path)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_while_files_are_moved(target, scans, monkeypatch):
    cases = [scans("a", 0), scans("b", 1)]
    rename, moved = type(target.folder).rename, []

    def stop(self, place):
        moved.append(place)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return rename(self, place)

    monkeypatch.setattr(type(target.folder), "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(cases, target)
    monkeypatch.undo()
    assert not (target.folder / "dataset.json").exists()
    result = write_dataset(cases, target)
    assert (
        len(result.new) == 2
        and json.loads((target.folder / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 2
    )
    assert len(files(target.folder)) == 6


def test_labels_values_test_cases_and_splits(raw, tmp_path, save, ct, rotated, scans):
    """What an importer of a public corpus hands over."""
    organs = np.zeros(ct().shape, np.int16)
    organs[2:5, 4:8, 4:8], organs[6:8, 4:8, 4:8] = 7, 3
    label = FileVolume(save(tmp_path / "in" / "seg.nrrd", organs, direction=rotated))
    plain = FileVolume(save(tmp_path / "in" / "plain.nii.gz", (organs > 0).astype(np.uint8), direction=rotated))
    cases = [
        Case("a", scans("a").channels, label, {0: 0, 3: 1, 7: 2}),
        Case("b", scans("b", 1).channels, plain),
        Case("t", scans("t", 2).channels, test=True),
        Case("u", scans("u", 3).channels, label, {0: 0, 3: 1, 7: 2}, test=True),
    ]
    target = DatasetTarget(
        raw / "Dataset010_Organs", CT, {"background": 0, "liver": 1, "spleen": 2},
        splits=[{"train": ["a"], "val": ["b"]}], extra={"licence": "CC-BY"},
    )  # fmt: skip
    assert write_dataset(cases, target).total == 2
    expected = np.zeros_like(organs)
    expected[organs == 3], expected[organs == 7] = 1, 2
    for part, name in (("labelsTr", "a"), ("labelsTs", "u")):
        np.testing.assert_array_equal(read(target.folder / part / f"{name}.nii.gz"), expected)
    assert (target.folder / "labelsTr" / "b.nii.gz").is_symlink()
    assert sorted(f.name for f in (target.folder / "imagesTs").iterdir()) == ["t_0000.nii.gz", "u_0000.nii.gz"]
    assert [f.name for f in (target.folder / "labelsTs").iterdir()] == ["u.nii.gz"]
    description = json.loads((target.folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["licence"] == "CC-BY" and description["numTraining"] == 2
    assert json.loads((target.folder / "splits_final.json").read_text(encoding="utf-8")) == [
        {"train": ["a"], "val": ["b"]}
    ]


def test_a_published_split_grows_with_the_dataset_unless_it_was_changed(target, scans):
    published = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    target = replace(target, splits=published)
    file = target.folder / "splits_final.json"
    write_dataset([scans("a", 0), scans("c", 2)], target)
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"train": ["a"], "val": ["c"]},
        {"train": ["c"], "val": ["a"]},
    ]
    # A run that sees the second part of the corpus only.
    write_dataset([scans("b", 1)], replace(target, splits=[{"train": ["b"], "val": []}, {"train": [], "val": ["b"]}]))
    assert json.loads(file.read_text(encoding="utf-8")) == published
    file.write_text("[]")
    write_dataset([scans("d", 4)], replace(target, splits=[{"train": ["a", "b", "d"], "val": ["c"]}]))
    assert file.read_text(encoding="utf-8") == "[]"


def test_segmentations_whose_values_stay_are_linked(raw, tmp_path, save, ct, rotated, scans):
    organs = np.zeros(ct().shape, np.uint8)
    organs[2:5, 4:8, 4:8] = 2
    label = FileVolume(save(tmp_path / "in" / "seg.nii.gz", organs, direction=rotated))
    target = DatasetTarget(raw / "Dataset010_Organs", CT, {"background": 0, "liver": 1, "spleen": 2})
    write_dataset([Case("a", scans("a").channels, label, {0: 0, 1: 1, 2: 2})], target)
    assert (target.folder / "labelsTr" / "a.nii.gz").resolve() == label.path


@pytest.mark.parametrize(
    ("change", "message"),
    [("values", "unexpected values \\[7\\]"), ("shape", "size 20 x 16 x 11"), ("fraction", "no whole numbers")],
)
def test_labels_that_do_not_fit(raw, tmp_path, save, ct, rotated, scans, change, message):
    organs = np.zeros(ct().shape, np.float32)
    organs[2:5, 4:8, 4:8] = 2.5 if change == "fraction" else 7
    array = organs[:-1] if change == "shape" else organs
    label = FileVolume(save(tmp_path / "in" / "seg.nrrd", array, direction=rotated))
    target = DatasetTarget(raw / "Dataset010_Organs", CT, {"background": 0, "liver": 1})
    with pytest.raises(CasesFailed, match=message):
        write_dataset([Case("a", scans("a").channels, label, {0: 0, 1: 1})], target)


@pytest.mark.parametrize(
    ("names", "message"), [(("a", "A"), "belong to several cases: a"), (("a b",), "Case names have letters")]
)
def test_names_that_cannot_be_used(target, scans, names, message):
    with pytest.raises(ValueError, match=message):
        write_dataset([Case(name, scans(f"s{i}", i).channels) for i, name in enumerate(names)], target)


def test_label_expected_or_not(target, scans):
    case = scans("a")
    with pytest.raises(ValueError, match="a has a label; expected none"):
        write_dataset([Case("a", case.channels, case.channels[0])], target)
    organs = DatasetTarget(target.folder, CT, {"background": 0, "liver": 1})
    with pytest.raises(ValueError, match="a has no label; expected one"):
        write_dataset([case], organs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "got 0"),
        ({"links": "hard"}, "got hard"),
        ({"accept": ("not-finite",)}, "Only few-slices"),
        ({"ending": ".npy"}, "got .npy"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        WriteOptions(**options)


def test_rounded_headers_are_made_equal(raw, tmp_path, save, ct):
    array = np.abs(ct()) + 5
    first = FileVolume(save(tmp_path / "a.nii.gz", array, (1, 1, 2)))
    second = FileVolume(save(tmp_path / "b.nii.gz", array, (1.0004, 1, 2)))
    target = DatasetTarget(raw / "Dataset802_T", (Channel("T1", "MR"), Channel("T2", "MR", "_0001")))
    write_dataset([Case("x", (first, second))], target)
    written = sitk.ReadImage(str(target.folder / "imagesTr" / "x_0001.nii.gz"))
    assert written.GetSpacing() == (1, 1, 2)
    assert (target.folder / "imagesTr" / "x_0000.nii.gz").is_symlink()
