"""CC-CCII: volumes from folders of slices, classes of cases, and what can be wrong with slices."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare.checks import VolumeError
from nnssl_stc3d.prepare.corpora.case_labels import read_case_labels, write_case_labels
from nnssl_stc3d.prepare.corpora.collect import collect, corpus_target
from nnssl_stc3d.prepare.corpora.corpus import CorpusOptions
from nnssl_stc3d.prepare.corpora.table import CORPORA
from nnssl_stc3d.prepare.slices import SliceStack
from nnssl_stc3d.prepare.writer import write_dataset

SPACING = (5.0, 0.75, 0.7)


def windowed(seed: int, shape=(10, 16, 20)) -> np.ndarray:
    """A bright disc in black, 8 bits."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return (np.where(x**2 + y**2 < 0.6, 150, 0) + rng.integers(0, 40, shape)).astype(np.uint8)


def put(folder, array, ending=".png", first=0, colour=False):
    folder.mkdir(parents=True, exist_ok=True)
    for number, plane in enumerate(array, first):
        plane = np.repeat(plane[..., None], 3, -1) if colour else plane
        sitk.WriteImage(sitk.GetImageFromArray(plane, isVector=colour), str(folder / f"{number:04d}{ending}"))
    return folder


def stack(folder):
    return SliceStack.of(folder.iterdir(), SPACING)


def find(folder, spacing=SPACING):
    return collect(CORPORA["cc-ccii"], folder, CorpusOptions("", spacing))


@pytest.fixture
def corpus(tmp_path):
    put(tmp_path / "c" / "NCP" / "2" / "1084", windowed(0))
    put(tmp_path / "c" / "NCP" / "2" / "1085", windowed(1), ".jpg", first=7)
    put(tmp_path / "c" / "CP" / "7" / "3140", windowed(2), colour=True)
    put(tmp_path / "c" / "Normal" / "1500" / "12", windowed(3))
    (tmp_path / "c" / "lesions_slices.csv").write_text("imgpath\nNCP/2/1084/0003.png\n")
    return tmp_path / "c"


@pytest.mark.parametrize("colour", [False, True])
def test_voxels_and_geometry(tmp_path, corners, colour):
    array = windowed(0)
    volume = stack(put(tmp_path / "s", array, colour=colour))
    image, header = volume.read(), volume.header()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert image.GetSpacing() == header.spacing == (0.7, 0.75, 5.0) and image.GetSize() == header.size == (20, 16, 10)
    np.testing.assert_allclose(corners(image)[-1], (19 * 0.7, 15 * 0.75, 9 * 5.0))
    assert volume.link_ending is None and len(volume.files) == 10


def test_slices_are_ordered_by_number_not_by_name(tmp_path):
    array = windowed(0, (12, 8, 9))
    for number, plane in enumerate(array):
        put(tmp_path / "s", plane[None], first=0)
        (tmp_path / "s" / "0000.png").rename(tmp_path / "s" / f"{number}.png")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(stack(tmp_path / "s").read()), array)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("gap", "missing-slices", "no slice between 0003.png and 0005.png"),
        ("twice", "duplicate-slices", "0004.jpg and 0004.png"),
        ("size", "mixed-orientation", "2 sizes: 20 x 16 .0000.png., 9 x 8 .0010.png."),
        ("damaged", "unreadable", "0004.png"),
        ("single", "2d", "single slice"),
    ],
)
def test_slices_that_make_no_volume(tmp_path, change, code, message):
    folder = put(tmp_path / "s", windowed(0))
    if change == "gap":
        (folder / "0004.png").unlink()
    elif change == "twice":
        put(folder, windowed(1)[:1], ".jpg", first=4)
    elif change == "size":
        put(folder, windowed(1, (1, 8, 9)), first=10)
    elif change == "damaged":
        (folder / "0004.png").write_bytes(b"nothing")
    else:
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()
    with pytest.raises(VolumeError, match=message) as error:
        stack(folder).header()
    assert error.value.problem.code == code


def test_every_second_number_is_no_gap(tmp_path):
    folder = put(tmp_path / "s", windowed(0))
    for file in sorted(folder.iterdir())[1::2]:
        file.unlink()
    assert stack(folder).header().size == (20, 16, 5)


def test_colour(tmp_path):
    folder = put(tmp_path / "s", windowed(0))
    coloured = np.zeros((16, 20, 3), np.uint8)
    coloured[4, 4] = (255, 0, 0)
    sitk.WriteImage(sitk.GetImageFromArray(coloured, isVector=True), str(folder / "0004.png"))
    with pytest.raises(VolumeError, match="is a coloured image") as error:
        stack(folder).read()
    assert error.value.problem.code == "colour"


def test_cases_classes_and_patients(corpus, raw):
    found = find(corpus)
    assert [c.case.name for c in found.cases] == ["CP_7_3140", "NCP_2_1084", "NCP_2_1085", "Normal_1500_12"]
    assert [p for c in found.cases for p in c.problems] == []
    target = corpus_target(CORPORA["cc-ccii"], raw / "Dataset801_X", "", False)
    write_dataset([c.case for c in found.cases[:3]], target)
    image = sitk.ReadImage(str(target.folder / "imagesTr" / "NCP_2_1084_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), windowed(0))
    np.testing.assert_allclose(image.GetSpacing(), (0.7, 0.75, 5.0), rtol=1e-6)
    assert target.channels[0].nnunet_name == "windowed CT"
    file = write_case_labels(target.folder, found.case_labels)
    assert file.read_text(encoding="utf-8").splitlines() == [
        "case,label,patient", "CP_7_3140,CP,7", "NCP_2_1084,NCP,2", "NCP_2_1085,NCP,2"
    ]  # fmt: skip
    # Another run that sees other cases keeps what was there.
    write_dataset([c.case for c in found.cases[3:]], target)
    write_case_labels(target.folder, {"Normal_1500_12": ("Normal", "1500")})
    assert len(read_case_labels(file)) == 4 and read_case_labels(file)["Normal_1500_12"] == ("Normal", "1500")
    file.write_text("case,class\na,b\n")
    with pytest.raises(ValueError, match="Expected the columns case, label, patient"):
        read_case_labels(file)


def test_the_published_number_of_slices(corpus):
    table = corpus / "unzip_filenames.csv"
    table.write_text("zip_file,label,patient_id,scan_id,n_slice\nNCP-1.zip,NCP,2,1084,10\nNCP-1.zip,NCP,2,1085,12\n")
    (problem,) = [p for c in find(corpus).cases for p in c.problems]
    assert problem.code == "missing-slices" and "has 10 slices, unzip_filenames.csv says 12" in problem.message
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns label, patient_id"):
        find(corpus)


def test_a_spacing_is_needed(corpus):
    with pytest.raises(ValueError, match="no voxel size.*--spacing Z Y X"):
        find(corpus, None)
