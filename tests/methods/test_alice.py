"""Alice: every option trains what it says, the target branch follows, and nothing that is masked leaks."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from math import cos, pi

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnssl_stc3d.losses.alice import (
    dino_cross_entropy,
    masked_reconstruction,
    normalised_blocks,
    normalised_views,
    paired_cosine,
)
from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.methods.base import EMBEDDINGS
from nnssl_stc3d.modules.masking import expand_mask
from nnssl_stc3d.views.batch import ViewBatch

PATCH = (16, 16, 16)
SMALL = {
    "view_shape": PATCH, "head_hidden": 16, "head_bottleneck": 8, "head_dim": 8, "decoder_width": 16,
    "decoder_depth": 1, "batch_size": 2,
}  # fmt: skip


def config_of(base: AliceConfig | None = None, **changes) -> AliceConfig:
    return dataclasses.replace(base or AliceConfig(), **(SMALL | changes))


@pytest.fixture
def method_class():
    return Alice


@pytest.fixture
def anatomy(anatomy):
    """Structure at the scale of a block."""
    return partial(anatomy, shape=(24, 22, 26), grain=3)


# ---- every option trains --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"form": "official"},
    {"head": "dino"},
    {"head": "dino", "form": "official"},
    {"predictor": False},
    {"casa": "official"},
    {"target_tokens": "decoder"},
    {"descriptor": "bottleneck"},
    {"descriptor": "bottleneck", "st_weight": 0.0},
    {"target_tokens": "decoder", "dv_weight": 0.0},
    {"dv_weight": 0.0, "st_weight": 0.0},
    {"reconstruct": "all", "normalise": "not", "mask_columns": True},
    {"normalise": "block", "mask_block": (8, 4, 4), "mask_ratio": 0.5},
    {"decoder": "tokens"},
    {"decoder": "tokens", "target_tokens": "decoder", "form": "official", "casa": "official"},
    {"batch_size": 1},
]


def label(options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.fixture
def check_training(check_step):
    """Function ``(method, batch)``: checks one step, and that embeddings come with a loss on them."""

    def check(method: Alice, batch: ViewBatch) -> None:
        config = method.config
        weights = {"reconstruction": config.reconstruction_weight, "dv": config.dv_weight, "st": config.st_weight}
        result = check_step(method, batch, weights)
        assert (EMBEDDINGS in result) == (config.dv_weight > 0 or config.st_weight > 0)

    return check


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains_a_unet(build, make_batch, check_transfers, check_training, options, architecture):
    config = config_of(**options)
    method = build(config, architecture, channels=2)
    check_training(method, make_batch(method.config, config.batch_size, channels=2))
    check_transfers(method, config.decoder == "unet")


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("mask_block") is None], ids=label)
def test_every_option_trains_a_transformer(build, make_batch, check_training, options):
    method = build(config_of(**(options | {"decoder": "tokens"})), "Primus", channels=2)
    check_training(method, make_batch(method.config, channels=2))
    assert method.transfers == ("down_projection", "eva")
    assert not any(p.requires_grad for p in method.network.up_projection.parameters())
    assert all(p.requires_grad for p in method.network.eva.parameters())


@pytest.mark.parametrize("base", [AliceConfig.paper(), AliceConfig.official()], ids=["paper", "official"])
def test_the_literal_forms_train(build, make_batch, check_training, base):
    method = build(config_of(base))
    check_training(method, make_batch(method.config))


def test_blocks_of_several_tokens(build, make_batch, check_training):
    method = build(config_of(decoder="tokens", mask_block=(8, 4, 8)), "Primus")
    batch = make_batch(method.config)
    assert batch.targets["masked"].shape[2:] == (2, 4, 2)
    check_training(method, batch)


def test_no_module_belongs_to_a_loss_that_is_off(build):
    def parts(**changes) -> set[str]:
        return {name for name, _ in build(config_of(**changes)).named_children()} - {"network"}

    assert parts(dv_weight=0, st_weight=0) == {"reconstruct"}
    assert parts(dv_weight=0, st_weight=0, decoder="tokens") == {"token_decoder"}
    assert parts(st_weight=0, predictor=False) == {"reconstruct", "token_head", "teacher"}
    assert parts(st_weight=0, descriptor="bottleneck") == {"reconstruct", "view_head", "dv_predictor", "teacher"}
    assert parts(dv_weight=0, form="official") == {"reconstruct", "token_head", "casa", "teacher"}


# ---- the equations --------------------------------------------------------------------------------------------------


def spy(module: torch.nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"normalise": "block"}, {"normalise": "not"}, {"reconstruct": "all"}], ids=label
)
def test_reconstruction_adds_the_crops_of_both_volumes(build, make_batch, options):
    method = build(config_of(**options))
    predictions, batch = spy(method.reconstruct), make_batch(method.config)
    result = method(batch)
    images = batch.views[:, :2].flatten(0, 1)
    target = {"view": normalised_views(images), "block": normalised_blocks(images, method.config.mask_block)}.get(
        method.config.normalise, images
    )
    mask = expand_mask(batch.targets["masked"].flatten(0, 1), method.config.mask_block)[:, None]
    if method.config.reconstruct == "all":
        expected = (predictions[0] - target).square().mean()
    else:
        expected = sum(masked_reconstruction(predictions[0][i::2], target[i::2], mask[i::2]) for i in (0, 1))
    assert result["reconstruction"].item() == pytest.approx(expected.item(), rel=1e-5)
    chosen = mask.expand_as(target)
    error = sum(((p - t)[m] ** 2).sum() for p, t, m in zip(predictions[0], target, chosen))
    variance = sum((t[m] - t[m].mean()).square().sum() for t, m in zip(target, chosen))
    assert result["masked_error"].item() == pytest.approx((error / variance).item(), rel=1e-4)


@pytest.mark.parametrize("form", ["paper", "official"])
def test_agreement_is_across_volumes_and_aligned_within_them(build, make_batch, form):
    """Eqs. 2 to 5 from the outputs of the heads: query with key and key with query, and each with itself."""
    method = build(config_of(form=form, predictor=False))
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = make_batch(method.config, 3)
    online, target = spy(method.token_head), spy(method.teacher.module["token_head"])
    embedded = spy(method.casa)
    result = method.eval()(batch)
    views, targets = (t[0].mean(1).unflatten(0, (3, 2)) for t in (online, target))
    crossed = targets[:, [1, 0]]
    student, teacher = (t.unflatten(0, (3, 2)) for t in embedded)
    if form == "paper":
        expected = paired_cosine(views, crossed), paired_cosine(student, teacher)
    else:
        start = method.config.teacher_temperature_start
        expected = (
            dino_cross_entropy(views, crossed, torch.zeros(8), 0.1, start),
            dino_cross_entropy(student, teacher, torch.zeros(8), 0.1, start),
        )
    assert result["dv"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert result["st"].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert torch.allclose(result[EMBEDDINGS], torch.stack((views, crossed), dim=2).flatten(0, 1), atol=1e-6)


def test_casa_asks_with_visible_tokens_only(build, make_batch):
    method = build(config_of(mask_ratio=0.75))
    seen = []
    method.casa.register_forward_hook(lambda module, inputs, output: seen.append([t.shape for t in inputs]))
    method(make_batch(method.config))
    # 4^3 blocks, of which 16 are visible; the key and value tokens are those of the whole view.
    assert [shapes[0][:2] for shapes in seen] == [(4, 16), (4, 16)]
    assert [shapes[1][:2] for shapes in seen] == [(4, 64), (4, 64)]


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "Primus"])
def test_what_is_masked_is_not_seen(build, make_batch, architecture):
    """The online branch's output depends on masked voxels through the loss's target only."""
    decoder = "tokens" if architecture == "Primus" else "unet"
    method = build(config_of(decoder=decoder, normalise="not"), architecture)
    batch = make_batch(method.config)
    predictions = spy(method.reconstruct if decoder == "unet" else method.token_decoder)
    method(batch)
    mask = expand_mask(batch.targets["masked"], method.config.mask_block)[:, :, None]
    views = batch.views.clone()
    views[:, :2] = views[:, :2].masked_fill(mask, 7.0)
    method(batch._replace(views=views))
    assert torch.equal(predictions[0], predictions[1])
    views[:, :2] = views[:, :2].masked_fill(~mask, 7.0)
    method(batch._replace(views=views))
    assert not torch.allclose(predictions[0], predictions[2], atol=1e-3)


# ---- the target branch ----------------------------------------------------------------------------------------------


def test_the_target_branch_follows_with_a_momentum_that_rises_to_one(build):
    method = build(config_of(ema_momentum=0.9, target_tokens="decoder"))
    teacher = {k: v.clone() for k, v in method.teacher.module.state_dict().items()}
    assert {k.split(".")[0] for k in teacher} == {"encoder", "decoder", "token_head"}
    for parameter in (*method.network.parameters(), *method.token_head.parameters()):
        parameter.data.add_(1.0)
    momentum = 1 - 0.1 * 0.5 * (1 + cos(pi * 0.3))
    method.after_step(0.3)
    for name, value in method.teacher.module.state_dict().items():
        assert torch.allclose(value, teacher[name] + 1 - momentum, atol=1e-5), name
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.after_step(1.0)
    assert all(torch.equal(v, before[k]) for k, v in method.teacher.state_dict().items())
    assert method.progress == 1


def test_the_target_branch_gets_no_gradient(build, make_batch):
    method = build(config_of())
    method(make_batch(method.config))["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())


def test_only_what_the_target_needs_is_copied(build):
    names = {k.split(".")[0] for k in build(config_of()).teacher.module.state_dict()}
    assert names == {"encoder", "token_head"}


def test_centres_follow_the_targets_logits(build, make_batch):
    """The released update: momentum .9 of the mean over the batch, in training only."""
    method = build(config_of(form="official"))
    target = spy(method.teacher.module["token_head"])
    embedded = spy(method.casa)
    method.eval()(make_batch(method.config))
    assert (method.dv_centre == 0).all() and (method.st_centre == 0).all()
    method.train()(make_batch(method.config))
    assert torch.allclose(method.dv_centre, 0.1 * target[-1].mean(1).mean(0), atol=1e-7)
    assert torch.allclose(method.st_centre, 0.1 * embedded[-1].mean((0, 1)), atol=1e-7)
    assert {"dv_centre", "st_centre", "progress"} <= set(method.state_dict())


def test_centres_are_those_of_all_gpus_together(build, make_batch, monkeypatch):
    """The other of two GPUs has three times the logits, so that the mean of both is twice that of this one."""
    alone = build(config_of(form="official"))
    together, batch = copy.deepcopy(alone), make_batch(alone.config)
    alone.train()(batch)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(1 + 3))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    together.train()(batch)
    for name in ("dv_centre", "st_centre"):
        centre = getattr(alone, name)
        assert centre.abs().max() > 0
        torch.testing.assert_close(getattr(together, name), 2 * centre)


def test_the_target_temperature_warms_up(build, make_batch):
    method = build(config_of(form="official", st_weight=0.0, teacher_temperature_warmup=0.5))
    method.eval()
    batch = make_batch(method.config)
    online, target = spy(method.token_head), spy(method.teacher.module["token_head"])
    for progress, temperature in ((0.0, 0.008), (0.25, 0.009), (0.5, 0.01), (1.0, 0.01)):
        method.progress.fill_(progress)
        found = method(batch)["dv"]
        views, targets = (t[-1].mean(1).unflatten(0, (2, 2)) for t in (online, target))
        expected = dino_cross_entropy(views, targets.flip(1), torch.zeros(8), 0.1, temperature)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- behaviour ------------------------------------------------------------------------------------------------------


def test_the_order_of_the_pairs_does_not_matter(build, make_batch, reordered):
    method = build(config_of())
    batch = make_batch(method.config, 3)
    first, second = method.eval()(batch), method(reordered(batch, [2, 0, 1]))
    for name in ("loss", "reconstruction", "dv", "st", "masked_error", "matched"):
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-4), name


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "Primus"])
@pytest.mark.parametrize("form", ["paper", "official"])
def test_autocast_gives_a_finite_float32_loss(build, make_batch, check_autocast, architecture, form):
    method = build(config_of(decoder="tokens" if architecture == "Primus" else "unet", form=form), architecture)
    batch = make_batch(method.config)
    check_autocast(method.eval(), batch, rel=0.05, term="reconstruction")


def test_a_constant_part_of_all_embeddings_cannot_bring_the_cosines_to_one(build, make_batch):
    """The projector's last BatchNorm takes it away, in both branches and over all tokens of the batch."""
    method = build(config_of())
    online, target = spy(method.token_head), spy(method.teacher.module["token_head"])
    batch = make_batch(method.config, 3)
    first = method(batch)["dv"].item()
    for head in (method.token_head, method.teacher.module["token_head"]):
        head[-2].bias.data.add_(100.0)
    assert method(batch)["dv"].item() == pytest.approx(first, abs=0.02)
    for seen in (*online, *target):
        assert seen.mean((0, 1)).abs().max() < 0.01


