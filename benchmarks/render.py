"""Rendering all views of a batch at once against the chain crop, rotate, scale, resize.

The chain does what augmentation pipelines do: it cuts a box that is large enough to be turned, rotates it, scales it,
cuts out the middle and resizes that to the view, which interpolates three times. It is written twice, in torch
(``grid_sample`` and ``interpolate``) and in scipy (``affine_transform`` and ``zoom``, order 1). The row "tight chain"
is a chain that rotates only into the part that it needs afterwards; few pipelines do.

Accuracy is the error against an analytic image at exactly the positions that a renderer claims to show. For the chain
these are its own positions, after its rounding to whole voxels, so only interpolation counts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, pi

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, interleaved, machine, parser, ratio, report, seconds
from scipy import ndimage
from torch import Tensor

from nnssl_stc3d.views.geometry import bounding_half_extent
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges, controlled_view
from nnssl_stc3d.views.spec import ViewSpecs

WAVE_LENGTHS = (17.0, 11.0, 13.0)
"""Of the analytic image along z, y and x, voxels: structures of organs at the resolution of a view."""


def analytic(points: Tensor) -> Tensor:
    """A smooth image at any position, ``(..., 3)`` source voxels to ``(...)``."""
    z, y, x = (2 * pi * points[..., i] / WAVE_LENGTHS[i] for i in range(3))
    return torch.sin(z + 0.5 * torch.cos(y)) + torch.cos(y + 0.3 * x) * torch.sin(x)


def positions(center: Tensor, matrix: Tensor, view_shape: tuple[int, int, int]) -> Tensor:
    """Source positions of all voxels of a view, ``(Z, Y, X, 3)``."""
    offsets = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in view_shape]
    return center + torch.stack(torch.meshgrid(*offsets, indexing="ij"), dim=-1) @ matrix.T


def draw_views(shape: tuple[int, int, int], view: int, count: int, rng: np.random.Generator) -> list[tuple]:
    """Controlled views as STC3D draws them: centre, rotation and scale of each."""
    ranges, views = TransformRanges(), []
    for _ in range(count):
        center = rng.uniform(view / 2, np.asarray(shape) - view / 2) - 0.5
        moved, matrix = controlled_view(center, np.eye(3), ranges, shape, (view,) * 3, (1, 1, 1), False, rng)
        scale = np.linalg.norm(matrix, axis=0)
        views.append((moved, matrix / scale, float(scale[0])))
    return views


class Chain:
    """Crop, rotate, scale, cut out the middle, resize, for one view.

    Args:
        view: ``(center, rotation, scale)``.
        shape: of the source.
        size: voxels of the view along each axis.
        tight: rotate only into the part that is scaled afterwards.
    """

    def __init__(self, view: tuple, shape: tuple[int, int, int], size: int, tight: bool) -> None:
        center, self.rotation, scale = view
        half = bounding_half_extent(torch.from_numpy(self.rotation * scale), (size,) * 3).numpy()
        start = np.maximum(0, np.floor(center - half)).astype(int)
        stop = np.minimum(shape, np.ceil(center + half) + 1).astype(int)
        self.box = tuple(slice(a, b) for a, b in zip(start, stop))
        self.crop = tuple(int(n) for n in stop - start)
        # The rotation is about the view's centre, which then is the middle of the rotated box.
        self.middle = center - start
        self.turned = (ceil(scale * size),) * 3 if tight else self.crop
        self.scaled = tuple(max(1, round(n / scale)) for n in self.turned)
        # The middle stays the middle only if the same number of voxels is cut off on both sides.
        self.cut = tuple((m - min(m, size)) // 2 for m in self.scaled)
        self.middle_size = tuple(m - 2 * c for m, c in zip(self.scaled, self.cut))
        self.size = size
        steps = zip(self.turned, self.scaled, self.middle_size)
        self.matrix = self.rotation * np.array([n / m * c / size for n, m, c in steps])

    def torch(self, source: Tensor) -> Tensor:
        """``(1, 1, Z, Y, X) -> (size,) * 3``."""
        box = source[(slice(None), slice(None), *self.box)]
        crop, turned = np.asarray(self.crop), np.asarray(self.turned)
        # affine_grid wants (x, y, z) and box sizes of 2; align_corners=False counts from the faces.
        matrix = self.rotation * turned / crop[:, None]
        shift = (2 * self.middle + 1) / crop - 1
        theta = torch.from_numpy(np.c_[matrix[::-1, ::-1], shift[::-1]].astype(np.float32))[None]
        grid = F.affine_grid(theta, [1, 1, *self.turned], align_corners=False)
        turned_box = F.grid_sample(box, grid, "bilinear", "border", align_corners=False)
        scaled = F.interpolate(turned_box, self.scaled, mode="trilinear", align_corners=False)
        middle = scaled[(slice(None), slice(None), *self._middle())]
        return F.interpolate(middle, (self.size,) * 3, mode="trilinear", align_corners=False)[0, 0]

    def scipy(self, source: np.ndarray) -> np.ndarray:
        """``(Z, Y, X) -> (size,) * 3``."""
        offset = self.middle - self.rotation @ ((np.asarray(self.turned) - 1) / 2)
        turned = ndimage.affine_transform(
            source[self.box], self.rotation, offset, output_shape=self.turned, order=1, mode="nearest"
        )
        scaled = _zoom(turned, self.scaled)
        return _zoom(scaled[self._middle()], (self.size,) * 3)

    def _middle(self) -> tuple[slice, ...]:
        return tuple(slice(c, c + n) for c, n in zip(self.cut, self.middle_size))


def _zoom(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    factors = [n / m for n, m in zip(shape, image.shape)]
    return ndimage.zoom(image, factors, order=1, mode="nearest", grid_mode=True)


def error(views: Tensor, geometry: list[tuple[Tensor, Tensor]], size: int) -> float:
    """Root mean square error against the analytic image, leaving out the outermost voxels."""
    inner = (slice(1, -1),) * 3
    squares = [
        (view.double() - analytic(positions(center, matrix, (size,) * 3)))[inner].square().mean()
        for view, (center, matrix) in zip(views, geometry)
    ]
    return float(torch.stack(squares).mean().sqrt())


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1, help="of torch; a loader's worker has one")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    shape, size, count = ((48, 96, 96), 32, 6) if options.quick else ((96, 256, 256), 64, 24)
    repeats = 2 if options.quick else options.repeats

    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    source = analytic(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).float()
    views = draw_views(shape, size, count, np.random.default_rng(options.seed))
    center = torch.from_numpy(np.stack([v[0] for v in views]))
    matrix = torch.from_numpy(np.stack([v[1] * v[2] for v in views]))
    specs = ViewSpecs(torch.zeros((1, count), dtype=torch.long), center[None], matrix[None])
    chains = {tight: [Chain(v, shape, size, tight) for v in views] for tight in (False, True)}
    array = source.numpy()

    renderers: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: render_views(source[None, None, None], specs, (size,) * 3)[0, :, 0],
        "torch": lambda: torch.stack([c.torch(source[None, None]) for c in chains[False]]),
        "scipy": lambda: torch.from_numpy(np.stack([c.scipy(array) for c in chains[False]])),
        "tight": lambda: torch.stack([c.torch(source[None, None]) for c in chains[True]]),
    }
    timings = interleaved(renderers, repeats)
    geometry = {
        "ours": list(zip(center, matrix)),
        "torch": [(ce, torch.from_numpy(c.matrix)) for ce, c in zip(center, chains[False])],
        "tight": [(ce, torch.from_numpy(c.matrix)) for ce, c in zip(center, chains[True])],
    }
    geometry["scipy"] = geometry["torch"]
    errors = {name: error(renderers[name](), geometry[name], size) for name in renderers}

    rows = []
    for name, label, target in (
        ("torch", "chain in torch", 2.5),
        ("scipy", "chain in scipy", 6.0),
        ("tight", "tight chain in torch", None),
    ):
        cpu = ratio(timings[name], timings["ours"], "cpu")
        note = f"{seconds(timings[name]):.3f} s / {seconds(timings['ours']):.3f} s; processor time {cpu:.2f}"
        rows.append(
            Row(f"time, {label} / one interpolation", ratio(timings[name], timings["ours"]), target, True, note)
        )
    for name in ("torch", "scipy"):
        note = f"{errors[name]:.2e} / {errors['ours']:.2e} (root mean square, image has {float(source.std()):.2f})"
        rows.append(Row(f"error, chain in {name} / one interpolation", errors[name] / errors["ours"], 1.0, True, note))
    title = (
        f"Rendering {count} views of {size}^3 from a source of {'x'.join(map(str, shape))}, {options.threads} thread(s)"
    )
    report(title, rows, machine(), options)


if __name__ == "__main__":
    main()
