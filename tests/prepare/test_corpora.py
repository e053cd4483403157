"""Importers of public corpora, on small replicas of their folders: cases, labels, parts, splits and geometry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare.corpora.collect import collect, corpus_target
from nnssl_stc3d.prepare.corpora.corpus import CorpusOptions
from nnssl_stc3d.prepare.corpora.msd import msd_commands
from nnssl_stc3d.prepare.corpora.table import CORPORA, MSD
from nnssl_stc3d.prepare.writer import write_dataset

ORIGIN, SPACING = (5.0, -6.0, 7.0), (0.8, 0.9, 2.5)


@pytest.fixture
def put(tmp_path, save, ct, rotated):
    """Function ``(*paths, kind="ct", values=(1, 2))``: writes files below tmp_path / "corpus", each another content."""
    count = [0]

    def write(*paths, kind="ct", values=(1, 2)):
        for path in paths:
            count[0] += 1
            array = ct(count[0])
            if kind == "label":
                array = np.zeros(array.shape, np.uint8 if max(values) < 256 else np.int16)
                for place, value in enumerate(values):
                    array[3, 4, 2 * place : 2 * place + 2] = value
            elif kind == "mr":
                array = np.random.default_rng(count[0]).gamma(2, 100, array.shape).astype(np.int16)
            save(tmp_path / "corpus" / path, array, SPACING, ORIGIN, rotated)
        return tmp_path / "corpus"

    return write


def find(name, folder, modality=None, spacing=None, **options):
    corpus = CORPORA[name]
    return collect(corpus, folder, CorpusOptions(modality or corpus.modalities[0], spacing), **options)


def parts(found):
    """Names of the cases in imagesTr, and of those in imagesTs."""
    return (
        [c.case.name for c in found.cases if not c.case.test],
        [c.case.name for c in found.cases if c.case.test],
    )


def problems(found):
    return [p.code for c in found.cases for p in c.problems]


def write(name, found, raw, modality=None, unlabelled=False):
    corpus = CORPORA[name]
    target = corpus_target(corpus, raw / "Dataset801_X", modality or corpus.modalities[0], unlabelled)
    write_dataset([c.case for c in found.cases if not c.problems], target)
    return target.folder


def array(path: Path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def btcv(put):
    put(*(f"RawData/Training/img/img{i:04d}.nii.gz" for i in (1, 2)))
    put(*(f"RawData/Training/label/label{i:04d}.nii.gz" for i in (1, 2)), kind="label", values=(1, 13))
    # Registered pairs and archives of macOS lie beside them.
    put("Reg-Training-Training/img/0001/img0001-0002.nii.gz", "__MACOSX/RawData/Training/img/img0001.nii.gz")
    return put("RawData/Testing/img/img0061.nii.gz")


def test_btcv(put, raw, corners):
    found = find("btcv", btcv(put))
    assert parts(found) == (["img0001", "img0002"], ["img0061"])
    assert found.parts == {"training": 2, "test": 1} and found.splits is None and problems(found) == []
    folder = write("btcv", found, raw)
    source = found.cases[0].case
    for written, file in (("imagesTr/img0001_0000", source.channels[0]), ("labelsTr/img0001", source.label)):
        assert (folder / f"{written}.nii.gz").resolve() == file.files[0]
    assert sorted(f.name for f in (folder / "imagesTs").iterdir()) == ["img0061_0000.nii.gz"]
    assert not (folder / "labelsTs").exists()
    description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"]["left adrenal gland"] == 13 and description["numTraining"] == 2
    assert "Synapse" in description["reference"] and description["channel_names"] == {"0": "CT"}


def test_btcv_from_the_single_files_on_synapse(put):
    put("averaged-training-images/DET0000101_avg.nii.gz", "averaged-testing-images/DET0003501_avg.nii.gz")
    folder = put("averaged-training-labels/DET0000101_avg_seg.nii.gz", kind="label")
    found = find("btcv", folder)
    assert parts(found) == (["DET0000101"], ["DET0003501"]) and found.cases[0].case.label is not None


def test_the_folder_may_be_given_at_any_level(put):
    folder = btcv(put)
    assert parts(find("btcv", folder / "RawData" / "Training")) == (["img0001", "img0002"], [])


def test_without_labels_held_out_parts_are_left_out(put, raw):
    folder = btcv(put)
    found = find("btcv", folder, unlabelled=True)
    assert parts(found) == (["img0001", "img0002"], []) and found.left_out == ("test",)
    assert all(c.case.label is None for c in found.cases)
    everything = find("btcv", folder, unlabelled=True, held_out=True)
    assert parts(everything) == (["img0001", "img0002", "img0061"], []) and everything.left_out == ()
    written = write("btcv", found, raw, unlabelled=True)
    assert json.loads((written / "dataset.json").read_text(encoding="utf-8"))["labels"] == {"background": 0, "body": 1}
    assert set(np.unique(array(written / "labelsTr" / "img0001.nii.gz"))) == {0, 1}


def test_images_without_segmentation_and_the_other_way_round(put):
    folder = btcv(put)
    (folder / "RawData/Training/label/label0002.nii.gz").unlink()
    (folder / "RawData/Training/img/img0001.nii.gz").unlink()
    found = find("btcv", folder)
    assert {c.case.name: [str(p) for p in c.problems] for c in found.cases if c.problems} == {
        "img0001": [f"{folder}/RawData/Training/label/label0001.nii.gz: is a segmentation without its image"],
        "img0002": [f"{folder}/RawData/Training/img/img0002.nii.gz: has no segmentation"],
    }
    assert problems(find("btcv", folder, unlabelled=True)) == []


def test_segmentations_of_another_size_and_damaged_ones(put, save, ct):
    folder = btcv(put)
    save(folder / "RawData/Training/label/label0001.nii.gz", np.zeros((5, 16, 20), np.uint8))
    label = folder / "RawData/Training/label/label0002.nii.gz"
    label.write_bytes(label.read_bytes()[:-30])
    found = find("btcv", folder)
    assert problems(found) == ["label", "truncated"]
    assert "size 20 x 16 x 5 instead of 20 x 16 x 12" in str(found.cases[0].problems[0])


def test_values_that_the_corpus_does_not_have(put, raw):
    put("Training/img/img0001.nii.gz")
    folder = put("Training/label/label0001.nii.gz", kind="label", values=(1, 14))
    with pytest.raises(ValueError, match="unexpected values \\[14\\]"):
        write("btcv", find("btcv", folder), raw)


def test_flare22(put):
    base = "Training/FLARE22_LabeledCase50"
    put(f"{base}/images/FLARE22_Tr_0001_0000.nii.gz", "Tuning/images/FLARETs_0001_0000.nii.gz")
    put("Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz", "Testing/FLARETs_0001_0000.nii.gz")
    put("Training/FLARE22_UnlabeledCase1001-2000/Case_01001_0000.nii.gz")
    folder = put(f"{base}/labels/FLARE22_Tr_0001.nii.gz", kind="label", values=(1, 13))
    found = find("flare22", folder)
    assert parts(found) == (["FLARE22_Tr_0001"], ["FLARETs_0001", "test_FLARETs_0001"])
    assert found.left_out == ("unlabelled",) and found.splits is None
    assert parts(find("flare22", folder, unlabelled=True))[0] == ["Case_00001", "Case_01001", "FLARE22_Tr_0001"]
    put("Tuning/labels/FLARETs_0001.nii.gz", kind="label")
    found = find("flare22", folder)
    assert parts(found) == (["FLARETs_0001", "FLARE22_Tr_0001"][::-1], ["test_FLARETs_0001"])
    assert found.splits == [{"train": ["FLARE22_Tr_0001"], "val": ["FLARETs_0001"]}]


@pytest.fixture
def amos(put):
    put("amos22/imagesTr/amos_0001.nii.gz", "amos22/imagesVa/amos_0008.nii.gz", "amos22/imagesTs/amos_0500.nii.gz")
    put("amos22/imagesTr/amos_0507.nii.gz", "amos22/imagesTs/amos_0600.nii.gz", kind="mr")
    put("amos22/labelsTr/amos_0001.nii.gz", "amos22/labelsVa/amos_0008.nii.gz", kind="label", values=(1, 15))
    folder = put("amos22/labelsTr/amos_0507.nii.gz", kind="label")
    (folder / "amos22" / "dataset.json").write_text("{}")
    return folder


def test_amos(amos, raw):
    found = find("amos", amos)
    assert parts(found) == (["amos_0001", "amos_0008"], ["amos_0500"])
    assert found.splits == [{"train": ["amos_0001"], "val": ["amos_0008"]}]
    assert parts(find("amos", amos, "MR")) == (["amos_0507"], ["amos_0600"])
    assert parts(find("amos", amos, unlabelled=True)) == (["amos_0001"], [])
    description = json.loads((write("amos", found, raw) / "dataset.json").read_text(encoding="utf-8"))
    assert description["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert len(description["labels"]) == 16


def test_lits(put):
    put("Training Batch 1/volume-0.nii", "Training Batch 2/volume-28.nii", "LITS-Challenge-Test-Data/test-volume-0.nii")
    folder = put("Training Batch 1/segmentation-0.nii", "Training Batch 2/segmentation-28.nii", kind="label")
    found = find("lits", folder)
    assert parts(found) == (["volume-0", "volume-28"], ["test-volume-0"]) and problems(found) == []
    assert [c.case.label.files[0].name for c in found.cases[1:]] == ["segmentation-0.nii", "segmentation-28.nii"]


@pytest.mark.parametrize("label", ["segmentation", "aggregated_MAJ_seg"])
def test_kits(put, raw, label):
    put("kits/data/case_00000/imaging.nii.gz", "kits/data/case_00210/imaging.nii.gz")
    folder = put(f"kits/data/case_00000/{label}.nii.gz", kind="label", values=(1, 2, 3))
    if label != "segmentation":
        put("kits/data/case_00000/aggregated_OR_seg.nii.gz", kind="label")
    found = find("kits", folder)
    assert parts(found) == (["case_00000"], ["case_00210"])
    assert found.cases[0].case.label.files[0].name == f"{label}.nii.gz"
    description = json.loads((write("kits", found, raw) / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"]["kidney"] == [1, 2, 3] and description["regions_class_order"] == [1, 3, 2]


def test_mmwhs(put, raw, corners):
    put("ct_train/ct_train_1001_image.nii.gz", "ct_test/ct_test_2001_image.nii.gz")
    put("mr_train/mr_train_1010_image.nii.gz", kind="mr")
    put("ct_train/ct_train_1001_label.nii.gz", kind="label", values=(205, 420, 500, 550, 600, 820, 850))
    folder = put("mr_train/mr_train_1010_label.nii.gz", kind="label", values=(205, 421))
    found = find("mmwhs", folder)
    assert parts(found) == (["ct_train_1001"], ["ct_test_2001"])
    written = write("mmwhs", found, raw)
    label = written / "labelsTr" / "ct_train_1001.nii.gz"
    assert array(label)[3, 4].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 0, 0, 0, 0, 0, 0]
    image = sitk.ReadImage(str(folder / "ct_train" / "ct_train_1001_image.nii.gz"))
    np.testing.assert_allclose(corners(sitk.ReadImage(str(label))), corners(image), atol=1e-4)
    found = find("mmwhs", folder, "MR")
    assert parts(found) == (["mr_train_1010"], [])
    (raw / "mr").mkdir()
    label = write("mmwhs", found, raw / "mr", "MR") / "labelsTr" / "mr_train_1010.nii.gz"
    assert array(label)[3, 4, :5].tolist() == [1, 1, 2, 2, 0]


def test_brats21(put, raw):
    for case in ("BraTS2021_00000", "BraTS2021_00001", "BraTS2021_00002"):
        put(*(f"{case}/{case}_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2")), kind="mr")
    for case in ("BraTS2021_00000", "BraTS2021_00002"):
        folder = put(f"{case}/{case}_seg.nii.gz", kind="label", values=(1, 2, 4))
    (folder / "BraTS2021_00002" / "BraTS2021_00002_t1ce.nii.gz").unlink()
    found = find("brats21", folder)
    assert parts(found) == (["BraTS2021_00000", "BraTS2021_00002"], ["BraTS2021_00001"])
    assert problems(found) == ["channels"] and "lacks t1ce" in str(found.cases[2].problems[0])
    assert [v.files[0].name[16:] for v in found.cases[0].case.channels] == [
        "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz"
    ]  # fmt: skip
    written = write("brats21", found, raw)
    assert array(written / "labelsTr" / "BraTS2021_00000.nii.gz")[3, 4, :7].tolist() == [2, 2, 1, 1, 3, 3, 0]
    description = json.loads((written / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
    assert description["regions_class_order"] == [1, 2, 3]


def test_luna16(put, raw, corners):
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.10000000000000000000000000000"
    folder = put(f"subset0/{uid}0.mhd", f"subset0/{uid}1.mhd", f"subset2/{uid}2.mhd")
    put(f"seg-lungs-LUNA16/{uid}0.mhd", kind="label")
    (folder / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    found = find("luna16", folder)
    assert parts(found) == ([f"{uid}0", f"{uid}1", f"{uid}2"], []) and problems(found) == []
    assert len(found.splits) == 3 and found.splits[0] == {"train": [f"{uid}2"], "val": [f"{uid}0", f"{uid}1"]}
    assert found.splits[1]["val"] == []
    written = write("luna16", found, raw)
    image = sitk.ReadImage(str(written / "imagesTr" / f"{uid}2_0000.nii.gz"))
    source = sitk.ReadImage(str(folder / "subset2" / f"{uid}2.mhd"))
    np.testing.assert_allclose(corners(image), corners(source), atol=1e-3)


def test_tcia_covid19(tmp_path, put, dicom_series, ct):
    base = tmp_path / "corpus" / "manifest-1" / "CT-Images-in-COVID-19"
    dicom_series(base / "volume-covid19-A-0001" / "01-01-2020-NA-1" / "2.000000-NA-1", ct(1), series="1.2.1")
    dicom_series(base / "volume-covid19-A-0002" / "01-01-2020-NA-2" / "3.000000-NA-2", ct(2), series="1.2.2")
    dicom_series(tmp_path / "corpus" / "other" / "x", ct(3), series="1.2.3")
    found = find("tcia-covid19", tmp_path / "corpus")
    assert parts(found)[0] == [
        "volume-covid19-A-0001_01-01-2020-NA-1_2.000000-NA-1", "volume-covid19-A-0002_01-01-2020-NA-2_3.000000-NA-2"
    ]  # fmt: skip
    assert problems(found) == []
    damaged = base / "volume-covid19-A-0001" / "damaged.dcm"
    damaged.write_bytes(b"nothing")
    (problem,) = [p for c in find("tcia-covid19", tmp_path / "corpus").cases for p in c.problems]
    assert (problem.code, problem.where) == ("unreadable", str(damaged))
    put("nifti/volume-covid19-A-0003.nii.gz", "nifti/volume-covid19-A-0004_ct.nii.gz")
    assert parts(find("tcia-covid19", tmp_path / "corpus"))[0] == ["volume-covid19-A-0003", "volume-covid19-A-0004"]


@pytest.mark.parametrize("name", CORPORA)
def test_a_folder_that_is_something_else(tmp_path, put, name):
    folder = put("patients/anna.nii.gz", "patients/ben.nii.gz")
    with pytest.raises(ValueError) as error:
        find(name, folder, spacing=(1.0, 1.0, 1.0))
    message = str(error.value)
    assert CORPORA[name].layout[0] in message and "Found: patients/" in message and "2 .nii.gz" in message
    assert CORPORA[name].page in message and "nnssl_stc3d prepare" in message
    with pytest.raises(ValueError, match="is not a folder"):
        find(name, tmp_path / "gone")


def test_a_corpus_that_is_there_twice_and_one_without_training_cases(put):
    folder = put("a/Training/img/img0001.nii.gz", "b/Training/img/img0001.nii.gz", "c/case_00210/imaging.nii.gz")
    with pytest.raises(ValueError, match="0001 is there twice: .*/a/.* and .*/b/"):
        find("btcv", folder)
    with pytest.raises(ValueError, match="no segmentation"):
        find("kits", folder / "c")
    with pytest.raises(ValueError, match="only what KiTS .* keeps .* \\(1 test\\).*--with-held-out"):
        find("kits", folder / "c", unlabelled=True)


@pytest.mark.parametrize("name", CORPORA)
def test_the_table_is_complete(name):
    corpus = CORPORA[name]
    assert corpus.page.startswith("http") and corpus.licence and corpus.layout
    if corpus.labels is not None:
        values = {v for value in corpus.labels.values() for v in (value if isinstance(value, list) else [value])}
        assert set(corpus.label_values.values()) == values


def test_msd(tmp_path):
    task = tmp_path / "Task01_BrainTumour"
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
    (task / "dataset.json").write_text('{"modality": {"0": "FLAIR", "1": "T1w"}}')
    assert msd_commands(task, 801, "Brain", False) == [
        f"nnUNetv2_convert_MSD_dataset -i {task} -overwrite_id 801"
    ]  # fmt: skip
    assert msd_commands(task, 801, "Brain", True)[1] == (
        'nnssl_stc3d prepare -i "$nnUNet_raw/Dataset001_BrainTumour/imagesTr" -d 801 -n Brain --modality MR '
        "--channels FLAIR T1w"
    )
    with pytest.raises(ValueError, match="is not named after a task.*Its folders Task01_BrainTumour are tasks"):
        msd_commands(tmp_path, 801, "Brain", False)
    (task / "dataset.json").unlink()
    with pytest.raises(ValueError, match="it lacks dataset.json"):
        msd_commands(task, 801, "Brain", False)


@pytest.mark.parametrize("name", [*CORPORA, MSD])
def test_every_corpus_is_in_the_documentation(repository, name):
    page = (repository / "documentation" / "corpora.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in page and f"nnssl_stc3d import {name} " in page
