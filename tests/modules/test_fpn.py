"""vox2vec's FPN: a network that nnU-Net builds from plans, and a pyramid that pretraining reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nnssl_stc3d.modules.feature_pyramid import check_unet, decoder_features, encoder_channels, total_stride
from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.modules.heads import sample_features
from nnssl_stc3d.transfer.adaptation_plan import build_adaptation_plan
from nnssl_stc3d.transfer.load import load_pretrained

FPN = "nnssl_stc3d.modules.fpn.VoxelFPN"


def fpn_plans(tiny_plans, channels: int = 1, **changes):
    """The plans of a residual U-Net with another class name."""
    plans = tiny_plans("ResidualEncoderUNet", channels, **changes)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = FPN
    return plans


@pytest.fixture(params=["nonlinear", "linear"])
def head(request) -> str:
    return request.param


@pytest.fixture
def network(tiny_plans, tiny_network, head) -> nn.Module:
    plans = fpn_plans(tiny_plans, 2, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], head=head)
    return tiny_network(plans, channels=2, classes=3)


def image(shape=(8, 16, 16), channels=2, batch=2) -> torch.Tensor:
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(0))


def test_plans_of_a_residual_unet_build_it(network):
    assert isinstance(network, VoxelFPN)
    check_unet(network)
    assert encoder_channels(network) == [4, 8, 8] and total_stride(network) == (2, 4, 4)


def test_deep_supervision_has_the_scales_that_nnunet_expects(network):
    outputs = network(image())
    # nnU-Net: every resolution but the bottleneck's, highest first.
    assert [tuple(o.shape) for o in outputs] == [(2, 3, 8, 16, 16), (2, 3, 8, 8, 8)]
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(image()), outputs[0])


def test_decoder_features_are_the_levels_that_the_head_reads(network, head):
    skips = network.encoder(image())
    features = decoder_features(network.decoder, skips)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 8, 8, 8), (4, 8, 16, 16)]
    outputs = network.decoder.seg_layers([skips[-1], *features], True)
    for output, expected in zip(outputs[::-1], network(image()), strict=True):
        torch.testing.assert_close(output, expected)


def test_every_parameter_gets_a_gradient(network):
    sum(o.square().mean() for o in network(image())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_linear_head_is_a_linear_classifier_of_the_concatenated_pyramid(tiny_plans, tiny_network):
    network = tiny_network(fpn_plans(tiny_plans, head="linear"), classes=3)
    x = image((8, 8, 8), 1)
    skips = network.encoder(x)
    pyramid = [skips[-1], *decoder_features(network.decoder, skips)]
    upsampled = [nn.functional.interpolate(level, size=(8, 8, 8), mode="nearest") for level in pyramid]
    layers = network.decoder.seg_layers.levels
    weight = torch.cat([layer.weight for layer in layers], dim=1)
    expected = nn.functional.conv3d(torch.cat(upsampled, dim=1), weight, sum(layer.bias for layer in layers))
    torch.testing.assert_close(network(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_nonlinear_head_classifies_single_voxels(tiny_plans, tiny_network):
    """All its kernels are 1: without normalisation over space, a voxel's logits follow from its own features."""
    network = tiny_network(fpn_plans(tiny_plans, norm_op=None, norm_op_kwargs=None), classes=3)
    head = network.decoder.seg_layers
    assert {tuple(p.shape[2:]) for p in head.parameters() if p.ndim > 1} == {(1, 1, 1)}
    pyramid = [torch.randn(1, 8, 2, 2, 2), torch.randn(1, 8, 4, 4, 4), torch.randn(1, 4, 8, 8, 8)]
    before = head(pyramid, False)[0]
    pyramid[0][..., 0] += 1
    changed = (head(pyramid, False)[0] != before).any(1)[0]
    # Column 0 of 2 covers columns 0 to 3 of 8.
    assert changed[..., :4].all() and not changed[..., 4:].any()


def test_the_papers_network_has_1008_channels_and_a_head_50_times_smaller():
    network = VoxelFPN(
        1, 6, [16 * 2**i for i in range(6)], nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 1, 14, 1,
        norm_op=nn.BatchNorm3d, nonlin=nn.ReLU,
    )  # fmt: skip
    with torch.no_grad():
        skips = network.eval().encoder(torch.zeros(1, 1, 32, 64, 64))
    pyramid = [skips[-1], *decoder_features(network.decoder, skips)]
    assert sample_features(pyramid, torch.zeros(1, 1, 3)).shape == (1, 1, 1008)
    head = sum(p.numel() for p in network.decoder.seg_layers.parameters())
    assert 25 < sum(p.numel() for p in network.parameters()) / head < 100


def test_two_dimensions_work():
    network = VoxelFPN(1, 3, [4, 8, 8], nn.Conv2d, [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]], 1, 2, 1)
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 2, 16, 16)


def test_dropout_and_missing_norm_are_possible(tiny_plans, tiny_network):
    plans = fpn_plans(
        tiny_plans, norm_op=None, norm_op_kwargs=None, dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.5}
    )
    network = tiny_network(plans, classes=2)
    x = image((8, 8, 8), 1)
    assert not torch.equal(network(x)[0], network(x)[0])
    network.eval()
    assert torch.equal(network(x)[0], network(x)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_per_stage": [4, 8]}, "features_per_stage must have one entry for each of 3 stages, got 2"),
        ({"n_conv_per_stage_decoder": [1, 1, 1]}, "n_conv_per_stage_decoder must have one entry for each of 2"),
        ({"strides": [[2, 2, 2]] * 3}, "has to keep the image's resolution"),
        ({"head": "deep"}, "head must be one of 'nonlinear', 'linear', got 'deep'"),
    ],
)
def test_what_does_not_fit_is_said(tiny_plans, tiny_network, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_network(fpn_plans(tiny_plans, **changes))


# ---- transfer -------------------------------------------------------------------------------------------------------


def test_the_adaptation_plan_finds_its_encoder(network, tiny_plans, head):
    plans = fpn_plans(tiny_plans, 2, head=head)
    plan = build_adaptation_plan(plans, "3d_fullres", 2, network)
    assert plan["architecture_plans"]["arch_class_name"] == FPN
    assert plan["key_to_stem"].startswith(plan["key_to_encoder"])


def test_pretrained_weights_load_without_the_head_and_adapt_to_channels(tiny_plans, tiny_network, head):
    plans = fpn_plans(tiny_plans, head=head)
    pretrained = tiny_network(plans, classes=2, seed=1)
    checkpoint = {
        "network_weights": copy.deepcopy(pretrained.state_dict()),
        "method": {"name": "vox2vec", "transfers": ["encoder", "decoder"]},
        "plans": plans,
        "configuration": "3d_fullres",
    }
    same, more = tiny_network(plans, classes=4), tiny_network(fpn_plans(tiny_plans, 3, head=head), 3, classes=4)
    report = load_pretrained(same, checkpoint, plans, "3d_fullres")
    assert all(name.startswith("decoder.seg_layers.") for name in report.fresh) and report.fresh
    for name, value in same.state_dict().items():
        if ".seg_layers." not in name:
            assert torch.equal(value, pretrained.state_dict()[name]), name
    adapted = load_pretrained(more, checkpoint, fpn_plans(tiny_plans, 3, head=head), "3d_fullres").adapted
    assert list(adapted) == ["encoder.stages.0.0.weight"]
