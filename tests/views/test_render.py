"""Rendering against analytic points: an image of coordinates must show where each voxel of a view looks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.spec import ViewSpecs

SOURCE_SHAPE = (21, 26, 30)
VIEW_SHAPE = (5, 6, 4)
ANISOTROPIC = np.diag([3.0, 0.7, 1.1])


def rotation(*angles: float) -> np.ndarray:
    return Rotation.from_euler("xyz", angles, degrees=True).as_matrix()


def in_mm(spacing: np.ndarray, map_in_mm: np.ndarray) -> np.ndarray:
    return np.linalg.inv(spacing) @ map_in_mm @ spacing


MATRICES = {
    "identity": np.eye(3),
    "flip": np.diag([-1.0, 1.0, -1.0]),
    "quarter turn": rotation(90, 0, 0).round(),
    "about z": rotation(23, 0, 0),
    "about y": rotation(0, -41, 0),
    "about x": rotation(0, 0, 67),
    "about all": rotation(20, -35, 50),
    "scaled": 1.7 * np.eye(3),
    "scaled per axis": np.diag([0.4, 1.3, 2.1]),
    "rotated and scaled per axis": rotation(15, 25, -30) @ np.diag([0.6, 1.2, 1.5]),
    "rotated in mm": in_mm(ANISOTROPIC, rotation(10, 20, 30)),
    "rotated and scaled in mm": in_mm(ANISOTROPIC, rotation(-25, 5, 12) @ np.diag([0.8, 1.1, 0.9])),
}


def coordinate_image(shape: tuple[int, ...], name: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Channels z, y, x, an affine function of them and a constant that tells sources apart, ``(5, Z, Y, X)``."""
    z, y, x = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
    return torch.stack((z, y, x, 2 * z - 3 * y + 0.5 * x + 1, torch.full_like(z, name))).to(dtype)


def looked_at(center: np.ndarray, matrix: np.ndarray, view_shape: tuple[int, ...]) -> np.ndarray:
    """Source position of every voxel of a view, one by one, ``(Z, Y, X, 3)``."""
    points = np.empty((*view_shape, 3))
    for index in product(*[range(n) for n in view_shape]):
        points[index] = center + matrix @ (np.array(index) - (np.array(view_shape) - 1) / 2)
    return points


def channels_at(points: np.ndarray, name: float = 0.0) -> np.ndarray:
    z, y, x = np.moveaxis(points, -1, 0)
    return np.stack([z, y, x, 2 * z - 3 * y + 0.5 * x + 1, np.full_like(z, name)])


def specs_of(centers: np.ndarray, matrices: np.ndarray, sources: np.ndarray | None = None) -> ViewSpecs:
    source = np.zeros(centers.shape[:2], dtype=np.int64) if sources is None else sources
    return ViewSpecs(torch.from_numpy(source), torch.from_numpy(centers), torch.from_numpy(matrices))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", MATRICES)
def test_views_show_the_analytic_points(name, dtype, tolerance):
    rng = np.random.default_rng(0)
    n_batch, n_sources, n_views = 2, 3, 4
    # Views of 5 x 6 x 4 voxels stay inside the volume around its middle.
    centers = np.array(SOURCE_SHAPE) / 2 + rng.uniform(-1, 1, size=(n_batch, n_views, 3))
    matrices = np.broadcast_to(MATRICES[name], (n_batch, n_views, 3, 3)).copy()
    which = rng.integers(0, n_sources, size=(n_batch, n_views))
    sources = torch.stack(
        [
            torch.stack([coordinate_image(SOURCE_SHAPE, s + 10.0 * b, dtype) for s in range(n_sources)])
            for b in range(n_batch)
        ]
    )
    views = render_views(sources, specs_of(centers, matrices, which), VIEW_SHAPE)
    assert views.shape == (n_batch, n_views, 5, *VIEW_SHAPE) and views.dtype == dtype
    for b, v in product(range(n_batch), range(n_views)):
        points = looked_at(centers[b, v], matrices[b, v], VIEW_SHAPE)
        assert points.min() > 0 and (points < np.array(SOURCE_SHAPE) - 1).all()
        expected = channels_at(points, which[b, v] + 10.0 * b)
        assert np.abs(views[b, v].numpy() - expected).max() <= tolerance * max(1, np.abs(expected).max())


