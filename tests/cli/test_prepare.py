"""``nnssl_stc3d prepare`` as a user calls it: what it writes, what it refuses, and that nothing else changes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.cli.main import main


@pytest.fixture
def scans(tmp_path, raw, dicom_series, ct, save) -> Path:
    folder = tmp_path / "scans"
    save(folder / "a.nii.gz", ct(0))
    save(folder / "sub" / "b.nrrd", ct(1))
    dicom_series(folder / "patient", ct(2))
    np.savez(folder / "c.npz", image=ct(3), spacing=np.array([2.0, 1, 1]))
    return folder


def prepare(*arguments: object) -> int:
    return main(["prepare", "-d", "801", "-n", "MyCT", "--jobs", "1", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    assert prepare(*arguments) == 1
    return capsys.readouterr().err


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(f): (f.lstat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()}


def cases(raw: Path) -> list[str]:
    return sorted(f.name for f in (raw / "Dataset801_MyCT" / "labelsTr").iterdir())


def test_a_folder_of_mixed_formats(raw, scans, capsys):
    before = tree(scans)
    assert prepare("-i", scans, "--modality", "CT") == 0
    assert cases(raw) == ["a.nii.gz", "c.nii.gz", "patient.nii.gz", "sub_b.nii.gz"]
    printed = capsys.readouterr().out
    assert "added 4 cases (1 linked, 3 converted), 4 in all" in printed and "nnUNetv2_plan_and_preprocess" in printed
    assert sorted(f.name for f in (raw / "report_Dataset801_MyCT").iterdir()) == [
        "prepare_cases.csv", "prepare_report.png"
    ]  # fmt: skip
    assert tree(scans) == before
    assert sorted(f.name for f in raw.iterdir()) == ["Dataset801_MyCT", "report_Dataset801_MyCT"]


def test_another_run_adds_what_is_new(raw, scans, capsys, ct, save):
    assert prepare("-i", scans, "--modality", "CT") == 0
    first = tree(raw / "Dataset801_MyCT")
    assert prepare("-i", scans, "--modality", "CT") == 0
    assert tree(raw / "Dataset801_MyCT") == first
    save(scans / "new.nii.gz", ct(9))
    assert prepare("-i", scans, "--modality", "CT") == 0
    assert "added 1 cases (1 linked, 0 converted), 5 in all" in capsys.readouterr().out
    now = tree(raw / "Dataset801_MyCT")
    assert all(now[f] == first[f] for f in first if f.endswith(".nii.gz"))
    assert json.loads((raw / "Dataset801_MyCT" / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 5


def test_dry_run_writes_the_report_only(raw, scans, tmp_path, capsys):
    assert prepare("-i", scans, "--modality", "CT", "--dry-run", "--report", tmp_path / "r") == 0
    assert list(raw.iterdir()) == [] and (tmp_path / "r" / "prepare_cases.csv").is_file()
    assert "would write 4 cases" in capsys.readouterr().out


def test_bad_cases_are_named_and_left_out_only_if_asked(raw, scans, capsys, ct, save):
    cut = save(scans / "cut.nii.gz", ct(5))
    cut.write_bytes(cut.read_bytes()[:-100])
    (scans / "copy.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    save(scans / "flat.nii.gz", ct(6)[:1])
    assert prepare("-i", scans, "--modality", "CT", "--dry-run") == 1
    capsys.readouterr()
    assert prepare("-i", scans, "--modality", "CT") == 1
    printed = capsys.readouterr()
    for part in ("cut.nii.gz: ", "[truncated] 1", "[duplicate] 1", "[2d] 1", "copy or download it again"):
        assert part in printed.out
    assert "3 problems" in printed.err and "--skip-bad" in printed.err
    assert not (raw / "Dataset801_MyCT").exists()
    assert prepare("-i", scans, "--modality", "CT", "--skip-bad") == 0
    assert cases(raw) == ["a.nii.gz", "c.nii.gz", "patient.nii.gz", "sub_b.nii.gz"]
    assert prepare("-i", scans, "--modality", "CT", "--skip-bad", "--accept", "duplicate") == 0
    assert "copy.nii.gz" in cases(raw)


def test_what_only_the_voxels_show(raw, scans, capsys, ct, save):
    broken = ct(5).astype(np.float32)
    broken[1, 1, 1] = np.nan
    save(scans / "nan.nii.gz", broken)
    arguments = ("-i", scans, "--modality", "CT", "--sample", "0")
    assert "nan: " in refused(capsys, *arguments)
    assert not (raw / "Dataset801_MyCT").exists()
    assert "[not-finite]" in (raw / "report_Dataset801_MyCT" / "prepare_cases.csv").read_text(encoding="utf-8")
    assert prepare(*arguments, "--skip-bad") == 0
    assert "nan.nii.gz" not in cases(raw)


def test_a_full_disk(raw, scans, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nnssl_stc3d.prepare.convert.sitk.WriteImage", full)
        patch.setattr("nnssl_stc3d.prepare.report.Path.write_bytes", full)
        message = refused(capsys, "-i", scans, "--modality", "CT")
    assert "No space left" in message and "make room" in message
    assert not (raw / "Dataset801_MyCT").exists()
    assert prepare("-i", scans, "--modality", "CT") == 0 and len(cases(raw)) == 4


def test_channels(raw, tmp_path, ct, save):
    for name in ("x_0000", "x_0001", "y_0000", "y_0001"):
        save(tmp_path / "mr" / f"{name}.nii.gz", np.abs(ct(len(name) + ord(name[-1]) + ord(name[0]))) + 3)
    assert prepare("-i", tmp_path / "mr", "--channels", "T1", "T2", "--modality", "MR") == 0
    description = json.loads((raw / "Dataset801_MyCT" / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "T1", "1": "T2"} and description["numTraining"] == 2
    assert len(list((raw / "Dataset801_MyCT" / "imagesTr").iterdir())) == 4


def test_normalisation_of_ct_phases(raw, tmp_path, ct, save):
    for index, name in enumerate(("x_art", "x_ven")):
        save(tmp_path / "ct" / f"{name}.nii.gz", ct(index))
    arguments = ("--channels", "arterial=_art", "venous=_ven", "--modality", "CT")
    assert prepare("-i", tmp_path / "ct", *arguments) == 0
    description = json.loads((raw / "Dataset801_MyCT" / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "CT", "1": "CT"}


def test_a_table_of_cases(raw, scans, tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text("case,CT\nfirst,a.nii.gz\nsecond,patient\nthird,sub/b.nrrd\n")
    assert prepare("-i", scans, "--cases-csv", table) == 0
    assert cases(raw) == ["first.nii.gz", "second.nii.gz", "third.nii.gz"]


def test_numpy_needs_a_spacing(raw, tmp_path, capsys, ct):
    (tmp_path / "np").mkdir()
    np.save(tmp_path / "np" / "a.npy", ct(0))
    assert prepare("-i", tmp_path / "np", "--modality", "CT") == 1
    assert "--spacing Z Y X" in capsys.readouterr().out
    assert prepare("-i", tmp_path / "np", "--modality", "CT", "--spacing", 3, 2, 1) == 0
    image = sitk.ReadImage(str(raw / "Dataset801_MyCT" / "imagesTr" / "a_0000.nii.gz"))
    assert image.GetSpacing() == (1, 2, 3)


@pytest.mark.parametrize("place", ["nnUNet_raw", "nnUNet_results"])
def test_a_number_that_is_taken(raw, scans, capsys, place):
    (raw.parent / place / "Dataset801_Other").mkdir()
    assert "Number 801 belongs to" in refused(capsys, "-i", scans, "--modality", "CT")


def test_a_dataset_of_somebody_else(raw, scans, capsys):
    folder = raw / "Dataset801_MyCT" / "imagesTr"
    folder.mkdir(parents=True)
    (folder / "x_0000.nii.gz").write_text("precious")
    assert "was not written by this command" in refused(capsys, "-i", scans, "--modality", "CT")
    assert (folder / "x_0000.nii.gz").read_text(encoding="utf-8") == "precious" and len(
        list(folder.parent.rglob("*"))
    ) == 2


def test_variables_folders_and_options_that_are_wrong(raw, scans, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    for arguments, message in (
        (("-i", tmp_path / "empty", "--modality", "CT"), "No volume was found"),
        (("-i", tmp_path / "texts", "--modality", "CT"), "1 .txt"),
        (("-i", tmp_path / "gone", "--modality", "CT"), "is not a folder"),
        (("--modality", "CT"), "with -i, or a table"),
        (("-i", scans), "--modality CT, MR"),
        (("-i", scans, "--channels", "T1", "T1"), "different names"),
        (("-i", scans, "--channels", "T1=_x", "T2=_x"), "different suffixes"),
        (("-i", scans, "--modality", "CT", "--jobs", "0"), "one process or more"),
        (("-i", scans, "--modality", "CT", "--spacing", 1, 0, 1), "three positive numbers"),
        (("-i", scans, "--modality", "CT", "--sample", -1), "--sample must not be negative"),
        (("-i", scans, "--modality", "CT", "-d", "1000"), "from 1 to 999"),
        (("-i", scans, "--modality", "CT", "-n", "a b"), "letters, digits"),
        (("--cases-csv", tmp_path / "gone.csv"), "cannot be read"),
    ):
        assert message in refused(capsys, *arguments), message
    assert list(raw.iterdir()) == []
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "gone"))
    assert "which is not a folder" in refused(capsys, "-i", scans, "--modality", "CT")
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in refused(capsys, "-i", scans, "--modality", "CT")


def test_several_processes(raw, scans):
    assert main(["prepare", "-i", str(scans), "-d", "801", "-n", "MyCT", "--modality", "CT", "--jobs", "2"]) == 0
    assert len(cases(raw)) == 4


def test_every_kind_of_bad_input_is_named_and_nothing_is_changed(raw, scans, dicom_series, capsys, ct, save):
    assert prepare("-i", scans, "--modality", "CT") == 0
    bad = scans / "bad"
    cut = save(bad / "cut.nii.gz", ct(10))
    cut.write_bytes(cut.read_bytes()[:-100])
    for name, value in (("zero", 0.0), ("negative", -1.0)):
        content = bytearray(save(bad / f"{name}.nii", ct(11)).read_bytes())
        content[84:88] = np.float32(value).tobytes()  # pixdim[2]
        (bad / f"{name}.nii").write_bytes(content)
    header = save(bad / "sheared.mhd", ct(12))
    header.write_text(
        header.read_text(encoding="utf-8").replace("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 0.5 1 0")
    )
    broken = ct(13).astype(np.float32)
    broken[1, 1, 1] = np.nan
    save(bad / "nan.nii.gz", broken)
    save(bad / "flat.nii.gz", ct(14)[0])
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 9, 9, 3), np.uint8), isVector=True), str(bad / "rgb.nii.gz"))
    save(scans / "bad_same.nii.gz", ct(15))
    save(bad / "same.nrrd", ct(16))
    next(iter(dicom_series(bad / "gap", ct(17), series="1.17")[4:])).unlink()
    (bad / "twice" / "copy.dcm").write_bytes(dicom_series(bad / "twice", ct(18), series="1.18")[3].read_bytes())
    dicom_series(bad / "mixed", ct(19)[:8], series="1.19", prefix="axial")
    turned = (1, 0, 0, 0, 0, 1, 0, -1, 0)
    dicom_series(bad / "mixed", ct(20)[:8], direction=turned, series="1.19", prefix="coronal")
    before = tree(raw / "Dataset801_MyCT"), tree(scans)
    capsys.readouterr()
    assert prepare("-i", scans, "--modality", "CT", "--sample", "20") == 1
    assert (tree(raw / "Dataset801_MyCT"), tree(scans)) == before
    printed = capsys.readouterr().out
    for code, count, where in (
        ("truncated", 1, "cut.nii.gz"), ("spacing", 2, "negative.nii"), ("not-orthonormal", 1, "sheared.mhd"),
        ("not-finite", 1, "nan.nii.gz"), ("2d", 1, "flat.nii.gz"), ("colour", 1, "rgb.nii.gz"),
        ("name-collision", 2, "same.nrrd"), ("missing-slices", 1, "gap"), ("duplicate-slices", 1, "twice"),
        ("mixed-orientation", 1, "mixed"),
    ):  # fmt: skip
        start = printed.index(f"[{code}] {count}: ")
        assert where in printed[start:].split("\n[")[0], code
