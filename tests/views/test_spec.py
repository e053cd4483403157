"""The coordinates of views, point by point."""

from __future__ import annotations

import pytest
import torch

from nnssl_stc3d.views.spec import ViewSpecs, source_to_view, stack_specs, view_center, view_to_source

VIEW_SHAPE = (4, 7, 1)


def random_specs(batch: int, views: int, seed: int = 0) -> ViewSpecs:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, views, 3, 3, generator=generator, dtype=torch.float64) + 3 * torch.eye(3)
    center = 10 * torch.randn(batch, views, 3, generator=generator, dtype=torch.float64)
    return ViewSpecs(torch.zeros(batch, views, dtype=torch.long), center, matrix)


def test_center_of_even_odd_and_single_axes():
    assert view_center(VIEW_SHAPE, torch.zeros((), dtype=torch.float64)).tolist() == [1.5, 3.0, 0.0]


def test_identity_view_in_the_middle_looks_at_the_volume_itself():
    specs = ViewSpecs(
        torch.zeros(1, 1, dtype=torch.long), torch.tensor([[[1.5, 3.0, 0.0]]]), torch.eye(3).expand(1, 1, 3, 3)
    )
    points = torch.tensor([[[[0.0, 0, 0], [3, 6, 0], [1, 2, 0]]]])
    assert torch.equal(view_to_source(specs, points, VIEW_SHAPE), points)


def test_view_to_source_is_the_definition():
    specs = random_specs(2, 3)
    points = torch.randn(2, 3, 5, 3, dtype=torch.float64)
    mapped = view_to_source(specs, points, VIEW_SHAPE)
    for b in range(2):
        for v in range(3):
            for p in range(5):
                offset = [points[b, v, p, k].item() - (VIEW_SHAPE[k] - 1) / 2 for k in range(3)]
                for axis in range(3):
                    expected = specs.center[b, v, axis] + sum(specs.matrix[b, v, axis, k] * offset[k] for k in range(3))
                    assert mapped[b, v, p, axis].item() == pytest.approx(float(expected), abs=1e-12)


def test_source_to_view_is_the_inverse():
    specs = random_specs(3, 4)
    points = torch.randn(3, 4, 6, 3, dtype=torch.float64)
    there = view_to_source(specs, points, VIEW_SHAPE)
    torch.testing.assert_close(source_to_view(specs, there, VIEW_SHAPE), points, rtol=0, atol=1e-10)


@pytest.mark.parametrize("views", [slice(1, 3), [2, 0], torch.tensor([2, 0])])
def test_select_takes_views_of_every_sample(views):
    specs = random_specs(2, 4)
    index = list(range(1, 3)) if isinstance(views, slice) else [2, 0]
    chosen = specs.select(views)
    for got, all_views in zip(chosen, specs):
        assert torch.equal(got, torch.stack([all_views[:, i] for i in index], dim=1))


def test_stack_adds_a_batch_axis():
    samples = [ViewSpecs(*(f[0] for f in random_specs(1, 3, seed))) for seed in range(4)]
    stacked = stack_specs(samples)
    assert stacked.source.shape == (4, 3) and stacked.center.shape == (4, 3, 3) and stacked.matrix.shape == (4, 3, 3, 3)
    assert torch.equal(stacked.center[2], samples[2].center)


def test_to_keeps_values():
    specs = random_specs(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(specs.to("cpu"), specs))
