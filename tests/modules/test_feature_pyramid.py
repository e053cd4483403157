"""Features of nnU-Net's U-Nets against the networks' own forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl_stc3d.modules.feature_pyramid import (
    PYRAMIDS,
    check_unet,
    decoder_features,
    encoder_channels,
    pyramid_channels,
    pyramid_maps,
    total_stride,
)


@pytest.fixture
def network(architecture, tiny_plans, tiny_network) -> nn.Module:
    """Each architecture with a stage that does not divide the first axis."""
    plans = tiny_plans(architecture, channels=2, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    return tiny_network(plans, channels=2, classes=3)


def test_decoder_features_are_what_the_segmentation_layers_see(network):
    image = torch.randn(2, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    features = decoder_features(network.decoder, network.encoder(image))
    # The network returns the highest resolution first, the decoder computes the lowest first.
    expected = network(image)[::-1]
    assert len(features) == len(expected) == 2
    for feature, layer, output in zip(features, network.decoder.seg_layers, expected):
        torch.testing.assert_close(layer(feature), output)


def test_decoder_features_have_the_channels_of_the_encoder(network):
    image = torch.randn(1, 2, 8, 16, 16)
    skips = network.encoder(image)
    features = decoder_features(network.decoder, skips)
    assert [f.shape for f in features] == [s.shape for s in reversed(skips[:-1])]
    assert encoder_channels(network) == [s.shape[1] for s in skips] == [4, 8, 8]


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_pyramids_have_the_maps_they_name(network, pyramid):
    skips = network.encoder(torch.randn(1, 2, 8, 16, 16))
    up = decoder_features(network.decoder, skips)
    expected = {"encoder": skips, "decoder": [skips[-1], *up], "both": [*skips, *up]}[pyramid]
    maps = pyramid_maps(network, skips, pyramid)
    assert len(maps) == len(expected)
    for one, other in zip(maps, expected):
        torch.testing.assert_close(one, other)
    assert pyramid_channels(network, pyramid) == sum(m.shape[1] for m in maps)


def test_total_stride_is_what_the_bottleneck_shows(network):
    assert total_stride(network) == (2, 4, 4)
    bottleneck = network.encoder(torch.randn(1, 2, 8, 16, 16))[-1]
    assert bottleneck.shape[2:] == (4, 4, 4)
    check_unet(network)


class EncoderOnly(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def test_other_networks_are_refused_by_name(network):
    with pytest.raises(NotImplementedError, match="supports PlainConvUNet and ResidualEncoderUNet, got Linear"):
        check_unet(nn.Linear(1, 1))
    with pytest.raises(NotImplementedError, match="got EncoderOnly"):
        check_unet(EncoderOnly(network.encoder))
