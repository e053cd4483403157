"""DICOM series: written slice by slice, read back at the same physical points, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare.dicom import SeriesVolume, is_dicom, read_slice, stack
from nnssl_stc3d.prepare.find import find_volumes

SPACING, ORIGIN = (0.7, 0.8, 2.5), (-10.5, 20.25, -300.0)


def only(folder):
    (found,) = find_volumes(folder).volumes
    return found


def codes(folder):
    return [p.code for f in find_volumes(folder).volumes for p in f.problems]


@pytest.mark.parametrize("turned", [False, True])
def test_points_of_a_series(tmp_path, dicom_series, ct, rotated, corners, turned):
    array = ct()
    direction = rotated if turned else (1, 0, 0, 0, 1, 0, 0, 0, 1)
    dicom_series(tmp_path / "scan", array, SPACING, ORIGIN, direction)
    found = only(tmp_path)
    assert found.problems == () and isinstance(found.volume, SeriesVolume)
    image = found.volume.read()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    ends = [(0, n - 1) for n in array.shape[::-1]]
    index = np.array([(i, j, k) for i in ends[0] for j in ends[1] for k in ends[2]])
    expected = np.array(ORIGIN) + (index * np.array(SPACING)) @ np.array(direction).reshape(3, 3).T
    np.testing.assert_allclose(corners(image), expected, atol=1e-3)
    header = found.header
    assert header.size == array.shape[::-1] and header.modality == "CT"
    np.testing.assert_allclose(header.spacing, SPACING, atol=1e-4)
    np.testing.assert_allclose(header.origin, ORIGIN, atol=1e-4)
    np.testing.assert_allclose(header.direction, image.GetDirection(), atol=1e-5)


def test_slices_from_head_to_feet_are_put_in_order(tmp_path, dicom_series, ct):
    array = ct()
    flipped = (1, 0, 0, 0, 1, 0, 0, 0, -1)
    dicom_series(tmp_path, array, SPACING, ORIGIN, flipped)
    found = only(tmp_path)
    image = found.volume.read()
    # DICOM's rows and columns make a right-handed system: the last slice comes first.
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array[::-1])
    np.testing.assert_allclose(image.GetOrigin(), (*ORIGIN[:2], ORIGIN[2] - 11 * SPACING[2]), atol=1e-4)
    np.testing.assert_allclose(found.header.origin, image.GetOrigin(), atol=1e-4)


def test_files_without_ending(tmp_path, dicom_series, ct):
    for file in dicom_series(tmp_path, ct()):
        file.rename(file.with_suffix(".1234" if file.name < "s004" else ""))
    assert only(tmp_path).header.size == (20, 16, 12)
    (tmp_path / "README").write_text("no DICOM")
    assert not is_dicom(tmp_path / "README") and not is_dicom(tmp_path / "gone")


def test_two_series_in_a_folder(tmp_path, dicom_series, ct):
    dicom_series(tmp_path / "p", ct(0), series="1.2.3.1", prefix="a")
    dicom_series(tmp_path / "p", ct(1), series="1.2.3.2", prefix="b")
    found = find_volumes(tmp_path).volumes
    assert [f.volume.id for f in found] == [f"{tmp_path / 'p'}#1.2.3.1", f"{tmp_path / 'p'}#1.2.3.2"]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found[1].volume.read()), ct(1))


def test_missing_slices(tmp_path, dicom_series, ct):
    dicom_series(tmp_path, ct())
    for k in (4, 5):
        next(tmp_path.glob(f"*_{k:03d}.dcm")).unlink()
    (problem,) = only(tmp_path).problems
    assert (
        problem.code == "missing-slices" and "7.5 mm between" in problem.message and "2 are missing" in problem.message
    )
    assert "_003.dcm and" in problem.message


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [
        (SPACING, 0, []),
        # A fifth of the distance between slices.
        (SPACING, 0.5, ["missing-slices"]),
        ((0.7, 0.9, 2.5), 0, ["mixed-orientation"]),
    ],
)
def test_both_halves_of_a_series_fit_each_other(tmp_path, dicom_series, ct, spacing, offset, expected):
    dicom_series(tmp_path, ct()[:6], SPACING, ORIGIN, prefix="a")
    dicom_series(tmp_path, ct()[6:], spacing, (*ORIGIN[:2], ORIGIN[2] + 6 * SPACING[2] + offset), prefix="b")
    assert codes(tmp_path) == expected


def test_duplicate_slices(tmp_path, dicom_series, ct):
    files = dicom_series(tmp_path, ct())
    (tmp_path / "copy.dcm").write_bytes(files[3].read_bytes())
    (problem,) = only(tmp_path).problems
    assert problem.code == "duplicate-slices" and "copy.dcm" in problem.message


def test_a_series_over_time(tmp_path, dicom_series, ct):
    dicom_series(tmp_path, ct(0), prefix="a")
    files = dicom_series(tmp_path / "later", ct(1))
    for k, file in enumerate(files):
        image = sitk.ReadImage(str(file))
        image.SetMetaData("0008|0018", f"1.2.9.{k}")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / f"b{k:03d}.dcm"))
        writer.Execute(image)
        file.unlink()
    (problem,) = only(tmp_path).problems
    assert problem.code == "4d" and "2 slices at each of 12 positions" in problem.message


def test_mixed_orientations(tmp_path, dicom_series, ct):
    dicom_series(tmp_path, ct(0)[:8], prefix="axial")
    dicom_series(tmp_path, ct(1)[:8], direction=(1, 0, 0, 0, 0, 1, 0, -1, 0), prefix="coronal")
    (problem,) = only(tmp_path).problems
    assert problem.code == "mixed-orientation" and "2 orientations" in problem.message


def test_slices_that_are_turned_a_little(tmp_path, dicom_series, ct):
    angle = np.radians(2)
    turned = (np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0)
    slices = [read_slice(file) for file in dicom_series(tmp_path, ct())]
    slices[1::2] = [replace(one, axes=turned) for one in slices[1::2]]
    _, header, (problem,) = stack(slices, alone=True)
    assert header is None and problem.code == "mixed-orientation"


def test_rows_and_columns_that_are_not_perpendicular(tmp_path, dicom_series, ct):
    angle = np.radians(5)
    skewed = (1, 0, 0, np.sin(angle), np.cos(angle), 0)
    slices = [replace(read_slice(file), axes=skewed) for file in dicom_series(tmp_path, ct())]
    _, header, (problem,) = stack(slices, alone=True)
    assert header is None and problem.code == "not-orthonormal" and "cosine 0.087" in problem.message


def test_mixed_sizes(tmp_path, dicom_series, ct):
    dicom_series(tmp_path, ct(0)[:8], prefix="a")
    dicom_series(tmp_path, ct(1, (8, 10, 10)), origin=(0, 0, 0), prefix="b")
    assert codes(tmp_path) == ["mixed-orientation"]


def test_localiser_single_image_and_colour(tmp_path, dicom_series, ct):
    dicom_series(tmp_path / "scout", ct()[:2], series="1.1", **{"0008_0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    dicom_series(tmp_path / "single", ct()[:1], series="1.2")
    dicom_series(tmp_path / "colour", np.zeros((4, 9, 9, 3), np.uint8), series="1.3")
    found = {f.volume.id.rpartition("/")[2]: f.problems[0].code for f in find_volumes(tmp_path).volumes}
    assert found == {"scout": "localiser", "single": "2d", "colour": "colour"}


@pytest.mark.parametrize("angle", [3, 15])
def test_a_tilted_gantry(tmp_path, dicom_series, ct, angle):
    for k, plane in enumerate(ct()):
        # Each slice is moved by its height times the tangent of the angle.
        shifted = (ORIGIN[0], ORIGIN[1] + 2.5 * k * np.tan(np.radians(angle)), ORIGIN[2] + 2.5 * k)
        dicom_series(tmp_path, plane[None], SPACING, shifted, prefix=f"k{k:02d}_")
    (problem,) = only(tmp_path).problems
    assert problem.code == "tilted" and f"{angle}.0 degrees" in problem.message


@pytest.mark.parametrize("value", [b"0\\0", b"-1\\1", b"a\\b", b""])
def test_pixel_spacing_that_is_not_positive(tmp_path, dicom_series, ct, value):
    # GDCM would take 1 mm instead.
    tag = b"\x28\x00\x30\x00"
    for file in dicom_series(tmp_path, ct()):
        before, rest = file.read_bytes().split(tag, 1)
        length = int.from_bytes(rest[:4], "little")
        file.write_bytes(before + tag + rest[:4] + value.ljust(length)[:length] + rest[4 + length :])
    (problem,) = only(tmp_path).problems
    assert problem.code == "spacing" and "0028,0030" in problem.message


def test_slices_without_position(tmp_path, dicom_series, ct):
    slices = [replace(read_slice(file), position=None) for file in dicom_series(tmp_path, ct())]
    _, header, (problem,) = stack(slices, alone=True)
    assert header is None and problem.code == "unreadable" and "0020,0032" in problem.message


def test_files_that_are_no_images(tmp_path, dicom_series, ct):
    files = dicom_series(tmp_path, ct())
    structure = b"\0" * 128 + b"DICM" + b"\x02\x00\x02\x00UI\x1e\x00" + b"1.2.840.10008.5.1.4.1.1.481.3\0"
    (tmp_path / "rtstruct.dcm").write_bytes(structure)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "damaged.dcm").write_bytes(files[0].read_bytes()[:200])
    search = find_volumes(tmp_path)
    assert read_slice(tmp_path / "rtstruct.dcm") is None
    assert len(search.volumes) == 1 and search.volumes[0].problems == ()
    assert search.ignored == {".dcm": 1, "no ending": 1}
    assert [(p.code, p.where) for p in search.problems] == [("unreadable", str(tmp_path / "damaged.dcm"))]
