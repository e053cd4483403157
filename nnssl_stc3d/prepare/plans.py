"""Derives plans of a small network from nnU-Net's own plans, for computers without a GPU.

Only the network's width, and on request its depth, the patch and the batch change. Spacing, normalisation and the
data identifier stay, so the small plans train on the data that was preprocessed for the original ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl_stc3d.prepare.raw_dataset import write_json
from nnssl_stc3d.transfer.adaptation_plan import resolve_configuration

# Entries of arch_kwargs that hold one value per encoder stage, and one per decoder stage, in PlainConvUNet and
# ResidualEncoderUNet.
PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
PER_DECODER_STAGE = ("n_conv_per_stage_decoder",)


@dataclass(frozen=True)
class SmallPlansConfig:
    """What is made small.

    Attributes:
        base_features: channels of the first stage; each further stage doubles them.
        max_features: channels at most.
        patch_size: voxels (z, y, x) of the patch in the plans' axis order, None keeps the plans' patch.
        max_patch_voxels: without `patch_size`, shrinks the plans' patch to at most so many voxels.
        batch_size: patches in a batch, None keeps the plans' batch.
        stages: keeps at most so many encoder stages and drops the deepest, None keeps all.
    """

    base_features: int = 8
    max_features: int = 64
    patch_size: tuple[int, ...] | None = None
    max_patch_voxels: int | None = None
    batch_size: int | None = None
    stages: int | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without plans.

        Raises:
            ValueError: a number is out of range.
        """
        if not 1 <= self.base_features <= self.max_features:
            raise ValueError(
                f"Expected 1 <= base features <= max features, got base {self.base_features} and max "
                f"{self.max_features}."
            )
        if self.patch_size is not None and self.max_patch_voxels is not None:
            raise ValueError("Give the patch size or the most voxels that a patch may have, not both.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"The batch needs at least one patch, got {self.batch_size}.")
        if self.stages is not None and self.stages < 2:
            raise ValueError(f"A U-Net needs at least two stages, got {self.stages}.")


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """Reads a plans file of a preprocessed dataset.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name.
        name: plans identifier, such as "nnUNetPlans".

    Returns:
        The plans.

    Raises:
        ValueError: the file is missing or is no plans file.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        # splits, fingerprints and dataset.json lie in the same folder
        others = sorted(f.stem for f in folder.glob("*.json") if "lans" in f.stem)
        raise ValueError(
            f"No plans {file}. "
            + (
                f"This dataset has: {', '.join(others)}; choose one with -p."
                if others
                else "Run nnUNetv2_plan_and_preprocess first."
            )
        )
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Plan the dataset again.") from error
    if not isinstance(plans, dict) or "configurations" not in plans:
        raise ValueError(f"{file} has no 'configurations', so it is no nnU-Net v2 plans file.")
    return plans


def trainable_configuration(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """Copies one configuration with everything that it inherits.

    Args:
        plans: nnU-Net plans.
        configuration: name, such as "3d_fullres".

    Returns:
        The configuration without "inherits_from".

    Raises:
        ValueError: there is no such configuration, or it inherits from itself.
        NotImplementedError: it is 2D or a cascade.
    """
    resolved = resolve_configuration(plans, configuration)
    resolved.pop("inherits_from", None)
    if len(resolved.get("patch_size", ())) != 3:
        raise NotImplementedError(
            f"Configuration {configuration!r} has patch size {resolved.get('patch_size')}; only 3D "
            f"configurations are supported. Use 3d_fullres."
        )
    if resolved.get("previous_stage"):
        raise NotImplementedError(
            f"Configuration {configuration!r} is a cascade, which is not supported. Use 3d_fullres."
        )
    return resolved


def _architecture(configuration: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration's arch_kwargs after checking that widths and strides are listed in it."""
    architecture = configuration.get("architecture", {})
    kwargs = architecture.get("arch_kwargs", {})
    if not {"n_stages", "features_per_stage", "strides"} <= set(kwargs):
        got = architecture.get("network_class_name", "plans without an architecture, as nnU-Net wrote them before 2.5")
        raise NotImplementedError(
            "Small plans are derived for PlainConvUNet and ResidualEncoderUNet, whose plans list n_stages, "
            f"features_per_stage and strides; got {got}. Plan the dataset again with nnUNetv2_plan_experiment."
        )
    return dict(kwargs)


def downsampling(configuration: dict[str, Any], stages: int | None = None) -> tuple[int, ...]:
    """Total stride of the network along each axis (z, y, x).

    Args:
        configuration: a resolved configuration.
        stages: number of stages counted, None for all.
    """
    strides = np.array(_architecture(configuration)["strides"][:stages])
    return tuple(int(s) for s in strides.prod(axis=0))


def fit_patch_size(configuration: dict[str, Any], max_voxels: int, stages: int | None = None) -> tuple[int, int, int]:
    """Chooses a patch of about the plans' proportions that has few voxels and that the network's strides divide.

    Args:
        configuration: a resolved configuration.
        max_voxels: the patch has at most that many voxels, or two times the strides along each axis if those are more.
        stages: number of stages that will be kept, None for all.

    Returns:
        Patch size (z, y, x) in voxels.
    """
    patch = np.array(configuration["patch_size"], dtype=float)
    step = np.array(downsampling(configuration, stages))
    full = np.maximum(patch // step, 1).astype(int)
    size = full.copy()
    while (size * step).prod() > max_voxels:
        # shorten the axis that is longest compared with the plans' patch, but leave two cells at the bottleneck
        candidates = [axis for axis in range(3) if size[axis] > 2]
        if not candidates:
            break
        axis = max(candidates, key=lambda a: (size[a] * step[a] / patch[a], size[a] * step[a]))
        size[axis] -= 1
    z, y, x = (size * step).tolist()
    return z, y, x


def _check_patch(patch: Sequence[int], stride: Sequence[int]) -> None:
    """Raises ValueError if a patch does not suit the strides."""
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"Expected a patch size of three positive numbers (z, y, x), got {tuple(patch)}.")
    if any(p % s for p, s in zip(patch, stride, strict=True)):
        lower = tuple(max(p // s, 1) * s for p, s in zip(patch, stride, strict=True))
        upper = tuple(-(-p // s) * s for p, s in zip(patch, stride, strict=True))
        raise ValueError(
            f"Patch size {tuple(patch)} is not divisible by the network's strides {tuple(stride)}. "
            f"The nearest sizes that are: {lower} and {upper}. Fewer stages (--stages) have smaller strides."
        )
    if all(p == s for p, s in zip(patch, stride, strict=True)):
        raise ValueError(
            f"Patch size {tuple(patch)} leaves a single voxel at the network's bottleneck (strides "
            f"{tuple(stride)}), which cannot be "
            f"normalised. Use a larger patch or fewer stages."
        )


def derive_small_plans(
    plans: dict[str, Any], name: str, configuration: str = "3d_fullres", small: SmallPlansConfig | None = None
) -> dict[str, Any]:
    """Derives plans of a small network.

    Args:
        plans: nnU-Net plans; they are not changed.
        name: identifier of the new plans.
        configuration: the one configuration that the new plans have.
        small: widths, patch and batch; the default is `SmallPlansConfig()`.

    Returns:
        The new plans, with `plans_name` set.

    Raises:
        ValueError: see `trainable_configuration`; the patch is not divisible by the strides.
        NotImplementedError: 2D, a cascade or an architecture without stages.
    """
    small = small or SmallPlansConfig()
    resolved = trainable_configuration(plans, configuration)
    kwargs = _architecture(resolved)
    depth = int(kwargs["n_stages"])
    stages = min(small.stages or depth, depth)
    kwargs["n_stages"] = stages
    for key in PER_STAGE:
        if isinstance(kwargs.get(key), (list, tuple)):
            kwargs[key] = list(kwargs[key][:stages])
    for key in PER_DECODER_STAGE:
        if isinstance(kwargs.get(key), (list, tuple)):
            kwargs[key] = list(kwargs[key][: stages - 1])
    kwargs["features_per_stage"] = [min(small.base_features * 2**i, small.max_features) for i in range(stages)]

    patch = list(small.patch_size or resolved["patch_size"])
    if small.max_patch_voxels is not None:
        patch = list(fit_patch_size(resolved, small.max_patch_voxels, stages))
    _check_patch(patch, downsampling(resolved, stages))
    resolved["patch_size"] = patch
    resolved["batch_size"] = small.batch_size or resolved["batch_size"]
    resolved["architecture"] = {**resolved["architecture"], "arch_kwargs": kwargs}
    # a following cascade stage is not among the new plans' configurations
    resolved.pop("next_stage", None)

    derived = {key: deepcopy(value) for key, value in plans.items() if key != "configurations"}
    derived["plans_name"] = name
    derived["configurations"] = {configuration: resolved}
    return derived


def check_plans_name(name: str) -> None:
    """Refuses a name that nnU-Net cannot use for plans.

    Raises:
        ValueError: it contains "__" or a path.
    """
    if not name or "__" in name or Path(name).name != name:
        raise ValueError(
            f"{name!r} cannot be a plans identifier: nnU-Net names its results TRAINER__PLANS__CONFIGURATION, "
            "so it must be a plain name without '__' and '/'."
        )


def new_plans_file(folder: Path, plans: dict[str, Any]) -> Path:
    """Finds the file for new plans without touching what is there.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name.
        plans: to write.

    Returns:
        The file; it exists only if it holds these plans already.

    Raises:
        ValueError: other plans have that name, or data was preprocessed under it.
    """
    file = folder / f"{plans['plans_name']}.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != _as_read(plans):
            raise ValueError(f"{file} exists and differs from these plans. Choose another name with -o, or remove it.")
        return file
    for configuration in plans["configurations"].values():
        data = folder / configuration.get("data_identifier", "")
        if data != folder and data.exists():
            raise ValueError(
                f"{data} holds data that was preprocessed with other plans, which would be taken for these. Choose "
                "another name with -o, or remove it."
            )
    return file


def write_plans(file: Path, plans: dict[str, Any]) -> bool:
    """Writes plans unless the file is there; see :func:`new_plans_file`.

    Returns:
        Whether it was written.
    """
    if file.exists():
        return False
    write_json(file, plans)
    return True


def _as_read(plans: dict[str, Any]) -> Any:
    """Plans as JSON gives them back: lists instead of tuples."""
    return json.loads(json.dumps(plans))


def write_small_plans(
    folder: Path,
    source: str,
    target: str,
    configuration: str = "3d_fullres",
    small: SmallPlansConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes small plans beside the plans that they come from; see `write_derived_plans` and `derive_small_plans`."""
    return write_derived_plans(
        folder, source, target, lambda plans: derive_small_plans(plans, target, configuration, small), overwrite
    )


def write_derived_plans(
    folder: Path,
    source: str,
    target: str,
    derive: Callable[[dict[str, Any]], dict[str, Any]],
    overwrite: bool = False,
) -> Path:
    """Writes plans beside the plans that they come from.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name.
        source: identifier of the plans to start from.
        target: identifier of the new plans, which is also the file's name.
        derive: makes the new plans of the old ones.
        overwrite: replaces an existing file of that name.

    Returns:
        The file.

    Raises:
        ValueError: the new name is the old one, contains "__" or a path, or exists.
    """
    if target == source:
        raise ValueError(
            f"The new plans need a name of their own, got {target!r}, which are the plans that they are derived from."
        )
    check_plans_name(target)
    file = folder / f"{target}.json"
    plans = derive(read_plans(folder, source))
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists. Pass --overwrite to replace it or -o to write under another name.")
    file.write_text(json.dumps(plans, indent=4) + "\n", encoding="utf-8")
    return file