def test_the_paper_augments_the_target_views_alone():
    resolved = {"view_shape": (8, 8, 8), "mask_block": (4, 4, 4)}
    plain = [
        Alice.view_sampler(dataclasses.replace(config, **resolved), (16, 16, 16), (1, 1, 1)).n_plain
        for config in (AliceConfig(), AliceConfig.paper())
    ]
    # Of the four views the online ones come first.
    assert plain == [0, 2]


def test_the_share_of_matched_pairs_is_reported(build, make_batch):
    method = build(config_of())
    batch = make_batch(method.config)
    batch.targets["matched"] = torch.tensor([True, False])
    assert method(batch)["matched"] == 0.5


def test_a_view_of_constant_air_is_survived(build, make_batch, check_training):
    for options in ({}, {"normalise": "block"}):
        method = build(config_of(**options))
        batch = make_batch(method.config)
        check_training(method, batch._replace(views=torch.full_like(batch.views, -7.0)))


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet", "Primus"])
def test_a_fixed_batch_is_learnt(build, make_batch, overfit, architecture):
    """Masked voxels of these smooth volumes can be guessed from their neighbours."""
    method = build(config_of(decoder="tokens" if architecture == "Primus" else "unet", mask_ratio=0.5), architecture)
    batch = make_batch(method.config)
    steps, rate = (120, 1e-2) if architecture == "Primus" else (60, 5e-3)
    first, last = overfit(method, batch, steps, rate)
    assert last["masked_error"] < 0.6 < first["masked_error"]
    assert last["dv"] < first["dv"] and last["st"] < first["st"]
