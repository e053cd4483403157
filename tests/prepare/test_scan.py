"""How volumes become cases: names, channels, tables; and what is wrong with their values."""

from __future__ import annotations

import os

import numpy as np
import pytest

from nnssl_stc3d.prepare.case import Channel
from nnssl_stc3d.prepare.checks import ADVICE, voxel_problems
from nnssl_stc3d.prepare.find import find_volumes
from nnssl_stc3d.prepare.scan import case_name, cases_by_name, cases_by_table, look_at_some, with_collisions

CT = (Channel("CT", "CT"),)
TWO = (Channel("T1", "MR", "_0000"), Channel("T2", "MR", "_0001"))


def names(root, channels=CT, **options):
    return [c.case.name for c in cases_by_name(find_volumes(root, **options), root, channels)]


def codes(cases):
    return {c.case.name: [p.code for p in c.problems] for c in cases if c.problems}


def test_names_are_made_of_paths(tmp_path, save, ct, dicom_series):
    for path in ("a.nii.gz", "patient 1/scan (2).nrrd", "x/y/z.mha"):
        save(tmp_path / path, ct())
    dicom_series(tmp_path / "p2" / "series", ct())
    assert names(tmp_path) == ["a", "p2_series", "patient_1_scan_2", "x_y_z"]
    assert case_name(["...", "é"]) == "case"


def test_series_of_one_folder_have_names_of_their_own(tmp_path, dicom_series, ct):
    dicom_series(tmp_path / "p", ct(0), series="1.2.3.1", prefix="a", **{"0020_0011": "1"})
    dicom_series(tmp_path / "p", ct(1), series="1.2.3.2", prefix="b", **{"0020_0011": "2"})
    assert names(tmp_path) == ["p_s1", "p_s2"]


def test_hidden_excluded_and_other_files(tmp_path, save, ct):
    for path in ("a.nii.gz", ".hidden/b.nii.gz", "labelsTr/a.nii.gz", "out/c.nii.gz"):
        save(tmp_path / path, ct())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._a.nii.gz").write_text("x")
    search = find_volumes(tmp_path, exclude=["labelsTr/*"], skip=[tmp_path / "out"])
    assert [f.volume.id for f in search.volumes] == [str(tmp_path / "a.nii.gz")]
    assert search.ignored == {".txt": 1}


def test_links_in_a_circle_end(tmp_path, save, ct):
    save(tmp_path / "sub" / "a.nii.gz", ct())
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert names(tmp_path) == ["sub_a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_that_may_not_be_read(tmp_path, save, ct):
    save(tmp_path / "a.nii.gz", ct()).chmod(0)
    save(tmp_path / "sub" / "b.nii.gz", ct())
    (tmp_path / "sub").chmod(0)
    try:
        search = find_volumes(tmp_path)
        found = [p.code for f in search.volumes for p in f.problems] + [p.code for p in search.problems]
        assert found == ["no-permission", "no-permission"]
    finally:
        (tmp_path / "sub").chmod(0o700)


def test_a_folder_that_refuses_is_named(tmp_path, save, ct, monkeypatch):
    # As root the real thing cannot be made.
    save(tmp_path / "sub" / "b.nii.gz", ct())
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (problem,) = find_volumes(tmp_path).problems
    assert problem.code == "no-permission" and problem.where == str(tmp_path / "sub")


def test_a_file_that_refuses_is_named(tmp_path, save, ct, monkeypatch):
    path = save(tmp_path / "a.nii.gz", ct())
    opened = type(path).open

    def refuse(self, *args, **options):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(type(path), "open", refuse)
    (found,) = find_volumes(tmp_path).volumes
    assert [str(p) for p in found.problems] == [f"{path}: may not be read"]
    assert found.problems[0].code == "no-permission"


def test_four_digits_of_a_single_channel(tmp_path, save, ct):
    for name in ("a_0000", "b_0000", "c_0000", "c_0001", "d_0007"):
        save(tmp_path / f"{name}.nii.gz", ct())
    assert names(tmp_path) == ["a", "b", "c_0000", "c_0001", "d_0007"]


def test_channels_that_were_not_named(tmp_path, save, ct):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        save(tmp_path / f"{name}.nii.gz", ct())
    with pytest.raises(ValueError, match="channels of 2 cases. Name the channels with --channels"):
        names(tmp_path)


def test_channels_by_suffix(tmp_path, save, ct):
    mr = np.abs(ct()) + 5
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c_0001", "odd"):
        shape = mr[:, :-1] if name == "b_0001" else mr
        save(tmp_path / "p" / f"{name}.nii.gz", shape)
    cases = cases_by_name(find_volumes(tmp_path), tmp_path, TWO)
    assert [c.case.name for c in cases] == ["p_a", "p_b", "p_c", "p_odd"]
    assert [v.files[0].name for v in cases[0].case.channels] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert codes(cases) == {"p_b": ["channels-differ"], "p_c": ["channels"], "p_odd": ["channels"]}
    assert "lacks T1 (p_c_0000)" in cases[2].problems[0].message
    own = (Channel("T1", "MR", "-t1"), Channel("FLAIR", "MR", "-flair"))
    save(tmp_path / "q" / "x-flair.nii.gz", mr)
    save(tmp_path / "q" / "x-t1.nii.gz", mr)
    (case,) = cases_by_name(find_volumes(tmp_path / "q"), tmp_path / "q", own)
    assert case.case.name == "x" and case.case.channels[0].files[0].name == "x-t1.nii.gz"


def test_cases_of_a_table(tmp_path, save, ct, dicom_series):
    mr = np.abs(ct()) + 5
    save(tmp_path / "one.nii.gz", mr, (0.7, 0.8, 2.5), (-10.5, 20.25, -300.0))
    dicom_series(tmp_path / "dicom", mr, series="1.2.1", prefix="a", **{"0008_0060": "MR"})
    dicom_series(tmp_path / "both", mr, series="1.2.2", prefix="a", **{"0008_0060": "MR"})
    dicom_series(tmp_path / "both", mr, series="1.2.3", prefix="b", **{"0008_0060": "MR"})
    table = tmp_path / "cases.csv"
    table.write_text("case,T1,T2\nx,one.nii.gz,dicom\ny,both#1.2.3,one.nii.gz\nz,both,gone.nii.gz\n")
    cases, _ = cases_by_table(table, tmp_path, TWO, None, 1)
    assert [c.case.name for c in cases] == ["x", "y", "z"]
    assert codes(cases) == {"z": ["unreadable", "unreadable"]}
    assert "holds 2 DICOM series" in str(cases[2].problems[0]) and "gone.nii.gz" in str(cases[2].problems[1])
    assert cases[1].case.channels[0].series == "1.2.3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,T1,T2\na,b,c\n", "first line .* has to be: case"),
        ("case,T1,T2\na,b\n", "Line 2 of"),
        ("case,T1,T2\n", "lists no case"),
        ("case,T1\na,b\n", "has 1 channels, but --channels names 2"),
        ("", "first line"),
    ],
)
def test_tables_that_are_wrong(tmp_path, text, message):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        cases_by_table(tmp_path / "cases.csv", tmp_path, TWO, None, 1)


