"""What a benchmark can compare: methods, the ablations of the papers, and ways to finetune."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from nnssl_stc3d.views.samplers import TransformRanges

SCRATCH = "scratch"
LONGER = "scratch-longer"
"""From scratch, for as long as a pretraining and a finetuning together."""
STOCK = "stock"
# Way of finetuning -> module of nnssl_stc3d.trainers and trainer; "stock" is nnU-Net's own.
SCHEDULES = {
    "stc3d": ("finetune", "STC3DFinetuneTrainer"),
    STOCK: ("", "nnUNetTrainer"),
    "frozen-start": ("finetune", "STC3DFrozenStartTrainer"),
    "linear-probe": ("probe", "STC3DLinearProbeTrainer"),
    "nonlinear-probe": ("probe", "STC3DNonlinearProbeTrainer"),
    "linear-probe-decoder": ("probe", "STC3DLinearProbeDecoderTrainer"),
    "nonlinear-probe-decoder": ("probe", "STC3DNonlinearProbeDecoderTrainer"),
}

NO_MIRRORING = "-no-mirroring"
"""Ending of a way of finetuning that neither augments with mirrored images nor mirrors at prediction."""


class Schedule(NamedTuple):
    """A way of finetuning.

    Attributes:
        name: of :data:`SCHEDULES`.
        mirroring: as nnU-Net does, in training and at prediction.
        learning_rate: None for the trainer's own.
    """

    name: str
    mirroring: bool = True
    learning_rate: float | None = None


def parse_schedule(schedule: str) -> Schedule:
    """Read a way of finetuning such as "stc3d", "stc3d@0.003" or "stc3d-no-mirroring@0.003".

    Raises:
        ValueError: an unknown name, or something else than a positive learning rate.
    """
    full, at, text = schedule.partition("@")
    name = full.removesuffix(NO_MIRRORING)
    if name not in SCHEDULES:
        raise ValueError(
            f"expected ways of finetuning of {', '.join(SCHEDULES)}, each also with {NO_MIRRORING} at its end, got "
            f"{schedule!r}"
        )
    mirroring = name == full
    if not at:
        return Schedule(name, mirroring)
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"expected a positive learning rate after @, such as {name}@0.003, got {schedule!r}")
    return Schedule(name, mirroring, rate)


@dataclass(frozen=True)
class Method:
    """A pretraining trainer, with options that differ from its own.

    Attributes:
        name: on the command line and in tables.
        trainer: class name.
        changes: pairs of option and value.
    """

    name: str
    trainer: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def module(self) -> str:
        """Module of nnssl_stc3d.trainers that has the trainer."""
        return re.split(r"(?:Paper|Official)?PretrainTrainer", self.trainer)[0].lower()

    def config(self) -> Any:
        """The trainer's configuration with the changed options.

        Raises:
            ValueError: it has no such option, or not with such a value.
        """
        try:
            return replace(self._trainer_class().config, **dict(self.changes))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.described()}: {error}") from None

    def check_network(self, network: nn.Module, patch_size: Sequence[int]) -> None:
        """Refuses a network that the method cannot pretrain, as its trainer would before its first step.

        Raises:
            ValueError: with the reason.
        """
        method_class = self._trainer_class().method_class
        try:
            method_class.check_network(network)
            method_class.resolve(self.config(), network, patch_size)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.described()}: {error}") from error

    def _trainer_class(self) -> Any:
        return getattr(importlib.import_module(f"nnssl_stc3d.trainers.{self.module}"), self.trainer)

    @property
    def key(self) -> str:
        """Name that also tells options apart, for folders."""
        return f"{self.name}-{self._digest}" if self.changes else self.name

    @property
    def _digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.changes)).encode()).hexdigest()[:8]

    def trainer_name(self, length: str) -> str:
        """Name of the trainer of a length, such as "500steps"."""
        return "_".join([self.trainer, *([f"options{self._digest}"] if self.changes else []), length])

    def described(self) -> str:
        """Name and changed options, for people."""
        changes = ", ".join(f"{key}={value!r}" for key, value in self.changes)
        return f"{self.name} ({changes})" if changes else self.name


_FAMILIES = {"voco": "VoCo", "pimpic": "PiMPiC", "vox2vec": "Vox2Vec", "alice": "Alice"}
_TRAINERS = {
    "stc3d": "STC3DPretrainTrainer",
    "stc3d-paper": "STC3DPaperPretrainTrainer",
    **{name: f"{family}PretrainTrainer" for name, family in _FAMILIES.items()},
    **{f"{name}-paper": f"{family}PaperPretrainTrainer" for name, family in _FAMILIES.items()},
    **{f"{name}-official": f"{family}OfficialPretrainTrainer" for name, family in _FAMILIES.items()},
}
METHODS = {name: Method(name, trainer) for name, trainer in _TRAINERS.items()}


def _variants(method: str, **changes: Mapping[str, Any]) -> list[Method]:
    return [
        Method(f"{method}-{name.replace('_', '-')}", _TRAINERS[method], tuple(change.items()))
        for name, change in changes.items()
    ]


def _transforms(**kept: Any) -> dict[str, Any]:
    """Only some of the transformations of STC3D's default."""
    return {"transforms": replace(TransformRanges.none(), **kept)}


