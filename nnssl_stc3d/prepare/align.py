"""Plans that give one dataset the network and the preprocessing of another, and what was decided on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnssl_stc3d.prepare.plans import trainable_configuration
from nnssl_stc3d.transfer.differences import PlansReference, describe_plans, normalisation_words
from nnssl_stc3d.views.samplers import least_volume

NEEDED = ("patch_size", "spacing", "normalization_schemes", "architecture", "batch_size")
FAR_SPACING = 2.0
"""A chosen spacing that differs from the images' median by more than this factor is worth a warning."""

# Entries that belong to the labels of a dataset, not to the network or its input.
_OF_THE_LABELS = ("batch_dice",)
_WHY_NETWORK = "same network"
_WHY = {
    "patch size": "what the network was planned for",
    "spacing (mm)": "things keep their size in voxels",
    "transposition": "axes keep their meaning",
}


@dataclass(frozen=True)
class Side:
    """One of the two datasets.

    Attributes:
        dataset: such as "Dataset801_Unlabelled".
        plans: its plans; for the one that is adapted, those that nnU-Net made for it.
        configuration: such as "3d_fullres".
        channels: names of the image channels, in order.
        spacings: (N, 3) mm of the cases in the axis order of the files (z, y, x), or None where unknown.
        shapes: (N, 3) voxels of the cases, likewise.
    """

    dataset: str
    plans: dict[str, Any]
    configuration: str
    channels: tuple[str, ...]
    spacings: NDArray[np.float64] | None = None
    shapes: NDArray[np.float64] | None = None

    @classmethod
    def read(
        cls,
        dataset: str,
        plans: dict[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        fingerprint: Mapping[str, Any] | None = None,
    ) -> Side:
        """Makes a side of the contents of nnU-Net's files.

        Raises:
            ValueError: dataset.json names no channels, or the fingerprint has no cases.
        """
        names = dataset_json.get("channel_names", dataset_json.get("modality"))
        if not isinstance(names, Mapping) or not names:
            raise ValueError(f"Expected channel_names in the dataset.json of {dataset}, got {names!r}.")
        cases: list[NDArray[np.float64] | None] = [None, None]
        if fingerprint is not None:
            try:
                cases = [
                    np.asarray(fingerprint[key], float).reshape(-1, 3) for key in ("spacings", "shapes_after_crop")
                ]
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(
                    f"The fingerprint of {dataset} cannot be read ({error!r}). Make it again: "
                    f"nnUNetv2_extract_fingerprint -d {dataset[7:10]} --clean"
                ) from error
        return cls(dataset, plans, configuration, tuple(str(name) for name in names.values()), *cases)

    @property
    def resolved(self) -> dict[str, Any]:
        """The configuration; where a dataset's own plans lack it, the one that nnU-Net always writes for volumes."""
        known = self.plans["configurations"]
        name = self.configuration if self.configuration in known else "3d_fullres"
        return trainable_configuration(self.plans, name)

    @property
    def reference(self) -> PlansReference:
        """Plans and configuration."""
        return PlansReference(self.plans, self.configuration)

    def sizes(self, spacing: Sequence[float], transposition: Sequence[int]) -> NDArray[np.float64] | None:
        """(N, 3) voxels of the cases at a spacing given in the plan's axis order, or None where unknown."""
        if self.spacings is None or self.shapes is None:
            return None
        axes = list(transposition)
        return np.round(self.shapes[:, axes] * self.spacings[:, axes] / np.asarray(spacing, float))


class Decision(NamedTuple):
    """One property of the new plans; ``own`` is that of the dataset they are for."""

    name: str
    reference: Any
    own: Any
    chosen: Any
    why: str


class Aligned(NamedTuple):
    """New plans, how they came about, and what should make a user think twice."""

    plans: dict[str, Any]
    decisions: list[Decision]
    warnings: list[str]


class _Channel(NamedTuple):
    """How a channel of the images is normalised."""

    scheme: str
    mask: bool
    statistics: dict[str, float]
    why: str
    is_own: bool


def align(reference: Side, own: Side, name: str) -> Aligned:
    """Makes plans for one dataset that give the network and the preprocessing of another.

    Args:
        reference: the dataset whose plans are followed.
        own: the dataset that the new plans are for, with the plans that nnU-Net made for it.
        name: of the new plans.

    Returns:
        Plans with one configuration, the decisions and the warnings.

    Raises:
        ValueError: the plans followed lack something.
        NotImplementedError: 2D or a cascade.
    """
    followed = trainable_configuration(reference.plans, reference.configuration)
    missing = [key for key in NEEDED if not followed.get(key)]
    missing += [key for key in ("transpose_forward", "transpose_backward") if key not in reference.plans]
    if missing:
        raise ValueError(
            f"The plans {reference.plans.get('plans_name')} of {reference.dataset} lack {', '.join(missing)}. Plan "
            "that dataset again with nnUNetv2_plan_experiment."
        )
    channels = [_channel(index, reference, own, followed) for index in range(len(own.channels))]
    chosen = {key: value for key, value in followed.items() if key not in _OF_THE_LABELS and key != "next_stage"}
    chosen |= {key: own.resolved[key] for key in _OF_THE_LABELS if key in own.resolved}
    chosen["data_identifier"] = f"{name}_{reference.configuration}"
    chosen["normalization_schemes"] = [channel.scheme for channel in channels]
    chosen["use_mask_for_norm"] = [channel.mask for channel in channels]
    axes = [int(axis) for axis in reference.plans["transpose_forward"]]
    sizes = own.sizes(chosen["spacing"], axes)
    plans = {key: deepcopy(value) for key, value in reference.plans.items() if key != "configurations"}
    plans |= {
        "dataset_name": own.dataset,
        "plans_name": name,
        # Depends on the files of the dataset.
        "image_reader_writer": own.plans["image_reader_writer"],
        "foreground_intensity_properties_per_channel": {
            str(index): channel.statistics for index, channel in enumerate(channels)
        },
        "configurations": {reference.configuration: deepcopy(chosen)},
    }
    if sizes is not None and own.spacings is not None and own.shapes is not None:
        plans["configurations"][reference.configuration]["median_image_size_in_voxels"] = np.median(sizes, 0).tolist()
        plans["original_median_spacing_after_transp"] = np.median(own.spacings, 0)[axes].tolist()
        plans["original_median_shape_after_transp"] = np.median(own.shapes, 0)[axes].astype(int).tolist()
    decisions = _decisions(reference, own, PlansReference(plans, reference.configuration), channels)
    return Aligned(plans, decisions, _warnings(reference, own, chosen, channels, sizes))


def _channel(index: int, reference: Side, own: Side, followed: Mapping[str, Any]) -> _Channel:
    """Finds the channel of the reference that a channel is normalised like, or keeps its own normalisation."""
    own_scheme = own.resolved["normalization_schemes"][index]
    names = [name.casefold() for name in reference.channels]
    schemes = list(followed["normalization_schemes"])[: len(names)]
    same_name = [k for k, name in enumerate(names) if name == own.channels[index].casefold()]
    same_scheme = [k for k, scheme in enumerate(schemes) if scheme == own_scheme]
    if same_name:
        match, why = (index if index in same_name else same_name[0]), "channel of that name"
    elif same_scheme:
        match, why = (index if index in same_scheme else same_scheme[0]), "channel of the same kind"
    else:
        statistics = (own.plans.get("foreground_intensity_properties_per_channel") or {}).get(str(index), {})
        mask = bool(_entry(own.resolved.get("use_mask_for_norm"), index, False))
        return _Channel(own_scheme, mask, deepcopy(statistics), "no such channel there: its own", True)
    statistics = (reference.plans.get("foreground_intensity_properties_per_channel") or {}).get(str(match), {})
    mask = bool(_entry(followed.get("use_mask_for_norm"), match, False))
    return _Channel(schemes[match], mask, deepcopy(statistics), f"{why} ({reference.channels[match]})", False)


def _entry(values: Sequence[Any] | None, index: int, default: Any) -> Any:
    return values[index] if values is not None and index < len(values) else default


def _decisions(
    reference: Side, own: Side, chosen: PlansReference, channels: Sequence[_Channel]
) -> list[Decision]:  # fmt: skip
    there = describe_plans(reference.reference)
    has_configuration = own.configuration in own.plans["configurations"]
    here, result = (describe_plans(own.reference) if has_configuration else {}), describe_plans(chosen)
    rows = [
        Decision(name, there.get(name), here.get(name), value, _WHY.get(name, _WHY_NETWORK))
        for name, value in result.items()
        if name != "normalisation"
    ]
    for index, channel in enumerate(channels):
        rows.append(
            Decision(
                f"channel {index}, {own.channels[index]}",
                _normalisation_of(reference, index),
                _normalisation_of(own, index),
                normalisation_words(channel.scheme, channel.statistics),
                channel.why,
            )
        )
    resolved = {side.dataset: side.resolved for side in (reference, own)}
    new = chosen.plans["configurations"][chosen.configuration]
    for key, name, why in (
        ("batch_size", "batch size", "trainers of a pretraining have their own"),
        ("batch_dice", "batch Dice", "belongs to the labels"),
        ("data_identifier", "preprocessed data", "nothing made earlier is reused"),
    ):
        if key in new:
            rows.append(
                Decision(name, resolved[reference.dataset].get(key), resolved[own.dataset].get(key), new[key], why)
            )
    return rows


def _normalisation_of(side: Side, index: int) -> str | None:
    schemes = side.resolved["normalization_schemes"]
    if index >= len(schemes):
        return None
    statistics = (side.plans.get("foreground_intensity_properties_per_channel") or {}).get(str(index), {})
    return normalisation_words(schemes[index], statistics)


def _warnings(
    reference: Side,
    own: Side,
    chosen: Mapping[str, Any],
    channels: Sequence[_Channel],
    sizes: NDArray[np.float64] | None,
) -> list[str]:
    """What the plans allow and a user may not have meant."""
    found = []
    axes = list(reference.plans["transpose_forward"])
    patch, spacing = np.asarray(chosen["patch_size"]), np.asarray(chosen["spacing"], float)
    if sizes is not None:
        smaller = (sizes < patch).any(axis=1)
        if smaller.mean() > 0.5:
            found.append(
                f"The patch of {_shape(patch)} voxels ({_shape(patch * spacing)} mm) is larger than {smaller.sum()} of "
                f"the {len(sizes)} volumes of {own.dataset}, whose median is {_shape(np.median(sizes, 0))} voxels at "
                "that spacing: much of it would be padding. Follow plans with a smaller patch, or use larger volumes."
            )
        # STC3D shows views of the whole patch, the most of all pretraining trainers, and refuses what is too small.
        least = least_volume(patch.tolist())
        if flat := int((sizes < least).any(axis=1).sum()):
            found.append(
                f"{flat} of the {len(sizes)} volumes of {own.dataset} are too small to be pretrained on: at that "
                f"spacing they have fewer than {_shape(least)} voxels along an axis, which views of the patch need. "
                "Leave them out of a pretraining, pretrain with smaller views (view_share), or follow plans with a "
                "finer spacing or a smaller patch there."
            )
    if own.spacings is not None:
        median = np.median(own.spacings, 0)[axes]
        factor = spacing / median
        if max(*factor, *(1 / factor)) > FAR_SPACING:
            side = "finer" if (1 / factor).max() > factor.max() else "coarser"
            found.append(
                f"The spacing of {_shape(spacing)} mm is far {side} than that of {own.dataset}, whose median is "
                f"{_shape(median)} mm: what the images do not show cannot be learnt from them, and what is resampled "
                "away is lost."
            )
    if len(reference.channels) != len(own.channels):
        found.append(
            f"{reference.dataset} has {len(reference.channels)} channels ({', '.join(reference.channels)}), "
            f"{own.dataset} {len(own.channels)} ({', '.join(own.channels)}): STC3DFinetuneTrainer adapts the first "
            "convolution, stock nnUNetTrainer refuses the weights."
        )
    unmatched = [own.channels[index] for index, channel in enumerate(channels) if channel.is_own]
    if unmatched:
        found.append(
            f"No channel of {reference.dataset} is like {', '.join(unmatched)} of {own.dataset}, which keeps its own "
            "normalisation: the network meets other intensities than it was trained on."
        )
    if axes != list(own.plans["transpose_forward"]):
        found.append(
            f"nnU-Net would order the axes of {own.dataset} as {own.plans['transpose_forward']}, these plans have "
            f"{axes}: this is right if the images of both datasets are oriented alike."
        )
    return found


def _shape(values: Sequence[float] | NDArray[Any]) -> str:
    return " x ".join(f"{float(value):.4g}" for value in values)
