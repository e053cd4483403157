"""Classification of volumes by the encoder of a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.modules.feature_pyramid import check_unet, encoder_channels


class ClassifierNetwork(nn.Module):
    """The encoder of a U-Net and a linear layer on its pooled stages.

    Mean and maximum of every stage are pooled: after InstanceNorm, which nnU-Net's encoders have, the mean alone is
    nearly the same for every image.

    Attributes:
        backbone: the U-Net without its decoder.
        reads: names of the parts of the U-Net that are used.
        head: the linear layer.

    Args:
        unet: PlainConvUNet, ResidualEncoderUNet or VoxelFPN; changed.
        num_classes: classes.

    Raises:
        NotImplementedError: for other networks.
    """

    reads = ("encoder",)

    def __init__(self, unet: Any, num_classes: int) -> None:
        super().__init__()
        check_unet(unet, "classification")
        del unet.decoder
        self.backbone: Any = unet
        self.head = nn.Linear(2 * sum(encoder_channels(unet)), num_classes)
        # All classes are equally likely at first, however large the features are.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, C, Z, Y, X)``."""
        stages = [stage.flatten(2) for stage in self.backbone.encoder(images)]
        return self.head(torch.cat([pooled for s in stages for pooled in (s.mean(2), s.amax(2))], dim=1))


def window_starts(size: int, window: int, step: float = 0.5) -> list[int]:
    """Evenly spread windows that cover an axis, at most ``step`` windows apart.

    Args:
        size: voxels of the axis, at least ``window``.
        window: voxels of a window.
        step: share of a window.
    """
    count = -(-(size - window) // max(1, int(window * step))) + 1
    return [round(i * (size - window) / max(1, count - 1)) for i in range(count)]


@torch.inference_mode()
def classify_volume(network: nn.Module, volume: Tensor, window: Sequence[int], device: torch.device) -> Tensor:
    """Mean logits of the windows that cover a volume.

    Args:
        network: in evaluation mode, on ``device``.
        volume: ``(C, Z, Y, X)``; filled up with zeros where it is smaller than the window, as in training.
        window: ``(Z, Y, X)`` voxels that the network sees at a time.
        device: to compute on.

    Returns:
        ``(num_classes,)`` float32 on the CPU.
    """
    missing = [max(0, w - n) for n, w in zip(volume.shape[1:], window)]
    volume = F.pad(volume, [p for m in reversed(missing) for p in (m // 2, m - m // 2)])
    starts = list(product(*(window_starts(n, w) for n, w in zip(volume.shape[1:], window))))
    total = torch.zeros(())
    for start in starts:
        z, y, x = (slice(s, s + w) for s, w in zip(start, window))
        with torch.autocast("cuda", enabled=device.type == "cuda"):
            logits = network(volume[None, :, z, y, x].to(device))
        total = total + logits[0].float().cpu()
    return total / len(starts)