_DEFAULT = TransformRanges()
_WITH_BASES = {"pred_weight": 1.0, "reg_weight": 1.0}
# The paper's views, half of the patch; as many points a step as the default.
_HALF_VIEWS = {"view_share": 0.5, "regions": 2, "batch_size": 4, "dense_points": 64}
# What the default does not have is varied in the paper's form, which has it.
ABLATIONS: dict[str, list[Method]] = {
    # STC3D Table 5 and VoCo Table 6, around the default and in the paper's form.
    "losses": [
        METHODS["stc3d"],
        *_variants(
            "stc3d",
            without_stages={"stage_weight": 0.0},
            stages_only={"dense_weight": 0.0},
            half_views=_HALF_VIEWS,
            half_views_with_bases=_HALF_VIEWS | _WITH_BASES,
            dense_on_decoder={"dense_pyramid": "decoder"},
            dense_against_all={"dense_negatives": "batch"},
            smaller_rate={"learning_rate": 1e-3},
        ),
        *_variants(
            "stc3d-paper",
            info_nce_only={"pred_weight": 0.0, "reg_weight": 0.0},
            without_position={"pred_weight": 0.0},
            without_regulariser={"reg_weight": 0.0},
        ),
        METHODS["stc3d-paper"],
        METHODS["voco"],
        *_variants("voco", without_regulariser={"reg_weight": 0.0}),
    ],
    # STC3D Table 6.
    "transformations": [
        METHODS["stc3d"],
        *_variants(
            "stc3d",
            no_transformation=_transforms(),
            rotation=_transforms(rotation=_DEFAULT.rotation),
            translation=_transforms(translation=_DEFAULT.translation),
            scaling=_transforms(scaling=_DEFAULT.scaling),
        ),
    ],
    # What STC3D's paper does not give a value for; no table of the papers.
    "options": [
        METHODS["stc3d"],
        *_variants(
            "stc3d",
            tau_0_05={"dense_temperature": 0.05},
            tau_0_2={"dense_temperature": 0.2},
            three_views={"views_per_region": 3},
            without_intensity={"intensity": 0.0},
            half_ranges={"transforms": replace(_DEFAULT, rotation=15.0, translation=0.075, scaling=(0.9, 1.1))},
            double_ranges={"transforms": replace(_DEFAULT, rotation=60.0, translation=0.3, scaling=(0.64, 1.6))},
            less_overlap={"transforms": replace(_DEFAULT, min_overlap=0.2)},
            scaling_per_axis={"transforms": replace(_DEFAULT, scaling_per_axis=True)},
            quarter_turns={"transforms": replace(_DEFAULT, quarter_turns=0.5)},
            flips={"transforms": replace(_DEFAULT, flips=0.5)},
        ),
        METHODS["stc3d-paper"],
        *_variants(
            "stc3d-paper",
            tau_0_05={"temperature": 0.05},
            tau_0_2={"temperature": 0.2},
            pred_as_printed={"pred_form": "paper"},
            bins={"bins": (2, 2, 2)},
            bottleneck={"descriptor_stages": "bottleneck"},
            finer_regions={"region_scale": 1.0},
        ),
    ],
    # STC3D Table 7; the trainer crops at random.
    "cropping": [
        METHODS["stc3d-paper"],
        *_variants(
            "stc3d-paper",
            center={"cropping": "center"},
            edge={"cropping": "edge"},
            without_regulariser={"reg_weight": 0.0},
            center_without_regulariser={"cropping": "center", "reg_weight": 0.0},
            edge_without_regulariser={"cropping": "edge", "reg_weight": 0.0},
        ),
    ],
    # The forms that STC3D's text allows; the trainer has the discrepancy between bases.
    "regulariser": [
        METHODS["stc3d-paper"],
        *_variants(
            "stc3d-paper",
            without_regulariser={"reg_weight": 0.0},
            overlap_weighted={"reg_form": "overlap_weighted"},
            eq12={"reg_form": "eq12"},
        ),
    ],
    # VoCo Table 7; STC3D's paper gives no number.
    "bases": [
        METHODS["stc3d-paper"],
        *_variants(
            "stc3d-paper", **{f"{z}x{y}x{x}": {"grid": (z, y, x)} for z, y, x in [(1, 2, 2), (1, 3, 3), (2, 2, 2)]}
        ),
        METHODS["voco"],
        *_variants(
            "voco",
            **{f"{z}x{y}x{x}": {"grid": (z, y, x)} for z, y, x in [(1, 2, 2), (1, 3, 3), (1, 4, 4), (1, 5, 5)]},
        ),
    ],
    # VoCo Table 10 and STC3D Eq. 13.
    "lambda": [
        METHODS["stc3d-paper"],
        *_variants("stc3d-paper", lambda_0_5={"reg_weight": 0.5}, lambda_1_5={"reg_weight": 1.5}),
        METHODS["voco"],
        *_variants("voco", lambda_0_5={"reg_weight": 0.5}, lambda_1_5={"reg_weight": 1.5}),
    ],
}


