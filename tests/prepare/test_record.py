"""What was written before, what changed, and what is a copy."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from nnssl_stc3d.prepare import record as module
from nnssl_stc3d.prepare.case import Channel, DatasetTarget
from nnssl_stc3d.prepare.find import find_volumes
from nnssl_stc3d.prepare.formats import FileVolume
from nnssl_stc3d.prepare.record import Record, with_record
from nnssl_stc3d.prepare.scan import cases_by_name
from nnssl_stc3d.prepare.writer import write_dataset

CT = (Channel("CT", "CT"),)


def looked(root, record=None):
    cases = with_record(cases_by_name(find_volumes(root), root, CT), record or Record(), 1)
    return {c.case.name: (c.known, [p.code for p in c.problems]) for c in cases}


@pytest.fixture
def scans(tmp_path, save, ct):
    for index in range(3):
        save(tmp_path / "in" / f"s{index}.nii", ct(index))
    return tmp_path / "in"


@pytest.fixture
def written(scans, raw):
    target = DatasetTarget(raw / "Dataset801_X", CT)
    write_dataset([c.case for c in cases_by_name(find_volumes(scans), scans, CT)], target)
    return Record.read(target.folder)


def test_copies_are_found_among_files_of_one_size(scans):
    shutil.copy(scans / "s1.nii", scans / "z.nii")
    assert looked(scans) == {"s0": (False, []), "s1": (False, []), "s2": (False, []), "z": (False, ["duplicate"])}


def test_files_of_different_size_are_not_read(scans, save, ct, monkeypatch):
    for index in range(3):
        save(scans / f"s{index}.nii", ct(index, (9, 10, 11 + index)))
    monkeypatch.setattr(module, "file_hash", lambda path: pytest.fail(f"read {path}"))
    assert len(looked(scans)) == 3


def test_series_are_compared_by_their_instances(tmp_path, dicom_series, ct, monkeypatch):
    dicom_series(tmp_path / "a", ct(0), series="1.2.1")
    dicom_series(tmp_path / "b", ct(1), series="1.2.2")
    hashed = []
    original = module.file_hash
    monkeypatch.setattr(module, "file_hash", lambda path: hashed.append(path) or original(path))
    assert looked(tmp_path) == {"a": (False, []), "b": (False, [])} and hashed == []
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert looked(tmp_path) == {"a": (False, []), "b": (False, []), "c": (False, ["duplicate"])}


def test_what_was_written_is_known_and_not_read_again(scans, written, monkeypatch):
    monkeypatch.setattr(module, "file_hash", lambda path: pytest.fail(f"read {path}"))
    assert looked(scans, written) == {f"s{i}": (True, []) for i in range(3)}


def test_a_file_that_was_touched_or_moved_is_the_same(scans, written):
    os.utime(scans / "s0.nii", (1, 1))
    (scans / "s1.nii").rename(scans / "new_name.nii")
    assert looked(scans, written) == {f"s{i}": (True, []) for i in range(3)}


def test_changed_copied_and_new_files(scans, written, save, ct):
    save(scans / "s0.nii", ct(7))
    shutil.copy(scans / "s1.nii", scans / "copy.nii")
    save(scans / "s9.nii", ct(9))
    assert looked(scans, written) == {
        "copy": (False, ["duplicate"]), "s0": (True, ["changed"]), "s1": (True, []), "s2": (True, []),
        "s9": (False, []),
    }  # fmt: skip


# ---- segmentations --------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path, scans, save, raw):
    """Function that finds the scans, each with its segmentation if there is one; they are in a dataset already."""
    folder = tmp_path / "labels"

    def find(record=None, root=scans):
        cases = []
        for found in cases_by_name(find_volumes(root), root, CT):
            path = folder / f"{found.case.name}.nii"
            label = FileVolume(path) if path.exists() else None
            cases.append(replace(found, case=replace(found.case, label=label, label_values={0: 0, 5: 1})))
        return with_record(cases, record or Record(), 1)

    for index in range(3):
        draw(save, folder / f"s{index}.nii", 4)
    target = DatasetTarget(raw / "Dataset802_Y", CT, {"background": 0, "organ": 1})
    write_dataset([c.case for c in find()], target)
    return find, Record.read(target.folder), folder


def draw(save, path, voxels):
    array = np.zeros((12, 16, 20), np.uint8)
    array[3, 4, :voxels] = 5
    save(path, array)


def seen(cases):
    return {c.case.name: [(p.code, p.where.rsplit("/", 1)[-1]) for p in c.problems] for c in cases if c.known}


def test_corrected_segmentations_are_reported_as_changed(labelled, save, monkeypatch):
    find, record, folder = labelled
    with monkeypatch.context() as unread:
        unread.setattr(module, "file_hash", lambda path: pytest.fail(f"read {path}"))
        assert seen(find(record)) == {"s0": [], "s1": [], "s2": []}
    draw(save, folder / "s0.nii", 6)
    os.utime(folder / "s1.nii", (1, 1))
    (folder / "s2.nii").unlink()
    cases = find(record)
    assert seen(cases) == {"s0": [("changed", "s0.nii")], "s1": [], "s2": [("changed", "s2.nii")]}
    assert "is not the segmentation that case s0 was written with" in cases[0].problems[0].message
    assert "has lost the segmentation" in cases[2].problems[0].message


def test_corrected_segmentations_of_scans_that_moved_are_reported_as_changed(labelled, scans, save):
    find, record, folder = labelled
    scans.rename(scans.with_name("moved"))
    draw(save, folder / "s0.nii", 6)
    found = seen(find(record, scans.with_name("moved")))
    assert found == {"s0": [("changed", "s0.nii")], "s1": [], "s2": []}


def test_records_of_another_kind_are_refused(tmp_path):
    assert Record.read(tmp_path) is None
    for text in ("{", "[]", '{"format": 99}'):
        (tmp_path / "prepare.json").write_text(text)
        with pytest.raises(ValueError, match="not a record of this version"):
            Record.read(tmp_path)
