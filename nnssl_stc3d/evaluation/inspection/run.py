"""Runs the parts of an inspection on each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from nnssl_stc3d.evaluation.inspection.cases import InspectedCases, default_reference
from nnssl_stc3d.evaluation.inspection.invariance import Invariance, case_similarities, invariance_views, summarise
from nnssl_stc3d.evaluation.inspection.models import Model
from nnssl_stc3d.evaluation.inspection.options import InspectOptions
from nnssl_stc3d.evaluation.inspection.places import Place, Similarity, nearest_places, similarity
from nnssl_stc3d.evaluation.inspection.spectrum import Spectrum, spectrum
from nnssl_stc3d.evaluation.inspection.views import embed_views, random_views, standardised
from nnssl_stc3d.evaluation.inspection.voxels import Drawn, VoxelMap, draw_cells, embed_in_plane, rows_of
from nnssl_stc3d.views.guide import Guide

# Enough to fix the scale of the channels and the directions that are kept.
_CALIBRATION_CASES = 8


@dataclass
class Inspection:
    """What was found.

    Attributes:
        reference: case and voxel ``(3,)`` that others are compared with.
        why: what that place is, in words.
        spectra: network -> spectrum.
        invariance: network -> curves.
        shrunk: smallest scale at which the invariance looks at a case, 1 if all cases are large enough.
        similarity: network -> similarity map of the reference's case.
        drawn: the cells of the voxel maps.
        voxels: network -> PCA and t-SNE.
        places: network -> nearest places in the other cases.
        kept: network -> share of the embeddings' energy that the maps keep.
        labels: label maps of cases that were read.
    """

    reference: tuple[str, np.ndarray]
    why: str
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    invariance: dict[str, Invariance] = field(default_factory=dict)
    shrunk: float = 1.0
    similarity: dict[str, Similarity] = field(default_factory=dict)
    drawn: Drawn | None = None
    voxels: dict[str, VoxelMap] = field(default_factory=dict)
    places: dict[str, list[Place]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)


def inspect_models(
    models: Sequence[Callable[[], Model]],
    cases: InspectedCases,
    view_shape: tuple[int, int, int],
    in_plane: bool,
    options: InspectOptions,
    device: torch.device,
    progress: bool = True,
) -> Inspection:
    """Look at each network with the same views, cells and points.

    Args:
        models: make a network each; one after the other is in memory.
        cases: to look at; that of the point first.
        view_shape: ``(Z, Y, X)`` of views and windows.
        in_plane: rotate about the first axis only.
        options: what is looked at.
        device: to compute on.
        progress: show bars.

    Raises:
        ValueError: if the point lies outside its case, or the cases hold too few labels.
    """
    guides = {n: cases.guide(n) for n in tqdm(cases.names, "bodies", leave=False, disable=not progress)}
    result = _prepare(cases, guides, options)
    for make in models:
        model = make()
        if {"spectrum", "invariance"} & set(options.parts):
            _look_at_views(result, model, cases, guides, view_shape, in_plane, options, device, progress)
        if {"similarity", "voxels", "neighbours"} & set(options.parts):
            _look_at_places(result, model, cases, guides, options, progress)
    return result


def _prepare(cases: InspectedCases, guides: Mapping[str, Guide], options: InspectOptions) -> Inspection:
    """What all networks share: the reference, label maps and cells."""
    first, point = cases.names[0], options.point
    if point is not None:
        voxel = point.voxel(cases.spacing, cases.images.shape(first), cases.scan_grid(first))
        result = Inspection((first, voxel), "the given point")
    else:
        voxel, why = default_reference(guides[first], cases.labels(first), cases.label_names)
        result = Inspection((first, voxel), f"{why}, since no point was given")
    if {"voxels", "neighbours"} & set(options.parts):
        found = {name: cases.labels(name) for name in cases.names}
        if all(labels is not None for labels in found.values()):
            result.labels = {name: labels for name, labels in found.items() if labels is not None}
    if "voxels" in options.parts:
        rng = np.random.default_rng([options.seed, 2])
        result.drawn = draw_cells(guides, result.labels, cases.label_names, options.points, rng)
    return result


def _look_at_views(
    result: Inspection,
    model: Model,
    cases: InspectedCases,
    guides: Mapping[str, Guide],
    view_shape: tuple[int, int, int],
    in_plane: bool,
    options: InspectOptions,
    device: torch.device,
    progress: bool,
) -> None:
    """Spectrum and invariance; the random views of the first also fix the scale of the second."""
    per_case = -(-options.views // len(cases.names))
    reference, moved = [], []
    for index, name in enumerate(tqdm(cases.names, f"{model.name}: views", disable=not progress)):
        shape, volume = cases.images.shape(name), cases.volume(name)
        rng = np.random.default_rng([options.seed, 0, index])
        specs = random_views(shape, view_shape, per_case, rng, guides[name])
        reference.append(embed_views(model.backbone.pooled, volume, specs, view_shape, device))
        if "invariance" in options.parts:
            rng = np.random.default_rng([options.seed, 1, index])
            specs, scale = invariance_views(
                shape, view_shape, cases.spacing, in_plane, options.regions, rng, guides[name]
            )
            result.shrunk = min(result.shrunk, scale)
            moved.append(embed_views(model.backbone.pooled, volume, specs, view_shape, device))
    rows = np.concatenate(reference)
    if "spectrum" in options.parts:
        result.spectra[model.name] = spectrum(rows)
    if moved:
        found = [case_similarities(standardised(case, rows)) for case in moved]
        result.invariance[model.name] = summarise(found, options.regions)


def _look_at_places(
    result: Inspection,
    model: Model,
    cases: InspectedCases,
    guides: Mapping[str, Guide],
    options: InspectOptions,
    progress: bool,
) -> None:
    """Similarity map, voxel map and nearest places, all from one map of embeddings for each case."""
    several = {"voxels", "neighbours"} & set(options.parts)
    names = cases.names if several else cases.names[:1]
    some = cases.names[:: max(1, -(-len(cases.names) // _CALIBRATION_CASES))]
    result.kept[model.name] = model.embedder.calibrate(
        (cases.volume(n) for n in some), [cases.grid(n) for n in some], options.width, [guides[n].body for n in some]
    )
    maps = {
        name: replace(guides[name], features=model.embedder(cases.volume(name), cases.grid(name)))
        for name in tqdm(names, f"{model.name}: places", disable=not progress)
    }
    case, voxel = result.reference
    if "similarity" in options.parts:
        result.similarity[model.name] = similarity(maps[case], voxel, cases.spacing, options.seed)
    if result.drawn is not None:
        result.voxels[model.name] = embed_in_plane(rows_of(result.drawn, maps), result.drawn, options.seed)
    if "neighbours" in options.parts:
        others = {name: guide for name, guide in maps.items() if name != case}
        result.places[model.name] = nearest_places(
            maps[case], voxel, others, cases.spacing, options.neighbours, result.labels
        )
