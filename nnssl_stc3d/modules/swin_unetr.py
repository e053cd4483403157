"""MONAI's Swin-UNETR as an architecture that a plans file can name; MONAI is optional."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SegmentationHead(nn.Module):
    """The last layer under the names that nnU-Net's trainers know from U-Nets.

    Args:
        layer: that makes the segmentation.
        deep_supervision: return a list of one segmentation.
    """

    def __init__(self, layer: nn.Module, deep_supervision: bool) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList([layer])
        self.deep_supervision = deep_supervision

    def forward(self, features: Tensor) -> Tensor | list[Tensor]:
        """Segmentation of ``(N, C, Z, Y, X)`` features."""
        output = self.seg_layers[0](features)
        return [output] if self.deep_supervision else output


class PlansSwinUNETR(nn.Module):
    """Swin-UNETR (Hatamizadeh et al. 2022) with the constructor that nnU-Net calls from plans.

    Patches have to be multiples of 32 voxels, with more than one voxel left at the deepest stage.

    Args:
        input_channels: of the images.
        num_classes: segmentation channels.
        deep_supervision: as nnU-Net's trainers expect it of a network, which has one output all the same.
        strides: ignored; nnU-Net's trainers read from it how many outputs to expect.
        arguments: further ones of ``monai.networks.nets.SwinUNETR``, such as ``feature_size``.

    Raises:
        ImportError: if MONAI is not installed.
    """

    # Where the images come in; MONAI adds them to the decoder without the transformer, too.
    keys_to_in_proj = (
        "swin.swinViT.patch_embed.proj",
        "swin.encoder1.layer.conv1.conv",
        "swin.encoder1.layer.conv3.conv",
    )

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        strides: Any = None,
        **arguments: Any,
    ) -> None:
        del strides
        super().__init__()
        try:
            from monai.networks.nets import SwinUNETR
        except ImportError as error:
            raise ImportError(
                "The plans name Swin-UNETR, which needs MONAI 1.5 or newer. Install it for this Python: "
                "pip install 'nnssl_stc3d[monai]' (or pip install monai einops)."
            ) from error
        network: Any = SwinUNETR(in_channels=input_channels, out_channels=num_classes, **arguments)
        # Named as in nnU-Net's U-Nets, so that pretrained weights of another number of classes load without it.
        self.decoder = SegmentationHead(network.out, deep_supervision)
        network.out = nn.Identity()
        self.swin = network

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Segment ``(N, C, Z, Y, X)``; a list of one segmentation with deep supervision."""
        return self.decoder(self.swin(images))
