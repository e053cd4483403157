"""An inspection from files to files: everything is checked before anything long is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.data.body import BodyRule
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.voxel_labels import anatomical_labels, ignored_value, label_file
from nnssl_stc3d.evaluation.inspection.cases import Chosen, InspectedCases, choose_cases, default_cell
from nnssl_stc3d.evaluation.inspection.folder import check_folder, write_folder
from nnssl_stc3d.evaluation.inspection.models import (
    SCRATCH,
    Model,
    check_fits,
    common_view_shape,
    load_model,
    scratch_model,
)
from nnssl_stc3d.evaluation.inspection.options import InspectOptions
from nnssl_stc3d.evaluation.inspection.report import PAGE, About, make_files
from nnssl_stc3d.evaluation.inspection.run import inspect_models
from nnssl_stc3d.evaluation.voxel_embeddings import sha256
from nnssl_stc3d.transfer.checkpoint import load_checkpoint
from nnssl_stc3d.transfer.differences import PlansReference
from nnssl_stc3d.views.samplers import is_anisotropic

_DATASET, _SPLITS = "dataset.json", "splits_final.json"


@dataclass(frozen=True)
class Request:
    """Files of an inspection.

    Attributes:
        files: checkpoints.
        names: of the checkpoints in figures; None takes their methods'.
        dataset: folder of the dataset in nnUNet_preprocessed.
        plans: content of the plans file.
        configuration: of the plans.
        output: folder to write.
        overwrite: whether it may hold other files.
        device: "auto", "cpu", "cuda" or "mps".
    """

    files: Sequence[Path]
    names: Sequence[str] | None
    dataset: Path
    plans: dict[str, Any]
    configuration: str
    output: Path
    overwrite: bool = False
    device: str = "auto"


def inspect_checkpoints(request: Request, options: InspectOptions, progress: bool = True) -> Path:
    """Look at checkpoints and write what was found.

    Returns:
        The page.

    Raises:
        ValueError: if checkpoints, cases, point or folder do not fit, before anything is computed.
    """
    check_folder(request.output, request.overwrite)
    device = find_device(request.device)
    dataset_json = json.loads((request.dataset / _DATASET).read_text(encoding="utf-8"))
    data = PlansReference(request.plans, request.configuration)
    configuration = PlansManager(request.plans).get_configuration(request.configuration)
    checkpoints = []
    for file in request.files:
        checkpoints.append(load_checkpoint(file))
        check_fits(checkpoints[-1], str(file), data, dataset_json)
    names = model_names(checkpoints, request.names)
    view_shape = common_view_shape(checkpoints)
    # Voxels are embedded as a prediction would see them.
    z, y, x = (int(n) for n in configuration.patch_size)
    window = (z, y, x)
    chosen, cases = _cases(request, options, checkpoints, dataset_json, view_shape)

    make: list[Callable[[], Model]] = [
        partial(load_model, checkpoint, name, str(file), view_shape, window, device, options.pyramid, options.embedding)
        for checkpoint, name, file in zip(checkpoints, names, request.files)
    ]
    if options.scratch:
        make.append(partial(scratch_model, checkpoints[0], view_shape, window, device, options.pyramid, options.seed))
    # A network that cannot be built shall say so before the first one is looked at.
    reads = {model.name: model.reads for model in (build() for build in make)}
    found = inspect_models(make, cases, view_shape, is_anisotropic(configuration.patch_size), options, device, progress)
    write_folder(
        request.output,
        make_files(found, cases, _about(request, options, chosen, names, reads, view_shape, window, device)),
    )
    return request.output / PAGE


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" takes CUDA if there is one, else the CPU.

    Raises:
        ValueError: if it is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there[name]:
        raise ValueError(f"this machine or this PyTorch has no {name}. Use --device cpu.")
    return torch.device(name)


def model_names(checkpoints: Sequence[dict[str, Any]], given: Sequence[str] | None) -> list[str]:
    """A name for each checkpoint, all different: the user's, or the method's or trainer's with a number.

    Raises:
        ValueError: if the user's are too few, too many, alike or "scratch".
    """
    if given is not None:
        names = [name.strip() for name in given]
        if len(names) != len(checkpoints) or len({*names, SCRATCH, ""}) != len(names) + 2:
            raise ValueError(
                f"expected {len(checkpoints)} different names, none of them empty or {SCRATCH}, got {', '.join(names)}"
            )
        return names
    kinds = [
        c["method"]["name"] if isinstance(c.get("method"), dict) else str(c.get("trainer_name", "network"))
        for c in checkpoints
    ]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} {kinds[: index + 1].count(kind)}"
        for index, kind in enumerate(kinds)
    ]


def _cases(
    request: Request,
    options: InspectOptions,
    checkpoints: Sequence[dict[str, Any]],
    dataset_json: dict[str, Any],
    view_shape: tuple[int, int, int],
) -> tuple[Chosen, InspectedCases]:
    """The cases to look at; they are there, finite and large enough, and hold the point."""
    resolved = PlansManager(request.plans).get_configuration(request.configuration)
    folder = request.dataset / resolved.data_identifier
    splits_file = request.dataset / _SPLITS
    splits = json.loads(splits_file.read_text(encoding="utf-8")) if splits_file.is_file() else None
    point = options.point
    chosen = choose_cases(
        CaseDataset.list_identifiers(folder), checkpoints, request.dataset.name, splits, options.max_cases,
        point.case if point else None,
    )  # fmt: skip
    images = CaseDataset(folder, chosen.identifiers)
    rule = BodyRule.of_plan(request.plans, resolved.configuration)
    images.check(view_shape, progress=False)
    labels = anatomical_labels(dataset_json)
    if not all(label_file(folder, name).is_file() for name in chosen.identifiers):
        labels = {}
    cell = options.cell_mm or default_cell([images.shape(i) for i in chosen.identifiers], rule.spacing)
    z, y, x = request.plans["transpose_backward"]
    ignored = ignored_value(dataset_json)
    cases = InspectedCases(images, chosen.identifiers, rule, cell, labels, ignored, (z, y, x))
    if point is not None:
        point.voxel(cases.spacing, images.shape(point.case), cases.scan_grid(point.case))
    return chosen, cases


def _about(
    request: Request,
    options: InspectOptions,
    chosen: Chosen,
    names: Sequence[str],
    reads: dict[str, str],
    view_shape: tuple[int, int, int],
    window: tuple[int, int, int],
    device: torch.device,
) -> About:
    """What stands above the figures and behind them."""
    facts = {name: str(file) for name, file in zip(names, request.files)}
    facts |= {
        "data": f"{request.dataset.name}, {request.configuration} of {request.plans['plans_name']}",
        "cases": f"{len(chosen.identifiers)}: {', '.join(chosen.identifiers)}",
        "views": f"{' x '.join(map(str, view_shape))} voxels",
        "windows for voxels": f"{' x '.join(map(str, window))} voxels",
        "voxel embeddings": "; ".join(f"{name}: {what}" for name, what in reads.items()),
        "seed": str(options.seed),
    }
    settings = {
        "checkpoints": {
            name: {"file": str(file), "sha256": sha256(file), "voxels": reads[name]}
            for name, file in zip(names, request.files)
        },
        "dataset": request.dataset.name,
        "plans": request.plans["plans_name"],
        "configuration": request.configuration,
        "unseen_cases": chosen.unseen,
        "about_cases": chosen.statement,
        "view_shape": view_shape,
        "window": window,
        "device": str(device),
        "options": asdict(options),
    }
    caveat = chosen.statement + " These are properties of features; whether they help is for a benchmark to say."
    return About(f"Inspection of {', '.join(names)}", facts, caveat, settings)