def test_float32_positions_are_exact_to_two_millionths_of_a_large_volume():
    shape, view_shape = (160, 192, 180), (8, 8, 8)
    x = torch.arange(shape[2], dtype=torch.float32).expand(1, 1, 1, *shape)
    center = np.array([[[80.0, 96.0, 168.3]]])
    views = render_views(x, specs_of(center, MATRICES["about all"][None, None]), view_shape)
    expected = looked_at(center[0, 0], MATRICES["about all"], view_shape)[..., 2]
    assert np.abs(views[0, 0, 0].numpy() - expected).max() < 2e-6 * 180


def test_a_rotation_in_mm_preserves_distances_in_mm():
    """What a view shows of an image of millimetre positions is as far apart as the view's own voxels are in mm."""
    spacing = np.diag(ANISOTROPIC)
    grids = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in SOURCE_SHAPE], indexing="ij")
    millimetres = torch.stack([g * s for g, s in zip(grids, spacing)])[None, None]
    center = np.array([[[10.0, 13.0, 15.0]]])
    view_shape = (3, 5, 4)
    own = np.stack(np.meshgrid(*[np.arange(n) for n in view_shape], indexing="ij"), -1).reshape(-1, 3) * spacing

    def shown(matrix: np.ndarray) -> np.ndarray:
        view = render_views(millimetres, specs_of(center, matrix[None, None]), view_shape)[0, 0]
        return view.reshape(3, -1).T.numpy()

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    turn = rotation(30, 20, -10)
    np.testing.assert_allclose(distances(shown(in_mm(ANISOTROPIC, turn))), distances(own), atol=1e-9)
    # The same rotation of voxels instead of millimetres deforms the anatomy.
    assert np.abs(distances(shown(turn)) - distances(own)).max() > 1


def test_an_aligned_view_is_a_crop():
    source = torch.randn(1, 1, 2, 9, 10, 11, dtype=torch.float64)
    centers = np.array([[[2 + 1.5, 3 + 2.0, 4 + 1.0]]])
    views = render_views(source, specs_of(centers, np.eye(3)[None, None]), (4, 5, 3))
    torch.testing.assert_close(views[0, 0], source[0, 0, :, 2:6, 3:8, 4:7], rtol=0, atol=1e-12)


def test_interpolation_is_trilinear():
    source = torch.randn(1, 1, 1, 6, 6, 6, dtype=torch.float64)
    point = np.array([2.3, 1.6, 3.9])
    low, share = np.floor(point).astype(int), point % 1
    expected = 0.0
    for corner in product((0, 1), repeat=3):
        weight = np.prod([share[k] if corner[k] else 1 - share[k] for k in range(3)])
        expected += weight * float(source[(0, 0, 0, *(low + corner))])
    views = render_views(source, specs_of(point[None, None], np.eye(3)[None, None]), (1, 1, 1))
    assert float(views) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9, 1), (1, 1, 7), (1, 1, 1)])
@pytest.mark.parametrize("n_sources", [1, 2])
def test_single_voxel_axes_of_the_source(shape, n_sources):
    sources = torch.stack([coordinate_image(shape, 50.0 * s) for s in range(n_sources)])[None]
    centers = np.array([[(np.array(shape) - 1) / 2] * n_sources])
    specs = specs_of(centers, np.tile(np.diag([1.0, 0.5, 0.5]), (1, n_sources, 1, 1)), np.arange(n_sources)[None])
    view_shape = (3, 4, 4)
    views = render_views(sources, specs, view_shape)
    points = np.clip(looked_at(centers[0, 0], np.diag([1.0, 0.5, 0.5]), view_shape), 0, np.array(shape) - 1)
    for s in range(n_sources):
        np.testing.assert_allclose(views[0, s].numpy(), channels_at(points, 50.0 * s), atol=1e-9)


@pytest.mark.parametrize("view_shape", [(1, 4, 5), (4, 1, 1), (1, 1, 1)])
def test_single_voxel_axes_of_the_view(view_shape):
    center, matrix = np.array([10.3, 12.1, 14.9]), MATRICES["rotated and scaled per axis"]
    views = render_views(
        coordinate_image(SOURCE_SHAPE)[None, None], specs_of(center[None, None], matrix[None, None]), view_shape
    )
    np.testing.assert_allclose(views[0, 0].numpy(), channels_at(looked_at(center, matrix, view_shape)), atol=1e-9)


