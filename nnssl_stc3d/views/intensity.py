"""Intensity augmentation of single views, from batchgeneratorsv2: the transforms nnU-Net users know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

# A blur of at most 1 voxel mirrors 3 voxels at the ends of an axis, and they have to be there.
_LEAST_LENGTH = 4


def intensity_transforms(strength: float) -> BasicTransform | None:
    """Noise, blur, brightness, contrast and gamma, each applied with probability ``strength`` times nnU-Net's order.

    Args:
        strength: 0 switches augmentation off, 1 is the default probability of each transform (.2 to .3).

    Raises:
        ValueError: if ``strength`` is outside [0, 3].
    """
    if not 0 <= strength <= 3:
        raise ValueError(f"intensity strength must lie in [0, 3], got {strength}")
    if strength == 0:
        return None
    factor = BGContrast((0.75, 1.25))
    transforms = [
        (GaussianNoiseTransform(noise_variance=(0, 0.1), p_per_channel=1, synchronize_channels=True), 0.2),
        (
            GaussianBlurTransform(
                blur_sigma=(0.5, 1.0), synchronize_channels=False, synchronize_axes=False, p_per_channel=1
            ),
            0.2,
        ),
        (MultiplicativeBrightnessTransform(factor, synchronize_channels=False, p_per_channel=1), 0.3),
        (ContrastTransform(factor, preserve_range=True, synchronize_channels=False, p_per_channel=1), 0.3),
        (
            GammaTransform(
                BGContrast((0.7, 1.5)), p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1
            ),
            0.3,
        ),
    ]
    return ComposeTransforms([RandomTransform(t, apply_probability=min(1.0, p * strength)) for t, p in transforms])


@contextmanager
def seeded_globals(rng: np.random.Generator) -> Iterator[None]:
    """Seed NumPy's and torch's global generators for a while: batchgeneratorsv2 draws from both. CPU state only."""
    seed = int(rng.integers(0, 2**32))
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs as well, whose state is not restored.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def augment_views(views: Tensor, transform: BasicTransform | None, rng: np.random.Generator) -> Tensor:
    """Augment each view on its own: an augmentation of the whole volume would be shared by overlapping views.

    Views of fewer than 4 voxels along an axis are continued with their last slice for as long as it takes.

    Args:
        views: ``(V, C, Z, Y, X)``.
        transform: from :func:`intensity_transforms`.
        rng: source of randomness.

    Returns:
        ``(V, C, Z, Y, X)``
    """
    if transform is None:
        return views
    z, y, x = views.shape[2:]
    if min(z, y, x) < _LEAST_LENGTH:
        more_z, more_y, more_x = (max(0, _LEAST_LENGTH - n) for n in (z, y, x))
        views = F.pad(views, (0, more_x, 0, more_y, 0, more_z), mode="replicate")
    with seeded_globals(rng):
        augmented = torch.stack([transform(image=view)["image"] for view in views])
    return augmented[..., :z, :y, :x]
