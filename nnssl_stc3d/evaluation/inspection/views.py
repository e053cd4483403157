"""Views of whole cases and their pooled embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.region_sampler import fit_extent
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.spec import ViewSpecs

_VIEWS_AT_ONCE = 8
_CANDIDATES = 16


def to_specs(centers: Sequence[np.ndarray], matrices: Sequence[np.ndarray]) -> ViewSpecs:
    """Views into one volume as one sample: ``V`` centres ``(3,)`` in voxels and ``V`` matrices ``(3, 3)``."""
    center, matrix = torch.from_numpy(np.stack(centers))[None], torch.from_numpy(np.stack(matrices))[None]
    return ViewSpecs(torch.zeros(center.shape[:2], dtype=torch.long), center, matrix)


def random_center(
    shape: Sequence[int], half: np.ndarray, rng: np.random.Generator, guide: Guide | None = None
) -> np.ndarray:
    """Centre ``(3,)`` of a random view that lies inside a volume, in its body if one of 16 tries is.

    Args:
        shape: ``(Z, Y, X)`` of the volume.
        half: ``(3,)`` half the size of the view, voxels.
        rng: source of randomness.
        guide: of the volume.
    """
    free = np.asarray(shape, dtype=float) - 2 * half
    candidates = half - 0.5 + rng.uniform(size=(_CANDIDATES, 3)) * free.clip(min=0)
    if guide is None:
        return candidates[0]
    return candidates[int(guide.in_body(candidates).argmax())]


def random_views(
    shape: Sequence[int], view_shape: Sequence[int], count: int, rng: np.random.Generator, guide: Guide | None = None
) -> ViewSpecs:
    """Views at random places of one volume, upright and at its own resolution; shrunk into a smaller volume."""
    view = np.asarray(view_shape, dtype=float)
    extent = fit_extent(view, np.asarray(shape, dtype=float))
    centers = [random_center(shape, extent / 2, rng, guide) for _ in range(count)]
    return to_specs(centers, [np.diag(extent / view)] * count)


def embed_views(
    pooled: Callable[[Tensor], Tensor],
    volume: np.ndarray,
    specs: ViewSpecs,
    view_shape: Sequence[int],
    device: torch.device,
) -> np.ndarray:
    """Look at a volume and embed what is seen.

    Args:
        pooled: views ``(N, C, *view_shape)`` to embeddings ``(N, D)``.
        volume: ``(C, Z, Y, X)``.
        specs: of ``V`` views, one sample.
        view_shape: of the views.
        device: to compute on.

    Returns:
        ``(V, D)`` float32.
    """
    source = torch.from_numpy(np.ascontiguousarray(volume))[None, None].to(device)
    rows = []
    for part in torch.arange(specs.center.shape[1]).split(_VIEWS_AT_ONCE):
        views = render_views(source, specs.select(part), view_shape)[0]
        rows.append(pooled(views).float().cpu())
    return torch.cat(rows).numpy()


def standardised(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Embeddings ``(..., D)`` of length 1, each dimension centred and scaled by its spread over ``reference`` (N, D).

    The mean of a channel right after an InstanceNorm is nearly the same everywhere, so that raw cosines are all near 1.
    """
    spread = reference.std(axis=0)
    scaled = (rows - reference.mean(axis=0)) / np.where(spread > 1e-6 * max(float(spread.max()), 1e-12), spread, np.inf)
    return scaled / np.maximum(np.linalg.norm(scaled, axis=-1, keepdims=True), 1e-12)
