"""The feature pyramid network of vox2vec as an architecture that nnU-Net's plans can name.

It has the interface of nnU-Net's U-Nets: ``encoder.stages``, ``decoder.transpconvs``, ``decoder.stages``,
``decoder.seg_layers`` and ``decoder.deep_supervision``. Whatever works on those works on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnssl_stc3d.modules.voxel_heads import Layers, make_head, nearest_upsample


class VoxelFPN(nn.Module):
    """vox2vec's FPN (3.2) with a segmentation head on all levels (3.4).

    A path down and a path up of pre-activation residual blocks. The levels of the path up and the deepest stage are the
    pyramid: with 16 channels doubled over 6 stages, the paper's 1008 for each voxel. Differs from a U-Net in that paths
    are summed instead of concatenated, and in that a segmentation is read from all levels instead of the finest.

    Arguments are those of ResidualEncoderUNet, so that its plans become plans of this network by exchanging
    ``network_class_name``. The paper has BatchNorm and ReLU, plans decide.

    Args:
        input_channels: of the image.
        n_stages: levels of the pyramid.
        features_per_stage: channels of each level.
        conv_op: ``nn.Conv3d`` or ``nn.Conv2d``.
        kernel_sizes: of the blocks' convolutions for each stage.
        strides: of each stage; the first has to be 1.
        n_blocks_per_stage: residual blocks of each stage on the way down.
        num_classes: channels of a segmentation.
        n_conv_per_stage_decoder: residual blocks of each level on the way up.
        conv_bias: whether convolutions have a bias.
        norm_op: normalisation, None for none.
        norm_op_kwargs: its arguments.
        dropout_op: dropout between the convolutions of a block, None for none.
        dropout_op_kwargs: its arguments.
        nonlin: nonlinearity.
        nonlin_kwargs: its arguments.
        deep_supervision: return a segmentation of every level but the deepest, highest resolution first.
        head: "nonlinear", the decoder of a U-Net with kernels of 1, or "linear", one convolution of kernel 1 for each
            level, summed.

    Raises:
        ValueError: if lengths do not fit together or the head is unknown.
    """

    # Where nnU-Net and nnssl find the encoder.
    key_to_encoder = "encoder.stages"
    key_to_stem = "encoder.stages.0"
    keys_to_in_proj = ("encoder.stages.0.0",)

    def __init__(
        self,
        input_channels: int,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[nn.Module],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: int | Sequence[int | Sequence[int]],
        n_blocks_per_stage: int | Sequence[int],
        num_classes: int,
        n_conv_per_stage_decoder: int | Sequence[int],
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict[str, Any] | None = None,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: dict[str, Any] | None = None,
        deep_supervision: bool = False,
        head: str = "nonlinear",
    ) -> None:
        super().__init__()
        parts = Layers(
            conv_op, conv_bias, norm_op, norm_op_kwargs or {}, dropout_op, dropout_op_kwargs or {}, nonlin or nn.ReLU,
            nonlin_kwargs or {},
        )  # fmt: skip
        kernels = _per_stage("kernel_sizes", kernel_sizes, n_stages)
        self.encoder = FPNEncoder(
            input_channels,
            _per_stage("features_per_stage", features_per_stage, n_stages),
            kernels,
            [parts.per_axis(stride) for stride in _per_stage("strides", strides, n_stages)],
            _per_stage("n_blocks_per_stage", n_blocks_per_stage, n_stages),
            parts,
        )
        blocks = _per_stage("n_conv_per_stage_decoder", n_conv_per_stage_decoder, n_stages - 1)
        self.decoder = FPNDecoder(self.encoder, num_classes, kernels, blocks, parts, deep_supervision, head)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment, ``(N, C, ...)`` to logits ``(N, num_classes, ...)``, with deep supervision a list of them."""
        return self.decoder(self.encoder(x))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """nnU-Net's initialisation, which it applies to every module."""
        InitWeights_He(1e-2)(module)


