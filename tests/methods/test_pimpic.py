"""PiMPiC: which levels it reads, what it compares, and every option."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.losses.pimpic import intersection_contrast, intersection_measure
from nnssl_stc3d.methods.base import EMBEDDINGS
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.samplers import TransformRanges

SMALL = {"view_shape": (8, 8, 8), "pim_hidden": 16, "pic_hidden": 16, "projector_dim": 8, "patches": 4}


def config_of(**changes) -> PiMPiCConfig:
    return PiMPiCConfig(**(SMALL | changes))


@pytest.fixture
def method_class():
    return PiMPiC


FIVE_STAGES = {
    "n_stages": 5,
    "features_per_stage": [4, 4, 8, 8, 8],
    "kernel_sizes": [[3, 3, 3]] * 5,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 4,
    "n_conv_per_stage": [1] * 5,
    "n_conv_per_stage_decoder": [1] * 4,
}


# ---- levels ---------------------------------------------------------------------------------------------------------


def test_levels_are_chosen_by_stride_as_far_as_the_network_has_them(build):
    three = build(config_of())
    assert (three.pim_stages, three.pic_stages) == ([2], [0, 1, 2])
    five = build(config_of(view_shape=(32, 32, 32)), **FIVE_STAGES)
    assert (five.pim_stages, five.pic_stages) == ([2, 3, 4], [0, 1, 2])
    # 512 + 64 + 8 places, and 4 + 4 + 8 channels.
    assert five.pim_projector[0].in_features == 584 and five.pic_projector[0].in_features == 16


def test_anisotropic_networks_have_levels_by_their_largest_stride(build, make_batch):
    config = config_of(view_shape=(8, 16, 16), pim_strides=(4,))
    method = build(config, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    assert method.pim_stages == [2] and method.pim_projector[0].in_features == 4 * 4 * 4
    batch = make_batch(config, shape=(20, 40, 40))
    assert method(batch)["loss"].isfinite()


@pytest.mark.parametrize("name", ["pim_strides", "pic_strides"])
def test_levels_that_the_network_does_not_have_are_refused(build, name):
    with pytest.raises(ValueError, match=rf"{name}=\(8, 16\): the network has no such level, .*\(1, 2, 4\)"):
        build(config_of(**{name: (8, 16)}))


def test_stages_below_the_deepest_level_stay_untrained(build, make_batch):
    method = build(config_of(view_shape=(32, 32, 32), pim_strides=(4, 8)), **FIVE_STAGES)
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in method.network.encoder.stages]
    assert trained == [True, True, True, True, False]
    method(make_batch(method.config, shape=(48, 48, 48)))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# ---- what is compared -----------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A U-Net whose feature maps are given."""

    def __init__(self, maps: list[Tensor], strides: list[int]) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.output_channels = [m.shape[1] for m in maps]
        self.encoder.strides = [[s] * 3 for s in strides]
        self.encoder.stages = nn.ModuleList()
        self.encoder.forward = lambda x: maps
        self.decoder = nn.Module()
        self.decoder.stages, self.decoder.transpconvs = nn.ModuleList(), nn.ModuleList()


def test_the_released_descriptor(wave):
    """Channel means of levels 3 to 5, flattened and concatenated from the finest."""
    maps = [
        torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 1, 8, 8, 8), wave((2, 4, 4, 4, 4), 0.05),
        wave((2, 8, 2, 2, 2), 0.07), wave((2, 16, 1, 1, 1), 0.3),
    ]  # fmt: skip
    config = config_of(view_shape=(16, 16, 16), patches=2, pic_weight=0.0)
    method = PiMPiC(Given(maps, [1, 2, 2, 2, 2]), config)
    seen = []
    method.pim_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.pim_projector.double()
    overlap = torch.eye(2)[None]
    method(ViewBatch(torch.zeros(1, 2, 1, 16, 16, 16), None, {"overlap": overlap}))
    (descriptor,) = seen
    assert descriptor.shape == (2, 64 + 8 + 1)
    assert descriptor[0, :3].tolist() == pytest.approx(
        [-0.11714103060642744, 0.07076900266666264, -0.2758192940054828], rel=1e-9
    )
    assert descriptor[0, -2:].tolist() == pytest.approx([0.049016288676189346, 0.11158663192807727], rel=1e-9)
    assert descriptor[1, :2].tolist() == pytest.approx([-0.05480882030017928, 0.0249949637204607], rel=1e-9)
    assert descriptor[1, -1].item() == pytest.approx(-0.034438229141791024, rel=1e-9)


