"""Weights that are changed to fit another network: what they then compute, and what of them is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnssl_stc3d.transfer.adapt import Adaptation, adapt_depth, adapt_input_channels, adapt_kernel, common_levels
from nnssl_stc3d.transfer.load import load_pretrained

FLAT = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
# One stage more than tiny_plans.
DEEPER = {
    "n_stages": 4,
    "features_per_stage": [4, 8, 8, 8],
    "kernel_sizes": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 3],
    "n_conv_per_stage_decoder": [1, 1, 1],
}
BLOCKS = {
    "PlainConvUNet": {"n_conv_per_stage": [2, 2, 2, 2]},
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 1, 2, 1]},
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- input channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(1, 2), (1, 3), (2, 3), (3, 1), (4, 2)])
def test_adapted_stem_keeps_its_response_to_equal_channels(source, target):
    weight = torch.randn(4, source, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 1, 5, 5, 5, dtype=torch.float64)
    adapted = adapt_input_channels(weight, target)
    assert adapted.shape == (4, target, 3, 3, 3)
    expected = torch.nn.functional.conv3d(image.expand(1, source, 5, 5, 5), weight)
    torch.testing.assert_close(torch.nn.functional.conv3d(image.expand(1, target, 5, 5, 5), adapted), expected)


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 5), (3, 1), (4, 2)])
def test_copied_stem_treats_each_channel_as_the_one_it_was_copied_from(source, target):
    weight, image = randn(4, source, 3, 3, 3), randn(1, target, 5, 5, 5)
    given = F.conv3d(image, adapt_input_channels(weight, target, "copied"))
    expected = sum(F.conv3d(image[:, [k]], weight[:, [k % source]]) for k in range(target))
    torch.testing.assert_close(given, expected)


def test_a_fresh_stem_is_counted_as_fresh(tiny_plans, tiny_network, pretraining_checkpoint, configuration):
    target = tiny_plans(channels=2)
    network = tiny_network(target, channels=2)
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    before = network.state_dict()[stem].clone()
    report = load_pretrained(
        network, pretraining_checkpoint(tiny_plans()), target, configuration, Adaptation(stem="fresh")
    )
    assert torch.equal(network.state_dict()[stem], before)
    assert stem in report.fresh and not report.adapted
    whole = load_pretrained(tiny_network(target, channels=2), pretraining_checkpoint(tiny_plans()))
    assert len(report.loaded) == len(whole.loaded) and len(report.fresh) == len(whole.fresh) + 1


# ---- kernels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("width", [3, 5])
def test_kernels_keep_the_response_to_what_is_constant_along_the_axis(axis, width):
    wide = [3, 3, 3]
    wide[axis] = width
    flat = [1 if a == axis else n for a, n in enumerate(wide)]
    size = [6 if a == axis else 9 for a in range(3)]
    image = randn(1, 2, *[1 if a == axis else n for a, n in enumerate(size)]).expand(1, 2, *size)
    for given, wanted in ((wide, flat), (flat, wide)):
        weight = randn(4, 2, *given)
        adapted = adapt_kernel(weight, tuple(wanted))
        assert tuple(adapted.shape[2:]) == tuple(wanted)
        # Neither pads, so the narrow one leaves more voxels along the axis; all of them are equal.
        before, after = F.conv3d(image, weight), F.conv3d(image, adapted)
        length = min(before.shape[2 + axis], after.shape[2 + axis])
        torch.testing.assert_close(after.narrow(2 + axis, 0, length), before.narrow(2 + axis, 0, length))


def test_a_flat_kernel_made_cubic_computes_the_same_on_any_image():
    weight, image = randn(4, 2, 1, 3, 3), randn(1, 2, 6, 7, 8)
    given = F.conv3d(image, adapt_kernel(weight, (3, 3, 3)), padding=1)
    torch.testing.assert_close(given, F.conv3d(image, weight, padding=(0, 1, 1)))


def test_other_changes_of_kernels_are_refused():
    assert adapt_kernel(randn(4, 2, 3, 3, 3), (5, 3, 3)) is None
    assert adapt_kernel(randn(4, 2, 1, 3, 3), (2, 3, 3)) is None


def test_kernels_are_adapted_only_when_asked(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, architecture
):
    target = tiny_plans(architecture, kernel_sizes=FLAT)
    checkpoint = pretraining_checkpoint(tiny_plans(architecture))
    with pytest.raises(ValueError, match="NNSSL_STC3D_ADAPT=kernels nnUNetv2_train 801 3d_fullres FOLD -p nnUNetPlans"):
        load_pretrained(tiny_network(target), checkpoint, target, configuration)
    network = tiny_network(target)
    report = load_pretrained(network, checkpoint, target, configuration, Adaptation(kernels=True))
    source = checkpoint["network_weights"]
    for key in report.adapted:
        assert torch.equal(network.state_dict()[key], source[key].sum(2, keepdim=True))
    assert set(report.adapted.values()) == {"kernel 3x3x3 -> 1x3x3, summed"}
    assert len(report.loaded) + len(report.adapted) + len(report.fresh) == len(list(network.parameters()))
    assert f"{len(report.loaded)} tensors loaded, {len(report.adapted)} adapted, {len(report.fresh)} fresh" in str(
        report
    )
    assert f"and {len(report.adapted) - 1} more: kernel 3x3x3 -> 1x3x3, summed" in str(report)


def test_channels_and_kernels_at_once(tiny_plans, tiny_network, pretraining_checkpoint, configuration):
    target = tiny_plans(channels=2, kernel_sizes=FLAT)
    network = tiny_network(target, channels=2)
    checkpoint = pretraining_checkpoint(tiny_plans())
    report = load_pretrained(network, checkpoint, target, configuration, Adaptation(kernels=True))
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    assert report.adapted[stem] == ("1 -> 2 input channels, repeated and divided by 2; kernel 3x3x3 -> 1x3x3, summed")
    source = checkpoint["network_weights"][stem]
    torch.testing.assert_close(network.state_dict()[stem].sum(1), source.sum((1, 2))[:, None])


# ---- depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deeper_target", [True, False])
def test_stages_that_both_have_are_taken(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, architecture, deeper_target
):
    shallow, deep = tiny_plans(architecture), tiny_plans(architecture, **DEEPER, **BLOCKS[architecture])
    source, target = (shallow, deep) if deeper_target else (deep, shallow)
    checkpoint, network = pretraining_checkpoint(source), tiny_network(target)
    with pytest.raises(ValueError, match="NNSSL_STC3D_ADAPT=depth "):
        load_pretrained(network, checkpoint, target, configuration)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_pretrained(network, checkpoint, target, configuration, Adaptation(depth=True))
    after, weights = network.state_dict(), checkpoint["network_weights"]
    for name in after:
        if name.startswith("encoder.") and not name.startswith("encoder.stages.3."):
            assert torch.equal(after[name], weights[name]), name
        elif name.startswith("encoder.stages.3."):
            assert torch.equal(after[name], before[name]), name
    # Only the finest level is fed by the same module in both: the last of a decoder's list.
    ours, theirs = (2, 1) if deeper_target else (1, 2)
    for part in ("stages", "transpconvs"):
        moved = [name for name in after if name.startswith(f"decoder.{part}.{ours}.")]
        assert moved
        for name in moved:
            twin = name.replace(f"decoder.{part}.{ours}.", f"decoder.{part}.{theirs}.")
            assert torch.equal(after[name], weights[twin]), name
    assert torch.equal(after["decoder.transpconvs.0.weight"], before["decoder.transpconvs.0.weight"])
    assert len(report.loaded) + len(report.fresh) == len(list(network.parameters()))
    assert "stages: pretrained with" in str(report)


def test_a_decoder_loses_the_level_above_the_shallower_bottleneck_and_keeps_the_finer_ones():
    """Five stages to four: of the decoder's four levels, the finest is the last."""
    weights = {f"decoder.stages.{level}.weight": torch.tensor(float(level)) for level in range(4)}
    weights |= {f"encoder.stages.{stage}.weight": torch.tensor(float(stage)) for stage in range(5)}
    adapted = {name: float(value) for name, value in adapt_depth(weights, 4).items()}
    encoder = {f"encoder.stages.{stage}.weight": stage for stage in range(4)}
    assert adapted == encoder | {"decoder.stages.1.weight": 2, "decoder.stages.2.weight": 3}
    common = [common_levels(f"decoder.stages.{level}.weight", 5, 4) for level in range(4)]
    assert common == [False, False, True, True]


