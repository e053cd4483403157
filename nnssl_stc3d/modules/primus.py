"""The transformer encoder of dynamic-network-architectures, as an architecture that a plans file can name."""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.architectures.primus import Primus
from torch import Tensor, nn


class PlansPrimus(Primus):
    """Primus with the constructor that nnU-Net calls from plans.

    Args:
        input_channels: of the images.
        num_classes: segmentation channels.
        deep_supervision: as nnU-Net's trainers expect it of a network, which has one output all the same.
        strides: ignored; nnU-Net's trainers read from it how many outputs to expect.
        arguments: of Primus: ``embed_dim``, ``patch_embed_size``, ``eva_depth``, ``eva_numheads``, ``input_shape`` (the
            plan's patch size), and its further options.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        strides: Any = None,
        **arguments: Any,
    ) -> None:
        del strides
        super().__init__(input_channels=input_channels, num_classes=num_classes, **arguments)
        self.decoder.deep_supervision = deep_supervision

    @property
    def decoder(self) -> Any:
        """Where nnU-Net's trainer switches deep supervision."""
        return self.up_projection

    def forward(self, images: Tensor, ret_mask: bool = False) -> Any:
        """Segment ``(N, C, Z, Y, X)``; a list of one segmentation with deep supervision."""
        output = super().forward(images, ret_mask)
        return [output] if self.decoder.deep_supervision and not ret_mask else output


def is_primus(network: nn.Module) -> bool:
    """Whether a network is Primus or one of its relatives."""
    return isinstance(network, Primus)


def encode_tokens(embed: nn.Module, eva: Any, images: Tensor, index: Tensor | None) -> Tensor:
    """Run the transformer on some of its tokens: masked ones are left out, not blanked.

    Primus' own patch dropout draws at random and does not work with every version of timm; here the caller chooses.

    Args:
        embed: Primus' ``down_projection``.
        eva: Primus' transformer.
        images: ``(N, C, Z, Y, X)``.
        index: ``(N, M)`` tokens to keep, C order over the grid of patches; None keeps all.

    Returns:
        ``(N, M, embed_dim)``
    """
    x = embed(images).flatten(2).transpose(1, 2)
    if eva.pos_embed is not None:
        x = x + eva.pos_embed
    x = eva.pos_drop(x)
    rope = eva.rope.get_embed() if eva.rope is not None else None
    if index is not None:
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        if rope is not None:
            # One embedding for each kept token of each image, the same for all heads.
            rope = rope[index][:, None]
    for block in eva.blocks:
        x = block(x, rope=rope)
    return eva.norm(x)


def token_grid(network: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Voxels of a token and of the only view shape that Primus takes, ``(z, y, x)`` each."""
    patch = tuple(int(n) for n in network.down_projection.proj.kernel_size)
    grid = network.eva.rope.feat_shape if network.eva.rope is not None else None
    if grid is None:
        raise NotImplementedError("masked pretraining needs a Primus with rotary position embeddings (its default)")
    shape = tuple(int(g) * p for g, p in zip(grid, patch))
    return (patch[0], patch[1], patch[2]), (shape[0], shape[1], shape[2])


def check_primus(network: Any) -> None:
    """Refuse relatives of Primus that tokens cannot be left out of.

    Raises:
        NotImplementedError: for register tokens, or an embedding that looks beyond its own patch.
    """
    if network.register_tokens is not None:
        raise NotImplementedError("masked pretraining does not support Primus with register tokens; plan it without")
    if not isinstance(getattr(network.down_projection, "proj", None), nn.Conv3d):
        raise NotImplementedError(
            f"masked pretraining supports Primus, whose tokens see their own patch only, got {type(network).__name__}"
        )
    token_grid(network)
