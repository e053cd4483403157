"""VoCo: contextual position prediction against base crops (Wu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.voco import base_discrepancy, position_accuracy, position_logits, position_prediction
from nnssl_stc3d.methods.base import (
    EMBEDDINGS,
    PretrainConfig,
    PretrainMethod,
    ViewBatch,
    choices,
    compile_in_place,
    not_negative,
    positive,
    three_positive,
)
from nnssl_stc3d.modules.ema import EMATeacher
from nnssl_stc3d.modules.feature_pyramid import decoder_features, encoder_channels
from nnssl_stc3d.modules.heads import Projector, pooled_descriptor
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.samplers import TransformRanges, is_anisotropic

# Quarter turns are drawn from all four, so three in four change something: 0.2 as released.
_RELEASED_AUGMENTATION = TransformRanges(
    rotation=0.0, quarter_turns=0.2 * 4 / 3, translation=0.0, scaling=(1.0, 1.0), flips=0.2
)


@dataclass(frozen=True)
class VoCoConfig(PretrainConfig):
    """Hyperparameters of VoCo. :meth:`official` is the released code, :meth:`paper` the text.

    Attributes:
        grid: bases along each axis.
        coverage: "window" tiles a window of the volume with the bases, "volume" the whole volume.
        base_scale: source voxels per view voxel of a base, "window" only; a smaller volume gets smaller cells.
        crops: random crops per volume, with the extent of a base.
        transforms: ranges of the transformations of the random crops; none by default.
        turn_bases: give each base quarter turns and flips from ``transforms`` as well.
        in_plane: turn about the first axis only, also where the plan is isotropic.
        teacher_momentum: of the EMA teacher, in [0, 1]; None trains without a teacher (the paper), and position
            prediction then has no gradient to the bases.
        bases_through: "both" encodes the bases with student and teacher, "teacher" with the teacher only: no gradient
            through most of the compute. The projector still learns from them.
        pred_form: "official" (released) or "paper" (Eq. 3).
        reg_weight: lambda of the discrepancy between bases (Eq. 7).
        reg_form: "official" (released), "symmetric" (the same with gradients to all bases) or "paper" (Eq. 5).
        descriptor_stages: "encoder" pools every stage of the encoder, "bottleneck" the last only, "encoder+decoder"
            adds the decoder's last stage, and the decoder is trained too.
        bins: spatial bins of the pooled descriptor; (1, 1, 1) is global average pooling.
        projector_hidden: width of the projector's hidden layers.
        projector_dim: width of the embedding.
    """

    grid: tuple[int, int, int] = (2, 2, 2)
    coverage: str = "window"
    base_scale: float = 1.0
    crops: int = 4
    transforms: TransformRanges = field(default_factory=TransformRanges.none)
    turn_bases: bool = False
    in_plane: bool = False
    teacher_momentum: float | None = 0.9
    bases_through: str = "both"
    pred_form: str = "official"
    reg_weight: float = 1.0
    reg_form: str = "symmetric"
    descriptor_stages: str = "encoder"
    bins: tuple[int, int, int] = (2, 2, 2)
    projector_hidden: int = 512
    projector_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(
            self,
            coverage=("window", "volume"),
            bases_through=("both", "teacher"),
            pred_form=("official", "paper"),
            reg_form=("official", "symmetric", "paper"),
            descriptor_stages=("encoder", "bottleneck", "encoder+decoder"),
        )
        positive(self, "base_scale", "crops", "projector_hidden", "projector_dim")
        not_negative(self, "reg_weight")
        three_positive(self, "grid", "bins")
        if max(self.grid) < 2:
            raise ValueError(f"position prediction needs at least 2 bases, got grid {self.grid}")
        if self.teacher_momentum is not None and not 0 <= self.teacher_momentum <= 1:
            raise ValueError(f"teacher_momentum must lie in [0, 1] or be None, got {self.teacher_momentum}")
        if self.teacher_momentum is None and self.bases_through == "teacher":
            raise ValueError("bases_through='teacher' needs a teacher, got teacher_momentum=None; give it a number")

    @classmethod
    def official(cls) -> VoCoConfig:
        """The released code: 1x4x4 bases over the whole volume, EMA teacher, 2048-d projector, AMSGrad."""
        return cls(
            batch_size=2, learning_rate=1e-4, amsgrad=True, warmup_steps=5000, intensity=0.0, grid=(1, 4, 4),
            coverage="volume", base_scale=1.5, crops=2, transforms=_RELEASED_AUGMENTATION, turn_bases=True,
            in_plane=True, reg_form="official", bins=(1, 1, 1), projector_hidden=2048, projector_dim=2048,
        )  # fmt: skip

    @classmethod
    def paper(cls) -> VoCoConfig:
        """The text: no teacher, Eqs. 3 and 5 as printed, the backbone's last features, 4 volumes with 4 crops."""
        return cls(
            intensity=0.0, grid=(1, 4, 4), coverage="volume", base_scale=1.5, transforms=_RELEASED_AUGMENTATION,
            turn_bases=True, in_plane=True, teacher_momentum=None, pred_form="paper", reg_form="paper",
            descriptor_stages="bottleneck", bins=(1, 1, 1), projector_hidden=2048, projector_dim=2048,
        )  # fmt: skip