@pytest.mark.parametrize("n_sources", [1, 2])
def test_beyond_the_border_lies_the_border_value(n_sources):
    shape = (6, 7, 8)
    sources = coordinate_image(shape).expand(1, n_sources, 5, *shape)
    view_shape = (9, 10, 11)
    center, matrix = np.array([0.0, 6.0, 3.5]), rotation(10, 20, 30)
    views = render_views(sources, specs_of(center[None, None], matrix[None, None]), view_shape)
    points = np.clip(looked_at(center, matrix, view_shape), 0, np.array(shape) - 1)
    np.testing.assert_allclose(views[0, 0].numpy(), channels_at(points), atol=1e-9)


def test_a_view_never_sees_the_neighbour_in_the_stack():
    shape, n_sources = (12, 9, 10), 3
    levels = torch.tensor([0.0, 1000.0, -1000.0], dtype=torch.float64)
    sources = levels.view(1, 3, 1, 1, 1, 1).expand(1, n_sources, 1, *shape).contiguous()
    centers = np.array([[[z, 4.0, 4.5] for _ in range(n_sources) for z in (-3.0, 0.0, 11.0, 14.0)]])
    which = np.repeat(np.arange(n_sources), 4)[None]
    matrices = np.tile(rotation(0, 33, 20), (1, 12, 1, 1))
    views = render_views(sources, specs_of(centers, matrices, which), (6, 6, 6))
    expected = levels[torch.from_numpy(which)].view(1, 12, 1, 1, 1, 1).expand_as(views)
    torch.testing.assert_close(views, expected, rtol=0, atol=1e-9)


def test_samples_of_a_batch_do_not_mix():
    sources = torch.randn(3, 2, 1, 8, 8, 8)
    rng = np.random.default_rng(1)
    centers, matrices = rng.uniform(2, 5, size=(3, 4, 3)), np.tile(rotation(20, 5, 5), (3, 4, 1, 1))
    which = rng.integers(0, 2, size=(3, 4))
    together = render_views(sources, specs_of(centers, matrices, which), (4, 4, 4))
    for b in range(3):
        for v in range(4):
            specs = specs_of(centers[b : b + 1, v : v + 1], matrices[b : b + 1, v : v + 1])
            alone = render_views(sources[b : b + 1, which[b, v] : which[b, v] + 1], specs, (4, 4, 4))
            torch.testing.assert_close(together[b, v], alone[0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_keep_float32_coordinates(dtype):
    """Neighbouring voxels alternate between 0 and 1, so that coordinates rounded to half precision would show."""
    source = (torch.arange(240) % 2).to(dtype).expand(1, 1, 1, 4, 4, 240)
    center = np.array([[[1.5, 1.5, 211.25]]])
    views = render_views(source, specs_of(center, np.eye(3)[None, None]), (2, 2, 5))
    assert views.dtype == dtype
    exact = render_views(source.double(), specs_of(center, np.eye(3)[None, None]), (2, 2, 5))
    assert (views.double() - exact).abs().max() < 5e-3


def test_autocast_changes_nothing():
    source = torch.randn(1, 1, 1, 40, 9, 9)
    specs = specs_of(np.array([[[31.3, 4.0, 4.0]]]), MATRICES["about all"][None, None])
    expected = render_views(source, specs, (4, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(render_views(source, specs, (4, 4, 4)), expected)


def test_no_gradient_is_recorded():
    source = torch.randn(1, 1, 1, 6, 6, 6, requires_grad=True)
    specs = specs_of(np.full((1, 1, 3), 2.5), np.eye(3)[None, None])
    assert not render_views(source, specs, (2, 2, 2)).requires_grad


def test_errors_say_what_was_got():
    specs = specs_of(np.zeros((2, 1, 3)), np.tile(np.eye(3), (2, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"\(B, S, C, Z, Y, X\), got shape \(2, 1, 8, 8, 8\)"):
        render_views(torch.zeros(2, 1, 8, 8, 8), specs, (2, 2, 2))
    with pytest.raises(ValueError, match="3 samples, the specifications 2"):
        render_views(torch.zeros(3, 1, 1, 8, 8, 8), specs, (2, 2, 2))
    with pytest.raises(ValueError, match=r"0\.\.0, got 1\.\.1"):
        render_views(torch.zeros(2, 1, 1, 8, 8, 8), specs._replace(source=specs.source + 1), (2, 2, 2))