def test_names_that_collide(tmp_path, save, ct):
    for index, path in enumerate(("a_b.nii.gz", "a/b.nrrd", "A_B.mha", "c.nii.gz")):
        save(tmp_path / path, ct(index))
    cases = with_collisions(cases_by_name(find_volumes(tmp_path), tmp_path, CT), taken=["C"])
    assert codes(cases) == {"a_b": ["name-collision"], "A_B": ["name-collision"], "c": ["name-collision"]}
    assert "a_b.nii.gz" in cases[1].problems[0].message or "A_B.mha" in cases[1].problems[0].message
    assert "written before" in cases[-1].problems[0].message


def test_a_sample_of_the_values(tmp_path, save, ct):
    for index in range(6):
        array = ct(index).astype(np.float32)
        if index == 5:
            array[3, 3, 3] = np.nan
        save(tmp_path / f"s{index}.nii.gz", array)
    cases = look_at_some(cases_by_name(find_volumes(tmp_path), tmp_path, CT), CT, 3, 1)
    assert [len(c.intensity) for c in cases] == [1, 0, 1, 0, 0, 0]
    assert codes(cases) == {"s5": ["not-finite"]}
    low, median, high = np.percentile(ct(0), (0.5, 50, 99.5))
    assert (cases[0].intensity[0].low, cases[0].intensity[0].median) == pytest.approx((low, median))


def test_values(ct):
    rng = np.random.default_rng(0)
    hounsfield, mr = ct(), rng.gamma(2, 100, (10, 11, 12)).astype(np.float32)
    labels = rng.integers(0, 4, (10, 11, 12)).astype(np.uint8)
    broken = mr.copy()
    broken[0, 0, 0], broken[1, 0, 0] = np.inf, np.nan
    for array, modality, expected in (
        (hounsfield, "CT", []), (mr, "MR", []), (mr, "", []), (mr, "CT", ["wrong-modality"]),
        (hounsfield, "MR", ["wrong-modality"]), (hounsfield, "US", []), (labels, "MR", ["label-map"]),
        (np.ones((3, 4, 5)), "CT", ["constant"]), (broken, "MR", ["not-finite"]),
    ):  # fmt: skip
        assert [p.code for p in voxel_problems(array, modality, "x")] == expected
    assert "2 voxels" in voxel_problems(broken, "MR", "x")[0].message
    assert all(advice.endswith((".", "!")) for advice in ADVICE.values())


def test_the_modality_of_a_series(tmp_path, dicom_series, ct):
    dicom_series(tmp_path / "s", ct(), **{"0008_0060": "MR"})
    (case,) = cases_by_name(find_volumes(tmp_path), tmp_path, CT)
    assert [p.code for p in case.problems] == ["wrong-modality"] and "is MR, expected CT" in case.problems[0].message
    assert case.accepting(["wrong-modality"]).problems == ()