class VoCo(PretrainMethod):
    """VoCo on a U-Net of nnU-Net. See :class:`VoCoConfig` and documentation/voco.md."""

    name = "VoCo"
    config: VoCoConfig

    def __init__(self, network: nn.Module, config: VoCoConfig) -> None:
        super().__init__(network, config)
        channels = encoder_channels(network)
        pooled = channels[-1] if config.descriptor_stages == "bottleneck" else sum(channels)
        if config.descriptor_stages == "encoder+decoder":
            self.transfers = ("encoder", "decoder")
            pooled += channels[0]
        self.n_bases = prod(config.grid)
        self.projector = Projector(pooled * prod(config.bins), config.projector_hidden, config.projector_dim)
        self.teacher = None if config.teacher_momentum is None else EMATeacher(self._student())

    @classmethod
    def view_sampler(cls, config: VoCoConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> RegionSampler:
        """See :meth:`PretrainMethod.view_sampler`."""
        return RegionSampler(
            view_shape=config.resolved_view_shape,
            spacing=tuple(spacing),
            in_plane=config.in_plane or is_anisotropic(patch_size),
            grid=config.grid,
            base_scale=config.base_scale if config.coverage == "window" else None,
            region_scale=None,
            regions=config.crops,
            views_per_region=1,
            transforms=config.transforms,
            turn_bases=config.turn_bases,
        )

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """See :meth:`PretrainMethod.forward`. ``batch.views``: ``(B, bases + crops, C, Z, Y, X)``."""
        config, n = self.config, self.n_bases
        student, teacher, labels = self._student(), self.teacher, batch.targets["position"]
        if teacher is None:
            bases, crops = self._project(student, self._describe(student, batch.views)).tensor_split([n], dim=1)
            # The paper stops the gradient of the bases here; they learn from the discrepancy alone.
            logits = position_logits(crops, bases.detach())
        else:
            with torch.no_grad():
                slow = self._describe(teacher.module, batch.views)
                slow_bases, slow_crops = self._project(teacher.module, slow).tensor_split([n], dim=1)
            if config.bases_through == "teacher":
                descriptors = torch.cat((slow[:, :n], self._describe(student, batch.views[:, n:])), dim=1)
            else:
                descriptors = self._describe(student, batch.views)
            bases, crops = self._project(student, descriptors).tensor_split([n], dim=1)
            logits = (position_logits(crops, slow_bases) + position_logits(slow_crops, bases)) / 2
        terms = {"pred": position_prediction(logits, labels, config.pred_form)}
        loss = terms["pred"]
        if config.reg_weight > 0:
            terms["reg"] = base_discrepancy(bases, config.reg_form)
            loss = loss + config.reg_weight * terms["reg"]
        terms["position_accuracy"] = position_accuracy(logits, labels)
        # A crop and the base that it overlaps most.
        nearest = labels.argmax(-1)[..., None].expand(-1, -1, bases.shape[-1])
        terms[EMBEDDINGS] = torch.stack((crops, bases.gather(1, nearest)), dim=2).flatten(0, 1)
        return {"loss": loss} | {name: value.detach() for name, value in terms.items()}

    def compile_network(self) -> None:
        """See :meth:`PretrainMethod.compile_network`: the teacher as well."""
        super().compile_network()
        if self.teacher is not None:
            compile_in_place(self.teacher.module["encoder"])
            if "decoder" in self.transfers:
                compile_in_place(*self.teacher.module["decoder"].stages)

    def after_step(self, progress: float) -> None:
        """Move the teacher: see :meth:`EMATeacher.update`."""
        del progress
        if self.teacher is not None and self.config.teacher_momentum is not None:
            self.teacher.update(self._student(), self.config.teacher_momentum)

    def _student(self) -> nn.ModuleDict:
        """What makes embeddings, without registering it a second time."""
        parts = {"encoder": self.network.encoder, "projector": self.projector}
        if "decoder" in self.transfers:
            parts["decoder"] = self.network.decoder
        return nn.ModuleDict(parts)

    def _describe(self, parts: nn.ModuleDict, views: Tensor) -> Tensor:
        """Pooled descriptors, ``(B, V, C, Z, Y, X) -> (B, V, F)``."""
        maps = parts["encoder"](views.flatten(0, 1))
        if self.config.descriptor_stages == "bottleneck":
            maps = maps[-1:]
        elif self.config.descriptor_stages == "encoder+decoder":
            maps = [*maps, decoder_features(parts["decoder"], maps)[-1]]
        return pooled_descriptor(maps, self.config.bins).unflatten(0, views.shape[:2])

    def _project(self, parts: nn.ModuleDict, descriptors: Tensor) -> Tensor:
        """Embeddings, normalised over all crops of the batch together, ``(B, V, F) -> (B, V, D)``."""
        return parts["projector"](descriptors.flatten(0, 1)).unflatten(0, descriptors.shape[:2])
