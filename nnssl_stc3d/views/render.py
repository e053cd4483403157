"""Rendering: every view of a batch is one affine map and one trilinear interpolation, never a chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_stc3d.views.spec import ViewSpecs


def view_grid(view_shape: Sequence[int], like: Tensor) -> Tensor:
    """Offsets of all voxels of a view from its centre, ``(Z, Y, X, 3)`` in view voxels."""
    axes = [torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1) / 2 for n in view_shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@torch.no_grad()
def render_views(sources: Tensor, specs: ViewSpecs, view_shape: Sequence[int]) -> Tensor:
    """Look at the sources through the views.

    Rotation, translation, scaling and cropping are composed in ``specs``; each view is interpolated once. Coordinates
    are computed in float32 at least, outside autocast (in float16 they would be off by 0.06 voxel beyond index 128).
    Positions up to half a voxel outside the outermost voxel centres take the border's value.

    Args:
        sources: ``(B, S, C, Z, Y, X)`` float, ``S`` source volumes of each of ``B`` samples.
        specs: the views, ``V`` for each sample, in voxels of their source.
        view_shape: ``(Z, Y, X)`` of the rendered views.

    Returns:
        ``(B, V, C, *view_shape)`` in the dtype of ``sources``.

    Raises:
        ValueError: if shapes or source indices do not fit together.
    """
    if sources.ndim != 6:
        raise ValueError(f"sources must be (B, S, C, Z, Y, X), got shape {tuple(sources.shape)}")
    batch, n_sources, channels, *shape = sources.shape
    if specs.center.shape[0] != batch:
        raise ValueError(f"sources hold {batch} samples, the specifications {specs.center.shape[0]}")
    n_views = specs.center.shape[1]
    if n_views and not 0 <= int(specs.source.min()) <= int(specs.source.max()) < n_sources:
        raise ValueError(
            f"specs.source must lie in 0..{n_sources - 1}, got {int(specs.source.min())}..{int(specs.source.max())}"
        )
    dtype = torch.promote_types(sources.dtype, torch.float32)
    with torch.autocast(sources.device.type, enabled=False):
        matrix, center = specs.matrix.to(sources.device, dtype), specs.center.to(sources.device, dtype)
        offsets = view_grid(view_shape, matrix).reshape(-1, 3)
        size = torch.tensor(shape, dtype=dtype, device=sources.device)
        views = sources.new_empty((batch, n_views, channels, *view_shape))
        for b in range(batch):
            points = torch.addmm(center[b].reshape(-1, 1), matrix[b].reshape(-1, 3), offsets.T)
            points = points.reshape(n_views, 3, -1).transpose(1, 2)
            extent, volume = size, sources[b, 0]
            if n_sources > 1:
                # Sources stacked along z serve all views with one interpolation; clamping first keeps a view from
                # seeing its neighbour in the stack.
                points = points.clamp(min=torch.zeros_like(size), max=size - 1)
                shift = specs.source[b].to(sources.device, dtype) * size[0]
                points = torch.cat((points[..., :1] + shift[:, None, None], points[..., 1:]), dim=-1)
                volume = sources[b].transpose(0, 1).reshape(channels, n_sources * shape[0], *shape[1:])
                extent = size * size.new_tensor([n_sources, 1, 1])
            # align_corners: -1 and 1 are the centres of the first and the last voxel; a single voxel sits at 0.
            grid = points * (2 / (extent - 1).clamp(min=1)) - (extent > 1).to(dtype)
            grid = grid.flip(-1).reshape(n_views, *view_shape, 3)
            views[b] = F.grid_sample(
                volume.to(dtype).expand(n_views, *volume.shape), grid, "bilinear", "border", align_corners=True
            )
    return views
