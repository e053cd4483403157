"""What a benchmark writes and links in its folder, and what it refuses before any run."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import zlib
from dataclasses import replace

import blosc2
import numpy as np
import pytest

from nnssl_stc3d.evaluation.benchmark import seeded
from nnssl_stc3d.evaluation.benchmark.design import draw_split
from nnssl_stc3d.evaluation.benchmark.methods import find_methods
from nnssl_stc3d.evaluation.benchmark.workspace import Dataset, Workspace, environment, write_whole

CASES = [f"case{i}" for i in range(8)]
NAME = "Dataset004_Made"


def image_of(case):
    return np.random.default_rng(zlib.crc32(case.encode())).normal(size=(2, 4, 5, 6)).astype(np.float32)


def write_image(file, image):
    blosc2.asarray(np.ascontiguousarray(image), urlpath=str(file), mode="w")


def make_dataset(root, name, cases):
    """A dataset of a user whose files are empty but for preprocessed images, two channels of 4x5x6."""
    raw, folder = root / "raw" / name, root / "preprocessed" / name
    plans = {
        "plans_name": "nnUNetPlans",
        "dataset_name": name,
        "configurations": {"3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres", "architecture": {}}},
    }
    files = [folder / "nnUNetPlans_3d_fullres" / f"{c}{end}" for c in cases for end in (".b2nd", "_seg.b2nd", ".pkl")]
    files += [folder / "gt_segmentations" / f"{c}.nii.gz" for c in cases]
    files += [raw / "imagesTr" / f"{c}_{channel:04d}.nii.gz" for c in cases for channel in (0, 1)]
    files += [raw / "labelsTr" / f"{c}.nii.gz" for c in cases]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for case in cases:
        write_image(folder / "nnUNetPlans_3d_fullres" / f"{case}.b2nd", image_of(case))
    for place in (raw, folder):
        description = {"channel_names": {"0": "T2", "1": "T1"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
        (place / "dataset.json").write_text(json.dumps(description))
    (folder / "splits_final.json").write_text("[]")
    return Dataset(raw, folder, plans, "3d_fullres")


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, NAME, CASES)


@pytest.fixture
def split():
    return draw_split(CASES, 2, 1, 0)


def test_test_cases_are_linked_for_prediction_only(dataset, split, tmp_path):
    assert dataset.cases() == CASES and dataset.number == "4"
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    own = workspace.preprocessed / NAME
    assert {f.name for f in own.rglob("*_seg.b2nd")} == {f"{c}_seg.b2nd" for c in split.development}
    assert {f.name[:5] for f in (own / "gt_segmentations").iterdir()} == set(split.development)
    images, labels = workspace.cases("test")
    assert {f.name for f in labels.iterdir()} == {f"{c}.nii.gz" for c in split.test}
    assert len(list(images.iterdir())) == 4 and all(f.is_symlink() for f in images.iterdir())
    assert workspace.ending(dataset) == ".nii.gz"
    workspace.link_datasets(dataset, split, "cpu")


def test_files_that_the_description_lists_are_linked_under_nnunets_names(dataset, split, tmp_path):
    raw, scans = dataset.raw, tmp_path / "scans"
    file, listed = raw / "dataset.json", {}
    for name in CASES:
        (scans / name).mkdir(parents=True)
        for modality in ("t1", "t2"):
            (scans / name / f"{modality}.nii.gz").write_text(f"{name} {modality}")
        listed[name] = {
            "images": [f"../../scans/{name}/{modality}.nii.gz" for modality in ("t2", "t1")],
            "label": f"labelsTr/{name}.nii.gz",
        }
    shutil.rmtree(raw / "imagesTr")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset": listed}))
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    images, labels = workspace.cases("test")
    for name in split.test:
        assert (images / f"{name}_0000.nii.gz").read_text() == f"{name} t2"
        assert (images / f"{name}_0001.nii.gz").read_text() == f"{name} t1"
        assert (labels / f"{name}.nii.gz").resolve() == raw / "labelsTr" / f"{name}.nii.gz"
    assert len(list(images.iterdir())) == 2 * len(split.test)


def test_every_case_of_another_pretraining_dataset_is_linked(dataset, split, tmp_path):
    others = ["other0", "other1", "other2"]
    pretraining = make_dataset(tmp_path, "Dataset801_Other", others)
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu", pretraining)
    for name, cases in (("Dataset801_Other", others), (NAME, split.development)):
        found = {f.name for f in (workspace.preprocessed / name).rglob("*_seg.b2nd")}
        assert found == {f"{c}_seg.b2nd" for c in cases}
    images, labels = workspace.cases("test")
    assert not [*images.glob("other*"), *labels.glob("other*")]


def test_images_of_test_cases_are_not_pretrained_on(dataset, split, tmp_path):
    others = ["other0", "other1", "other2", "other3"]
    pretraining = make_dataset(tmp_path, "Dataset801_Other", others)
    first, second = split.test
    # One is mirrored and turned, one saved with less precision. A development case may be pretrained on.
    changed = {
        "other0": np.swapaxes(image_of(first), 1, 3)[:, ::-1],
        "other1": image_of(second).astype(np.float16).astype(np.float32),
        "other2": image_of(split.pool[0]),
    }
    for name, image in changed.items():
        write_image(pretraining.data / f"{name}.b2nd", image)
    workspace = Workspace(tmp_path / "b")
    for _ in range(2):
        workspace.link_datasets(dataset, split, "cpu", pretraining)
        assert workspace.left_out() == {"other0": first, "other1": second}
        found = {f.name for f in (workspace.preprocessed / "Dataset801_Other").rglob("*_seg.b2nd")}
        assert found == {"other2_seg.b2nd", "other3_seg.b2nd"}


def test_a_pretraining_dataset_that_has_grown(dataset, split, tmp_path):
    pretraining = make_dataset(tmp_path, "Dataset801_Other", ["other0", "other1"])
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu", pretraining)
    make_dataset(tmp_path, "Dataset801_Other", ["other0", "other1", "other2"])
    with pytest.raises(ValueError, match=r"cases of Dataset801_Other have changed .* other2 \(2 then, 3 now\)"):
        workspace.link_datasets(dataset, split, "cpu", pretraining)
    assert not list((workspace.preprocessed / "Dataset801_Other").rglob("other2*"))


def test_the_spacing_of_tiffs_comes_along(dataset, split, tmp_path):
    first = split.test[0]
    for folder, name in (("imagesTr", first), ("labelsTr", first), ("imagesTr", split.pool[0])):
        (dataset.raw / folder / f"{name}.json").write_text(json.dumps({"spacing": [5, 1, 1]}))
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    for folder in workspace.cases("test"):
        assert [f.name for f in folder.glob("*.json")] == [f"{first}.json"]


def test_data_that_were_moved_are_linked_anew(dataset, split, tmp_path):
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    moved = replace(dataset, raw=tmp_path / "raw2" / NAME, preprocessed=tmp_path / "preprocessed2" / NAME)
    for before, after in ((dataset.raw, moved.raw), (dataset.preprocessed, moved.preprocessed)):
        after.parent.mkdir()
        before.rename(after)
    workspace.link_datasets(moved, split, "cpu")
    links = [f for f in (tmp_path / "b").rglob("*") if f.is_symlink()]
    assert links and all(link.exists() for link in links)


def test_options_that_have_changed_with_the_version(tmp_path, monkeypatch):
    workspace, methods = Workspace(tmp_path / "b"), find_methods(["stc3d", "voco", "stc3d-rotation"])
    for _ in range(2):
        workspace.fix_methods(methods)
    before = (tmp_path / "b" / "methods.json").read_bytes()
    trainer = importlib.import_module("nnssl_stc3d.trainers.stc3d").STC3DPretrainTrainer
    monkeypatch.setattr(trainer, "config", replace(trainer.config, dense_points=7))
    with pytest.raises(ValueError, match=r"runs of stc3d in .*b were made with dense_points=256, now 7\."):
        workspace.fix_methods(methods)
    assert (tmp_path / "b" / "methods.json").read_bytes() == before
    workspace.fix_methods(find_methods(["voco"]))


def test_a_dataset_of_test_cases_alone_is_refused(dataset, split, tmp_path):
    pretraining = make_dataset(tmp_path, "Dataset801_Other", ["other0"])
    write_image(pretraining.data / "other0.b2nd", image_of(split.test[0]))
    with pytest.raises(ValueError, match="every case of Dataset801_Other shows a test case of Dataset004_Made"):
        Workspace(tmp_path / "b").link_datasets(dataset, split, "cpu", pretraining)


def test_folds_are_the_benchmarks_own_and_never_change_their_number(dataset, split, tmp_path):
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    assert [workspace.fold(dataset, split, *key) for key in ((2, 0), (1, 0), (2, 1), (2, 0))] == [0, 1, 2, 0]
    folds = json.loads((workspace.preprocessed / NAME / "splits_final.json").read_text(encoding="utf-8"))
    assert [fold["train"] for fold in folds] == [split.labelled(2, 0), split.labelled(1, 0), split.labelled(2, 1)]
    assert (dataset.preprocessed / "splits_final.json").read_text(encoding="utf-8") == "[]"


def test_plans_that_have_changed(dataset, split, tmp_path):
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    dataset.plans["configurations"]["3d_fullres"]["patch_size"] = [8, 8, 8]
    with pytest.raises(ValueError, match="plans nnUNetPlans of Dataset004_Made have changed"):
        workspace.link_datasets(dataset, split, "cpu")


def test_a_folder_keeps_its_data(dataset, split, tmp_path):
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cpu")
    workspace.link_datasets(dataset, split, "cpu", dataset)
    other = replace(dataset, preprocessed=tmp_path / "preprocessed" / "Dataset801_Other")
    with pytest.raises(ValueError, match="expected the pretraining dataset Dataset004_Made.* got Dataset801_Other"):
        workspace.link_datasets(dataset, split, "cpu", other)
    with pytest.raises(ValueError, match="expected the configuration 3d_fullres.* got 3d_lowres"):
        workspace.link_datasets(replace(dataset, configuration="3d_lowres"), split, "cpu")


@pytest.mark.parametrize(
    ("file", "content", "bound"),
    [
        ("cost/scratch.json", {"nnUNetv2_train, unfinished": {"seconds": 1.0}}, False),
        ("cost/scratch.json", {"nnUNetv2_train": {"seconds": 1.0}}, True),
        ("seconds_per_step.json", {"stc3d": 1.0}, True),
    ],
)
def test_another_device_where_nothing_has_finished(dataset, split, tmp_path, file, content, bound):
    workspace = Workspace(tmp_path / "b")
    workspace.link_datasets(dataset, split, "cuda")
    write_whole(workspace.root / file, json.dumps(content))
    if not bound:
        return workspace.link_datasets(dataset, split, "cpu")
    with pytest.raises(ValueError, match="expected the device cuda.* got cpu"):
        workspace.link_datasets(dataset, split, "cpu")


def test_files_that_are_missing(dataset, split, tmp_path):
    (dataset.raw / "labelsTr" / f"{split.test[1]}.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=f"2 images of {split.test[1]}, .* and its label map .*, found 2 and no label map"
    ):
        dataset.raw_cases(split.test)
    for number, left in ((0, 1), (1, 0)):
        (dataset.raw / "imagesTr" / f"{split.test[0]}_{number:04d}.nii.gz").unlink()
        with pytest.raises(ValueError, match=f"expected 2 images of {split.test[0]}, such as .*, found {left}[.]"):
            Workspace(tmp_path / "b").link_datasets(dataset, split, "cpu")
    for file in dataset.data.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="Run nnUNetv2_preprocess -d 4 -plans_name nnUNetPlans -c 3d_fullres"):
        dataset.cases()


def test_variables_of_a_run(tmp_path):
    variables = environment(Workspace(tmp_path), "stc3d/50steps/seed1", threads=2, workers=0)
    assert variables["nnUNet_results"].endswith("results/stc3d/50steps/seed1")
    assert variables["nnUNet_extTrainer"] == str(tmp_path / "trainers")
    assert variables["OMP_NUM_THREADS"] == "2" and variables["nnUNet_n_proc_DA"] == "0"
    assert "OMP_NUM_THREADS" not in environment(Workspace(tmp_path), "scratch", threads=0, workers=8)


class Command:
    """A console command that draws numbers."""

    name = "draw"

    @staticmethod
    def load():
        def draw():
            import numpy
            import torch

            return random.random(), numpy.random.rand(), torch.rand(1).item(), os.cpu_count()

        return draw


def test_a_seed_fixes_what_a_command_draws(monkeypatch):
    monkeypatch.setattr(seeded, "entry_points", lambda group: [Command])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(seeded.sys, "argv", ["before"])
    drawn = [seeded.main([seed, "0", "draw", "-x"]) for seed in ("3", "3", "4")]
    assert drawn[0] == drawn[1] and len(set(drawn[1][:3] + drawn[2][:3])) == 6
    assert drawn[0][3] == 12 and os.environ["OMP_NUM_THREADS"] == "7" and seeded.sys.argv == ["draw", "-x"]
    assert seeded.main(["3", "1", "draw"])[3] == 1 and os.environ["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ValueError, match="such as nnUNetv2_train, got 'other'"):
        seeded.main(["3", "1", "other"])
