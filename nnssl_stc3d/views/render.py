"""Rendering: every view of a batch is one affine map and one trilinear interpolation, never a chain."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from nnssl_stc3d.views.spec import ViewSpecs

# The grid of one 64^3 view: 3 MiB.
_CPU_POINTS_AT_ONCE = 2**18


@torch.no_grad()
def render_views(sources: Tensor, specs: ViewSpecs, view_shape: Sequence[int]) -> Tensor:
    """Look at the sources through the views.

    Rotation, translation, scaling and cropping are composed in ``specs``; each view is interpolated once, on a
    GPU all views of one source in one call. Coordinates are computed in float32 at least, outside autocast (in float16
    they would be off by 0.06 voxel beyond index 128). Positions up to half a voxel outside the outermost voxel centres
    take the border's value.

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
    # On the CPU a grid that fits into its caches is faster than one for all views, and small.
    at_once = max(1, _CPU_POINTS_AT_ONCE // prod(view_shape)) if sources.device.type == "cpu" else max(1, n_views)
    selected, center, matrix = (field.cpu() for field in specs)
    with torch.autocast(sources.device.type, enabled=False):
        views = sources.new_empty((batch, n_views, channels, *view_shape))
        for b in range(batch):
            for index in selected[b].unique().tolist():
                volume = sources[b, index].to(dtype)
                for mine in (selected[b] == index).nonzero()[:, 0].split(at_once):
                    grid = _sampling_grid(center[b, mine], matrix[b, mine], shape, view_shape, sources.device, dtype)
                    views[b, mine.to(sources.device)] = F.grid_sample(
                        volume.expand(len(mine), *volume.shape), grid, "bilinear", "border", align_corners=True
                    ).to(views.dtype)
    return views


def _sampling_grid(
    center: Tensor, matrix: Tensor, shape: Sequence[int], view_shape: Sequence[int], device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Positions of all view voxels for ``grid_sample``, ``(V, Z, Y, X, 3)`` in (x, y, z) order, ``align_corners=True``.

    An affine map of a grid is a sum of one term per axis, so that the work per voxel is two additions; the terms are
    computed in float64.

    Args:
        center: ``(V, 3)`` source voxels.
        matrix: ``(V, 3, 3)``.
        shape: ``(Z, Y, X)`` of the source.
        view_shape: ``(Z, Y, X)`` of the views.
        device: of the result.
        dtype: of the result.
    """
    size = torch.tensor(shape, dtype=torch.float64)
    # align_corners: -1 and 1 are the centres of the first and the last voxel; a single voxel sits at 0.
    factor = 2 / (size - 1).clamp(min=1)
    origin = (center * factor - (size > 1).double()).flip(-1)
    columns = (matrix * factor[:, None]).flip(-2)
    offsets = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in view_shape]
    z, y, x = (offset[:, None] * columns[:, None, :, axis] for axis, offset in enumerate(offsets))
    z, y, x = (term.to(device, dtype) for term in (z + origin[:, None], y, x))
    return (z[:, :, None] + y[:, None])[:, :, :, None] + x[:, None, None]
