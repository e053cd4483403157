"""vox2vec: contrastive learning of voxels over a feature pyramid (Goncharov et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.info_nce import INFO_NCE_FORMS, info_nce, retrieval
from nnssl_stc3d.methods.base import (
    EMBEDDINGS,
    PretrainConfig,
    PretrainMethod,
    ViewBatch,
    choices,
    positive,
)
from nnssl_stc3d.modules.feature_pyramid import PYRAMIDS, pyramid_channels, pyramid_maps
from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.modules.heads import Projector, sample_features
from nnssl_stc3d.views.geometry import normalised_points
from nnssl_stc3d.views.point_sampler import PointPairSampler
from nnssl_stc3d.views.samplers import TransformRanges, is_anisotropic

# The monitors compare all embeddings with each other.
_MONITORED_PAIRS = 256


@dataclass(frozen=True)
class Vox2VecConfig(PretrainConfig):
    """Hyperparameters of vox2vec. :meth:`paper` is the text, :meth:`official` the released code.

    Attributes:
        network: "any" trains the pyramid of whatever network the plan names; "fpn" insists on the paper's.
        pyramid: which feature maps a voxel is read from: "both" the stages of encoder and decoder, "decoder" the
            bottleneck and the decoder's stages (the levels of the FPN, as in the paper), "encoder" the encoder's
            stages, which leaves the decoder untrained.
        reading: "trilinear" interpolates the maps at a voxel's position, "nearest" takes the voxel that holds it.
        pairs: of views from each volume.
        points: voxels of the body for each pair of views, m.
        guided: take voxels of the body only (3.1); otherwise anywhere.
        transforms: rotation, translation and scaling of both views; none in the paper and the released code.
        temperature: tau.
        loss_form: "official" averages over all voxels, "paper" sums.
        head_hidden: width of the head's hidden layers; None takes the width of the pyramid.
        head_dim: width of the embedding.
        head_per_view: the views' voxels pass the head one after the other, so that its BatchNorm sees one at a time.
        rows: voxels whose similarities are held at once; None takes all of them.
    """

    network: str = "any"
    pyramid: str = "both"
    reading: str = "trilinear"
    pairs: int = 1
    points: int = 1000
    guided: bool = True
    transforms: TransformRanges = field(default_factory=TransformRanges.none)
    temperature: float = 0.1
    loss_form: str = "official"
    head_hidden: int | None = None
    head_dim: int = 128
    head_per_view: bool = True
    rows: int | None = 1024
    batch_size: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(
            self,
            network=("any", "fpn"),
            pyramid=PYRAMIDS,
            reading=("trilinear", "nearest"),
            loss_form=INFO_NCE_FORMS,
        )
        positive(self, "pairs", "points", "temperature", "head_dim")
        for name in ("head_hidden", "rows"):
            if getattr(self, name) is not None:
                positive(self, name)

    @classmethod
    def paper(cls) -> Vox2VecConfig:
        """The text (3.1 to 3.3, 4.1): 10 volumes, 1000 voxels each, the loss summed, on the FPN."""
        return cls(
            network="fpn", pyramid="decoder", reading="nearest", view_shape=(32, 128, 128), loss_form="paper",
            optimizer="adam", learning_rate=3e-4, weight_decay=0.0, schedule="constant", warmup_steps=0,
            gradient_clip=1.0,
        )  # fmt: skip

    @classmethod
    def official(cls) -> Vox2VecConfig:
        """The released code: 10 pairs of views of one volume, 1024 voxels each, the loss averaged, on the FPN."""
        return dataclasses.replace(cls.paper(), batch_size=1, pairs=10, points=1024, loss_form="official")


class Vox2Vec(PretrainMethod):
    """vox2vec on the pyramid of a network of nnU-Net. See :class:`Vox2VecConfig` and documentation/vox2vec.md."""

    name = "vox2vec"
    config: Vox2VecConfig

    def __init__(self, network: nn.Module, config: Vox2VecConfig) -> None:
        super().__init__(network, config)
        width = pyramid_channels(network, config.pyramid)
        self.head = Projector(width, config.head_hidden or width, config.head_dim, affine=True)
        self.transfers = ("encoder",) if config.pyramid == "encoder" else ("encoder", "decoder")

    @classmethod
    def resolve(cls, config: Any, network: nn.Module, patch_size: Sequence[int]) -> Any:
        """See :meth:`PretrainMethod.resolve`.

        Raises:
            ValueError: also if the configuration insists on the FPN and the plan names another network.
        """
        if config.network == "fpn" and not isinstance(network, VoxelFPN):
            raise ValueError(
                f"this form of vox2vec pretrains the paper's FPN, but the plan names {type(network).__name__}. Write "
                "FPN plans with nnssl_stc3d network-plans -d DATASET --network fpn-paper and train with -p and their "
                "name, or pretrain this network with Vox2VecPretrainTrainer."
            )
        return super().resolve(config, network, patch_size)

    @classmethod
    def view_sampler(
        cls, config: Vox2VecConfig, patch_size: Sequence[int], spacing: Sequence[float]
    ) -> PointPairSampler:
        """See :meth:`PretrainMethod.view_sampler`."""
        return PointPairSampler(
            view_shape=config.resolved_view_shape,
            spacing=tuple(spacing),
            in_plane=is_anisotropic(patch_size),
            pairs=config.pairs,
            points=config.points,
            transforms=config.transforms,
            guided=config.guided,
        )

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """See :meth:`PretrainMethod.forward`. ``batch.views``: ``(B, 2 pairs, C, Z, Y, X)``."""
        config = self.config
        first, second = self._descriptors(batch)
        if config.head_per_view:
            first, second = self.head(first), self.head(second)
        else:
            first, second = self.head(torch.cat((first, second))).chunk(2)
        loss = info_nce(first, second, config.temperature, form=config.loss_form, rows=config.rows)
        # Evenly spread, since neighbours in the list belong to one pair of views.
        shown = torch.linspace(0, max(0, len(first) - 1), min(len(first), _MONITORED_PAIRS)).long()
        return {
            "loss": loss,
            "voxel_retrieval": retrieval(first.detach(), second.detach()),
            EMBEDDINGS: torch.stack((first, second), dim=1)[shown.to(first.device)].detach(),
        }

    @property
    def voxel_head(self) -> nn.Module:
        """See :attr:`PretrainMethod.voxel_head`."""
        return self.head

    def voxel_maps(self, images: Tensor) -> list[Tensor]:
        """See :meth:`PretrainMethod.voxel_maps`."""
        return pyramid_maps(self.network, self.network.encoder(images), self.config.pyramid)

    def _descriptors(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """The pyramid at the voxels that both views of a pair see, twice ``(N, C)``."""
        maps = self.voxel_maps(batch.views.flatten(0, 1))
        points = normalised_points(batch.targets["points"], batch.views.shape[-3:])
        # The views of a pair follow each other, as its points do.
        vectors = sample_features(maps, points.flatten(0, 2), nearest=self.config.reading == "nearest")
        vectors = vectors.unflatten(0, points.shape[:3]).transpose(2, 3)[batch.targets["points_inside"]]
        if len(vectors) == 1:
            # A single voxel has no negatives: its loss is 0. A BatchNorm could not normalise it.
            vectors = vectors[:0]
        return vectors[:, 0], vectors[:, 1]
