"""Batches of rendered views. Every batch follows from its index alone, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.intensity import augment_views, intensity_transforms
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import ViewSampler
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs


class LoadedBatch(NamedTuple):
    """A batch and the cases it shows, ``B`` times ``n_sources`` identifiers."""

    batch: ViewBatch
    cases: list[list[str]]


class Sample(NamedTuple):
    """The views of one sample.

    Attributes:
        sources: boxes ``(C, Z, Y, X)`` of the volumes, as read.
        specs: ``source (V,)``, ``center (V, 3)``, ``matrix (V, 3, 3)``, in voxels of the boxes.
        views: ``(V, C, *view_shape)``.
        targets: what the sampler found while sampling.
    """

    sources: list[torch.Tensor]
    specs: ViewSpecs
    views: torch.Tensor
    targets: dict[str, torch.Tensor] = {}


class ViewDataset(Dataset):
    """Batch ``i`` of a run: a pure function of the seeds and ``i``, so that a resumed run sees what it would have seen.

    Args:
        cases: preprocessed cases.
        sampler: draws the views.
        batch_size: samples in a batch.
        intensity: strength of the intensity augmentation, 0 for none.
        seed: what distinguishes runs, ranks and training from validation.
        guides: of every case, for samplers that are guided.
    """

    def __init__(
        self,
        cases: CaseDataset,
        sampler: ViewSampler,
        batch_size: int,
        intensity: float,
        seed: tuple[int, ...],
        guides: Mapping[str, Guide] | None = None,
    ) -> None:
        if len(cases.identifiers) < sampler.n_sources:
            raise ValueError(
                f"this method looks at {sampler.n_sources} cases at once, got {len(cases.identifiers)} "
                f"({', '.join(cases.identifiers)}). Add cases, or train with the fold 'all' if this is a small fold."
            )
        if sampler.guided and guides is None:
            raise ValueError(
                f"{type(sampler).__name__} samples with guides, got none. Make them with "
                "nnssl_stc3d.data.guides.body_guides and pass them as guides=..."
            )
        self.cases = cases
        self.sampler = sampler
        self.batch_size = batch_size
        self.transform = intensity_transforms(intensity)
        self.seed = seed
        self.guides = guides if sampler.guided else None

    def __getitem__(self, index: int) -> LoadedBatch:
        rng = self._rng(index)
        chosen = self._choose(rng)
        # Sources can be whole volumes: one sample's at a time.
        samples = [self._sample(names, rng)._replace(sources=[]) for names in chosen]
        specs = stack_specs([s.specs for s in samples])
        views = torch.stack([s.views for s in samples])
        targets = {name: torch.stack([s.targets[name] for s in samples]) for name in samples[0].targets}
        return LoadedBatch(ViewBatch(views, specs, targets | self.sampler.targets(specs, rng)), chosen)

    def preview(self, index: int) -> tuple[Sample, list[str]]:
        """The first sample of a batch with the sources it looks into, and the names of its cases."""
        rng = self._rng(index)
        names = self._choose(rng)[0]
        return self._sample(names, rng), names

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, index])

    def _sample(self, names: list[str], rng: np.random.Generator) -> Sample:
        shapes = [self.cases.shape(name) for name in names]
        if self.guides is None:
            boxes, specs, targets = self.sampler.sample(shapes, rng)
        else:
            boxes, specs, targets = self.sampler.sample(shapes, rng, [self.guides[name] for name in names])
        sources = [torch.from_numpy(self.cases.read(name, box)) for name, box in zip(names, boxes)]
        return Sample(sources, specs, self._render(sources, specs, rng), targets)

    def _choose(self, rng: np.random.Generator) -> list[list[str]]:
        """Cases of one batch: no case twice as long as there are enough."""
        identifiers = self.cases.identifiers
        sources = self.sampler.n_sources
        wanted = self.batch_size * sources
        if sources > 1 and wanted > len(identifiers):
            # The volumes of one sample differ, even where those of the batch cannot.
            orders = [rng.permutation(len(identifiers))[:sources] for _ in range(self.batch_size)]
            return [[identifiers[i] for i in order] for order in orders]
        order = np.concatenate([rng.permutation(len(identifiers)) for _ in range(-(-wanted // len(identifiers)))])
        chosen = [identifiers[i] for i in order[:wanted]]
        return [chosen[i : i + sources] for i in range(0, wanted, sources)]

    def _render(self, sources: list[torch.Tensor], specs: ViewSpecs, rng: np.random.Generator) -> torch.Tensor:
        """Render and augment the views of one sample, ``(V, C, *view_shape)``."""
        shape = self.sampler.view_shape
        views = torch.empty((self.sampler.n_views, sources[0].shape[0], *shape))
        for index, source in enumerate(sources):
            mine = (specs.source == index).nonzero()[:, 0]
            # Boxes differ in size, so each source is rendered on its own and is source 0 of that call.
            alone = ViewSpecs(torch.zeros_like(mine)[None], specs.center[None, mine], specs.matrix[None, mine])
            views[mine] = render_views(source[None, None], alone, shape)[0]
        plain = self.sampler.n_plain
        views[plain:] = augment_views(views[plain:], self.transform, rng)
        return views


def batches(
    dataset: ViewDataset, start: int, stop: int, workers: int, pin_memory: bool, persistent: bool = False
) -> DataLoader:
    """Load the batches ``start`` to ``stop`` of a run in order.

    An exception in a worker reaches the caller with the worker's own traceback.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        # A loader draws a seed for its workers. From the global generator, that would change the dropout of a resumed
        # run, which makes its loader after it has restored the generator's state.
        generator=torch.Generator(),
    )


def endless(loader: DataLoader) -> Iterator[LoadedBatch]:
    """Go through a loader again and again: the fixed views of a validation."""
    while True:
        yield from loader