def with_options(methods: Sequence[Method], options: Sequence[str]) -> list[Method]:
    """Changes options of methods.

    Args:
        methods: to compare.
        options: such as "vox2vec.points=100" or "stc3d.transforms.rotation=15": the name of a method, an option of its
            configuration or of a part of it, a Python literal.

    Raises:
        ValueError: an option that cannot be read, that does not exist, or of a method that is not compared.
    """
    changed = {method.name: method for method in methods}
    for option in options:
        match = re.fullmatch(r"([\w-]+)\.(\w+)(?:\.(\w+))?=(.+)", option)
        if not match or match[1] not in changed:
            raise ValueError(
                f"expected METHOD.OPTION=VALUE with a method of {', '.join(changed) or 'none'}, such as "
                f"vox2vec.points=100 or stc3d.transforms.rotation=15, got {option!r}"
            )
        method, key, part = changed[match[1]], match[2], match[3]
        value = _literal(match[4])
        if part:
            try:
                value = replace(getattr(method.config(), key), **{part: value})
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{option!r} cannot be set: {error}") from None
        changes = dict(method.changes) | {key: value}
        changed[match[1]] = replace(method, changes=tuple(changes.items()))
    for method in changed.values():
        method.config()
    return list(changed.values())


def _literal(text: str) -> Any:
    """A Python literal, a list as a tuple; what is none is a string."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value


def find_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name, in their order; "scratch" and "scratch-longer" are none of them.

    Raises:
        ValueError: an unknown name, one twice, or none.
    """
    known = METHODS | {method.name: method for ablation in ABLATIONS.values() for method in ablation}
    unknown = [name for name in names if name not in known and name not in (SCRATCH, LONGER)]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"expected different methods of {', '.join([SCRATCH, LONGER, *METHODS])}, or variants of an ablation such "
            f"as {ABLATIONS['losses'][1].name}, got {', '.join(names) or 'none'}"
        )
    return [known[name] for name in names if name not in (SCRATCH, LONGER)]
