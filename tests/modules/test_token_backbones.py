"""Tokens of U-Nets and of Primus: masked voxels must not reach visible tokens in ways they should not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl_stc3d.modules.masking import expand_mask, visible_tokens
from nnssl_stc3d.modules.primus import PlansPrimus, check_primus, is_primus, token_grid
from nnssl_stc3d.modules.token_backbones import PrimusBackbone, UNetBackbone, resolve_block, token_backbone

VIEW = (16, 16, 16)


def primus(seed: int = 0, **changes) -> PlansPrimus:
    torch.manual_seed(seed)
    options = {"embed_dim": 24, "patch_embed_size": (4, 8, 4), "eva_depth": 2, "eva_numheads": 1} | changes
    network = PlansPrimus(1, 3, input_shape=VIEW, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def parts(network, backbone) -> dict[str, nn.Module]:
    return {name: getattr(network, name) for name in backbone.parts}


@pytest.fixture
def mask():
    drawn = torch.rand(2, 4 * 2 * 4, generator=torch.Generator().manual_seed(0)).argsort(1) < 20
    return drawn.reshape(2, 4, 2, 4)


# ---- U-Net ----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_unet_are_its_stages_averaged_over_blocks(tiny_plans, tiny_network, architecture):
    network = tiny_network(tiny_plans(architecture)).eval()
    backbone = token_backbone(network, (4, 4, 8), VIEW)
    assert isinstance(backbone, UNetBackbone) and backbone.grid == (4, 4, 2) and backbone.features == 4 + 8 + 8
    images = torch.randn(2, 1, *VIEW)
    encoded = backbone.encode(parts(network, backbone), images, None)
    assert encoded.tokens.shape == (2, 32, 20) and encoded.pooled.shape == (2, 8)
    skips = network.encoder(images)
    token = encoded.tokens[1].reshape(4, 4, 2, 20)[1, 3, 0]
    expected = torch.cat([
        skips[0][1, :, 4:8, 12:16, :8].mean((1, 2, 3)),
        skips[1][1, :, 2:4, 6:8, :4].mean((1, 2, 3)),
        skips[2][1, :, 1, 3, :2].mean(1),
    ])  # fmt: skip
    assert torch.allclose(token, expected, atol=1e-5)
    index = torch.tensor([[3, 5], [0, 31]])
    kept = backbone.encode(parts(network, backbone), images, index).tokens
    assert torch.equal(kept[0], encoded.tokens[0, [3, 5]]) and torch.equal(kept[1], encoded.tokens[1, [0, 31]])


def test_the_decoder_of_a_unet_makes_tokens_of_the_same_width(tiny_plans, tiny_network, architecture):
    network = tiny_network(tiny_plans(architecture)).eval()
    backbone = UNetBackbone(network, (4, 4, 8), VIEW)
    images = torch.randn(2, 1, *VIEW)
    encoded = backbone.encode(parts(network, backbone), images, None)
    tokens, finest = backbone.decode(network.decoder, encoded.maps)
    assert tokens.shape == encoded.tokens.shape and finest.shape == (2, 4, *VIEW)
    # The highest resolution first and the bottleneck last, as the encoder's.
    assert torch.equal(tokens[..., -8:], encoded.tokens[..., -8:])
    logits = network.decoder.seg_layers[-1](finest)
    assert torch.allclose(logits, network(images)[0], atol=1e-5)


# ---- Primus ---------------------------------------------------------------------------------------------------------


def test_all_tokens_are_what_primus_itself_computes():
    network = primus()
    backbone = token_backbone(network, (4, 8, 4), VIEW)
    assert isinstance(backbone, PrimusBackbone) and backbone.grid == (4, 2, 4)
    images, seen = torch.randn(2, 1, *VIEW), []
    network.eva.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    network(images)
    found = backbone.encode(parts(network, backbone), images, None)
    assert torch.allclose(found.tokens, seen[0], atol=1e-5)
    assert torch.allclose(found.pooled, found.tokens.mean(1))
    everything = torch.arange(32).expand(2, -1)
    assert torch.allclose(backbone.encode(parts(network, backbone), images, everything).tokens, seen[0], atol=1e-5)


def test_masked_voxels_do_not_reach_a_transformers_tokens(mask):
    """Tokens are left out, not blanked: not one voxel below the mask may matter."""
    network = primus()
    backbone = PrimusBackbone(network)
    voxels = expand_mask(mask, backbone.block)[:, None]
    images = torch.randn(2, 1, *VIEW)
    index = visible_tokens(mask)
    first = backbone.encode(parts(network, backbone), images, index).tokens
    second = backbone.encode(parts(network, backbone), images.masked_fill(voxels, 99.0), index).tokens
    assert first.shape == (2, 12, 24) and torch.equal(first, second)
    changed = backbone.encode(parts(network, backbone), images.masked_fill(~voxels, 99.0), index).tokens
    assert not torch.allclose(first, changed, atol=0.1)


def test_visible_tokens_keep_their_positions(mask):
    """The same patches at other places are other tokens, by the absolute and by the rotary embedding alone."""
    images = torch.ones(1, 1, *VIEW)
    for options in ({"use_abs_pos_embed": False}, {}):
        network = primus(**options)
        backbone = PrimusBackbone(network)
        some = backbone.encode(parts(network, backbone), images, torch.tensor([[0, 1, 9]])).tokens
        moved = backbone.encode(parts(network, backbone), images, torch.tensor([[0, 30, 9]])).tokens
        if options:
            # All tokens hold the same, so attention has nothing to choose from, wherever they lie.
            assert torch.allclose(some, moved, atol=1e-5)
        else:
            assert not torch.allclose(some[:, 1], moved[:, 1], atol=1e-2)
    generator = torch.Generator().manual_seed(1)
    network = primus(use_abs_pos_embed=False)
    backbone = PrimusBackbone(network)
    images = torch.randn(1, 1, *VIEW, generator=generator)
    near = backbone.encode(parts(network, backbone), images, torch.tensor([[0, 1, 9]])).tokens
    # The patch of token 1, shown at token 30.
    moved_image = images.clone()
    moved_image[..., 12:16, 8:16, 8:12] = images[..., 0:4, 0:8, 4:8]
    far = backbone.encode(parts(network, backbone), moved_image, torch.tensor([[0, 30, 9]])).tokens
    assert not torch.allclose(near, far, atol=1e-4)


def test_a_whole_network_as_nnunet_builds_it():
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    arguments = {
        "embed_dim": 24, "patch_embed_size": [4, 8, 4], "eva_depth": 1, "eva_numheads": 1, "input_shape": list(VIEW),
    }  # fmt: skip
    network = get_network_from_plans(
        "nnssl_stc3d.modules.primus.PlansPrimus", arguments, [], 2, 4, deep_supervision=True
    )
    assert is_primus(network) and token_grid(network) == ((4, 8, 4), VIEW)
    check_primus(network)
    image = torch.randn(1, 2, *VIEW)
    (supervised,) = network.eval()(image)
    # Where nnU-Net's trainer switches deep supervision.
    network.decoder.deep_supervision = False
    assert network(image).shape == (1, 4, *VIEW)
    assert torch.equal(network(image), supervised)


def test_relatives_that_cannot_leave_tokens_out_are_refused():
    with pytest.raises(NotImplementedError, match="register tokens"):
        check_primus(primus(num_register_tokens=2))
    with pytest.raises(NotImplementedError, match="rotary"):
        check_primus(primus(use_rot_pos_emb=False))
    network = primus()
    network.down_projection = nn.Sequential(nn.Conv3d(1, 24, 4, 4))
    with pytest.raises(NotImplementedError, match="see their own patch only, got PlansPrimus"):
        check_primus(network)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_of_a_transformer_are_made_of_tokens():
    network = primus()
    assert resolve_block(network, None, VIEW) == (4, 8, 4)
    assert resolve_block(network, (8, 8, 8), VIEW) == (8, 8, 8)
    with pytest.raises(ValueError, match=r"whole tokens of \(4, 8, 4\) voxels, got \(4, 4, 4\)"):
        resolve_block(network, (4, 4, 4), VIEW)


def test_blocks_of_a_unet_respect_its_strides(tiny_plans, tiny_network):
    network = tiny_network(tiny_plans())
    assert resolve_block(network, None, VIEW) == (4, 4, 4)
    assert resolve_block(network, [2, 4, 8], VIEW) == (2, 4, 8)
    with pytest.raises(ValueError, match="got \\(3, 4, 4\\)"):
        resolve_block(network, (3, 4, 4), VIEW)
