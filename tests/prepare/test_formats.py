"""Single files: the same physical points in every format, and what readers would pass over in silence."""

from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.prepare.case import Header
from nnssl_stc3d.prepare.checks import VolumeError, header_problems
from nnssl_stc3d.prepare.formats import FileVolume, NumpyVolume, ending_of, stem_of
from nnssl_stc3d.prepare.voxels import read_volume

SPACING, ORIGIN = (0.75, 1.5, 2.5), (-12.5, 40.25, -300.0)


def analytic(size, direction):
    """Corner points from the definition: origin + direction * (spacing * index)."""
    ends = [(0, n - 1) for n in size]
    index = np.array([(i, j, k) for i in ends[0] for j in ends[1] for k in ends[2]])
    return np.array(ORIGIN) + (index * np.array(SPACING)) @ np.array(direction).reshape(3, 3).T


def of_header(header):
    image = sitk.Image(header.size, sitk.sitkUInt8)
    image.SetSpacing(header.spacing)
    image.SetOrigin(header.origin)
    image.SetDirection(header.direction)
    return image


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_points_and_voxels_of_every_format(tmp_path, save, ct, rotated, corners, ending):
    array = ct()
    volume = FileVolume(save(tmp_path / f"scan{ending}", array, SPACING, ORIGIN, rotated))
    header, (image, _) = volume.header(), read_volume(volume)
    expected = analytic(array.shape[::-1], rotated)
    np.testing.assert_allclose(corners(image), expected, atol=1e-3)
    np.testing.assert_allclose(corners(of_header(header)), expected, atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)
    assert header_problems(header, "CT", "scan") == []
    linked = {".nii": ".nii", ".nii.gz": ".nii.gz", ".nrrd": ".nrrd", ".mha": ".mha"}
    assert volume.link_ending == linked.get(ending)
    assert len(volume.files) == (2 if ending in (".mhd", ".nhdr") else 1)