class FPNEncoder(nn.Module):
    """The path down: max pooling, a convolution of kernel 1 to the new width, residual blocks.

    Attributes:
        output_channels: of each stage, from the highest resolution to the bottleneck.
        strides: of each stage.
    """

    def __init__(
        self,
        input_channels: int,
        features: Sequence[int],
        kernels: Sequence[int | Sequence[int]],
        strides: Sequence[tuple[int, ...]],
        blocks: Sequence[int],
        parts: Layers,
    ) -> None:
        super().__init__()
        if any(s != 1 for s in strides[0]):
            raise ValueError(f"the first stage has to keep the image's resolution, got strides {strides[0]}")
        self.output_channels = list(features)
        self.strides = [list(stride) for stride in strides]
        self.kernel_sizes = list(kernels)
        self.conv_op = parts.conv_op
        stages = [nn.Sequential(parts.conv(input_channels, features[0], kernels[0]))]
        for stride, below, here in zip(strides[1:], features[:-1], features[1:]):
            stages.append(nn.Sequential(parts.pool_op(stride, stride), parts.conv(below, here)))
        for stage, count, width, kernel in zip(stages, blocks, features, kernels):
            stage.extend(parts.blocks(count, width, width, kernel))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The stages, highest resolution first."""
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class Lateral(nn.Module):
    """A level of the path up: the upsampled level below plus the encoder's stage after a convolution of kernel 1."""

    def __init__(self, parts: Layers, features: int, kernel: int | Sequence[int], blocks: int) -> None:
        super().__init__()
        self.lateral = parts.conv(features, features)
        self.blocks = nn.Sequential(*parts.blocks(blocks, features, features, kernel))

    def forward(self, both: Tensor) -> Tensor:
        """``(N, 2 F, ...)``, concatenated as the decoder's stages of a U-Net get it, to ``(N, F, ...)``."""
        below, skip = both.chunk(2, dim=1)
        return self.blocks(below + self.lateral(skip))


class FPNDecoder(nn.Module):
    """The path up and the segmentation head.

    Attributes:
        transpconvs: a convolution of kernel 1 and nearest upsampling for each level, lowest resolution first. The name
            is that of nnU-Net's decoders, which have transposed convolutions there.
        stages: the levels, lowest resolution first.
        seg_layers: the head. Everything in it is new when a pretrained network is finetuned, as in nnU-Net's decoders.
        deep_supervision: whether all levels but the deepest are segmented.
    """

    def __init__(
        self,
        encoder: FPNEncoder,
        num_classes: int,
        kernels: Sequence[int | Sequence[int]],
        blocks: Sequence[int],
        parts: Layers,
        deep_supervision: bool,
        head: str,
    ) -> None:
        super().__init__()
        features = encoder.output_channels
        levels = range(len(features) - 2, -1, -1)
        strides = [encoder.strides[level + 1] for level in levels]
        self.deep_supervision = deep_supervision
        self.transpconvs = nn.ModuleList(
            nn.Sequential(parts.conv(features[level + 1], features[level]), nearest_upsample(stride))
            for level, stride in zip(levels, strides)
        )
        self.stages = nn.ModuleList(
            Lateral(parts, features[level], kernels[level], count) for level, count in zip(levels, blocks)
        )
        self.seg_layers = make_head(head, parts, features[::-1], strides, num_classes)

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Segment the encoder's stages, see :meth:`VoxelFPN.forward`."""
        pyramid = [skips[-1]]
        for stage, upsample, skip in zip(self.stages, self.transpconvs, reversed(skips[:-1])):
            pyramid.append(stage(torch.cat((upsample(pyramid[-1]), skip), dim=1)))
        outputs = self.seg_layers(pyramid, self.deep_supervision)
        return outputs[::-1] if self.deep_supervision else outputs[-1]


def _per_stage(name: str, value: Any, count: int) -> list[Any]:
    """One value for each stage."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must have one entry for each of {count} stages, got {len(values)}: {value}")
    return values
