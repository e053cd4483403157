"""Invariance curves of networks for which they are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl_stc3d.evaluation.inspection.curves import invariance_figure
from nnssl_stc3d.evaluation.inspection.invariance import (
    STRENGTHS,
    case_similarities,
    invariance_views,
    summarise,
)
from nnssl_stc3d.evaluation.inspection.views import embed_views, random_views, standardised
from nnssl_stc3d.views.geometry import bounding_half_extent, is_axis_aligned
from nnssl_stc3d.views.guide import Guide

CPU = torch.device("cpu")
VIEW = (8, 8, 8)
SPACING = (2.0, 1.0, 1.0)
SHAPE = (40, 36, 44)
PER_REGION = 2 + sum(len(s) for s in STRENGTHS.values())


def coordinates(shape=SHAPE) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))


def mean_place(views: torch.Tensor) -> torch.Tensor:
    """A network that returns where its view lies."""
    return views.mean((2, 3, 4))


def views_of(shape=SHAPE, in_plane=False, regions=3, view=VIEW):
    return invariance_views(shape, view, SPACING, in_plane, regions, np.random.default_rng(0))


@pytest.mark.parametrize(("shape", "in_plane"), [(SHAPE, False), (SHAPE, True), ((17, 18, 30), False)])
def test_all_views_lie_inside_the_volume(shape, in_plane):
    specs, scale = views_of(shape, in_plane)
    assert specs.center.shape == (1, 3 * PER_REGION, 3)
    assert scale == (1 if shape == SHAPE else pytest.approx(min(shape[0] / 16, 18 / (8 * np.sqrt(6)), 1)))
    half = bounding_half_extent(specs.matrix, VIEW)
    assert (specs.center - half >= -0.5 - 1e-6).all()
    assert (specs.center + half <= torch.tensor(shape) - 0.5 + 1e-6).all()


def test_turning_and_scaling_about_the_centre_do_not_move_a_view():
    """On an image of coordinates, a view's mean is its centre, which only translations and random crops change."""
    specs, _ = views_of()
    rows = embed_views(mean_place, coordinates(), specs, VIEW, CPU)
    np.testing.assert_allclose(rows, specs.center[0].numpy(), atol=1e-4)
    found = case_similarities(rows)
    np.testing.assert_allclose(found["rotation"], 1, atol=1e-6)
    np.testing.assert_allclose(found["scaling"], 1, atol=1e-6)


def test_the_curve_of_a_network_that_returns_coordinates_is_known():
    specs, _ = views_of()
    found = case_similarities(embed_views(mean_place, coordinates(), specs, VIEW, CPU))
    first = 2 + len(STRENGTHS["rotation"])
    by_region = specs.center[0].numpy().reshape(3, PER_REGION, 3)
    shifts = by_region[:, first : first + len(STRENGTHS["translation"])] - by_region[:, :1]
    # One axis each, by the stated share of the view's 8 voxels.
    np.testing.assert_allclose(np.abs(shifts).sum(-1), np.tile(np.array(STRENGTHS["translation"]) * 8, (3, 1)))
    assert (np.count_nonzero(shifts, axis=-1) <= 1).all()
    plain = by_region[:, 0]
    expected = []
    for index in range(len(STRENGTHS["translation"])):
        moved = plain + shifts[:, index]
        cosines = (plain * moved).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(moved, axis=1)
        expected.append(cosines.mean())
    np.testing.assert_allclose(found["translation"], expected, atol=1e-5)
    assert found["translation"][0] == pytest.approx(1) and found["translation"][-1] < 0.9999


def test_rotations_are_rigid_in_mm_and_in_plane_where_they_have_to_be():
    specs, _ = views_of()
    turned = specs.matrix[0, 2 + len(STRENGTHS["rotation"]) - 1].numpy()
    mm = np.diag(SPACING) @ turned @ np.diag(1 / np.array(SPACING))
    np.testing.assert_allclose(mm @ mm.T, np.eye(3), atol=1e-12)
    assert np.trace(mm) == pytest.approx(1)  # 90 degrees
    flat, _ = views_of(in_plane=True)
    quarter = flat.matrix[:, 2 + len(STRENGTHS["rotation"]) - 1]
    assert is_axis_aligned(quarter).all() and abs(float(quarter[0, 0, 0])) == pytest.approx(1)


def test_scaling_goes_both_ways():
    specs, _ = views_of(regions=20)
    scale = specs.matrix[0, :, 0, 0].reshape(20, PER_REGION)[:, -1].numpy()
    assert set(np.round(scale, 6)) == {0.5, 2.0}


def test_every_network_is_the_same_at_strength_zero():
    volume = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(1, 6, 3)

    @torch.no_grad()
    def pooled(views):
        return convolution(views).relu().mean((2, 3, 4))

    specs, _ = views_of()
    reference = embed_views(pooled, volume, random_views(SHAPE, VIEW, 32, np.random.default_rng(1)), VIEW, CPU)
    found = case_similarities(standardised(embed_views(pooled, volume, specs, VIEW, CPU), reference))
    for kind in STRENGTHS:
        assert found[kind][0] == pytest.approx(1, abs=1e-5)
    assert found["crop"] < 0.9


def test_means_intervals_and_the_share_that_is_kept():
    def case(offset):
        steps = {name: np.linspace(1, 0.2, len(s)) - offset for name, s in STRENGTHS.items()}
        return steps | {"crop": np.array(0.2 - offset)}

    found = summarise([case(0.0), case(0.1)], regions=2)
    curve = found.curves["translation"]
    assert curve.mean == pytest.approx((np.linspace(1, 0.2, 6) - 0.05).tolist()) and found.crop == pytest.approx(0.15)
    lower, upper = curve.interval[0]
    assert (lower + upper) / 2 == pytest.approx(0.95) and upper - lower == pytest.approx(2 * 12.706 * 0.05, rel=1e-3)
    expected = (np.mean(np.linspace(1, 0.2, 6)[1:] - 0.05) - 0.15) / 0.85
    assert curve.kept == pytest.approx(expected)
    assert summarise([case(0.0)], 1).curves["rotation"].interval == [None] * 7
    assert invariance_figure({"STC3D": found, "scratch": summarise([case(0.0)], 1)}).startswith(b"\x89PNG")


def test_random_views_lie_inside_and_look_at_the_body():
    body = np.zeros((4, 4, 4), dtype=bool)
    body[1:3, 1:3, 1:3] = True
    guide = Guide((10.0, 9.0, 11.0), body)
    specs = random_views(SHAPE, VIEW, 40, np.random.default_rng(0), guide)
    half = bounding_half_extent(specs.matrix, VIEW)
    assert (specs.center - half >= -0.5).all() and (specs.center + half <= torch.tensor(SHAPE) - 0.5).all()
    assert guide.in_body(specs.center[0].numpy()).mean() > 0.8
    small = random_views((6, 40, 40), VIEW, 4, np.random.default_rng(0))
    # Shrunk alike along all axes, here to 6 of 8.
    np.testing.assert_allclose(small.matrix[0, 0].numpy(), np.eye(3) * 0.75)


def test_standardising_removes_what_all_embeddings_share():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(200, 5)) * np.array([1, 0.01, 5, 0, 1]) + 100
    unit = standardised(reference, reference)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1)
    assert abs((unit @ unit.T).mean()) < 0.02 and (unit[:, 3] == 0).all()
