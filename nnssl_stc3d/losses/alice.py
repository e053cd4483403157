"""Losses of Alice (Jiang et al. 2023): masked reconstruction and agreement of online and target branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6
# Of nnU-Net's normalised intensities: a view of nothing but air shall not have its noise blown up.
_SMALLEST_VARIANCE = 1e-2


def masked_reconstruction(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked voxels (Alice Eq. 1).

    Eq. 1 adds this for the crops of both volumes.

    Args:
        prediction: ``(..., C, Z, Y, X)``.
        target: of the same shape.
        mask: true or 1 where a voxel was masked; of the same shape or one that broadcasts to it, such as
            ``(..., 1, Z, Y, X)``.

    Returns:
        Scalar, float32 or wider; 0 with a gradient of zero if nothing is masked.

    Raises:
        ValueError: if prediction and target differ in shape.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        chosen = mask.to(dtype).expand(prediction.shape)
        squared = (prediction.to(dtype) - target.to(dtype)).square()
        return (squared * chosen).sum() / chosen.sum().clamp(min=1)


def normalised_blocks(images: Tensor, block: Sequence[int]) -> Tensor:
    """Normalise each block of voxels to mean 0 and variance 1: the target of the masked autoencoder (He et al. 2022).

    Args:
        images: ``(N, C, Z, Y, X)``; the block divides each axis.
        block: ``(bz, by, bx)`` voxels.

    Returns:
        ``(N, C, Z, Y, X)`` float32 or wider. All channels of a block share its mean and (unbiased) variance.
    """
    voxels = image_to_blocks(images.to(torch.promote_types(images.dtype, torch.float32)), block)
    variance, mean = torch.var_mean(voxels, dim=2, keepdim=True)
    grid = [n // b for n, b in zip(images.shape[2:], block)]
    return blocks_to_image((voxels - mean) / (variance + _EPS).sqrt(), grid, block)


def normalised_views(images: Tensor) -> Tensor:
    """Normalise each image to mean 0 and variance 1 over its voxels and channels, less where it shows almost nothing.

    Args:
        images: ``(N, C, Z, Y, X)``.

    Returns:
        ``(N, C, Z, Y, X)`` float32 or wider.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    variance, mean = torch.var_mean(images, dim=(1, 2, 3, 4), keepdim=True)
    return (images - mean) / (variance + _SMALLEST_VARIANCE).sqrt()


def image_to_blocks(images: Tensor, block: Sequence[int]) -> Tensor:
    """Cut images into blocks, ``(N, C, Z, Y, X) -> (N, blocks, C * bz * by * bx)``, blocks in C order."""
    size, channels = images.shape[:2]
    (gz, bz), (gy, by), (gx, bx) = ((n // b, b) for n, b in zip(images.shape[2:], block))
    split = images.reshape(size, channels, gz, bz, gy, by, gx, bx).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return split.reshape(size, gz * gy * gx, channels * bz * by * bx)


def blocks_to_image(blocks: Tensor, grid: Sequence[int], block: Sequence[int]) -> Tensor:
    """Undo :func:`image_to_blocks`, ``(N, blocks, C * bz * by * bx) -> (N, C, Z, Y, X)``."""
    size = blocks.shape[0]
    split = blocks.reshape(size, *grid, -1, *block).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return split.reshape(size, -1, *(g * b for g, b in zip(grid, block)))


def paired_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine loss between the branches, added over the two crops of a pair (Alice Eqs. 2 and 5).

    ``sum_crops mean -cos(student, stopgrad(teacher))``, the similarity loss of SimSiam. Eq. 2 compares with the other
    volume: give ``teacher.flip(1)``.

    Args:
        student: ``(B, 2, ..., D)``, axis 1 the crops of query and key volume.
        teacher: of the same shape; gets no gradient.

    Returns:
        Scalar in [-2, 2], float32 or wider.

    Raises:
        ValueError: if the shapes differ or axis 1 does not hold a pair.
    """
    if student.shape != teacher.shape or student.ndim < 3 or student.shape[1] != 2:
        raise ValueError(
            f"student and teacher must both be (B, 2, ..., D), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        cosine = F.cosine_similarity(student.to(dtype), teacher.detach().to(dtype), dim=-1)
        return -2 * cosine.mean()


def dino_cross_entropy(
    student: Tensor, teacher: Tensor, centre: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy between centred, sharpened target and online distribution (DINO; Alice as released).

    ``mean -sum softmax((teacher - centre) / t_teacher) * log_softmax(student / t_student)``.

    Args:
        student: ``(..., D)`` logits.
        teacher: of the same shape; gets no gradient.
        centre: ``(D,)`` running mean of the teacher's logits.
        student_temperature: above 0.
        teacher_temperature: above 0, below the student's to sharpen.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if the shapes differ or a temperature is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if min(student_temperature, teacher_temperature) <= 0:
        raise ValueError(f"temperatures must be positive, got {student_temperature} and {teacher_temperature}")
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        target = ((teacher.detach().to(dtype) - centre.to(dtype)) / teacher_temperature).softmax(-1)
        return -(target * (student.to(dtype) / student_temperature).log_softmax(-1)).sum(-1).mean()