def test_the_common_encoder_computes_the_same(tiny_plans, tiny_network, pretraining_checkpoint, configuration):
    source = tiny_plans(**DEEPER, **BLOCKS["PlainConvUNet"])
    target = tiny_plans()
    checkpoint, network = pretraining_checkpoint(source, transfers=("encoder",)), tiny_network(target)
    load_pretrained(network, checkpoint, target, configuration, Adaptation(depth=True))
    pretrained = tiny_network(source, classes=2)
    pretrained.load_state_dict(checkpoint["network_weights"])
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        for ours, theirs in zip(network.encoder(image), pretrained.encoder(image)[:3], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_depth_and_kernels_at_once(tiny_plans, tiny_network, pretraining_checkpoint, configuration):
    target = tiny_plans(kernel_sizes=FLAT)
    checkpoint = pretraining_checkpoint(tiny_plans(**DEEPER, **BLOCKS["PlainConvUNet"]))
    with pytest.raises(ValueError, match="NNSSL_STC3D_ADAPT=depth,kernels "):
        load_pretrained(tiny_network(target), checkpoint, target, configuration)
    report = load_pretrained(
        tiny_network(target), checkpoint, target, configuration, Adaptation(depth=True, kernels=True)
    )
    assert report.adapted and report.loaded


@pytest.mark.parametrize(
    "change",
    [
        {"features_per_stage": [4, 16, 16]},
        {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]},
        {"kernel_sizes": [[5, 3, 3], [3, 3, 3], [3, 3, 3]]},
    ],
)
def test_what_cannot_be_adapted_fails_even_when_asked(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, change
):
    target = tiny_plans(**change)
    checkpoint = pretraining_checkpoint(tiny_plans(**DEEPER, **BLOCKS["PlainConvUNet"]))
    network = tiny_network(target)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit this network") as caught:
        load_pretrained(network, checkpoint, target, configuration, Adaptation(depth=True, kernels=True))
    assert "NNSSL_STC3D_ADAPT" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# ---- how it is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, Adaptation()),
        ("", Adaptation()),
        ("depth", Adaptation(depth=True)),
        ("kernels, stem=copied", Adaptation(kernels=True, stem="copied")),
    ],
)
def test_the_variable(text, expected):
    assert Adaptation.from_environment({} if text is None else {"NNSSL_STC3D_ADAPT": text}) == expected


@pytest.mark.parametrize("text", ["dept", "stem", "stem=new", "depth=1"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match=r"understands depth, kernels and stem=divided\|copied\|fresh.* got"):
        Adaptation.from_environment({"NNSSL_STC3D_ADAPT": text})


def test_other_stems_are_refused():
    with pytest.raises(ValueError, match="one of divided, copied, fresh, got 'new'"):
        Adaptation(stem="new")
