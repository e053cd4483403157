"""What a pretraining method is: a sampler of views and a module whose forward pass returns the losses."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from nnssl_stc3d.modules.feature_pyramid import check_unet, total_stride
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.samplers import ViewSampler

EMBEDDINGS = "embeddings"
"""Key under which a forward pass may return positive pairs, ``(P, 2, D)`` detached, for the collapse monitors."""

ConfigT = TypeVar("ConfigT", bound="PretrainConfig")


# Of one forward: the 24 blocks of Primus-L, in training and in evaluation, and some shapes of views.
_COMPILED_VERSIONS = 128


@dataclass(frozen=True)
class PretrainConfig:
    """Hyperparameters that every method has. Defaults are those of STC3D's paper (A.3.2).

    Attributes:
        batch_size: volumes a step, over all GPUs.
        view_shape: ``(Z, Y, X)`` voxels of every view; None takes ``view_share`` of the plan's patch size.
        view_share: along every axis, at most 1, the patch that the network will be finetuned on.
        optimizer: "adamw", "adam" or "sgd" (STC3D 3.4.3, with ``momentum`` and Nesterov).
        learning_rate: peak of the schedule.
        weight_decay: decoupled for AdamW.
        weight_decay_end: reached at the end along a cosine (Alice's released code); None keeps ``weight_decay``.
        momentum: of SGD, and beta1 of Adam.
        beta2: of Adam.
        amsgrad: variant of Adam that VoCo's released code uses.
        schedule: "cosine" to zero or "constant", after the warm-up.
        warmup_steps: steps of linear warm-up.
        gradient_clip: largest norm of the gradient.
        intensity: strength of the intensity augmentation of single views, 0 for none.
        seed: of the views; weights are initialised by torch's global generator.
    """

    batch_size: int = 4
    view_shape: tuple[int, int, int] | None = None
    view_share: float = 0.5
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    weight_decay_end: float | None = None
    momentum: float = 0.9
    beta2: float = 0.999
    amsgrad: bool = False
    schedule: str = "cosine"
    warmup_steps: int = 100
    gradient_clip: float = 12.0
    intensity: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        choices(self, optimizer=("adamw", "adam", "sgd"), schedule=("cosine", "constant"))
        positive(self, "batch_size", "learning_rate", "gradient_clip")
        not_negative(self, "weight_decay", "momentum", "warmup_steps", "intensity", "seed")
        if self.weight_decay_end is not None:
            not_negative(self, "weight_decay_end")
        if not 0 < self.view_share <= 1:
            raise ValueError(f"view_share is a share of the patch in (0, 1], got {self.view_share}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {self.beta2}")
        if self.view_shape is not None and (len(self.view_shape) != 3 or min(self.view_shape) < 1):
            raise ValueError(f"view_shape must be three positive numbers (Z, Y, X) or None, got {self.view_shape}")

    @property
    def resolved_view_shape(self) -> tuple[int, int, int]:
        """``view_shape``, once :meth:`PretrainMethod.resolve` has set it.

        Raises:
            ValueError: if it has not.
        """
        if self.view_shape is None:
            raise ValueError("view_shape must be resolved first, got None; see PretrainMethod.resolve")
        return self.view_shape

    def check_share(self, volumes: int) -> None:
        """Refuse a GPU's share of the batch in which a loss would have nothing to compare with.

        Args:
            volumes: of the batch on each GPU; ``batch_size`` where there is one.

        Raises:
            ValueError: if they are too few for a loss that looks at one GPU at a time.
        """
        del volumes

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain numbers, strings, lists and dictionaries."""
        return _plain(dataclasses.asdict(self))


class PretrainMethod(nn.Module, ABC):
    """A method to pretrain a network of nnU-Net.

    Heads, EMA teachers, centres and queues are submodules and buffers, so that optimiser, AMP, clipping, DDP, saving
    and resuming need no code of the method.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        config: hyperparameters with ``view_shape`` resolved.

    Attributes:
        name: how logs, checkpoints and tables call the method.
        transfers: parts of the network that pretraining trains; the others are frozen.
    """

    name: ClassVar[str]
    transfers: tuple[str, ...] = ("encoder",)
    # U-Nets of dynamic-network-architectures; their common attributes have no type.
    network: Any

    def __init__(self, network: nn.Module, config: PretrainConfig) -> None:
        super().__init__()
        self.check_network(network)
        self.network = network
        self.config = config

    @classmethod
    def check_network(cls, network: nn.Module) -> None:
        """Refuse networks that the method cannot pretrain, with NotImplementedError."""
        check_unet(network)

    @classmethod
    def resolve(cls, config: Any, network: nn.Module, patch_size: Sequence[int]) -> Any:
        """The configuration with everything set that depends on the network and the plan.

        Args:
            config: as the trainer names it; ``view_shape`` may be None.
            network: that will be pretrained.
            patch_size: ``(Z, Y, X)`` of the plan.

        Raises:
            ValueError: if the network cannot take views of the configured shape.
        """
        stride = total_stride(network)
        if config.view_shape is None:
            return dataclasses.replace(config, view_shape=default_view_shape(patch_size, stride, config.view_share))
        check_view_shape(config.view_shape, stride)
        return config

    def compile_network(self) -> None:
        """Compile in place, stage by stage: state-dict keys stay; losses with data-dependent shapes are left alone."""
        compile_in_place(self.network.encoder, *self.network.decoder.stages)

    def freeze_untrained(self) -> None:
        """Freeze what the method leaves untrained: DDP refuses parameters that get no gradient."""
        self.network.requires_grad_(False)
        for part in self.transfers:
            getattr(self.network, part).requires_grad_(True)
        self.network.decoder.seg_layers.requires_grad_(False)
        # The decoder holds the encoder as a submodule.
        self.network.encoder.requires_grad_("encoder" in self.transfers)

    def place(self, device: torch.device) -> None:
        """Move to a device, in the memory layout that its 3D convolutions are faster in: channels last on a CPU."""
        self.to(device)
        if device.type == "cpu":
            # bfloat16 would be faster still, but torch 2.15 returns wrong gradients for maps of 2x2x2.
            self.to(memory_format=torch.channels_last_3d)

    @classmethod
    @abstractmethod
    def view_sampler(cls, config: Any, patch_size: Sequence[int], spacing: Sequence[float]) -> ViewSampler:
        """The sampler that draws this method's views.

        Args:
            config: with ``view_shape`` resolved.
            patch_size: of the plan, which decides on in-plane rotation.
            spacing: mm per voxel, (z, y, x).
        """

    @abstractmethod
    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute ``"loss"`` and its detached terms, and optionally :data:`EMBEDDINGS`."""

    @property
    def voxel_head(self) -> nn.Module | None:
        """Maps descriptors of voxels, read from :meth:`voxel_maps`, to their embeddings; None if there are none."""
        return None

    def voxel_maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images ``(N, C, Z, Y, X)`` that are read at voxels, for methods with a :attr:`voxel_head`."""
        raise NotImplementedError(f"{self.name} does not embed voxels")

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step with the share of training that is done: EMA, temperatures."""
        del progress


def compile_in_place(*modules: nn.Module) -> None:
    """Compile modules of one kind, each for the shapes that it sees.

    They share the code of one ``forward``, of which torch keeps 8 compiled versions and runs the others as they are:
    too few for the stages of a decoder or the blocks of a transformer, each in training and in evaluation. With shapes
    left open instead, all but the first stage would be slower.
    """
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(_COMPILED_VERSIONS, getattr(torch._dynamo.config, limit)))
    for module in modules:
        module.compile(dynamic=False)


def default_view_shape(patch_size: Sequence[int], stride: Sequence[int], share: float = 0.5) -> tuple[int, int, int]:
    """A share of the patch, rounded to what the network's strides divide, with 2 bottleneck voxels or more on two axes.

    Half of 128^3 is the 64^3 of STC3D, VoCo and PiMPiC.

    Args:
        patch_size: ``(Z, Y, X)`` of the plan.
        stride: total stride of the network.
        share: along every axis.
    """
    cells = [max(1, round(p * share / s)) for p, s in zip(patch_size, stride)]
    # InstanceNorm cannot normalise a bottleneck of a single voxel.
    for axis in sorted(range(3), key=lambda a: -patch_size[a])[:2]:
        cells[axis] = max(2, cells[axis])
    shape = [c * s for c, s in zip(cells, stride)]
    return shape[0], shape[1], shape[2]


def check_view_shape(view_shape: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse views that the network's strides do not divide or that leave a single voxel at the bottleneck.

    Raises:
        ValueError: with the nearest shape that works.
    """
    if any(v % s for v, s in zip(view_shape, stride)) or all(v == s for v, s in zip(view_shape, stride)):
        nearest = tuple(max(2, round(v / s)) * s for v, s in zip(view_shape, stride))
        raise ValueError(
            f"view_shape {tuple(view_shape)} must be a multiple of the network's total stride {tuple(stride)} with "
            f"more than one voxel left at the bottleneck; the nearest is {nearest}"
        )


def choices(config: object, **allowed: Sequence[str]) -> None:
    """Raise ValueError for a field that is none of the allowed values."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {getattr(config, name)!r}")


def positive(config: object, *names: str) -> None:
    """Raise ValueError for a field that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)!r}")


def three_positive(config: object, *names: str) -> None:
    """Raise ValueError for a field that is not one positive number for each axis."""
    for name in names:
        value = getattr(config, name)
        if len(value) != 3 or min(value) < 1:
            raise ValueError(f"{name} must be three positive numbers (Z, Y, X), got {value}")


def not_negative(config: object, *names: str) -> None:
    """Raise ValueError for a field below 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)!r}")


def config_from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Rebuild a configuration from :meth:`PretrainConfig.to_dict`.

    Raises:
        ValueError: for options that the configuration does not have.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}; options are {', '.join(sorted(fields))}")
    arguments = {}
    for name, value in values.items():
        factory = fields[name].default_factory
        if isinstance(value, dict) and factory is not dataclasses.MISSING:
            # A nested dataclass, such as the ranges of the transformations.
            value = config_from_dict(type(factory()), value)
        arguments[name] = _frozen(value)
    return cls(**arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
