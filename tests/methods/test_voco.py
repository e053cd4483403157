"""VoCo: the released step, both networks, and every option."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.losses.voco import base_discrepancy, position_logits, position_prediction
from nnssl_stc3d.methods.base import EMBEDDINGS
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.geometry import overlap_fraction
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

SMALL = {"view_shape": (8, 8, 8), "projector_hidden": 16, "projector_dim": 8}


def config_of(**changes) -> VoCoConfig:
    return VoCoConfig(**(SMALL | changes))


def anatomy(seed: int, shape: tuple[int, ...] = (20, 24, 18), channels: int = 1) -> Tensor:
    """A smooth volume with structure at the scale of a view, ``(1, 1, C, Z, Y, X)``."""
    noise = torch.randn(1, channels, *[n // 4 for n in shape], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=shape, mode="trilinear")[None]


def make_batch(config: VoCoConfig, volumes: list[Tensor], seed: int = 0) -> ViewBatch:
    """What the loader makes of volumes ``(1, 1, C, Z, Y, X)``, one for each sample."""
    sampler = VoCo.view_sampler(config, (16, 16, 16), (1.5, 1.0, 1.0))
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
    """Function ``(config, architecture, channels) -> method`` with frozen parts frozen."""

    def make(config: VoCoConfig, architecture: str = "PlainConvUNet", channels: int = 1) -> VoCo:
        network = tiny_network(tiny_plans(architecture, channels), channels)
        torch.manual_seed(0)
        method = VoCo(network, config)
        method.freeze_untrained()
        return method

    return make


# ---- the released step ----------------------------------------------------------------------------------------------


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


class Linear(nn.Module):
    """A network whose only feature map is a linear function of the view, as in the reference values."""

    class Encoder(nn.Module):
        output_channels = [8]
        strides = [[1, 1, 1]]

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False).double()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.linear(x.flatten(1))[..., None, None, None]]

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.decoder = nn.Module()
        self.decoder.stages, self.decoder.transpconvs = nn.ModuleList(), nn.ModuleList()


def linear_voco(**changes) -> VoCo:
    options = {"view_shape": (2, 2, 2), "grid": (1, 4, 4), "crops": 2, "bins": (1, 1, 1), "reg_form": "official"}
    method = VoCo(Linear(), VoCoConfig(**(options | changes)))
    method.projector = nn.Identity()
    with torch.no_grad():
        method.network.encoder.linear.weight.copy_(wave((8, 8), 0.37))
    if method.teacher is not None:
        method.teacher.module["projector"] = nn.Identity()
        with torch.no_grad():
            method.teacher.module["encoder"].linear.weight.copy_(wave((8, 8), 0.23, 1.0))
    return method


def reference_batch() -> ViewBatch:
    """Two volumes with 4 x 4 bases of 64 voxels; crops around (80, 144), (111, 77) and (32, 32), (223, 128)."""
    crops, bases = wave((2, 2, 1, 2, 2, 2), 0.9), wave((2, 16, 1, 2, 2, 2), 0.11, 0.3)
    centers = torch.cartesian_prod(torch.arange(32.0, 256, 64), torch.arange(32.0, 256, 64)).expand(2, -1, -1)
    places = torch.tensor([[[80.0, 144], [111, 77]], [[32, 32], [223, 128]]])

    def specs(center: Tensor) -> ViewSpecs:
        center = F.pad(center, (1, 0))
        return ViewSpecs(
            torch.zeros(center.shape[:2], dtype=torch.long), center, torch.eye(3).expand(*center.shape[:2], 3, 3)
        )

    labels = overlap_fraction(specs(places), specs(centers), (64, 64, 64))
    return ViewBatch(torch.cat((bases, crops), dim=1), specs(centers), {"position": labels})


def test_a_full_step_of_the_released_code():
    method = linear_voco()
    method.after_step(0.0)
    slow = method.teacher.module["encoder"].linear.weight
    assert slow.sum().item() == pytest.approx(1.4101336071044577, rel=1e-9)
    assert slow[0, :4].tolist() == pytest.approx(
        [0.7573238863271069, 0.8855796234251252, 0.963921327486779, 0.9811358032559321], rel=1e-9
    )
    batch = reference_batch()
    result = method(batch)
    assert result["pred"].item() == pytest.approx(0.7015407937399064 + 0.037144536726288147, rel=1e-6)
    assert result["reg"].item() == pytest.approx(0.2398446101934109, rel=1e-9)
    assert result["loss"].item() == pytest.approx(0.9785299406596055, rel=1e-6)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((48, 48), {0: 1.0}),
        ((96, 96), {0: 0.25, 1: 0.25, 4: 0.25, 5: 0.25}),
        ((120, 200), {1: 0.10416666666666667, 2: 0.14583333333333334, 5: 0.3125, 6: 0.4375}),
        ((335, 335), {10: 0.00010850694444, 11: 0.010308159722, 14: 0.010308159722, 15: 0.9792751736}),
    ],
)
def test_the_released_position_labels(place, expected):
    """Crops of 96 voxels among the 4 x 4 bases of a volume of 384, shown as 64."""
    config = dataclasses.replace(VoCoConfig.official(), view_shape=(64, 64, 64), transforms=TransformRanges.none())
    sampler = VoCo.view_sampler(config, (128, 128, 128), (1.0, 1.0, 1.0))
    specs = stack_specs([sampler.sample([(96, 384, 384)], np.random.default_rng(0)).specs])
    torch.testing.assert_close(specs.matrix[0], torch.eye(3).double().expand(18, 3, 3) * 1.5)
    specs.center[0, 16] = torch.tensor([47.5, place[0] - 0.5, place[1] - 0.5])
    labels = sampler.targets(specs, np.random.default_rng(0))["position"][0, 0]
    dense = [expected.get(i, 0.0) for i in range(16)]
    assert labels.tolist() == pytest.approx(dense, abs=1e-6)


def test_the_printed_step_has_no_gradient_from_the_prediction_to_the_bases():
    method = linear_voco(teacher_momentum=None, pred_form="paper", reg_form="paper")
    assert method.teacher is None
    batch = reference_batch()
    weight = method.network.encoder.linear.weight
    crops, bases = (batch.views[:, part].flatten(2) @ weight.T for part in (slice(16, None), slice(0, 16)))
    pred = position_prediction(position_logits(crops, bases.detach()), batch.targets["position"], "paper")
    expected = pred + base_discrepancy(bases, "paper")
    result = method(batch)
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (result["loss"], expected)]
    torch.testing.assert_close(*gradients)


# ---- every option trains --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"bases_through": "teacher"},
    {"bases_through": "teacher", "descriptor_stages": "encoder+decoder"},
    {"teacher_momentum": None},
    {"teacher_momentum": None, "reg_weight": 0.0},
    {"reg_weight": 0.0},
    {"reg_weight": 0.5, "reg_form": "official"},
    {"pred_form": "paper", "reg_form": "paper"},
    {"descriptor_stages": "bottleneck", "bins": (1, 1, 1)},
    {"descriptor_stages": "encoder+decoder", "bins": (1, 2, 1)},
    {"coverage": "volume", "crops": 1, "grid": (1, 2, 3)},
    {"transforms": TransformRanges(quarter_turns=0.5, flips=0.5), "turn_bases": True, "in_plane": True},
    {"batch_size": 1},
]


def label(options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if not isinstance(v, TransformRanges))


def check_training(method: VoCo, batch: ViewBatch) -> None:
    """One step: finite, a sum of its terms, a gradient for all that is trained and none for the rest."""
    config = method.config
    result = method(batch)
    assert ("reg" in result) == (config.reg_weight > 0)
    reg = config.reg_weight * result["reg"].item() if config.reg_weight else 0
    assert result["loss"].item() == pytest.approx(result["pred"].item() + reg, rel=1e-5)
    assert all(value.isfinite().all() for value in result.values())
    assert all(not value.requires_grad for name, value in result.items() if name != "loss")
    result["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    trains_decoder = config.descriptor_stages == "encoder+decoder"
    assert method.transfers == (("encoder", "decoder") if trains_decoder else ("encoder",))
    decoder = [p for part in ("stages", "transpconvs") for p in getattr(method.network.decoder, part).parameters()]
    assert all(p.requires_grad == trains_decoder for p in decoder)
    assert all(p.requires_grad for p in method.network.encoder.parameters())
    if method.teacher is not None:
        assert not any(p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains(build, options, architecture):
    config = config_of(**options)
    volumes = [anatomy(s, channels=2) for s in range(min(2, config.batch_size))]
    check_training(build(config, architecture, channels=2), make_batch(config, volumes))


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_literal_forms_train(build, name):
    config = dataclasses.replace(getattr(VoCoConfig, name)(), **SMALL)
    check_training(build(config), make_batch(config, [anatomy(s, (40, 40, 40)) for s in range(2)]))


def test_the_smallest_volumes_train(build):
    config = config_of()
    check_training(build(config), make_batch(config, [anatomy(s, (16, 16, 16)) for s in range(2)]))


def test_autocast_gives_a_finite_float32_loss(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = method(batch)
    assert result["loss"].dtype == torch.float32 and result["loss"].isfinite()
    assert result["loss"].item() == pytest.approx(method(batch)["loss"].item(), rel=0.1)


def test_the_sampler_follows_the_options():
    sampler = VoCo.view_sampler(config_of(crops=3, in_plane=True, turn_bases=True), (16, 16, 16), (1, 1, 1))
    assert sampler.n_bases == 8 and sampler.n_views == 11 and sampler.in_plane and sampler.turn_bases
    assert sampler.base_scale == 1.0 and sampler.region_scale is None
    sampler = VoCo.view_sampler(config_of(coverage="volume"), (16, 64, 64), (5, 1, 1))
    assert sampler.base_scale is None and sampler.in_plane and not sampler.turn_bases
    assert not VoCo.view_sampler(config_of(), (16, 16, 16), (1, 1, 1)).in_plane
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        VoCo.view_sampler(VoCoConfig(), (16, 16, 16), (1, 1, 1))


# ---- the teacher ----------------------------------------------------------------------------------------------------


def test_the_teacher_starts_equal_and_follows(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    parts = method._student()
    for slow, fast in zip(method.teacher.module.parameters(), parts.parameters(), strict=True):
        assert torch.equal(slow, fast)
    before = [p.clone() for p in method.teacher.module.parameters()]
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(batch)["loss"].backward()
    optimizer.step()
    for slow, old in zip(method.teacher.module.parameters(), before):
        assert torch.equal(slow, old)
    method.after_step(0.5)
    for slow, old, fast in zip(method.teacher.module.parameters(), before, parts.parameters()):
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * fast)


def test_the_bases_through_the_teacher_get_no_gradient_but_the_same_loss(build):
    """With equal networks both ways give one loss; only the gradient of the encoder differs."""
    results, gradients = [], []
    for through in ("both", "teacher"):
        config = config_of(bases_through=through)
        method = build(config)
        seen = []
        method.network.encoder.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        batch = make_batch(config, [anatomy(s) for s in range(2)])
        result = method(batch)
        result["loss"].backward()
        results.append(result["loss"].item())
        gradients.append(torch.cat([p.grad.flatten() for p in method.network.encoder.parameters()]))
        assert seen == [2 * (12 if through == "both" else 4)]
        assert all(p.grad is not None for p in method.projector.parameters())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_the_state_continues_exactly(build):
    config = config_of()
    batch = make_batch(config, [anatomy(s) for s in range(2)])

    def train(method: VoCo, steps: int) -> Tensor:
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = method(batch)["loss"]
            loss.backward()
            optimizer.step()
            method.after_step(0.0)
        return loss.detach()

    whole = build(config)
    train(whole, 2)
    continued = build(config)
    continued.load_state_dict(whole.state_dict())
    assert torch.equal(train(whole, 2), train(continued, 2))
    names = [n for n in whole.state_dict() if not n.startswith("network.")]
    assert any(n.startswith("teacher.module.encoder.") for n in names)
    assert {n.split(".")[0] for n in names} == {"projector", "teacher"}


# ---- what is reported, and that it learns ---------------------------------------------------------------------------


def test_embeddings_are_crops_with_their_nearest_base(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    embeddings = {}
    method.projector.register_forward_hook(lambda _, __, output: embeddings.update(all=output.unflatten(0, (2, -1))))
    pairs = method(batch)[EMBEDDINGS]
    assert pairs.shape == (2 * 4, 2, 8)
    nearest = batch.targets["position"].argmax(-1)
    for volume in range(2):
        for crop in range(4):
            pair = pairs[4 * volume + crop]
            assert torch.equal(pair[0], embeddings["all"][volume, 8 + crop])
            assert torch.equal(pair[1], embeddings["all"][volume, nearest[volume, crop]])


@pytest.mark.parametrize("options", [{}, {"bases_through": "teacher"}, {"teacher_momentum": None}], ids=label)
def test_a_fixed_batch_is_learnt(build, options):
    config = config_of(projector_dim=32, crops=8, **options)
    method = build(config)
    batch = make_batch(config, [anatomy(s, (28, 28, 28)) for s in range(2)])
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-3)
    before = method(batch)
    for _ in range(60):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
        method.after_step(0.0)
    after = method(batch)
    assert after["loss"] < 0.5 * before["loss"] and after["pred"] < 0.5 * before["pred"]
    # Chance is 1 in 8.
    assert after["position_accuracy"] > 0.35
