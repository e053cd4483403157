"""Intensity augmentation of single views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl_stc3d.views.intensity import augment_views, intensity_transforms, seeded_globals


def example_views(count: int = 6, channels: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, 8, 9, 10, generator=torch.Generator().manual_seed(0))


def test_zero_strength_is_no_augmentation():
    assert intensity_transforms(0) is None
    views = example_views()
    assert torch.equal(augment_views(views, None, np.random.default_rng(0)), views)


@pytest.mark.parametrize("strength", [-0.1, 3.5])
def test_strength_is_checked(strength):
    with pytest.raises(ValueError, match=rf"\[0, 3\], got {strength}"):
        intensity_transforms(strength)


def test_shape_type_and_finiteness_are_kept():
    views = example_views()
    for seed in range(10):
        result = augment_views(views.clone(), intensity_transforms(3), np.random.default_rng(seed))
        assert result.shape == views.shape and result.dtype == views.dtype and result.isfinite().all()


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_views_of_a_few_slices_keep_their_shape_and_are_augmented(slices):
    """A blur of the whole view needs more voxels than these have."""
    views = example_views()[:, :, :slices]
    for seed in range(20):
        result = augment_views(views.clone(), intensity_transforms(3), np.random.default_rng(seed))
        assert result.shape == views.shape and result.isfinite().all() and not torch.equal(result, views)


def test_equal_views_are_augmented_differently():
    """Otherwise views that overlap could be recognised by their noise."""
    views = example_views(1).expand(8, -1, -1, -1, -1).clone()
    result = augment_views(views, intensity_transforms(3), np.random.default_rng(0))
    different = torch.pdist(result.flatten(1)) > 1e-3
    assert different.float().mean() > 0.9


def test_a_stronger_setting_changes_more_views():
    views = example_views(60, 1)
    changed = [
        (augment_views(views.clone(), intensity_transforms(s), np.random.default_rng(0)) != views).flatten(1).any(1)
        for s in (0.2, 1, 3)
    ]
    shares = [float(c.float().mean()) for c in changed]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9


def test_the_generator_decides_everything():
    views = example_views()
    first, again, other = (
        augment_views(views.clone(), intensity_transforms(1), np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_consecutive_batches_of_one_generator_differ():
    rng, transform, views = np.random.default_rng(0), intensity_transforms(3), example_views()
    assert not torch.equal(augment_views(views.clone(), transform, rng), augment_views(views.clone(), transform, rng))


def test_global_random_states_are_left_as_they_were():
    torch.manual_seed(1)
    np.random.seed(1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    augment_views(example_views(), intensity_transforms(3), np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_gpus_are_not_seeded(monkeypatch):
    """Their states are not restored, and a continued training has set them."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    with seeded_globals(np.random.default_rng(0)):
        drawn = torch.rand(3)
    with seeded_globals(np.random.default_rng(0)):
        assert torch.equal(torch.rand(3), drawn)


def test_global_random_states_are_restored_after_an_error():
    np.random.seed(1)
    numpy_state = np.random.get_state()[1].copy()
    with pytest.raises(KeyError), seeded_globals(np.random.default_rng(0)):
        np.random.rand()
        raise KeyError
    assert np.array_equal(np.random.get_state()[1], numpy_state)
