"""Alice: masked reconstruction with anatomical invariance across volumes and semantic alignment within them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import cos, pi, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnssl_stc3d.losses.alice import (
    blocks_to_image,
    dino_cross_entropy,
    masked_reconstruction,
    normalised_blocks,
    normalised_views,
    paired_cosine,
)
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.methods.base import EMBEDDINGS, PretrainMethod, compile_in_place
from nnssl_stc3d.modules.casa import CasaOfficial, CasaPaper
from nnssl_stc3d.modules.dino_head import DinoHead
from nnssl_stc3d.modules.ema import EMATeacher
from nnssl_stc3d.modules.feature_pyramid import check_unet
from nnssl_stc3d.modules.heads import Projector
from nnssl_stc3d.modules.masking import expand_mask, visible_tokens
from nnssl_stc3d.modules.primus import check_primus, is_primus, token_grid
from nnssl_stc3d.modules.token_backbones import Encoded, UNetBackbone, resolve_block, token_backbone
from nnssl_stc3d.modules.token_decoder import TokenDecoder
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.crop_pair_sampler import CropPairSampler
from nnssl_stc3d.views.samplers import is_anisotropic


class Alice(PretrainMethod):
    """Alice on a U-Net of nnU-Net or on Primus. See :class:`AliceConfig` and documentation/alice.md."""

    name = "Alice"
    config: AliceConfig
    progress: Tensor

    def __init__(self, network: nn.Module, config: AliceConfig) -> None:
        super().__init__(network, config)
        block = config.resolved_mask_block
        backbone = self.backbone = token_backbone(network, block, config.resolved_view_shape)
        # A mask may be made of blocks of several tokens.
        self.tokens_per_block = tuple(m // b for m, b in zip(block, backbone.block))
        channels = _input_channels(network)
        if config.decoder == "unet":
            if not isinstance(backbone, UNetBackbone):
                raise ValueError(
                    f"{type(network).__name__} has no decoder to reconstruct through; use decoder='tokens' "
                    "(AlicePrimusPretrainTrainer)"
                )
            self.transfers = ("encoder", "decoder")
            self.reconstruct = nn.Conv3d(backbone.finest_features, channels, 1)
        else:
            self.transfers = backbone.parts
            self.token_decoder = TokenDecoder(
                backbone.features, prod(backbone.grid), channels * prod(backbone.block), config.decoder_width,
                config.decoder_depth, config.decoder_heads,
            )  # fmt: skip
        self.register_buffer("progress", torch.zeros(()))
        if not config.needs_target:
            return

        def head(features: int) -> nn.Module:
            if config.head == "projector":
                return TokenProjector(features, config.head_hidden, config.head_dim)
            return DinoHead(features, config.head_dim, config.head_hidden, config.head_bottleneck)

        dim = config.head_dim
        pools_bottleneck = config.dv_weight > 0 and config.descriptor == "bottleneck"
        if config.st_weight > 0 or not pools_bottleneck:
            self.token_head = head(backbone.features)
        if pools_bottleneck:
            self.view_head = head(backbone.pooled_features)
        if config.st_weight > 0:
            # The released form adds the query, which therefore passes the head as well.
            official = config.casa == "official"
            self.casa: nn.Module = (
                CasaOfficial(dim, dim, dim, config.casa_heads) if official else CasaPaper(backbone.features, dim, dim)
            )
        for term, weight in (("dv", config.dv_weight), ("st", config.st_weight)):
            if weight > 0 and config.form == "official":
                self.register_buffer(f"{term}_centre", torch.zeros(dim))
            elif weight > 0 and config.predictor:
                self.add_module(f"{term}_predictor", TokenProjector(dim, config.head_hidden, dim, centred=False))
        self.teacher = EMATeacher(self._followed())

    @classmethod
    def check_network(cls, network: nn.Module) -> None:
        """See :meth:`PretrainMethod.check_network`."""
        if is_primus(network):
            check_primus(network)
        else:
            check_unet(network)

    @classmethod
    def resolve(cls, config: AliceConfig, network: nn.Module, patch_size: Sequence[int]) -> AliceConfig:
        """See :meth:`PretrainMethod.resolve`: ``view_shape`` and ``mask_block``."""
        if is_primus(network):
            shape = token_grid(network)[1]
            if config.view_shape not in (None, shape):
                raise ValueError(f"this Primus was planned for views of {shape}, got view_shape {config.view_shape}")
        else:
            shape = super().resolve(config, network, patch_size).view_shape
        block = resolve_block(network, config.mask_block, shape)
        return dataclasses.replace(config, view_shape=shape, mask_block=block)

    @classmethod
    def view_sampler(cls, config: AliceConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> CropPairSampler:
        """See :meth:`PretrainMethod.view_sampler`."""
        z, y, x = (v // b for v, b in zip(config.resolved_view_shape, config.resolved_mask_block))
        return CropPairSampler(
            view_shape=config.resolved_view_shape,
            spacing=tuple(spacing),
            in_plane=is_anisotropic(patch_size),
            mask_grid=(z, y, x),
            mask_ratio=config.mask_ratio,
            mask_columns=config.mask_columns,
            transforms=config.transforms,
            max_cycle=config.max_cycle,
            min_score=config.min_score,
            search=config.search,
            attempts=config.attempts,
            n_plain=0 if config.augment_online else 2,
        )

    def freeze_untrained(self) -> None:
        """See :meth:`PretrainMethod.freeze_untrained`."""
        if not is_primus(self.network):
            super().freeze_untrained()
            return
        self.network.requires_grad_(False)
        for part in self.transfers:
            getattr(self.network, part).requires_grad_(True)

    def compile_network(self) -> None:
        """See :meth:`PretrainMethod.compile_network`."""
        if is_primus(self.network):
            compile_in_place(*self.network.eva.blocks)
        else:
            super().compile_network()

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """See :meth:`PretrainMethod.forward`. ``batch.views``: ``(B, 4, C, Z, Y, X)``, online views, then targets."""
        config = self.config
        images, blocks = batch.views[:, :2].flatten(0, 1), batch.targets["masked"].flatten(0, 1)
        mask = expand_mask(blocks, config.resolved_mask_block)[:, None]
        index = visible_tokens(expand_mask(blocks, self.tokens_per_block))
        encoded = self.backbone.encode(self._encoder(), images.masked_fill(mask, 0), index)
        decoded, prediction = self._decode(self._decoder(), encoded, index)
        terms = {"reconstruction": self._reconstruction(prediction, images, mask)}
        result = {"masked_error": _relative_error(prediction, self._target(images), mask)}
        if config.needs_target:
            agreement, result[EMBEDDINGS] = self._agreement(encoded, decoded, batch.views[:, 2:].flatten(0, 1))
            terms |= agreement
        if "matched" in batch.targets:
            result["matched"] = batch.targets["matched"].float().mean()
        weights = {"reconstruction": config.reconstruction_weight, "dv": config.dv_weight, "st": config.st_weight}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss} | {name: value.detach() for name, value in (terms | result).items()}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the target branch; its momentum rises to 1 along a cosine."""
        self.progress.fill_(progress)
        if self.config.needs_target:
            momentum = 1 - (1 - self.config.ema_momentum) * 0.5 * (1 + cos(pi * progress))
            self.teacher.update(self._followed(), momentum)

    def _encoder(self) -> dict[str, nn.Module]:
        return {name: getattr(self.network, name) for name in self.backbone.parts}

    def _decoder(self) -> nn.Module:
        return self.network.decoder if self.config.decoder == "unet" else self.token_decoder

    def _followed(self) -> nn.ModuleDict:
        """The parts of the online branch that the target branch follows."""
        config = self.config
        modules = self._encoder()
        if config.target_tokens == "decoder" and hasattr(self, "token_head"):
            modules["decoder"] = self._decoder()
        modules |= {name: getattr(self, name) for name in ("token_head", "view_head") if hasattr(self, name)}
        return nn.ModuleDict(modules)

    def _decode(self, decoder: Any, encoded: Encoded, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """All tokens ``(N, K, C)`` and the reconstruction ``(N, channels, Z, Y, X)``."""
        backbone = self.backbone
        if isinstance(backbone, UNetBackbone) and self.config.decoder == "unet":
            tokens, finest = backbone.decode(decoder, encoded.maps)
            return tokens, self.reconstruct(finest)
        tokens = decoder(encoded.tokens, index)
        return tokens, blocks_to_image(decoder.to_voxels(tokens), backbone.grid, backbone.block)

    def _target(self, images: Tensor) -> Tensor:
        """What is reconstructed, ``(N, C, Z, Y, X)``."""
        if self.config.normalise == "block":
            return normalised_blocks(images, self.backbone.block)
        return normalised_views(images) if self.config.normalise == "view" else images

    def _reconstruction(self, prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        target = self._target(images)
        if self.config.reconstruct == "all":
            return masked_reconstruction(prediction, target, torch.ones_like(mask))
        # Eq. 1 adds the crops of query and key.
        query, key = (masked_reconstruction(prediction[i::2], target[i::2], mask[i::2]) for i in (0, 1))
        return query + key

    def _agreement(
        self, encoded: Encoded, decoded: Tensor, target_views: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Terms l_dv and l_st, and pairs ``(2 B, 2, D)`` for the monitors."""
        config = self.config
        tokens, view = self._project(dict(self.named_children()), encoded, decoded)
        with torch.no_grad():
            parts = self.teacher.module
            seen = self.backbone.encode(parts, target_views, None)
            everywhere = self._decode(parts["decoder"], seen, None)[0] if "decoder" in parts else seen.tokens
            target_tokens, target_view = self._project(dict(parts.items()), seen, everywhere)
        terms, pairs = {}, []
        if config.dv_weight > 0:
            other = target_view.unflatten(0, (-1, 2)).flip(1)
            terms["dv"] = self._agree("dv", view.unflatten(0, (-1, 2)), other)
            pairs.append(torch.stack((view, other.flatten(0, 1)), dim=1))
        if config.st_weight > 0:
            query = self.token_head(encoded.tokens) if config.casa == "official" else encoded.tokens
            student = self.casa(query, tokens)
            with torch.no_grad():
                teacher = self.casa(query, target_tokens)
            terms["st"] = self._agree("st", student.unflatten(0, (-1, 2)), teacher.unflatten(0, (-1, 2)))
            pairs.append(torch.stack((student.mean(1), teacher.mean(1)), dim=1))
        return terms, pairs[0]

    def _project(self, heads: dict[str, nn.Module], encoded: Encoded, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Projected tokens ``(N, K, D)``, empty if no loss looks at them, and descriptors of whole views ``(N, D)``."""
        projected = heads["token_head"](tokens) if "token_head" in heads else tokens[:, :0]
        return projected, heads["view_head"](encoded.pooled) if "view_head" in heads else projected.mean(1)

    def _agree(self, term: str, student: Tensor, teacher: Tensor) -> Tensor:
        """One agreement loss between ``(B, 2, ..., D)``."""
        config = self.config
        if config.form == "paper":
            return paired_cosine(getattr(self, f"{term}_predictor")(student) if config.predictor else student, teacher)
        centre = getattr(self, f"{term}_centre")
        warm = min(1.0, float(self.progress) / max(config.teacher_temperature_warmup, 1e-9))
        start, end = config.teacher_temperature_start, config.teacher_temperature
        loss = dino_cross_entropy(student, teacher, centre, config.student_temperature, start + warm * (end - start))
        if self.training:
            self._move_centre(centre, teacher)
        return loss

    @torch.no_grad()
    def _move_centre(self, centre: Tensor, teacher: Tensor) -> None:
        """Running mean of the target's logits ``(..., D)`` over all GPUs."""
        mean = teacher.flatten(0, -2).float().mean(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        centre.lerp_(mean.to(centre.dtype), 1 - self.config.centre_momentum)


class TokenProjector(Projector):
    """A projector of descriptors of any number of axes, ``(..., C)``, with MoCo v3's BatchNorm at its end.

    Without that, a constant added to all embeddings would bring every cosine to 1.

    Args:
        in_features: width of the descriptor.
        hidden_features: width of both hidden layers.
        out_features: width of the embedding.
        centred: whether the BatchNorm at the end is there.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, centred: bool = True) -> None:
        super().__init__(in_features, hidden_features, out_features)
        if centred:
            self.append(nn.BatchNorm1d(out_features, affine=False, track_running_stats=False))

    def forward(self, descriptors: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``; the BatchNorms are over all other axes."""
        return super().forward(descriptors.flatten(0, -2)).unflatten(0, descriptors.shape[:-1])


def _input_channels(network: Any) -> int:
    return int(network.get_submodule(network.keys_to_in_proj[0]).weight.shape[1])


@torch.no_grad()
def _relative_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error on the masked voxels relative to their variance in each image: 1 for guessing each image's mean."""
    prediction, target, chosen = prediction.float(), target.float(), mask.float().expand(target.shape)
    count = chosen.sum((1, 2, 3, 4), keepdim=True)
    mean = (target * chosen).sum((1, 2, 3, 4), keepdim=True) / count
    variance = ((target - mean).square() * chosen).sum()
    return ((prediction - target).square() * chosen).sum() / variance.clamp(min=1e-8)