@pytest.mark.parametrize("ending", [".nrrd.gz", ".mha.gz"])
def test_formats_that_were_gzipped_afterwards(tmp_path, save, ct, rotated, corners, ending):
    array = ct()
    plain = save(tmp_path / f"scan{ending[:-3]}", array, SPACING, ORIGIN, rotated)
    packed = plain.with_name(f"{plain.name}.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    volume = FileVolume(packed)
    assert volume.header().size == array.shape[::-1] and volume.link_ending is None
    np.testing.assert_allclose(corners(read_volume(volume)[0]), analytic(array.shape[::-1], rotated), atol=1e-3)
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(VolumeError, match="not a complete gzip file"):
        volume.header()


def test_endings():
    from pathlib import Path

    assert ending_of(Path("a.b.NII.GZ")) == ".nii.gz" and stem_of(Path("a.b.NII.GZ")) == "a.b"
    assert ending_of(Path("x.dcm")) is None and ending_of(Path("notes.txt")) is None


@pytest.mark.parametrize("cut", [3, 200, 0.5])
def test_a_truncated_gzip_is_seen_in_its_header_already(tmp_path, save, ct, cut):
    path = save(tmp_path / "scan.nii.gz", ct())
    content = path.read_bytes()
    path.write_bytes(content[: -cut if cut > 1 else len(content) // 2])
    with pytest.raises(VolumeError) as error:
        FileVolume(path).header()
    assert error.value.problem.code == "truncated" and "scan.nii.gz" in str(error.value)


def test_a_damaged_gzip_is_seen_when_it_is_read(tmp_path, save, ct):
    # ITK reads such a file without a word.
    path = save(tmp_path / "scan.nii.gz", ct())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="not a complete gzip file"):
        FileVolume(path).read()


def test_a_gzip_of_several_members_is_whole(tmp_path, save, ct):
    array = ct()
    plain = save(tmp_path / "scan.nii", array).read_bytes()
    path = tmp_path / "parts.nii.gz"
    path.write_bytes(gzip.compress(plain[:3000]) + gzip.compress(plain[3000:]) + gzip.compress(b""))
    volume = FileVolume(path)
    assert volume.header().size == array.shape[::-1]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.read()), array)


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "truncated"), (b"hello", "unreadable"), (b"\x1f\x8b\x08\0", "truncated")]
)
def test_files_that_are_nothing(tmp_path, content, code):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    with pytest.raises(VolumeError) as error:
        FileVolume(path).header()
    assert error.value.problem.code == code


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".mhd"])
def test_files_that_are_cut_short(tmp_path, save, ct, ending):
    path = save(tmp_path / f"scan{ending}", ct())
    cut = path.with_suffix(".raw") if ending == ".mhd" else path
    cut.write_bytes(cut.read_bytes()[: -cut.stat().st_size // 2])
    with pytest.raises(VolumeError, match="scan"):
        FileVolume(path).header()
        FileVolume(path).read()


def test_a_header_without_its_voxels(tmp_path, save, ct):
    path = save(tmp_path / "scan.mhd", ct())
    (tmp_path / "scan.raw").unlink()
    with pytest.raises(VolumeError, match="scan.raw as the file of its voxels, which is missing"):
        FileVolume(path).header()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mhd"])
def test_spacing_that_is_not_positive(tmp_path, save, ct, ending, value):
    path = save(tmp_path / f"scan{'.nii' if ending == '.nii.gz' else ending}", ct())
    if ending == ".mhd":
        path.write_text(
            path.read_text(encoding="utf-8").replace("ElementSpacing = 1 1.5 2", f"ElementSpacing = 1 {value} 2")
        )
    else:
        # ITK makes a zero in the header a one.
        content = bytearray(path.read_bytes())
        struct.pack_into("<f", content, 76 + 2 * 4, value)
        path = tmp_path / f"scan{ending}"
        path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    codes = []
    try:
        codes = [p.code for p in header_problems(FileVolume(path).header(), "", "scan")]
    except VolumeError as error:
        codes = [error.problem.code]
    assert codes == ["spacing"] or (np.isnan(value) and ending == ".mhd" and codes in (["spacing"], ["unreadable"]))


def test_axes_that_are_not_perpendicular(tmp_path, save, ct):
    affine = np.diag([1.0, 2, 3, 1])
    affine[0, 1] = 0.8
    image = nibabel.Nifti1Image(ct().astype(np.float32), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "sheared.nii.gz")
    with pytest.raises(VolumeError) as error:
        FileVolume(tmp_path / "sheared.nii.gz").header()
    assert error.value.problem.code == "not-orthonormal"
    path = save(tmp_path / "scan.mhd", ct())
    path.write_text(
        path.read_text(encoding="utf-8").replace("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 0.5 1 0")
    )
    assert [p.code for p in header_problems(FileVolume(path).header(), "", "scan")] == ["not-orthonormal"]


@pytest.mark.parametrize("ending", [".npy", ".npz", ".npy.gz"])
def test_numpy_files(tmp_path, ct, ending):
    array = ct()
    path = tmp_path / f"scan{ending}"
    if ending == ".npz":
        np.savez(path, image=array, spacing=np.array([2.5, 1.5, 0.75]))
    else:
        with (gzip.open if ending == ".npy.gz" else open)(path, "wb") as file:
            np.save(file, array)
    volume = NumpyVolume(path, None if ending == ".npz" else (2.5, 1.5, 0.75))
    header, image = volume.header(), volume.read()
    assert header.size == image.GetSize() == array.shape[::-1]
    assert header.spacing == image.GetSpacing() == (0.75, 1.5, 2.5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)


def test_numpy_files_that_cannot_be_used(tmp_path, ct):
    np.save(tmp_path / "plain.npy", ct())
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=ct(), b=ct())
    np.savez(tmp_path / "flat.npz", a=ct(), spacing=np.array([1.0, 1.0]))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    for name, code in (
        ("plain.npy", "no-spacing"), ("objects.npy", "unreadable"), ("two.npz", "unreadable"),
        ("flat.npz", "spacing"), ("broken.npz", "unreadable"),
    ):  # fmt: skip
        with pytest.raises(VolumeError) as error:
            NumpyVolume(tmp_path / name).header()
        assert error.value.problem.code == code, name
    with pytest.raises(VolumeError):
        NumpyVolume(tmp_path / "objects.npy", (1.0, 1.0, 1.0)).read()


def test_a_fourth_axis_of_one_volume_is_dropped(tmp_path, save, ct):
    array = ct()
    path = tmp_path / "scan.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(array[None], isVector=False), str(path))
    volume = FileVolume(path)
    assert volume.header().size == (*array.shape[::-1], 1)
    assert header_problems(volume.header(), "", "scan") == []
    image, usable = read_volume(volume)
    assert not usable and Header.of(image) == volume.header().spatial()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array)


@pytest.mark.parametrize(
    ("array", "vector", "code"),
    [
        (np.zeros((5, 6), np.float32), False, "2d"),
        (np.zeros((1, 5, 6), np.float32), False, "2d"),
        (np.zeros((3, 9, 9, 9), np.float32), False, "4d"),
        (np.zeros((9, 9, 9, 3), np.uint8), True, "colour"),
        (np.zeros((5, 9, 9), np.float32), False, "few-slices"),
    ],
)
def test_images_that_are_no_volumes(tmp_path, array, vector, code):
    path = tmp_path / "scan.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    volume = FileVolume(path)
    assert [p.code for p in header_problems(volume.header(), "", "scan")] == [code]
    if code in ("4d", "colour"):
        with pytest.raises(VolumeError):
            read_volume(volume)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_seen_though_itk_makes_it_zero(tmp_path, save, ct, ending, dtype):
    array = ct().astype(dtype)
    array[2, 3, 4], array[5, 6, 7] = np.nan, -np.inf
    volume = FileVolume(save(tmp_path / f"scan{ending}", array))
    if ending == ".nrrd":
        assert np.isnan(sitk.GetArrayFromImage(volume.read())).sum() == 1
        return
    with pytest.raises(VolumeError, match="2 voxels that are NaN or infinite"):
        volume.read()
