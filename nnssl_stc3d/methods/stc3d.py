"""STC3D: contrastive learning on views under controlled rotation, translation and scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.info_nce import info_nce, masked_info_nce, retrieval
from nnssl_stc3d.losses.stc3d import REGULARISERS, eq12, overlap_weighted
from nnssl_stc3d.losses.voco import base_discrepancy, position_accuracy, position_logits, position_prediction
from nnssl_stc3d.methods.base import (
    EMBEDDINGS,
    PretrainConfig,
    PretrainMethod,
    ViewBatch,
    choices,
    not_negative,
    positive,
    three_positive,
)
from nnssl_stc3d.modules.feature_pyramid import PYRAMIDS, encoder_channels, pyramid_channels, pyramid_maps
from nnssl_stc3d.modules.heads import Projector, pooled_descriptor, sample_features
from nnssl_stc3d.views.geometry import normalised_points
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.samplers import TransformRanges, is_anisotropic


@dataclass(frozen=True)
class STC3DConfig(PretrainConfig):
    """Hyperparameters of STC3D. The default contrasts voxels and goes beyond the paper; :meth:`paper` is its reading.

    Attributes:
        grid: bases along each axis; the paper does not say, VoCo has (1, 4, 4). Several regions lie in the window that
            these tile, or would tile where no loss looks at them.
        base_scale: source voxels per view voxel of a base; a smaller volume gets smaller cells.
        region_scale: the same for the regions that are transformed: 1 shows the network the resolution that it will be
            finetuned at; None takes the cell of a base.
        cropping: placement of the window that the bases tile, "random", "center" or "edge" (Table 7).
        regions: transformed regions per volume, K.
        views_per_region: views of each region, N >= 2.
        transforms: ranges of rotation, translation and scaling (Table 6; the paper gives none).
        pred_weight: of L_pred (Table 5).
        pred_form: "official" (VoCo's released loss) or "paper" (VoCo Eq. 3).
        reg_weight: lambda of L_reg (Eq. 13, Table 5; not given).
        reg_form: "discrepancy", "overlap_weighted" or "eq12".
        reg_margin: distance beyond which different views are left alone, "overlap_weighted" only.
        info_nce_weight: of L_InfoNCE (Eq. 11).
        info_nce_on: "views" contrasts whole views (the paper), "bins" the spatial bins that correspond.
        temperature: tau of L_InfoNCE (not given).
        neutral_overlap: views of different regions, or bins, that overlap by more are neither positive nor negative.
        descriptor_stages: "encoder" pools every stage of the encoder, "bottleneck" the last only.
        bins: spatial bins of the pooled descriptor; (1, 1, 1) is global average pooling.
        projector_hidden: width of the projector's hidden layers.
        projector_dim: width of the embedding.
        dense_weight: of L_dense, voxel-level InfoNCE over the pyramid of the network.
        dense_pyramid: which maps a voxel is read from: "both" the stages of encoder and decoder, "decoder" the
            bottleneck and the decoder's stages, "encoder" the encoder's stages and leaves the decoder untrained.
        dense_points: corresponding points for each pair of views.
        dense_temperature: tau of L_dense.
        dense_negatives: "batch" takes the points of all volumes as negatives, "volume" those of the same volume only,
            so that the same anatomy of two subjects is not pushed apart.
        dense_dim: width of the voxel embedding and its hidden layers.
        stage_weight: of L_stages, the same contrast with the voxels of one stage of the decoder at a time (of the
            encoder, where the decoder is untrained), each with a head of its own; the mean over the stages. L_dense
            reads all stages together and may leave the last one empty, which segmentation layers read.
    """

    batch_size: int = 2
    view_share: float = 1.0
    learning_rate: float = 3e-3
    grid: tuple[int, int, int] = (2, 2, 2)
    base_scale: float = 1.0
    region_scale: float | None = 1.0
    cropping: str = "random"
    regions: int = 1
    views_per_region: int = 2
    transforms: TransformRanges = field(default_factory=TransformRanges)
    pred_weight: float = 0.0
    pred_form: str = "official"
    reg_weight: float = 0.0
    reg_form: str = "discrepancy"
    reg_margin: float = 1.0
    info_nce_weight: float = 0.0
    info_nce_on: str = "views"
    temperature: float = 0.1
    neutral_overlap: float = 0.2
    descriptor_stages: str = "encoder"
    bins: tuple[int, int, int] = (2, 2, 2)
    projector_hidden: int = 512
    projector_dim: int = 128
    dense_weight: float = 1.0
    dense_pyramid: str = "both"
    dense_points: int = 256
    dense_temperature: float = 0.1
    dense_negatives: str = "volume"
    dense_dim: int = 128
    stage_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(
            self,
            cropping=("random", "center", "edge"),
            pred_form=("official", "paper"),
            reg_form=REGULARISERS,
            info_nce_on=("views", "bins"),
            descriptor_stages=("encoder", "bottleneck"),
            dense_pyramid=PYRAMIDS,
            dense_negatives=("batch", "volume"),
        )
        positive(self, "base_scale", "regions", "temperature", "projector_hidden", "projector_dim", "dense_points")
        positive(self, "dense_temperature", "dense_dim", "reg_margin")
        not_negative(self, "pred_weight", "reg_weight", "info_nce_weight", "dense_weight", "stage_weight")
        not_negative(self, "neutral_overlap")
        if self.region_scale is not None:
            positive(self, "region_scale")
        if self.views_per_region < 2:
            raise ValueError(f"views_per_region must be at least 2 (positive pairs), got {self.views_per_region}")
        three_positive(self, "grid", "bins")
        if self.needs_bases and max(self.grid) < 2:
            raise ValueError(f"position prediction and discrepancy need at least 2 bases, got grid {self.grid}")
        if not (self.pred_weight or self.reg_weight or self.info_nce_weight or self.needs_points):
            raise ValueError("all loss weights are 0: there is nothing to train")
        self.check_share(self.batch_size)

    def check_share(self, volumes: int) -> None:
        """See :meth:`PretrainConfig.check_share`: InfoNCE takes its negatives from the volumes of one GPU."""
        if not self.info_nce_weight:
            return
        found = volumes * self.regions * (prod(self.bins) if self.info_nce_on == "bins" else 1)
        if found < 2:
            raise ValueError(
                f"InfoNCE on {self.info_nce_on!r} needs negatives on every GPU: 2 volumes or 2 regions a volume, got "
                f"{volumes} and {self.regions}. Raise regions or batch_size, or use fewer GPUs."
            )

    @property
    def needs_bases(self) -> bool:
        """Whether a loss looks at the bases."""
        return self.pred_weight > 0 or (self.reg_weight > 0 and self.reg_form == "discrepancy")

    @property
    def needs_points(self) -> bool:
        """Whether a loss compares voxels."""
        return self.dense_weight > 0 or self.stage_weight > 0

    @classmethod
    def paper(cls) -> STC3DConfig:
        """The literal reading: 1x4x4 bases, pooled descriptors, L_InfoNCE + L_pred + L_reg, encoder only."""
        return cls(
            batch_size=4,
            view_share=0.5,
            learning_rate=1e-3,
            grid=(1, 4, 4),
            base_scale=1.5,
            region_scale=None,
            regions=2,
            pred_weight=1.0,
            reg_weight=1.0,
            info_nce_weight=1.0,
            bins=(1, 1, 1),
            dense_weight=0.0,
            stage_weight=0.0,
        )


class STC3D(PretrainMethod):
    """STC3D on a U-Net of nnU-Net. See :class:`STC3DConfig` and documentation/stc3d.md."""

    name = "STC3D"
    config: STC3DConfig

    def __init__(self, network: nn.Module, config: STC3DConfig) -> None:
        super().__init__(network, config)
        channels = encoder_channels(network)
        pooled = sum(channels) if config.descriptor_stages == "encoder" else channels[-1]
        per_bin = config.info_nce_weight > 0 and config.info_nce_on == "bins"
        self.sampler_layout = self.view_sampler(config, config.view_shape or (1, 1, 1), (1.0, 1.0, 1.0))
        if self._describes_views:
            self.projector = Projector(pooled * prod(config.bins), config.projector_hidden, config.projector_dim)
        if per_bin:
            self.bin_projector = Projector(pooled, config.projector_hidden, config.projector_dim)
        if config.needs_points and config.dense_pyramid != "encoder":
            self.transfers = ("encoder", "decoder")
        if config.dense_weight > 0:
            width = pyramid_channels(network, config.dense_pyramid)
            self.dense_projector = Projector(width, config.dense_dim, config.dense_dim, affine=True)
        if config.stage_weight > 0:
            widths = channels if config.dense_pyramid == "encoder" else channels[-2::-1]
            self.stage_projectors = nn.ModuleList(
                Projector(width, config.dense_dim, config.dense_dim, affine=True) for width in widths
            )

    @property
    def _describes_views(self) -> bool:
        config = self.config
        contrasts_views = config.info_nce_weight > 0 and config.info_nce_on == "views"
        return config.needs_bases or config.reg_weight > 0 or contrasts_views

    @classmethod
    def view_sampler(cls, config: STC3DConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> RegionSampler:
        """See :meth:`PretrainMethod.view_sampler`."""
        return RegionSampler(
            view_shape=config.resolved_view_shape,
            spacing=tuple(spacing),
            in_plane=is_anisotropic(patch_size),
            # Several regions lie in the window of the bases whether a loss looks at these or not: in one of a single
            # view they would all lie at one place. A single region has all of the volume.
            grid=config.grid if config.needs_bases or config.regions > 1 else None,
            base_scale=config.base_scale,
            region_scale=config.region_scale,
            placement=config.cropping,
            regions=config.regions,
            views_per_region=config.views_per_region,
            transforms=config.transforms,
            points=config.dense_points if config.needs_points else 0,
            bins=config.bins if config.info_nce_weight > 0 and config.info_nce_on == "bins" else None,
            show_bases=config.needs_bases,
        )

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """See :meth:`PretrainMethod.forward`. ``batch.views``: ``(B, bases + K N, C, Z, Y, X)``."""
        config, layout = self.config, self.sampler_layout
        size = batch.views.shape[0]
        # Bases and transformed views pass the encoder one after the other: cutting the latter's feature maps,
        # (B * K * N, C, Z, Y, X), out of a common pass would copy them and their gradients.
        parts = batch.views.split([n for n in (layout.n_bases, layout.n_views - layout.n_bases) if n], dim=1)
        skips = [self.network.encoder(part.flatten(0, 1)) for part in parts]
        moved = skips[-1]
        stages = slice(None) if config.descriptor_stages == "encoder" else slice(-1, None)
        terms: dict[str, Tensor] = {}
        result: dict[str, Tensor] = {}
        if self._describes_views:
            pooled = [pooled_descriptor(maps[stages], config.bins).unflatten(0, (size, -1)) for maps in skips]
            embeddings = self.projector(torch.cat(pooled, dim=1).flatten(0, 1)).unflatten(0, (size, -1))
            bases, views = embeddings[:, : layout.n_bases], embeddings[:, layout.n_bases :]
            if config.pred_weight > 0:
                labels = batch.targets["position"]
                logits = position_logits(views, bases)
                terms["pred"] = position_prediction(logits, labels, config.pred_form)
                result["position_accuracy"] = position_accuracy(logits, labels)
            if config.reg_weight > 0:
                terms["reg"] = self._regulariser(bases, views, batch.targets["overlap"])
            if config.info_nce_weight > 0 and config.info_nce_on == "views":
                terms["info_nce"] = self._contrast_views(views, batch.targets["overlap"])
            result[EMBEDDINGS] = self._pairs(views).flatten(0, 1)
        if config.info_nce_weight > 0 and config.info_nce_on == "bins":
            binned = [nn.functional.adaptive_avg_pool3d(f, config.bins) for f in moved[stages]]
            first, second = _embedded(self._at_points(binned, batch, "bins"), self.bin_projector)
            terms["info_nce"] = self._contrast_bins(first, second, batch)
            result.setdefault(EMBEDDINGS, torch.stack((first, second), dim=1))
        if config.needs_points:
            maps = pyramid_maps(self.network, moved, config.dense_pyramid)
            descriptors = self._at_points(maps, batch, "points")
            groups = _volumes(batch.targets["points_inside"]) if config.dense_negatives == "volume" else None
            embedded: list[tuple[Tensor, Tensor]] = []
            if config.stage_weight > 0:
                by_stage = descriptors.split([m.shape[1] for m in maps], dim=-1)[-len(self.stage_projectors) :]
                embedded += [_embedded(stage, projector) for stage, projector in zip(by_stage, self.stage_projectors)]
                losses = [info_nce(*pairs, config.dense_temperature, groups) for pairs in embedded]
                terms["stages"] = torch.stack(losses).mean()
            if config.dense_weight > 0:
                embedded.append(_embedded(descriptors, self.dense_projector))
                terms["dense"] = info_nce(*embedded[-1], config.dense_temperature, groups)
            # Of all stages together where they are contrasted so, otherwise of the last one.
            first, second = embedded[-1]
            result["voxel_retrieval"] = retrieval(first, second)
            result.setdefault(EMBEDDINGS, torch.stack((first, second), dim=1))
        weights = {
            "pred": config.pred_weight,
            "reg": config.reg_weight,
            "info_nce": config.info_nce_weight,
            "dense": config.dense_weight,
            "stages": config.stage_weight,
        }
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss} | {name: value.detach() for name, value in (terms | result).items()}

    @property
    def voxel_head(self) -> nn.Module | None:
        """See :attr:`PretrainMethod.voxel_head`."""
        return self.dense_projector if self.config.dense_weight > 0 else None

    def voxel_maps(self, images: Tensor) -> list[Tensor]:
        """See :meth:`PretrainMethod.voxel_maps`."""
        return pyramid_maps(self.network, self.network.encoder(images), self.config.dense_pyramid)

    def _regulariser(self, bases: Tensor, views: Tensor, overlap: Tensor) -> Tensor:
        if self.config.reg_form == "discrepancy":
            return base_discrepancy(bases, "symmetric")
        if self.config.reg_form == "eq12":
            return eq12(views)
        return overlap_weighted(views, overlap, self.config.reg_margin)

    def _contrast_views(self, views: Tensor, overlap: Tensor) -> Tensor:
        """Eq. 11 on whole views: positives are the views of one region, negatives other regions and other volumes."""
        device = views.device
        region = torch.arange(len(views) * self.config.regions, device=device)
        region = region.repeat_interleave(self.config.views_per_region)
        same_region = region[:, None] == region
        positives = same_region & ~torch.eye(len(region), dtype=torch.bool, device=device)
        negatives = ~same_region & ~self._close(overlap)
        return masked_info_nce(views.flatten(0, 1), positives, negatives, self.config.temperature)

    def _contrast_bins(self, first: Tensor, second: Tensor, batch: ViewBatch) -> Tensor:
        """Eq. 11 on bins ``(N, D)`` that both views of a pair show: each has one positive, where it lies in the other.

        Bins that overlap are neither, or a bin of a view in two pairs would be its own negative.
        """
        inside = batch.targets["bins_inside"].flatten()
        same = torch.eye(len(first), dtype=torch.bool, device=first.device)
        close = self._close(batch.targets["bins_overlap"])[inside][:, inside]
        positives = same.repeat(2, 2).fill_diagonal_(False)
        negatives = ~(same | close).repeat(2, 2)
        return masked_info_nce(torch.cat((first, second)), positives, negatives, self.config.temperature)

    def _close(self, overlap: Tensor) -> Tensor:
        """What overlaps by too much to be negatives, in the whole batch: ``(B, M, M) -> (B M, B M)``."""
        return torch.block_diag(*torch.maximum(overlap, overlap.transpose(1, 2))) > self.config.neutral_overlap

    def _pairs(self, views: Tensor) -> Tensor:
        """Both views of each pair of one region, ``(B, M, ...) -> (B, pairs, 2, ...)``."""
        first, second = self.sampler_layout.pairs()
        return torch.stack((views[:, first], views[:, second]), dim=2)

    def _at_points(self, maps: Sequence[Tensor], batch: ViewBatch, name: str) -> Tensor:
        """Descriptors at the corresponding points of all pairs that both views see, ``(N, 2, C)``."""
        count = batch.targets[name].shape[-2]
        points = normalised_points(batch.targets[name], batch.views.shape[-3:])
        points = points.unflatten(1, (self.config.regions, self.config.views_per_region - 1))
        # A view is read once, at its points as first and as second of a pair: a map for each pair would be a copy. The
        # last view of a region is never first and the first never second; what is read there instead is not used.
        as_first = nn.functional.pad(points[:, :, :, 0], (0, 0, 0, 0, 0, 1))
        as_second = nn.functional.pad(points[:, :, :, 1], (0, 0, 0, 0, 1, 0))
        everywhere = torch.cat((as_first, as_second), dim=3)
        sampled = sample_features(maps, everywhere.flatten(0, 2)).unflatten(0, everywhere.shape[:3])
        both = torch.stack((sampled[:, :, :-1, :count], sampled[:, :, 1:, count:]), dim=-2)
        # (N, 2, C): the two views of a pair side by side, one row for each point that both see.
        return both.flatten(0, 3)[batch.targets[f"{name}_inside"].flatten()]


def _embedded(descriptors: Tensor, projector: nn.Module) -> tuple[Tensor, Tensor]:
    """Embeddings of the first and the second of each pair, ``(N, 2, C)`` to twice ``(N, D)``."""
    embeddings = projector(descriptors.flatten(0, 1)).unflatten(0, (-1, 2))
    return embeddings[:, 0], embeddings[:, 1]


def _volumes(inside: Tensor) -> Tensor:
    """The volume of each point that both views see, ``(B, pairs, P) -> (N,)``."""
    volume = torch.arange(len(inside), device=inside.device)[:, None, None]
    return volume.expand_as(inside)[inside]
