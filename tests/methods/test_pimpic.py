"""PiMPiC: which levels it reads, what it compares, and every option."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.losses.pimpic import intersection_contrast, intersection_measure
from nnssl_stc3d.methods.base import EMBEDDINGS
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

SMALL = {"view_shape": (8, 8, 8), "pim_hidden": 16, "pic_hidden": 16, "projector_dim": 8, "patches": 4}


def config_of(**changes) -> PiMPiCConfig:
    return PiMPiCConfig(**(SMALL | changes))


def anatomy(seed: int, shape: tuple[int, ...] = (20, 24, 18), channels: int = 1) -> Tensor:
    """A smooth volume with structure at the scale of a view, ``(1, 1, C, Z, Y, X)``."""
    noise = torch.randn(1, channels, *[n // 4 for n in shape], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=shape, mode="trilinear")[None]


def make_batch(config: PiMPiCConfig, volumes: list[Tensor], seed: int = 0) -> ViewBatch:
    """What the loader makes of volumes ``(1, 1, C, Z, Y, X)``, one for each sample."""
    sampler = PiMPiC.view_sampler(config, (16, 16, 16), (1.5, 1.0, 1.0))
    rng = np.random.default_rng(seed)
    specs, views = [], []
    for volume in volumes:
        (box,), found, *_ = sampler.sample([volume.shape[3:]], rng)
        crop = volume[(..., *(slice(a, b) for a, b in zip(*box)))]
        views.append(render_views(crop, ViewSpecs(*(f[None] for f in found)), config.view_shape)[0])
        specs.append(found)
    stacked = stack_specs(specs)
    return ViewBatch(torch.stack(views), stacked, sampler.targets(stacked, rng))


@pytest.fixture
def build(tiny_plans, tiny_network):
    """Function ``(config, architecture, channels, **arch_kwargs) -> method`` with frozen parts frozen."""

    def make(config: PiMPiCConfig, architecture: str = "PlainConvUNet", channels: int = 1, **changes) -> PiMPiC:
        network = tiny_network(tiny_plans(architecture, channels, **changes), channels)
        torch.manual_seed(0)
        method = PiMPiC(network, config)
        method.freeze_untrained()
        return method

    return make


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


def test_anisotropic_networks_have_levels_by_their_largest_stride(build):
    config = config_of(view_shape=(8, 16, 16), pim_strides=(4,))
    method = build(config, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    assert method.pim_stages == [2] and method.pim_projector[0].in_features == 4 * 4 * 4
    batch = make_batch(config, [anatomy(s, (20, 40, 40)) for s in range(2)])
    assert method(batch)["loss"].isfinite()


@pytest.mark.parametrize("name", ["pim_strides", "pic_strides"])
def test_levels_that_the_network_does_not_have_are_refused(build, name):
    with pytest.raises(ValueError, match=rf"{name}=\(8, 16\): the network has no such level, .*\(1, 2, 4\)"):
        build(config_of(**{name: (8, 16)}))


def test_stages_below_the_deepest_level_stay_untrained(build):
    method = build(config_of(view_shape=(32, 32, 32), pim_strides=(4, 8)), **FIVE_STAGES)
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in method.network.encoder.stages]
    assert trained == [True, True, True, True, False]
    method(make_batch(method.config, [anatomy(s, (48, 48, 48)) for s in range(2)]))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# ---- what is compared -----------------------------------------------------------------------------------------------


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


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


def test_the_released_descriptor():
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


def test_overlaps_are_compared_within_a_volume_only(build):
    config = config_of(pic_weight=0.0)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(3)])
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
def test_pairs_that_overlap_are_contrasted(build, transforms):
    """Every pair of a volume from a threshold on, no pair of two volumes."""
    config = config_of(pim_weight=0.0, pair_overlap=0.2, reach=1.0, transforms=transforms)
    method, batch = build(config), make_batch(config, [anatomy(s, (24, 24, 24)) for s in range(3)])
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
def test_shared_parts_show_the_same_positions(rotation, tolerance):
    """On feature maps that hold positions of the volume, the shared parts of a pair have the same mean position.

    Boxes are widened to whole voxels of the map, here 2 voxels of the view wide; soft masks are not.
    """
    transforms = TransformRanges(rotation=rotation, translation=0.1, scaling=(0.9, 1.1), min_overlap=0.3)
    config = config_of(view_shape=(16, 16, 16), pim_weight=0.0, pic_strides=(1, 2), pair_overlap=0.1)
    config = dataclasses.replace(config, transforms=transforms)
    shape = (40, 44, 36)
    axes = torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij")
    batch = make_batch(config, [torch.stack(axes)[None, None]] * 2)
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


def test_the_monitors_see_each_patch_with_its_nearest(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
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


def check_training(method: PiMPiC, batch: ViewBatch) -> None:
    """One step: finite, a weighted sum of its terms, a gradient for all that is trained and none for the rest."""
    config = method.config
    result = method(batch)
    used = {n: w for n, w in {"pim": config.pim_weight, "pic": config.pic_weight}.items() if w > 0}
    assert {n for n in ("pim", "pic") if n in result} == set(used)
    assert result["loss"].item() == pytest.approx(sum(w * result[n].item() for n, w in used.items()), rel=1e-5)
    assert all(value.isfinite().all() for value in result.values())
    assert all(not value.requires_grad for name, value in result.items() if name != "loss")
    result["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    assert method.transfers == ("encoder",)
    assert any(p.requires_grad for p in method.network.encoder.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains(build, options, architecture):
    config = config_of(**options)
    volumes = [anatomy(s, channels=2) for s in range(min(2, config.batch_size))]
    check_training(build(config, architecture, channels=2), make_batch(config, volumes))


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_literal_forms_train(build, name):
    config = dataclasses.replace(getattr(PiMPiCConfig, name)(), **SMALL)
    check_training(build(config), make_batch(config, [anatomy(0, (40, 40, 40))]))


def test_the_smallest_volumes_train(build):
    config = config_of()
    check_training(build(config), make_batch(config, [anatomy(s, (16, 16, 16)) for s in range(2)]))


@pytest.mark.parametrize("pim_weight", [0.0, 1.0])
def test_a_batch_in_which_no_patches_overlap_is_survived(build, pim_weight):
    config = config_of(pim_weight=pim_weight)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    batch.targets["overlap"] = torch.eye(4).expand(2, 4, 4)
    batch.targets["boxes"][:, ~torch.eye(4, dtype=torch.bool)] = 0
    result = method(batch)
    assert result["pic"] == 0 and result["overlapping_pairs"] == 0 and result["loss"].isfinite()
    result["loss"].backward()
    # No parameter is left out: several GPUs would wait for it.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_identical_patches_are_survived(build):
    config = config_of(reach=0.0)
    batch = make_batch(config, [anatomy(s) for s in range(2)])
    assert (batch.targets["overlap"] == 1).all()
    check_training(build(config), batch)


@pytest.mark.parametrize("transforms", [TransformRanges.none(), TransformRanges()])
def test_autocast_gives_a_finite_float32_loss(build, transforms):
    config = config_of(transforms=transforms)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = method(batch)
    assert result["loss"].dtype == torch.float32 and result["loss"].isfinite()
    assert result["loss"].item() == pytest.approx(method(batch)["loss"].item(), rel=0.1)


def test_the_sampler_follows_the_options():
    config = config_of(patches=5, reach=0.3, transforms=TransformRanges(rotation=5))
    sampler = PiMPiC.view_sampler(config, (16, 64, 64), (5, 1, 1))
    assert sampler.n_views == 5 and sampler.reach == 0.3 and sampler.transforms.rotation == 5 and sampler.in_plane
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        PiMPiC.view_sampler(PiMPiCConfig(), (16, 16, 16), (1, 1, 1))


def test_the_view_shape_has_to_be_resolved_first(build):
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        build(config_of(view_shape=None))


def test_a_fixed_batch_is_learnt(build):
    config = config_of(projector_dim=32, patches=6)
    method = build(config)
    batch = make_batch(config, [anatomy(s, (28, 28, 28)) for s in range(2)])
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-3)
    before = method(batch)
    for _ in range(40):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    after = method(batch)
    assert after["pim"] < 0.5 * before["pim"] and after["pic"] < 0.8 * before["pic"]
    assert after["overlap_error"] < 0.5 * before["overlap_error"]