def run_with_given_embeddings(method: PiMPiC, batch: ViewBatch, embeddings: Tensor) -> dict[str, Tensor]:
    method.pim_projector.register_forward_hook(lambda *_: embeddings)
    return method(batch)


def test_overlaps_are_compared_within_a_volume_only(build, make_batch):
    config = config_of(pic_weight=0.0)
    method, batch = build(config), make_batch(config, 3)
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    result = run_with_given_embeddings(method, batch, z)
    volumes = [intersection_measure(z[4 * b : 4 * b + 4], batch.targets["overlap"][b]) for b in range(3)]
    assert result["pim"].item() == pytest.approx(float(torch.stack(volumes).mean()), rel=1e-6)
    errors = [
        abs(F.cosine_similarity(z[4 * b + i], z[4 * b + j], dim=0) - batch.targets["overlap"][b, i, j])
        for b in range(3)
        for i, j in combinations(range(4), 2)
    ]
    assert result["overlap_error"].item() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize("transforms", [TransformRanges.none(), TransformRanges(rotation=30, min_overlap=0.2)])
def test_pairs_that_overlap_are_contrasted(build, make_batch, transforms):
    """Every pair of a volume from a threshold on, no pair of two volumes."""
    config = config_of(pim_weight=0.0, pair_overlap=0.2, reach=1.0, transforms=transforms)
    method, batch = build(config), make_batch(config, 3, shape=(24, 24, 24))
    seen = {}
    method.pic_projector.register_forward_hook(lambda _, inputs, output: seen.update(rows=inputs[0], out=output))
    result = method(batch)
    overlap = batch.targets["overlap"]
    expected = int((overlap >= 0.2).triu(1).sum())
    assert 0 < expected < 3 * 6
    assert seen["rows"].shape == (4 * expected, 4 + 8 + 8)
    assert result["overlapping_pairs"].item() == pytest.approx(expected / 18)
    contrast = intersection_contrast(seen["out"].unflatten(0, (-1, 4)), 1.0, "official")
    assert result["pic"].item() == pytest.approx(contrast.item(), rel=1e-6)
    assert result[EMBEDDINGS].shape == (expected, 2, 8)


@pytest.mark.parametrize(("rotation", "tolerance"), [(0, 2.2), (30, 0.6)])
def test_shared_parts_show_the_same_positions(coordinates, make_batch, rotation, tolerance):
    """On feature maps that hold positions of the volume, the shared parts of a pair have the same mean position.

    Boxes are widened to whole voxels of the map, here 2 voxels of the view wide; soft masks are not.
    """
    transforms = TransformRanges(rotation=rotation, translation=0.1, scaling=(0.9, 1.1), min_overlap=0.3)
    config = config_of(view_shape=(16, 16, 16), pim_weight=0.0, pic_strides=(1, 2), pair_overlap=0.1)
    config = dataclasses.replace(config, transforms=transforms)
    batch = make_batch(config, [coordinates((40, 44, 36))] * 2)
    views = batch.views.flatten(0, 1)
    method = PiMPiC(Given([views, F.avg_pool3d(views, 2)], [1, 2]), config)
    seen = []
    method.pic_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unflatten(0, (-1, 4))))
    assert method(batch)["loss"].isfinite()
    (parts,) = seen
    assert len(parts) > 4
    apart = (parts[:, 0] - parts[:, 1]).abs().amax()
    assert apart < tolerance, apart
    assert (parts[:, 2] - parts[:, 3]).abs().amax(1).mean() > 2


def test_the_monitors_see_each_patch_with_its_nearest(build, make_batch):
    config = config_of()
    method, batch = build(config), make_batch(config)
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    pairs = run_with_given_embeddings(method, batch, z)[EMBEDDINGS]
    assert pairs.shape == (8, 2, 8)
    for b, i in ((b, i) for b in range(2) for i in range(4)):
        overlap = batch.targets["overlap"][b, i].clone()
        overlap[i] = -1
        assert torch.equal(pairs[4 * b + i, 0], z[4 * b + i])
        assert torch.equal(pairs[4 * b + i, 1], z[4 * b + int(overlap.argmax())])


