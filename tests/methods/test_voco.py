"""VoCo: the released step, both networks, and every option."""

from __future__ import annotations

import dataclasses

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
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

SMALL = {"view_shape": (8, 8, 8), "projector_hidden": 16, "projector_dim": 8}


def config_of(**changes) -> VoCoConfig:
    return VoCoConfig(**(SMALL | changes))


@pytest.fixture
def method_class():
    return VoCo


# ---- the released step ----------------------------------------------------------------------------------------------


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


@pytest.fixture
def linear_voco(wave):
    """Function ``(**options) -> method`` on linear networks with the weights of the reference values."""

    def make(**changes) -> VoCo:
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

    return make


@pytest.fixture
def reference_batch(wave) -> ViewBatch:
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


def test_a_full_step_of_the_released_code(linear_voco, reference_batch):
    method = linear_voco()
    method.after_step(0.0)
    slow = method.teacher.module["encoder"].linear.weight
    assert slow.sum().item() == pytest.approx(1.4101336071044577, rel=1e-9)
    assert slow[0, :4].tolist() == pytest.approx(
        [0.7573238863271069, 0.8855796234251252, 0.963921327486779, 0.9811358032559321], rel=1e-9
    )
    result = method(reference_batch)
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


def test_the_printed_step_has_no_gradient_from_the_prediction_to_the_bases(linear_voco, reference_batch):
    method = linear_voco(teacher_momentum=None, pred_form="paper", reg_form="paper")
    assert method.teacher is None
    weight = method.network.encoder.linear.weight
    crops, bases = (reference_batch.views[:, part].flatten(2) @ weight.T for part in (slice(16, None), slice(0, 16)))
    pred = position_prediction(position_logits(crops, bases.detach()), reference_batch.targets["position"], "paper")
    expected = pred + base_discrepancy(bases, "paper")
    result = method(reference_batch)
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


@pytest.fixture
def check_training(check_step, check_transfers):
    """Function ``(method, batch)``: checks one step, and what is trained and transferred."""

    def check(method: VoCo, batch: ViewBatch) -> None:
        check_step(method, batch, {"pred": 1.0, "reg": method.config.reg_weight})
        check_transfers(method, method.config.descriptor_stages == "encoder+decoder")
        assert all(p.requires_grad for p in method.network.encoder.parameters())
        if method.teacher is not None:
            assert not any(p.requires_grad for p in method.teacher.parameters())

    return check


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains(build, make_batch, check_training, options, architecture):
    config = config_of(**options)
    check_training(build(config, architecture, channels=2), make_batch(config, min(2, config.batch_size), channels=2))


@pytest.mark.parametrize("name", ["paper", "official"])
def test_the_literal_forms_train(build, make_batch, check_training, name):
    config = dataclasses.replace(getattr(VoCoConfig, name)(), **SMALL)
    check_training(build(config), make_batch(config, shape=(40, 40, 40)))


def test_the_smallest_volumes_train(build, make_batch, check_training):
    config = config_of()
    check_training(build(config), make_batch(config, shape=(16, 16, 16)))


def test_autocast_gives_a_finite_float32_loss(build, make_batch, check_autocast):
    config = config_of()
    method, batch = build(config), make_batch(config)
    check_autocast(method, batch, rel=0.1)


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


def test_the_teacher_starts_equal_and_follows(build, make_batch):
    config = config_of()
    method, batch = build(config), make_batch(config)
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


def test_the_bases_through_the_teacher_get_no_gradient_but_the_same_loss(build, make_batch):
    """With equal networks both ways give one loss; only the gradient of the encoder differs."""
    results, gradients = [], []
    for through in ("both", "teacher"):
        config = config_of(bases_through=through)
        method = build(config)
        seen = []
        method.network.encoder.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
        batch = make_batch(config)
        result = method(batch)
        result["loss"].backward()
        results.append(result["loss"].item())
        gradients.append(torch.cat([p.grad.flatten() for p in method.network.encoder.parameters()]))
        assert seen == [2 * (12 if through == "both" else 4)]
        assert all(p.grad is not None for p in method.projector.parameters())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_the_state_continues_exactly(build, make_batch):
    config = config_of()
    batch = make_batch(config)

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


def test_embeddings_are_crops_with_their_nearest_base(build, make_batch):
    config = config_of()
    method, batch = build(config), make_batch(config)
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
def test_a_fixed_batch_is_learnt(build, make_batch, overfit, options):
    config = config_of(projector_dim=32, crops=8, **options)
    method = build(config)
    batch = make_batch(config, shape=(28, 28, 28))
    before, after = overfit(method, batch, 60)
    assert after["loss"] < 0.5 * before["loss"] and after["pred"] < 0.5 * before["pred"]
    # Chance is 1 in 8.
    assert after["position_accuracy"] > 0.35
