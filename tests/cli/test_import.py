"""``nnssl_stc3d import`` as a user calls it: on a replica of a corpus, with everything that `prepare` does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nnssl_stc3d.cli.main import main


@pytest.fixture
def amos(tmp_path, raw, ct, save) -> Path:
    folder = tmp_path / "amos22"
    label = np.zeros((12, 16, 20), np.uint8)
    label[3:6, 5:8, 5:8] = 15
    for number, part in enumerate(("Tr", "Tr", "Va", "Ts"), 1):
        save(folder / f"images{part}" / f"amos_{number:04d}.nii.gz", ct(number))
        if part != "Ts":
            save(folder / f"labels{part}" / f"amos_{number:04d}.nii.gz", label)
    return folder


def run(corpus: str, *arguments: object) -> int:
    return main(["import", corpus, "-d", "801", "-n", "X", "--jobs", "1", *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    assert run(*arguments) == 1
    return capsys.readouterr().err


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(f.name.removesuffix(".nii.gz") for f in folder.iterdir())


def test_with_labels_and_the_published_split(raw, amos, capsys):
    before = content(amos)
    assert run("amos", "-i", amos) == 0
    folder = raw / "Dataset801_X"
    assert names(folder / "labelsTr") == ["amos_0001", "amos_0002", "amos_0003"]
    assert names(folder / "imagesTs") == ["amos_0004_0000"]
    assert json.loads((folder / "splits_final.json").read_text(encoding="utf-8")) == [
        {"train": ["amos_0001", "amos_0002"], "val": ["amos_0003"]}
    ]
    printed = capsys.readouterr().out
    assert "2 training, 1 validation, 1 test" in printed and "Licence: " in printed
    assert "nnUNetv2_plan_and_preprocess -d 801" in printed
    assert f"Published split: {folder}/splits_final.json (1 fold)" in printed and "cp " not in printed
    assert (raw / "report_Dataset801_X" / "prepare_cases.csv").is_file() and content(amos) == before


def test_another_run_adds_what_is_new(raw, amos, capsys, ct, save):
    assert run("amos", "-i", amos) == 0
    used = raw.parent / "nnUNet_preprocessed" / "Dataset801_X" / "splits_final.json"
    used.parent.mkdir()
    used.write_bytes((raw / "Dataset801_X" / "splits_final.json").read_bytes())
    before = content(raw / "Dataset801_X")
    assert run("amos", "-i", amos) == 0
    assert content(raw / "Dataset801_X") == before
    save(amos / "imagesTr" / "amos_0005.nii.gz", ct(5))
    save(amos / "labelsTr" / "amos_0005.nii.gz", np.ones((12, 16, 20), np.uint8))
    assert run("amos", "-i", amos) == 0
    printed = capsys.readouterr().out
    assert "added 1 cases" in printed
    # nnU-Net's planner asserts that the split that it copied before is the same.
    assert f"cp {raw}/Dataset801_X/splits_final.json {used}" in printed
    split = json.loads((raw / "Dataset801_X" / "splits_final.json").read_text(encoding="utf-8"))
    assert split == [{"train": ["amos_0001", "amos_0002", "amos_0005"], "val": ["amos_0003"]}]


def test_without_labels(raw, amos, capsys):
    assert run("amos", "-i", amos, "--unlabelled") == 0
    assert names(raw / "Dataset801_X" / "labelsTr") == ["amos_0001", "amos_0002"]
    assert "Left out: test, validation" in capsys.readouterr().out
    assert not (raw / "Dataset801_X" / "splits_final.json").exists()
    assert "was written with other labels" in refused(capsys, "amos", "-i", amos)
    assert run("amos", "-i", amos, "--unlabelled", "--with-held-out") == 0
    assert len(names(raw / "Dataset801_X" / "labelsTr")) == 4


def test_dry_run_and_bad_cases(raw, amos, capsys):
    cut = amos / "imagesTr" / "amos_0002.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert run("amos", "-i", amos, "--dry-run") == 1
    assert "[truncated] 1" in capsys.readouterr().out and not (raw / "Dataset801_X").exists()
    assert "--skip-bad" in refused(capsys, "amos", "-i", amos)
    assert run("amos", "-i", amos, "--skip-bad") == 0
    split = json.loads((raw / "Dataset801_X" / "splits_final.json").read_text(encoding="utf-8"))
    assert split == [{"train": ["amos_0001"], "val": ["amos_0003"]}]


def test_slices_with_classes(raw, tmp_path, capsys, ct, save):
    for number, label in enumerate(("NCP", "CP", "Normal")):
        for plane in range(8):
            image = np.clip(ct(number)[plane] + 1000, 0, 1060) // 5
            save(tmp_path / "cc" / label / str(number) / "1" / f"{plane:04d}.png", image.astype(np.uint8))
    assert "no voxel size" in refused(capsys, "cc-ccii", "-i", tmp_path / "cc")
    assert run("cc-ccii", "-i", tmp_path / "cc", "--spacing", 5, 1, 1) == 0
    table = raw / "Dataset801_X" / "case_labels.csv"
    assert table.read_text(encoding="utf-8").splitlines()[1:] == ["CP_1_1,CP,1", "NCP_0_1,NCP,0", "Normal_2_1,Normal,2"]
    assert str(table) in capsys.readouterr().out


def test_the_decathlon_is_left_to_nnunet(raw, tmp_path, capsys):
    task = tmp_path / "Task04_Hippocampus"
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
    (task / "dataset.json").write_text('{"modality": {"0": "MRI"}}')
    assert run("msd", "-i", task) == 0
    assert f"nnUNetv2_convert_MSD_dataset -i {task} -overwrite_id 801" in capsys.readouterr().out
    assert list(raw.iterdir()) == []


def test_folders_and_options_that_are_wrong(raw, amos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("btcv", "-i", tmp_path / "empty"), "Found: nothing"),
        (("btcv", "-i", amos), "RawData/Training/img/img0001.nii.gz"),
        (("amos", "-i", tmp_path / "gone"), "is not a folder"),
        (("amos", "-i", amos, "--modality", "MR"), "no MR case was found"),
        (("btcv", "-i", amos, "--modality", "MR"), "has CT only"),
        (("cc-ccii", "-i", amos, "--modality", "CT"), "has windowed CT only"),
        (("amos", "-i", amos, "--spacing", 1, 1, 1), "--spacing is for cc-ccii"),
        (("cc-ccii", "-i", amos, "--spacing", 1, 0, 1), "three positive numbers"),
        (("amos", "-i", amos, "--with-held-out"), "pass it with --unlabelled"),
        (("amos", "-i", amos, "--sample", -1), "--sample must not be negative"),
        (("msd", "-i", amos), "is not a task of the Decathlon"),
    ):
        assert message in refused(capsys, *arguments), message
    (raw / "Dataset801_Other").mkdir()
    assert "Number 801 belongs to" in refused(capsys, "amos", "-i", amos)
    assert [f.name for f in raw.iterdir()] == ["Dataset801_Other"]


def test_an_unknown_corpus(capsys):
    with pytest.raises(SystemExit):
        run("imagenet", "-i", ".")
    assert "luna16" in capsys.readouterr().err
