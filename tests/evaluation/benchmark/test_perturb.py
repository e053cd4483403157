"""Perturbed cases: what is changed by how much, and that image and label map stay together."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.evaluation.benchmark.perturb import LEVELS, STRENGTHS, perturb_case, perturbed_kinds, write_perturbed

SPACING = (0.8, 1.0, 2.0)


def as_image(values, spacing=SPACING):
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetOrigin((5.0, -20.0, 100.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    return image


@pytest.fixture
def case():
    """A ball whose value is 100 in a background of 20 with some texture, and its label map."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 40, 44)), indexing="ij"), axis=-1)
    centre, spacing = np.array([7.0, 28.0, 15.0]), np.array(SPACING[::-1])
    inside = (((grid - centre) * spacing) ** 2).sum(axis=-1) < 5.0**2
    values = np.where(inside, 100.0, 20.0) + np.random.default_rng(0).normal(0, 2, inside.shape)
    return as_image(values.astype(np.int16)), as_image(inside.astype(np.uint8))


def perturbed(case, kind, level, name="case"):
    images, label = perturb_case([case[0]], case[1], kind, level, name)
    for image in (images[0], label):
        assert image.GetSize() == case[0].GetSize() and image.GetSpacing() == pytest.approx(SPACING)
        assert image.GetDirection() == case[0].GetDirection() and image.GetOrigin() == case[0].GetOrigin()
    assert images[0].GetPixelID() == sitk.sitkFloat32
    return sitk.GetArrayFromImage(images[0]), sitk.GetArrayFromImage(label)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_a_higher_level_changes_more_and_a_name_fixes_chance(case, kind):
    original, truth = (sitk.GetArrayFromImage(image).astype(float) for image in case)
    change = [np.abs(perturbed(case, kind, level)[0] - original).mean() for level in LEVELS]
    assert 0 < change[0] < change[1] < change[2]
    again = perturbed(case, kind, "high")
    np.testing.assert_array_equal(again[0], perturbed(case, kind, "high")[0])
    if kind in ("noise", "bias", "rotation"):
        assert not np.array_equal(again[0], perturbed(case, kind, "high", "another")[0])
    if kind != "rotation":
        np.testing.assert_array_equal(again[1], truth)


def test_noise_has_the_spread_that_is_named(case):
    original = sitk.GetArrayFromImage(case[0]).astype(float)
    low, high = np.percentile(original, [1, 99])
    spread = original[(original >= low) & (original <= high)].std()
    noise = perturbed(case, "noise", "medium")[0] - original
    assert noise.std() == pytest.approx(0.25 * spread, rel=0.03) and abs(noise.mean()) < 0.02 * spread


def test_bias_is_smooth_positive_and_within_its_range(case):
    original = sitk.GetArrayFromImage(case[0]).astype(float)
    ratio = np.log(perturbed(case, "bias", "medium")[0] / original)
    assert np.abs(ratio).max() == pytest.approx(0.4, rel=1e-3)
    assert np.abs(np.diff(ratio, axis=1)).max() < 0.05


def test_a_turned_ball_lies_where_the_turn_takes_its_centre(case):
    """About the centre of the image, by the angle of the level; image and label map alike."""
    values, label = perturbed(case, "rotation", "high")
    truth = sitk.GetArrayFromImage(case[1])

    def place(mask):
        index = np.argwhere(mask).mean(axis=0)[::-1]
        return np.array(case[0].TransformContinuousIndexToPhysicalPoint(index.tolist()))

    centre = np.array(case[0].TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in case[0].GetSize()]))
    before, after = place(truth) - centre, place(label) - centre
    assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before), abs=0.3)
    # A turn by an angle moves a point by at most twice its distance times the sine of half of it.
    assert 1 < np.linalg.norm(after - before) <= 2 * np.linalg.norm(before) * np.sin(np.deg2rad(10)) + 0.3
    assert np.linalg.norm(place(values > 60) - place(label)) < 0.2
    assert int(label.sum()) == pytest.approx(int(truth.sum()), rel=0.1)


def test_a_lower_resolution_keeps_a_ramp_and_takes_fine_detail(case):
    ramp = np.broadcast_to(np.arange(44, dtype=np.float32), (20, 40, 44)).copy()
    (coarse,), _ = perturb_case([as_image(ramp)], case[1], "resolution", "high", "ramp")
    np.testing.assert_allclose(sitk.GetArrayFromImage(coarse)[:, :, 6:-6], ramp[:, :, 6:-6], atol=0.15)
    checker = np.indices((20, 40, 44)).sum(axis=0) % 2 * 100.0
    (coarse,), _ = perturb_case([as_image(checker.astype(np.float32))], case[1], "resolution", "high", "checker")
    assert sitk.GetArrayFromImage(coarse)[4:-4, 4:-4, 4:-4].std() < 10


@pytest.mark.parametrize("name", ["x", "x [1]", "a?*"])
def test_files_of_a_folder(tmp_path, case, name):
    source, target = ((tmp_path / side / "images", tmp_path / side / "labels") for side in ("a", "b"))
    for folder in source:
        folder.mkdir(parents=True)
    for channel in (0, 1):
        sitk.WriteImage(case[0], str(source[0] / f"{name}_{channel:04d}.nii.gz"))
    sitk.WriteImage(case[1], str(source[1] / f"{name}.nii.gz"))
    write_perturbed(source, target, ".nii.gz", "noise", "low")
    assert sorted(f.name for f in target[0].iterdir()) == [f"{name}_0000.nii.gz", f"{name}_0001.nii.gz"]
    assert [f.name for f in target[1].iterdir()] == [f"{name}.nii.gz"]
    first, second = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted(target[0].iterdir()))
    assert not np.array_equal(first, second)
    (target[0] / f"{name}_0000.nii.gz").unlink()
    write_perturbed(source, target, ".nii.gz", "noise", "low")
    assert not (target[0] / f"{name}_0000.nii.gz").exists(), "what is complete is not written again"


def test_kinds():
    assert perturbed_kinds(["noise", "noise"]) == [("noise", level) for level in LEVELS]
    assert len(perturbed_kinds(list(STRENGTHS))) == 15
    with pytest.raises(ValueError, match="noise, blur, resolution, bias, rotation, got fog"):
        perturbed_kinds(["noise", "fog"])


@pytest.mark.parametrize("perturbation", list(STRENGTHS))
def test_few_slices_can_be_perturbed(perturbation):
    """SimpleITK's smoothing needs four voxels along an axis."""
    rng = np.random.default_rng(0)
    thin = sitk.GetImageFromArray(rng.normal(size=(2, 12, 14)).astype(np.float32))
    (image,), _ = perturb_case([thin], sitk.Cast(thin, sitk.sitkUInt8), perturbation, "high", "thin")
    values = sitk.GetArrayFromImage(image)
    assert values.shape == (2, 12, 14) and np.isfinite(values).all()
    assert not np.allclose(values, sitk.GetArrayFromImage(thin))


def test_formats_without_a_spacing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="files have a spacing, such as .nii.gz, .* got .tif"):
        write_perturbed((tmp_path, tmp_path), (tmp_path / "a", tmp_path / "b"), ".tif", "noise", "low")
    assert not (tmp_path / "a").exists()
