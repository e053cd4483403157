"""Body masks of raw images, as pseudo-labels where there are no labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnssl_stc3d.data.body import BODY_HU, BodyRule, body_mask, otsu_threshold
from nnssl_stc3d.prepare.checks import VolumeError

# Above this number of voxels, components are found on a coarser grid and the surface is drawn on the fine one.
_EXACT_VOXELS = 2**20


def foreground_mask(image: NDArray[Any], modality: str = "", axial: int = 0) -> NDArray[np.uint8]:
    """Mask of the body, without the air around it.

    nnU-Net cannot preprocess a dataset without labels, and takes its intensity statistics inside them. The mask is the
    largest connected region above -500 HU in CT that has air, and above Otsu's threshold elsewhere, with air inside
    it filled (`nnssl_stc3d.data.body.body_mask`). In large images, regions are found on a coarser grid; the surface
    is that of the full resolution.

    Args:
        image: (Z, Y, X) voxels.
        modality: "CT" for Hounsfield units; anything else for other values.
        axial: axis along which the scan cuts through the body, at whose ends lungs may be open.

    Returns:
        (Z, Y, X) uint8 mask with at least one voxel; all ones where no air can be told from the body.

    Raises:
        VolumeError: the image holds a single value or numbers that are not finite. It is a ValueError.
    """
    low, high = float(image.min()), float(image.max())
    if not np.isfinite([low, high]).all():
        count = int((~np.isfinite(image)).sum())
        raise VolumeError("not-finite", f"The image has {count} voxels that are NaN or infinite. Replace them.")
    if low == high:
        raise VolumeError("constant", f"Every voxel of the image is {low:g}: there is nothing to learn from.")
    step = int(np.ceil((image.size / _EXACT_VOXELS) ** (1 / 3)))
    coarse = image if step == 1 else _shrunk(image, step)
    # Values that are no Hounsfield units have no air at -1000.
    fixed = modality == "CT" and low < BODY_HU
    threshold = BODY_HU if fixed else otsu_threshold(coarse)
    body, _ = body_mask(coarse, BodyRule("threshold" if fixed else "otsu", 0, threshold, (1.0, 1.0, 1.0), axial, ""))
    if step == 1 or body.all():
        return np.ones(image.shape, np.uint8) if body.all() else body.astype(np.uint8)
    return _at_full_resolution(image, body, threshold, step)


def _shrunk(image: NDArray[Any], step: int) -> NDArray[np.float32]:
    """Means of blocks of `step` voxels along each axis; what does not fill a block at the end is left out."""
    factors = [min(step, n) for n in image.shape]
    means = np.empty([n // factor for n, factor in zip(image.shape, factors)], np.float32)
    # Sums of a block are exact in 32 bits for small numbers only.
    exact = np.float32 if image.dtype.itemsize <= 2 else np.float64
    for z, cells in enumerate(means):
        # A layer stays in the caches: its planes are added, then their rows, then, transposed, their columns.
        layer = image[z * factors[0] : (z + 1) * factors[0]].sum(0, dtype=exact)
        for factor, n in zip(factors[1:], means.shape[1:]):
            layer = np.add.reduce([layer[i : n * factor : factor] for i in range(factor)]).T
        cells[...] = layer / np.prod(factors)
    return means


def _combined(mask: NDArray[np.bool_], combine: np.ufunc) -> NDArray[np.bool_]:
    """Each cell combined with its 26 neighbours: np.logical_or dilates, np.logical_and erodes."""
    result = mask.copy()
    for axis in range(3):
        before, after = np.moveaxis(result.copy(), axis, 0), np.moveaxis(result, axis, 0)
        combine(after[1:], before[:-1], out=after[1:])
        combine(after[:-1], before[1:], out=after[:-1])
    return result


def _at_full_resolution(image: NDArray[Any], body: NDArray[np.bool_], threshold: float, step: int) -> NDArray[np.uint8]:
    """Draws the surface of a coarse mask: cells beside it are body where they exceed the threshold."""
    inside = _combined(body, np.logical_and)
    beside = _combined(body, np.logical_or) & ~inside
    cells = [np.minimum(np.arange(n) // min(step, n), c - 1) for n, c in zip(image.shape, body.shape)]
    if image.dtype.kind in "iu":
        # The same for whole numbers, and they need not be converted.
        threshold = int(np.floor(threshold))
    mask = np.empty(image.shape, bool)
    last = -1
    for z, cell in enumerate(cells[0]):
        if cell != last:
            fill, edge = (where[cell].take(cells[2], 1).take(cells[1], 0) for where in (inside, beside))
            last = cell
        np.greater(image[z], threshold, out=mask[z])
        mask[z] &= edge
        mask[z] |= fill
    return mask.view(np.uint8)
