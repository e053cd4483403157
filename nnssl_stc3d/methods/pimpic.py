"""PiMPiC: how much do patches overlap, and what do they share (Karimzadeh et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.pimpic import intersection_contrast, intersection_measure, overlap_error
from nnssl_stc3d.methods.base import (
    EMBEDDINGS,
    PretrainConfig,
    PretrainMethod,
    ViewBatch,
    choices,
    not_negative,
    positive,
)
from nnssl_stc3d.modules.feature_pyramid import encoder_channels
from nnssl_stc3d.modules.heads import Projector
from nnssl_stc3d.modules.intersection_pooling import pool_boxes, pool_masks
from nnssl_stc3d.views.patch_sampler import PatchSampler
from nnssl_stc3d.views.samplers import TransformRanges, is_anisotropic


@dataclass(frozen=True)
class PiMPiCConfig(PretrainConfig):
    """Hyperparameters of PiMPiC. :meth:`official` is the released code, :meth:`paper` the text.

    Attributes:
        patches: patches of each volume.
        reach: largest distance of a patch's start from the anchor's along each axis, fraction of the patch.
        transforms: ranges of the transformations of the patches; none by default. With rotations, what two patches
            share is no box any more, and PiC pools with soft masks.
        pim_weight: of PiM.
        pim_form: "official" (released: mean over all entries) or "paper" (Eq. 1).
        pim_strides: levels whose channel means PiM reads, by their largest stride; those that the network has.
        pim_hidden: width of the hidden layers of PiM's projector.
        pic_weight: of PiC.
        pic_form: "official" (released) or "paper" (Eq. 2, six pairs).
        pic_strides: levels that PiC pools, as ``pim_strides``.
        pic_hidden: width of the hidden layers of PiC's projector.
        pair_overlap: overlap from which PiC contrasts a pair (released; the paper has no threshold).
        temperature: tau of PiC.
        projector_dim: width of both embeddings.
    """

    patches: int = 8
    reach: float = 0.8
    transforms: TransformRanges = field(default_factory=TransformRanges.none)
    pim_weight: float = 1.0
    pim_form: str = "official"
    pim_strides: tuple[int, ...] = (4, 8, 16, 32)
    pim_hidden: int = 256
    pic_weight: float = 1.0
    pic_form: str = "official"
    pic_strides: tuple[int, ...] = (1, 2, 4)
    pic_hidden: int = 128
    pair_overlap: float = 0.01
    temperature: float = 1.0
    projector_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(self, pim_form=("official", "paper"), pic_form=("official", "paper"))
        positive(self, "temperature", "pim_hidden", "pic_hidden", "projector_dim")
        not_negative(self, "reach", "pim_weight", "pic_weight")
        if self.patches < 2:
            raise ValueError(
                f"patches must be at least 2 (overlaps are between patches of a volume), got {self.patches}"
            )
        if not 0 < self.pair_overlap <= 1:
            raise ValueError(f"pair_overlap must lie in (0, 1], got {self.pair_overlap}")
        for name in ("pim_strides", "pic_strides"):
            strides = getattr(self, name)
            if not strides or min(strides) < 1 or len(set(strides)) < len(strides):
                raise ValueError(f"{name} must be different positive numbers, such as (4, 8, 16), got {strides}")
        if not (self.pim_weight or self.pic_weight):
            raise ValueError("pim_weight and pic_weight are both 0: there is nothing to train")

    @classmethod
    def official(cls) -> PiMPiCConfig:
        """The released code: 32 patches of one volume, levels of stride 4 to 16, Adam with a constant rate."""
        return cls(
            batch_size=1, patches=32, optimizer="adam", learning_rate=1e-5, weight_decay=0.0, schedule="constant",
            warmup_steps=0, pim_strides=(4, 8, 16),
        )  # fmt: skip

    @classmethod
    def paper(cls) -> PiMPiCConfig:
        """The text: Eqs. 1 and 2 as printed, no threshold on the overlap to speak of."""
        return cls(
            batch_size=1, patches=32, optimizer="adam", learning_rate=1e-5, weight_decay=0.0, schedule="constant",
            warmup_steps=0, pim_strides=(4, 8, 16), pim_form="paper", pic_form="paper", pair_overlap=1e-6,
        )  # fmt: skip


class PiMPiC(PretrainMethod):
    """PiMPiC on a U-Net of nnU-Net. See :class:`PiMPiCConfig` and documentation/pimpic.md."""

    name = "PiMPiC"
    config: PiMPiCConfig

    def __init__(self, network: nn.Module, config: PiMPiCConfig) -> None:
        super().__init__(network, config)
        strides, channels = np.cumprod(np.array(self.network.encoder.strides), axis=0), encoder_channels(network)
        self.pim_stages, self.pic_stages = [], []
        if config.pim_weight > 0:
            self.pim_stages = _stages(strides, config.pim_strides, "pim_strides")
            cells = [prod(v // int(s) for v, s in zip(config.resolved_view_shape, strides[i])) for i in self.pim_stages]
            self.pim_projector = Projector(sum(cells), config.pim_hidden, config.projector_dim)
        if config.pic_weight > 0:
            self.pic_stages = _stages(strides, config.pic_strides, "pic_strides")
            pooled = sum(channels[i] for i in self.pic_stages)
            self.pic_projector = Projector(pooled, config.pic_hidden, config.projector_dim)

    @classmethod
    def view_sampler(cls, config: PiMPiCConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> PatchSampler:
        """See :meth:`PretrainMethod.view_sampler`."""
        return PatchSampler(
            view_shape=config.resolved_view_shape,
            spacing=tuple(spacing),
            in_plane=is_anisotropic(patch_size),
            patches=config.patches,
            reach=config.reach,
            transforms=config.transforms,
        )

    def freeze_untrained(self) -> None:
        """Freeze the stages below the deepest that a loss reads as well."""
        super().freeze_untrained()
        for stage in self.network.encoder.stages[max(self.pim_stages + self.pic_stages) + 1 :]:
            stage.requires_grad_(False)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """See :meth:`PretrainMethod.forward`. ``batch.views``: ``(B, patches, C, Z, Y, X)``."""
        config, overlap = self.config, batch.targets["overlap"]
        maps = self.network.encoder(batch.views.flatten(0, 1))
        terms: dict[str, Tensor] = {}
        result: dict[str, Tensor] = {}
        if config.pim_weight > 0:
            # Where something is, not what: the mean over channels keeps the place of every voxel (2.1, 2.2).
            descriptors = torch.cat([maps[i].mean(1).flatten(1) for i in self.pim_stages], dim=1)
            embeddings = self.pim_projector(descriptors).unflatten(0, overlap.shape[:2])
            terms["pim"] = intersection_measure(embeddings, overlap, config.pim_form)
            result["overlap_error"] = overlap_error(embeddings, overlap)
            result[EMBEDDINGS] = _nearest(embeddings, overlap)
        if config.pic_weight > 0:
            parts, share = self._shared_parts([maps[i] for i in self.pic_stages], batch)
            projections = self.pic_projector(parts.flatten(0, 1)).unflatten(0, (-1, 4))
            # Without a pair that overlaps, one that does not keeps every parameter in the graph, with weight 0.
            terms["pic"] = intersection_contrast(projections, config.temperature, config.pic_form) * (share > 0)
            result["overlapping_pairs"] = share
            result.setdefault(EMBEDDINGS, projections[:, :2])
        weights = {"pim": config.pim_weight, "pic": config.pic_weight}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss} | {name: value.detach() for name, value in (terms | result).items()}

    def _shared_parts(self, maps: Sequence[Tensor], batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Mean features of what the two patches of each pair share and do not share.

        Returns:
            ``(P, 4, C)``: shared part in the first and the second patch, rest of the first and the second. And the
            share of pairs that overlap; 0 comes with a single pair that does not.
        """
        targets, view_shape = batch.targets, batch.views.shape[-3:]
        size = batch.views.shape[:2]
        pooled = []
        for features in maps:
            if "boxes" in targets:
                means = pool_boxes(features, targets["boxes"].flatten(0, 1), view_shape)
            else:
                matrix, shift = (targets[f"frame_{name}"].flatten(0, 1) for name in ("matrix", "shift"))
                means = pool_masks(features, matrix, shift, view_shape)
            pooled.append(torch.stack(means, dim=2))
        # (B, patches, partners, inside and outside, C)
        everything = torch.cat(pooled, dim=-1).unflatten(0, size)
        chosen = (targets["overlap"] >= self.config.pair_overlap).triu(1)
        share = chosen.float().sum() / (size[0] * size[1] * (size[1] - 1) / 2)
        if not chosen.any():
            chosen[0, 0, 1] = True
        volume, i, j = chosen.nonzero(as_tuple=True)
        first, second = everything[volume, i, j], everything[volume, j, i]
        return torch.stack((first, second), dim=2).flatten(1, 2), share


def _stages(strides: np.ndarray, wanted: Sequence[int], name: str) -> list[int]:
    """Stages of the encoder by their largest stride, those that it has.

    Args:
        strides: ``(stages, 3)`` cumulative.
        wanted: strides.
        name: of the option, for the message.

    Raises:
        ValueError: if the encoder has none of them.
    """
    largest = strides.max(axis=1).tolist()
    found = [largest.index(stride) for stride in sorted(wanted) if stride in largest]
    if not found:
        raise ValueError(
            f"{name}={tuple(wanted)}: the network has no such level, its strides are {tuple(largest)}. Name at least "
            "one of them."
        )
    return found


@torch.no_grad()
def _nearest(embeddings: Tensor, overlap: Tensor) -> Tensor:
    """Each patch with the other patch of its volume that it overlaps most, ``(B, P, D) -> (B P, 2, D)``."""
    other = overlap - 2 * torch.eye(overlap.shape[1], device=overlap.device)
    index = other.argmax(-1)[..., None].expand_as(embeddings)
    return torch.stack((embeddings, embeddings.gather(1, index)), dim=2).flatten(0, 1)
