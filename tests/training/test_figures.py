"""``views.png``: outlines where the views are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nnssl_stc3d.data.loader import Sample
from nnssl_stc3d.training.figures import plot_views, view_corners
from nnssl_stc3d.views.spec import ViewSpecs


def specs(center, matrix) -> ViewSpecs:
    return ViewSpecs(torch.zeros(1, dtype=torch.long), torch.tensor([center]).double(), torch.tensor([matrix]).double())


def as_set(corners: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(round(float(v), 6) for v in corner) for corner in corners}


def test_corners_of_an_aligned_view_are_the_faces_of_its_outer_voxels():
    corners = view_corners(specs([10.0, 20.0, 30.0], np.eye(3).tolist()), (4, 6, 8))
    assert corners.shape == (1, 8, 3)
    # Voxels 8..12 - 0.5 and so on: the box of n voxels is n wide.
    assert as_set(corners[0]) == {(z, y, x) for z in (8.0, 12.0) for y in (17.0, 23.0) for x in (26.0, 34.0)}


def test_corners_of_a_scaled_view():
    corners = view_corners(specs([0.0, 0.0, 0.0], np.diag([2.0, 0.5, 1.0]).tolist()), (4, 4, 4))
    assert as_set(corners[0]) == {(z, y, x) for z in (-4.0, 4.0) for y in (-1.0, 1.0) for x in (-2.0, 2.0)}


def test_corners_of_a_view_rotated_by_45_degrees_about_z():
    c = 0.5**0.5
    corners = view_corners(specs([5.0, 5.0, 5.0], [[1, 0, 0], [0, c, -c], [0, c, c]]), (2, 4, 4))
    r = 2 * 2**0.5
    expected = {(0, r), (0, -r), (r, 0), (-r, 0)}
    found = {(round(y - 5, 4), round(x - 5, 4)) for _, y, x in corners[0].tolist()}
    assert found == {(round(a, 4), round(b, 4)) for a, b in expected}
    assert {z for z, _, _ in as_set(corners[0])} == {4.0, 6.0}


def sample(channels=1, views=6) -> Sample:
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(views, 3, generator=generator).double() * 10 + 5
    matrix = torch.eye(3).double() + 0.2 * torch.randn(views, 3, 3, generator=generator).double()
    return Sample(
        [torch.randn(channels, 20, 22, 24, generator=generator)],
        ViewSpecs(torch.zeros(views, dtype=torch.long), center, matrix),
        torch.randn(views, channels, 8, 8, 8, generator=generator),
    )


@pytest.mark.parametrize(("channels", "views", "n_bases"), [(1, 6, 4), (2, 2, 0), (1, 40, 16)])
def test_the_figure_is_an_image(tmp_path, channels, views, n_bases):
    before = plt.get_fignums()
    plot_views(sample(channels, views), ["case_7"], n_bases, (3.0, 1.0, 1.0), tmp_path / "views.png")
    image = plt.imread(tmp_path / "views.png")
    assert min(image.shape[:2]) > 200 and image.std() > 0.05
    assert plt.get_fignums() == before


def test_outlines_are_drawn_at_the_corners_in_every_plane(tmp_path, monkeypatch):
    """Bases in grey, views in colour, coordinates of the plane that is shown."""
    drawn = []
    original = plt.Axes.fill
    monkeypatch.setattr(
        plt.Axes, "fill", lambda axis, *a, **options: drawn.append((a, options)) or original(axis, *a, **options)
    )
    shown = sample(views=3)
    plot_views(shown, ["case_7"], 1, (1.0, 1.0, 1.0), tmp_path / "views.png")
    assert len(drawn) == 9
    corners = view_corners(shown.specs, (8, 8, 8)).numpy()
    for index, ((x, y), options) in enumerate(drawn):
        normal, view = divmod(index, 3)
        rest = [a for a in range(3) if a != normal]
        np.testing.assert_allclose([y.min(), y.max()], [f(corners[view][:, rest[0]]) for f in (np.min, np.max)])
        np.testing.assert_allclose([x.min(), x.max()], [f(corners[view][:, rest[1]]) for f in (np.min, np.max)])
        assert (options["edgecolor"] == "0.7") == (view == 0)


def test_views_into_other_sources_are_not_outlined_in_the_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt.Axes, "fill", lambda axis, *a, **options: drawn.append(a))
    shown = sample(views=4)
    source = torch.tensor([0, 1, 1, 0])
    shown = shown._replace(specs=shown.specs._replace(source=source), sources=shown.sources * 2)
    plot_views(shown, ["a", "b"], 0, (1.0, 1.0, 1.0), tmp_path / "views.png")
    assert len(drawn) == 3 * 2
