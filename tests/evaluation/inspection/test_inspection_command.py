"""``nnssl_stc3d inspect`` from checkpoint files to a page, on tiny cases, and what it refuses first."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.data.body import BodyRule
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.evaluation.inspection.cases import InspectedCases, choose_cases, default_cell, default_reference
from nnssl_stc3d.evaluation.inspection.command import model_names
from nnssl_stc3d.evaluation.inspection.folder import check_folder, write_folder
from nnssl_stc3d.evaluation.inspection.models import load_model, scratch_model
from nnssl_stc3d.evaluation.inspection.options import InspectOptions, Point
from nnssl_stc3d.evaluation.inspection.scan_grid import ScanGrid
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.views.guide import Guide

CPU = torch.device("cpu")
NAMES = [f"case_{i}" for i in range(5)]
SMALL = ("--views", "16", "--points", "60", "--regions", "1", "--cell", "3", "--device", "cpu")


@pytest.fixture
def dataset(tmp_path, monkeypatch, tiny_plans, tiny_dataset_json):
    """Five cases of two bright blocks, labelled, in nnUNet_preprocessed."""
    folder = tmp_path / "pre" / "Dataset801_Unlabelled"
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans()))
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    rng = np.random.default_rng(0)
    for index, name in enumerate(NAMES):
        labels = np.zeros((1, 18, 20 + index, 22), dtype=np.int8)
        labels[0, 3:9, 4:12, 4:12], labels[0, 9:15, 8:16, 10:18] = 1, 2
        image = (labels + 0.3 * rng.normal(size=labels.shape)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(data / f"{name}.b2nd"))
        blosc2.asarray(labels, urlpath=str(data / f"{name}_seg.b2nd"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    monkeypatch.setenv("NNSSL_STC3D_DEBUG", "")
    return folder


@pytest.fixture
def checkpoint(tmp_path, tiny_plans, pretraining_checkpoint):
    """Function ``(file="a.pth", seed=1, plans=None, **changes) -> path``."""

    def write(file: str = "a.pth", seed: int = 1, plans=None, **changes) -> str:
        torch.save(pretraining_checkpoint(plans or tiny_plans(), seed=seed) | changes, tmp_path / file)
        return str(tmp_path / file)

    return write


def refused(capsys, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 1
    return capsys.readouterr().err


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_all_parts_of_two_checkpoints(dataset, checkpoint, tmp_path, capsys):
    (dataset / "splits_final.json").write_text(json.dumps([{"train": NAMES[:2], "val": NAMES[2:]}]))
    fold = {"init_args": {"configuration": "3d_fullres", "fold": 0}}
    files = [checkpoint("a.pth", 1, **fold), checkpoint("b.pth", 2, **fold)]
    output = tmp_path / "out"
    command = ["inspect", *files, "-d", "801", "-o", str(output), "--names", "first,second", *SMALL]
    assert main([*command, "--point", "case_3", "6,8,8", "--neighbours", "2"]) == 0
    made = {f.name for f in output.iterdir()}
    parts = ("spectrum", "invariance", "similarity", "voxels", "neighbours")
    assert made == {*(f"{p}.png" for p in parts), "index.html", "results.json", "neighbours.csv"}
    assert "index.html" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["cases"] == ["case_3", "case_2", "case_4"] and results["unseen_cases"]
    for part in parts:
        assert list(results[part]) == ["first", "second", "scratch"]
    assert results["spectrum"]["first"] != results["spectrum"]["second"]
    assert 1 <= results["spectrum"]["scratch"]["effective_rank"] <= 20
    assert results["invariance"]["first"]["rotation"]["mean"][0] == pytest.approx(1, abs=1e-5)
    assert results["reference"] == {"case": "case_3", "voxel": [6, 8, 8], "what": "the given point"}
    with (output / "neighbours.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["network"], r["case"], r["rank"]) for r in rows} == {
        (n, c, str(k)) for n in ("first", "second", "scratch") for c in ("case_2", "case_4") for k in (1, 2)
    }
    assert {r["label"] for r in rows} <= {"background", "liver", "spleen"}
    assert all(float(r["z_mm"]) == pytest.approx(1.5 * float(r["z"]), abs=0.1) for r in rows)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5 and "validation cases" in page and "Outlined: liver" in page

    # Again: the same numbers, and what this run does not make is gone.
    assert main([*command, "--parts", "spectrum"]) == 0
    assert {f.name for f in output.iterdir()} == {"spectrum.png", "index.html", "results.json"}
    again = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert set(again["spectrum"]) == {"first", "second", "scratch"}
    assert main([*command, "--parts", "spectrum"]) == 0
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == again


def test_unlabelled_cases_and_an_encoder_alone(dataset, checkpoint, tmp_path, tiny_dataset_json):
    labels = {"background": 0, "body": 1}
    (dataset / "dataset.json").write_text(json.dumps(tiny_dataset_json() | {"labels": labels}))
    method = {"name": "VoCo", "config": {"view_shape": [8, 8, 8]}, "transfers": ["encoder"]}
    output = tmp_path / "out"
    arguments = [checkpoint(method=method), "-d", "801", "-o", str(output), "--no-scratch", "--parts", "voxels"]
    assert main(["inspect", *arguments, *SMALL, "--cases", "2"]) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["checkpoints"]["VoCo"]["voxels"] == "features of the encoder"
    assert list(results["voxels"]) == ["VoCo"] and len(results["cases"]) == 2 and not results["unseen_cases"]
    page = (output / "index.html").read_text(encoding="utf-8")
    assert "may have been trained on" in page and "octant of the body" in page


# ---- networks -------------------------------------------------------------------------------------------------------


def test_a_network_has_the_checkpoints_weights(tiny_plans, pretraining_checkpoint):
    saved = pretraining_checkpoint(tiny_plans())
    model = load_model(saved, "STC3D", "a.pth", (8, 8, 8), (16, 16, 16), CPU)
    other = scratch_model(saved, (8, 8, 8), (16, 16, 16), CPU, "auto", 0)
    same = scratch_model(saved, (8, 8, 8), (16, 16, 16), CPU, "auto", 0)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    weight = model.backbone.network.state_dict()[key]
    assert torch.equal(weight, saved["network_weights"][key])
    first, second = (m.backbone.network.state_dict()[key] for m in (other, same))
    assert torch.equal(first, second) and not torch.equal(first, weight)
    images = torch.randn(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([s.mean((2, 3, 4)) for s in model.backbone.network.encoder(images)], dim=1)
    torch.testing.assert_close(model.backbone.pooled(images), expected)
    assert [tuple(m.shape[2:]) for m in model.backbone.voxel_maps(images)] == [(2, 2, 2), (4, 4, 4), (8, 8, 8)]
    assert model.reads == "features of the bottleneck and decoder" and model.embedder.window == (16, 16, 16)


def test_the_methods_own_embedding(tiny_plans, tiny_network, pretraining_checkpoint):
    plans = tiny_plans()
    config = STC3DConfig(view_shape=(8, 8, 8), dense_dim=8, projector_hidden=8, projector_dim=4)
    method = STC3D(tiny_network(plans), config)
    state = {k: v for k, v in method.state_dict().items() if not k.startswith("network.")}
    saved = pretraining_checkpoint(plans) | {
        "network_weights": method.network.state_dict(),
        "method_state": state,
        "method": {"name": "STC3D", "config": config.to_dict(), "transfers": list(method.transfers)},
    }
    model = load_model(saved, "STC3D", "a.pth", (8, 8, 8), (16, 16, 16), CPU, embedding="head")
    volume = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    model.embedder.calibrate([volume], [(4, 4, 4)], 128)
    assert model.embedder(volume, (4, 4, 4)).shape == (8, 4, 4, 4)
    assert model.reads == "the method's own voxel embedding"
    stock = {"trainer_name": "STC3DFinetuneTrainer", "network_weights": method.network.state_dict()}
    stock["init_args"] = {key: saved[key] for key in ("plans", "configuration", "dataset_json")}
    with pytest.raises(ValueError, match="b.pth: expected a pretraining that contrasts voxels.*STC3DFinetuneTrainer"):
        load_model(stock, "stock", "b.pth", (8, 8, 8), (16, 16, 16), CPU, embedding="head")


def test_names_are_different():
    stc3d, stock = {"method": {"name": "STC3D"}}, {"trainer_name": "nnUNetTrainer"}
    assert model_names([stc3d, stock, stc3d], None) == ["STC3D 1", "nnUNetTrainer", "STC3D 2"]
    assert model_names([stc3d, stock], ["a", " b"]) == ["a", "b"]
    for names in (["a"], ["a", "a"], ["a", "scratch"], ["a", ""]):
        with pytest.raises(ValueError, match="expected 2 different names"):
            model_names([stc3d, stock], names)


# ---- cases ----------------------------------------------------------------------------------------------------------


def trained_on(dataset: str, fold, method: bool = True) -> dict:
    plans = {"dataset_name": dataset, "configurations": {"3d_fullres": {}}}
    checkpoint = {"plans": plans, "configuration": "3d_fullres", "init_args": {"fold": fold}}
    return checkpoint | ({"method": {"name": "STC3D"}} if method else {})


SPLITS = [{"train": NAMES[:3], "val": NAMES[3:]}, {"train": NAMES[2:], "val": NAMES[:2]}]


@pytest.mark.parametrize(
    ("checkpoints", "splits", "expected", "unseen", "statement"),
    [
        ([("Dataset801_A", 0)], SPLITS, NAMES[3:], True, "validation cases"),
        ([("Dataset802_B", 0)], SPLITS, NAMES, True, "trained on this dataset, by its name"),
        ([("Dataset801_A", 0), ("Dataset802_B", "all")], SPLITS, NAMES[3:], True, "validation cases"),
        ([("Dataset801_A", 0), ("Dataset801_A", 1)], SPLITS, NAMES, False, "fewer than two"),
        ([("Dataset801_A", "all")], SPLITS, NAMES, False, "on all cases of this dataset"),
        ([("Dataset801_A", 0)], None, NAMES, False, "cases that it does not name"),
        ([("Dataset801_A", 7)], SPLITS, NAMES, False, "cases that it does not name"),
        ([("Dataset801_A", 0, False)], SPLITS, NAMES[3:], False, "cannot be told"),
        ([("Dataset801_A", 0), ("Dataset802_B", 0, False)], SPLITS, NAMES[3:], False, "what it was pretrained on"),
    ],
)
def test_cases_that_were_not_trained_on_come_first(checkpoints, splits, expected, unseen, statement):
    chosen = choose_cases(NAMES, [trained_on(*c) for c in checkpoints], "Dataset801_A", splits, 12)
    assert (chosen.identifiers, chosen.unseen) == (expected, unseen) and statement in chosen.statement


def test_the_case_of_the_point_comes_first_and_the_limit_holds():
    chosen = choose_cases(NAMES, [trained_on("Dataset801_A", 0)], "Dataset801_A", SPLITS, 12, "case_1")
    assert chosen.identifiers == ["case_1", "case_3", "case_4"] and not chosen.unseen
    assert "case_1" in chosen.statement
    few = choose_cases(NAMES, [trained_on("Dataset802_B", 0)], "Dataset801_A", None, 3)
    assert few.identifiers == ["case_0", "case_2", "case_4"]


def test_the_reference_is_the_middle_of_the_largest_structure_or_of_the_body():
    body = np.zeros((4, 4, 4), dtype=bool)
    body[1:, 1:3, 1:3] = True
    guide = Guide((2.0, 2.0, 2.0), body)
    labels = np.zeros((8, 8, 8), dtype=np.int8)
    labels[0, 0, 0], labels[3:6, 2:5, 4:7] = 1, 2
    voxel, why = default_reference(guide, labels, {1: "liver", 2: "spleen"})
    assert voxel.tolist() == [4, 3, 5] and why == "the middle of spleen, its largest structure"
    voxel, why = default_reference(guide, labels * 0, {1: "liver"})
    assert voxel[0] == 4.5 and set(voxel[1:]) <= {2.5, 4.5} and why == "the middle of the body"


def test_the_size_of_a_cell_follows_the_cases():
    assert default_cell([(32, 100, 128), (40, 100, 100)], (2.0, 1.0, 1.0)) == 2
    assert default_cell([(16, 16, 16)], (2.0, 1.0, 1.0)) == 1


# ---- points and options ---------------------------------------------------------------------------------------------


def test_points_in_voxels_and_in_mm():
    spacing, shape = (2.0, 1.0, 0.5), (10, 10, 10)
    assert Point.parse("a", "1,2,3").voxel(spacing, shape).tolist() == [1, 2, 3]
    assert Point.parse("a", "(2, 2.5, 3)mm").voxel(spacing, shape).tolist() == [1, 2.5, 6]
    for text in ("1,2", "a,b,c", "1,2,3cm", "1,2,3,4", ".,1,2"):
        with pytest.raises(ValueError, match="expected a point as Z,Y,X in voxels"):
            Point.parse("a", text)
    with pytest.raises(ValueError, match=r"lies outside a, which goes from 0,0,0 to 18.0,9.0,4.5 mm"):
        Point.parse("a", "1,1,5mm").voxel(spacing, shape)
    with pytest.raises(ValueError, match="lies outside a"):
        Point.parse("a", "-1,1,5").voxel(spacing, shape)
    grid = ScanGrid((1, 2, 0), shape, (20, 10, 5), (4, 0, 2))
    assert Point.parse("a", "3, 5, 12scan").voxel(spacing, shape, grid).tolist() == [3.75, 3, 6.5]
    with pytest.raises(ValueError, match=r"outside the part of a .* 0.0,1.8,4.5 to 9.0,6.2,22.5 \(z,y,x of the scan"):
        Point.parse("a", "3,5,30scan").voxel(spacing, shape, grid)
    with pytest.raises(ValueError, match="lie in its scan is not known: its .pkl"):
        Point.parse("a", "3,5,12scan").voxel(spacing, shape)


def test_voxels_lie_in_the_scan_where_nnunet_took_them_from(tmp_path, tiny_plans, tiny_dataset_json):
    """Preprocessed by nnU-Net itself: transposed, cropped to what is not zero, resampled."""
    plans = tiny_plans()
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    plans["foreground_intensity_properties_per_channel"] = {"0": {}}
    plain = {"normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [False]}
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    for what, is_seg in (("data", False), ("seg", True)):
        plain[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        plain[f"resampling_fn_{what}_kwargs"] = {"is_seg": is_seg, **resampling}
    plans["configurations"]["3d_fullres"] |= {"spacing": [2.0, 1.0, 0.8], **plain}
    manager = PlansManager(plans)
    scan = np.zeros((1, 20, 30, 24), np.float32)
    scan[0, 3:18, 5:28, 2:22] = 1
    places = np.array([[8, 12, 9], [13, 20, 15]])
    grid = np.stack(np.meshgrid(*map(np.arange, scan.shape[1:]), indexing="ij"), axis=-1)
    for place in places:
        scan[0] += 20 * np.exp(-((grid - place) ** 2).sum(-1) / 8) * (scan[0] > 0)
    properties = {"spacing": [1.5, 1.0, 1.0]}
    data, _, kept = DefaultPreprocessor(verbose=False).run_case_npy(
        scan, None, properties, manager, manager.get_configuration("3d_fullres"), tiny_dataset_json()
    )
    assert data.shape[1:] != scan.shape[1:]
    with open(tmp_path / "case.pkl", "wb") as file:
        pickle.dump(kept, file)
    found = ScanGrid.read(tmp_path / "case.pkl", data.shape[1:], (1, 2, 0))
    for place in places:
        voxel = found.from_scan(place)
        np.testing.assert_allclose(found.to_scan(voxel), place, atol=1e-9)
        # The brightest voxel around is the one that shows the place.
        near = [slice(max(0, round(v) - 3), round(v) + 4) for v in voxel]
        peak = np.array(np.unravel_index(data[0][tuple(near)].argmax(), data[0][tuple(near)].shape))
        assert np.abs(peak + [s.start for s in near] - voxel).max() <= 0.51
    (tmp_path / "empty.pkl").touch()
    assert ScanGrid.read(tmp_path / "empty.pkl", (4, 4, 4), (0, 1, 2)) is None


def test_what_is_kept_beside_a_case_cannot_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "case.pkl").write_bytes(pickle.dumps({"bbox_used_for_cropping": Runs()}))
    assert ScanGrid.read(tmp_path / "case.pkl", (4, 4, 4), (0, 1, 2)) is None and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("spectra",)}, "parts must be some of spectrum, .*, got spectra"),
        ({"max_cases": 1}, "max cases must be at least 2, got 1"),
        ({"cell_mm": 0.0}, "must be positive, got 0.0 mm"),
        ({"pyramid": "both"}, "pyramid must be one of"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        InspectOptions(**options)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_computed(dataset, checkpoint, tmp_path, capsys, tiny_plans):
    there = ("-d", "801", "-o", str(tmp_path / "out"))
    file = checkpoint()
    assert "expected a case of Dataset801_Unlabelled, got case_9" in refused(
        capsys, file, *there, "--point", "case_9", "1,2,3"
    )
    assert "lies outside case_1" in refused(capsys, file, *there, "--point", "case_1", "1,2,30")
    assert "parts must be some of" in refused(capsys, file, *there, "--parts", "spectrum,umap")
    assert "otherPlans.json is not there, found nnUNetPlans" in refused(capsys, file, *there, "-p", "otherPlans")
    other = tiny_plans()
    other["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 1.0]
    message = refused(capsys, checkpoint("b.pth", plans=other), *there)
    assert "other plans (spacing (mm): [3.0, 1.0, 1.0] there, [1.5, 1.0, 1.0] here)" in message and "-p" in message
    if not torch.cuda.is_available():
        assert "has no cuda" in refused(capsys, file, *there, "--device", "cuda")
    method = {"name": "VoCo", "config": {}, "transfers": ["encoder"]}
    message = refused(capsys, checkpoint("c.pth", method=method), *there, "--pyramid", "decoder")
    assert "trained only the encoder" in message
    for name in NAMES[1:]:
        (dataset / "nnUNetPlans_3d_fullres" / f"{name}.b2nd").unlink()
    assert "at least 2 preprocessed cases of Dataset801_Unlabelled, got 1" in refused(capsys, file, *there)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(dataset, checkpoint, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "results.json").write_text('{"made_by": "something else"}')
    message = refused(capsys, checkpoint(), "-d", "801", "-o", str(folder))
    assert "no results of nnssl_stc3d inspect" in message and "--overwrite" in message
    assert (folder / "results.json").read_text(encoding="utf-8") == '{"made_by": "something else"}'


def test_only_what_an_inspection_lists_is_removed(tmp_path):
    folder = tmp_path / "out"
    listed = {"made_by": "nnssl_stc3d inspect", "files": ["old.png", "../keep.png", "notes.txt"]}
    write_folder(folder, {"results.json": json.dumps(listed).encode(), "old.png": b"1", "notes.txt": b"2"})
    (tmp_path / "keep.png").touch()
    (folder / "own.png").touch()
    check_folder(folder, overwrite=False)
    write_folder(folder, {"results.json": b"{}", "new.png": b"3"})
    assert {f.name for f in folder.iterdir()} == {"results.json", "new.png", "notes.txt", "own.png"}
    assert (tmp_path / "keep.png").exists() and [f.name for f in tmp_path.iterdir() if f.name[0] == "."] == []
    with pytest.raises(ValueError, match="got the file"):
        check_folder(folder / "own.png", overwrite=True)


def test_files_are_moved_within_the_folder_which_may_be_a_disk_of_its_own(tmp_path, monkeypatch):
    moves = []

    def move(source, target):
        moves.append((Path(source), Path(target)))
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", move)
    folder = tmp_path / "out"
    write_folder(folder, {"results.json": b"{}", "new.png": b"3"})
    assert [target.name for _, target in moves] == ["new.png", "results.json"]
    assert all(folder in source.parents for source, _ in moves)
    assert {f.name for f in folder.iterdir()} == {"results.json", "new.png"}
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    check_folder(folder, overwrite=True)
    with pytest.raises(ValueError, match="no right to write into"):
        check_folder(tmp_path / "other" / "deep", overwrite=False)


def test_the_figure_of_neighbours_counts_the_slices_of_the_scan(dataset, checkpoint, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **_: titles.append(text))
    shape = CaseDataset(dataset / "nnUNetPlans_3d_fullres", NAMES).shape("case_2")
    kept = {
        "shape_after_cropping_and_before_resampling": tuple(2 * n for n in shape),
        "bbox_used_for_cropping": [[10, 10 + 2 * n] for n in shape],
    }
    (dataset / "nnUNetPlans_3d_fullres" / "case_2.pkl").write_bytes(pickle.dumps(kept))
    (dataset / "nnUNetPlans_3d_fullres" / "case_4.pkl").unlink(missing_ok=True)
    command = ["inspect", checkpoint(), "-d", "801", "-o", str(tmp_path / "out"), "--parts", "neighbours", *SMALL]
    assert main([*command, "--point", "case_3", "6,8,8"]) == 0
    with (tmp_path / "out" / "neighbours.csv").open() as file:
        best = {row["case"]: row for row in csv.DictReader(file) if row["rank"] == "1" and row["network"] != "scratch"}
    assert float(best["case_2"]["z_scan"]) >= 10
    text = "\n".join(titles)
    assert f"case_2, slice {float(best['case_2']['z_scan']):.0f} of the scan" in text
    assert f"case_4, preprocessed slice {float(best['case_4']['z']):.0f}" in text


def test_slices_are_those_of_the_scan_whatever_the_order_of_axes(tmp_path):
    """Plans put the axis with the largest spacing first; sagittal slices then come first in the arrays."""
    scan = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)
    for forward in ([0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 1, 0]):
        array = np.ascontiguousarray(scan.transpose(forward))
        blosc2.asarray(array[None], urlpath=str(tmp_path / "case.b2nd"), mode="w")
        z, y, x = (forward.index(axis) for axis in range(3))
        rule = BodyRule("otsu", None, None, (1.0, 1.0, 1.0), z, "")
        cases = InspectedCases(CaseDataset(tmp_path, ["case"]), ["case"], rule, 1.0, axes=(z, y, x))
        np.testing.assert_array_equal(cases.axial(array, 3.2), scan[3])
        np.testing.assert_array_equal(cases.axial_image("case", 3.2), scan[3])
        point = np.array([2.0, 4.0, 5.0])
        assert cases.in_scan(point[forward]) == (2.0, 4.0, 5.0)