# ---- every option trains --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"pim_form": "paper", "pic_form": "paper", "temperature": 0.1},
    {"pim_weight": 0.0},
    {"pic_weight": 0.0},
    {"pim_weight": 0.5, "pic_weight": 2.0, "patches": 2},
    {"pim_strides": (1, 2, 4), "pic_strides": (1,)},
    {"pim_strides": (2,), "pic_strides": (2,)},
    {"transforms": TransformRanges()},
    {"transforms": TransformRanges(rotation=0, scaling=(0.5, 2), flips=0.5)},
    {"batch_size": 1, "reach": 0.2},
]


def label(options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if not isinstance(v, TransformRanges))


@pytest.fixture
def check_training(check_step):
    """Function ``(method, batch)``: checks one step, and what is trained and transferred."""

    def check(method: PiMPiC, batch: ViewBatch) -> None:
        check_step(method, batch, {"pim": method.config.pim_weight, "pic": method.config.pic_weight})
        assert method.transfers == ("encoder",)
        assert any(p.requires_grad for p in method.network.encoder.parameters())

    return check


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains(build, make_batch, check_training, options, architecture):
    config = config_of(**options)
    check_training(build(config, architecture, channels=2), make_batch(config, min(2, config.batch_size), channels=2))


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_literal_forms_train(build, make_batch, check_training, name):
    config = dataclasses.replace(getattr(PiMPiCConfig, name)(), **SMALL)
    check_training(build(config), make_batch(config, 1, shape=(40, 40, 40)))


def test_the_smallest_volumes_train(build, make_batch, check_training):
    config = config_of()
    check_training(build(config), make_batch(config, shape=(16, 16, 16)))


@pytest.mark.parametrize("pim_weight", [0.0, 1.0])
def test_a_batch_in_which_no_patches_overlap_is_survived(build, make_batch, pim_weight):
    config = config_of(pim_weight=pim_weight)
    method, batch = build(config), make_batch(config)
    batch.targets["overlap"] = torch.eye(4).expand(2, 4, 4)
    batch.targets["boxes"][:, ~torch.eye(4, dtype=torch.bool)] = 0
    result = method(batch)
    assert result["pic"] == 0 and result["overlapping_pairs"] == 0 and result["loss"].isfinite()
    result["loss"].backward()
    # No parameter is left out: several GPUs would wait for it.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_identical_patches_are_survived(build, make_batch, check_training):
    config = config_of(reach=0.0)
    batch = make_batch(config)
    assert (batch.targets["overlap"] == 1).all()
    check_training(build(config), batch)


@pytest.mark.parametrize("transforms", [TransformRanges.none(), TransformRanges()])
def test_autocast_gives_a_finite_float32_loss(build, make_batch, check_autocast, transforms):
    config = config_of(transforms=transforms)
    method, batch = build(config), make_batch(config)
    check_autocast(method, batch, rel=0.1)


def test_the_sampler_follows_the_options():
    config = config_of(patches=5, reach=0.3, transforms=TransformRanges(rotation=5))
    sampler = PiMPiC.view_sampler(config, (16, 64, 64), (5, 1, 1))
    assert sampler.n_views == 5 and sampler.reach == 0.3 and sampler.transforms.rotation == 5 and sampler.in_plane
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        PiMPiC.view_sampler(PiMPiCConfig(), (16, 16, 16), (1, 1, 1))


def test_the_view_shape_has_to_be_resolved_first(network_of):
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        PiMPiC(network_of("PlainConvUNet"), config_of(view_shape=None))


def test_a_fixed_batch_is_learnt(build, make_batch, overfit):
    config = config_of(projector_dim=32, patches=6)
    method = build(config)
    batch = make_batch(config, shape=(28, 28, 28))
    before, after = overfit(method, batch, 40)
    assert after["pim"] < 0.5 * before["pim"] and after["pic"] < 0.8 * before["pic"]
    assert after["overlap_error"] < 0.5 * before["overlap_error"]
