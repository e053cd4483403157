"""Body masks: the outside is air, lungs are body, small and large volumes alike."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnssl_stc3d.prepare import body_mask as module
from nnssl_stc3d.prepare.body_mask import foreground_mask
from nnssl_stc3d.prepare.checks import VolumeError
from nnssl_stc3d.prepare.phantom import PhantomConfig, generate_case


def dice(a, b):
    return 2 * (a.astype(bool) & b.astype(bool)).sum() / (a.sum() + b.sum())


def torso(shape=(20, 60, 60)):
    """Body and lungs that are open at the ends, a table beside it; the image in HU and the truth."""
    _, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    lung = (abs(x) - 0.35) ** 2 / 0.04 + y**2 / 0.09 < 1
    table = (y > 0.85) & (abs(x) < 0.6)
    image = np.full(shape, -1000.0)
    image[body], image[lung], image[table] = 40, -850, 200
    rng = np.random.default_rng(0)
    return (image + rng.normal(0, 20, shape)).astype(np.int16), body


def test_ct_with_open_lungs_and_a_table():
    image, body = torso()
    mask = foreground_mask(image, "CT")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, body)


def test_mr_is_separated_by_its_own_values():
    image, body = torso()
    mr = np.where(image > -500, 300, 20) + np.random.default_rng(1).normal(0, 5, image.shape)
    np.testing.assert_array_equal(foreground_mask(mr.astype(np.float32), "MR"), body)


def test_ct_whose_values_are_no_hounsfield_units():
    image, body = torso()
    np.testing.assert_array_equal(foreground_mask(image + 1024, "CT"), body)


@pytest.mark.parametrize("shape", [(20, 60, 60), (33, 95, 101)])
def test_large_volumes_have_the_surface_of_the_full_resolution(monkeypatch, shape):
    image, body = torso(shape)
    exact = foreground_mask(image, "CT")
    monkeypatch.setattr(module, "_EXACT_VOXELS", 5000)
    mask = foreground_mask(image, "CT")
    assert dice(mask, exact) > 0.995 and dice(mask, body) > 0.995
    assert mask[ndimage.binary_erosion(body, iterations=8)].all()


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.int16, -(2**15), 2**15 - 1), (np.float32, -3.4e38, 3.4e38)])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_cells_are_the_means_of_blocks(dtype, low, high, step):
    image = np.random.default_rng(0).uniform(low, high, (3, 13, 14)).astype(dtype)
    image[:, :4, :4] = high
    factors = min(step, 3), step, step
    nz, ny, nx = (n // f for n, f in zip(image.shape, factors))
    whole = image[: nz * factors[0], : ny * step, : nx * step].astype(np.float64)
    expected = whole.reshape(nz, factors[0], ny, step, nx, step).mean((1, 3, 5))
    means = module._shrunk(image, step)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, expected, rtol=1e-6, atol=1e-6 * high)


def test_neighbours_of_cells():
    mask = np.random.default_rng(0).random((6, 7, 8)) > 0.9
    for where, combine in ((mask, np.logical_or), (~mask, np.logical_and)):
        filtered = ndimage.maximum_filter if combine is np.logical_or else ndimage.minimum_filter
        np.testing.assert_array_equal(module._combined(where, combine), filtered(where, 3, mode="nearest"))


def test_phantom():
    case = generate_case(1, PhantomConfig())
    assert dice(foreground_mask(case.image, "CT"), case.body) > 0.97


def test_a_crop_without_air_is_all_body():
    image = np.random.default_rng(0).normal(60, 20, (10, 12, 14)).astype(np.int16)
    assert foreground_mask(image, "CT").all() and foreground_mask(image, "MR").all()


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [(np.nan, "not-finite", "NaN or infinite"), (7.0, "constant", "Every voxel of the image is 7")],
)
def test_useless_images(value, code, message):
    with pytest.raises(VolumeError, match=message) as error:
        foreground_mask(np.full((4, 4, 4), value))
    assert error.value.problem.code == code
