"""Copies of test cases that are noisier, blurrier, coarser, unevenly bright or turned (STC3D Fig. 3 shows noise)."""

from __future__ import annotations

import glob
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

# nnU-Net reads these without what SimpleITK would need to turn them in mm.
_WITHOUT_SPACING = (".tif", ".tiff", ".png", ".bmp")
# SimpleITK smooths along axes of as many voxels at least.
_SMOOTHED = 4
# Perturbation -> strength at each level. The paper names three levels of noise and says no more about them.
STRENGTHS = {
    "noise": (0.1, 0.25, 0.5),  # standard deviation, in that of the image between its 1st and 99th percentile
    "blur": (0.5, 1.0, 2.0),  # standard deviation of a Gaussian, in voxels
    "resolution": (1.5, 2.0, 3.0),  # voxels are so many times as large, then interpolated back
    "bias": (0.2, 0.4, 0.8),  # brightness varies smoothly by exp(-x) to exp(x)
    "rotation": (5.0, 10.0, 20.0),  # degrees about a random axis
}
LEVELS = ("low", "medium", "high")


def perturbed_kinds(perturbations: Sequence[str]) -> list[tuple[str, str]]:
    """Every level of some perturbations.

    Raises:
        ValueError: an unknown one.
    """
    unknown = [name for name in perturbations if name not in STRENGTHS]
    if unknown:
        raise ValueError(f"expected perturbations of {', '.join(STRENGTHS)}, got {', '.join(unknown)}")
    return [(name, level) for name in dict.fromkeys(perturbations) for level in LEVELS]


def perturb_case(
    images: Sequence[sitk.Image], label: sitk.Image, perturbation: str, level: str, name: str
) -> tuple[list[sitk.Image], sitk.Image]:
    """Perturbs the channels of a case; turning changes the label map, too.

    Args:
        images: channels on one grid.
        label: reference label map.
        perturbation: of :data:`STRENGTHS`.
        level: of :data:`LEVELS`.
        name: of the case; with perturbation and level it fixes what is random.

    Returns:
        Channels as float32 and the label map, on the grid they had.
    """
    strength = STRENGTHS[perturbation][LEVELS.index(level)]
    rng = np.random.default_rng(zlib.crc32(f"{name} {perturbation} {level}".encode()))
    images = [sitk.Cast(image, sitk.sitkFloat32) for image in images]
    if perturbation == "noise":
        return [_add_noise(image, strength, rng) for image in images], label
    if perturbation == "blur":
        return [_smooth(i, [strength * s for s in i.GetSpacing()]) for i in images], label
    if perturbation == "resolution":
        return [_coarser(image, strength) for image in images], label
    if perturbation == "bias":
        field = _smooth_field(images[0], rng)
        return [_like(sitk.GetArrayFromImage(i) * np.exp(strength * field), i) for i in images], label
    turn = _rotation(images[0], strength, rng)
    turned = [sitk.Resample(i, turn, sitk.sitkLinear, float(sitk.GetArrayViewFromImage(i).min())) for i in images]
    return turned, sitk.Resample(label, turn, sitk.sitkNearestNeighbor, 0)


def write_perturbed(
    source: tuple[Path, Path], target: tuple[Path, Path], ending: str, perturbation: str, level: str
) -> None:
    """Perturbs all cases of a folder. What is there in whole stays.

    Args:
        source: folders of images and of label maps.
        target: the same to write to.
        ending: of nnU-Net's files.
        perturbation: of :data:`STRENGTHS`.
        level: of :data:`LEVELS`.

    Raises:
        ValueError: a format without a spacing.
    """
    if ending.lower() in _WITHOUT_SPACING:
        raise ValueError(
            f"--robustness needs images whose files have a spacing, such as .nii.gz, .nrrd or .mha, got {ending}"
        )
    for folder in target:
        folder.mkdir(parents=True, exist_ok=True)
    for truth in sorted(source[1].glob(f"*{ending}")):
        name = truth.name[: -len(ending)]
        files = sorted(source[0].glob(f"{glob.escape(name)}_[0-9][0-9][0-9][0-9]{ending}"))
        # The label map is written last: with it the case is complete.
        if (target[1] / truth.name).is_file():
            continue
        channels = [sitk.ReadImage(str(file)) for file in files]
        images, label = perturb_case(channels, sitk.ReadImage(str(truth)), perturbation, level, name)
        for file, image in zip(files, images, strict=True):
            sitk.WriteImage(image, str(target[0] / file.name), useCompression=True)
        part = target[1] / f"part_{truth.name}"
        sitk.WriteImage(label, str(part), useCompression=True)
        part.replace(target[1] / truth.name)


def _add_noise(image: sitk.Image, strength: float, rng: np.random.Generator) -> sitk.Image:
    values = sitk.GetArrayFromImage(image)
    low, high = np.percentile(values, [1, 99])
    spread = float(values[(values >= low) & (values <= high)].std())
    return _like(values + rng.normal(0.0, strength * spread, values.shape), image)


def _smooth(image: sitk.Image, sigma: Sequence[float]) -> sitk.Image:
    """Gaussian smoothing by standard deviations in mm, (x, y, z); axes of three voxels or fewer stay."""
    for axis, (size, deviation) in enumerate(zip(image.GetSize(), sigma, strict=True)):
        if size >= _SMOOTHED:
            image = sitk.RecursiveGaussian(image, deviation, direction=axis)
    return image


def _coarser(image: sitk.Image, factor: float) -> sitk.Image:
    """Interpolates an image from a grid of larger voxels that covers the same box."""
    size = [max(1, round(n / factor)) for n in image.GetSize()]
    spacing = [s * n / m for s, n, m in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
    # Both grids share their outer faces, so the centre of the first voxel moves.
    first = image.TransformContinuousIndexToPhysicalPoint([n / m / 2 - 0.5 for n, m in zip(image.GetSize(), size)])
    sigma = [max(0.5 * (new - old), 1e-3 * old) for new, old in zip(spacing, image.GetSpacing(), strict=True)]
    smooth = _smooth(image, sigma)
    coarse = sitk.Resample(smooth, size, sitk.Transform(), sitk.sitkLinear, first, spacing, image.GetDirection(), 0.0)
    nearest = sitk.ResampleImageFilter()
    nearest.SetReferenceImage(image)
    nearest.SetInterpolator(sitk.sitkLinear)
    # Voxels beyond the centres of the outermost coarse ones continue them.
    nearest.UseNearestNeighborExtrapolatorOn()
    return nearest.Execute(coarse)


def _smooth_field(image: sitk.Image, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random quadratic in -1 to 1 over the image, shape (Z, Y, X)."""
    size = image.GetSize()[::-1]
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij", sparse=True)
    terms = [*axes, *(a * b for i, a in enumerate(axes) for b in axes[i:])]
    field = np.zeros(size)
    for term in terms:
        field += rng.normal() * term
    field -= field.mean()
    highest = np.abs(field).max()
    return field / highest if highest > 0 else field


def _rotation(image: sitk.Image, degrees: float, rng: np.random.Generator) -> sitk.VersorTransform:
    """Turns about the centre of an image."""
    axis = rng.normal(size=3)
    turn = sitk.VersorTransform((axis / np.linalg.norm(axis)).tolist(), float(np.deg2rad(degrees)))
    turn.SetCenter(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    return turn


def _like(values: NDArray[np.floating], image: sitk.Image) -> sitk.Image:
    result = sitk.GetImageFromArray(values.astype(np.float32))
    result.CopyInformation(image)
    return result
