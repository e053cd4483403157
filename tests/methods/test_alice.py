"""Alice: every option trains what it says, the target branch follows, and nothing that is masked leaks."""

from __future__ import annotations

import dataclasses
from math import cos, pi

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from nnssl_stc3d.modules.primus import PlansPrimus
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

PATCH = (16, 16, 16)
SMALL = {
    "view_shape": PATCH, "head_hidden": 16, "head_bottleneck": 8, "head_dim": 8, "decoder_width": 16,
    "decoder_depth": 1, "batch_size": 2,
}  # fmt: skip


def config_of(base: AliceConfig | None = None, **changes) -> AliceConfig:
    return dataclasses.replace(base or AliceConfig(), **(SMALL | changes))


def anatomy(seed: int, shape: tuple[int, ...] = (24, 22, 26), channels: int = 1) -> Tensor:
    """A smooth volume with structure at the scale of a block, ``(C, Z, Y, X)``."""
    noise = torch.randn(1, channels, *[n // 3 for n in shape], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=shape, mode="trilinear")[0]


def make_batch(config: AliceConfig, channels: int = 1, pairs: int = 2, seed: int = 0) -> ViewBatch:
    """What the loader makes of pairs of volumes."""
    sampler = Alice.view_sampler(config, PATCH, (1.5, 1.0, 1.0))
    rng, samples, views = np.random.default_rng(seed), [], []
    for pair in range(pairs):
        volumes = [anatomy(2 * pair + index, channels=channels) for index in (0, 1)]
        boxes, specs, targets = sampler.sample([v.shape[1:] for v in volumes], rng)
        shown = torch.empty(4, channels, *config.view_shape)
        for index, (volume, box) in enumerate(zip(volumes, boxes)):
            crop = volume[(slice(None), *(slice(a, b) for a, b in zip(*box)))]
            mine = (specs.source == index).nonzero()[:, 0]
            alone = ViewSpecs(torch.zeros_like(mine)[None], specs.center[None, mine], specs.matrix[None, mine])
            shown[mine] = render_views(crop[None, None], alone, config.view_shape)[0]
        samples.append((specs, targets["matched"]))
        views.append(shown)
    stacked = stack_specs([specs for specs, _ in samples])
    matched = {"matched": torch.stack([m for _, m in samples])}
    return ViewBatch(torch.stack(views), stacked, matched | sampler.targets(stacked, rng))


def primus(channels: int = 1) -> PlansPrimus:
    torch.manual_seed(0)
    return PlansPrimus(
        channels, 3, embed_dim=24, patch_embed_size=(4, 4, 4), eva_depth=1, eva_numheads=1, input_shape=PATCH
    )


@pytest.fixture
def build(tiny_plans, tiny_network):
    """Function ``(config, architecture, channels) -> method`` with frozen parts frozen."""

    def make(config: AliceConfig, architecture: str = "PlainConvUNet", channels: int = 1) -> Alice:
        if architecture == "Primus":
            network = primus(channels)
        else:
            network = tiny_network(tiny_plans(architecture, channels), channels)
        torch.manual_seed(0)
        method = Alice(network, Alice.resolve(config, network, PATCH))
        method.freeze_untrained()
        return method

    return make


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


def check_training(method: Alice, batch: ViewBatch) -> dict[str, Tensor]:
    """One step: finite, a weighted sum of its terms, a gradient for all that is trained and none for the rest."""
    config = method.config
    result = method(batch)
    weights = {"reconstruction": config.reconstruction_weight, "dv": config.dv_weight, "st": config.st_weight}
    used = {name: weight for name, weight in weights.items() if weight > 0}
    assert {name for name in weights if name in result} == set(used)
    assert result["loss"].item() == pytest.approx(sum(w * result[n].item() for n, w in used.items()), rel=1e-5)
    assert all(value.isfinite().all() for value in result.values())
    assert all(not value.requires_grad for name, value in result.items() if name != "loss")
    assert (EMBEDDINGS in result) == (config.dv_weight > 0 or config.st_weight > 0)
    result["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains_a_unet(build, options, architecture):
    config = config_of(**options)
    method = build(config, architecture, channels=2)
    check_training(method, make_batch(method.config, channels=2, pairs=config.batch_size))
    assert method.transfers == (("encoder", "decoder") if config.decoder == "unet" else ("encoder",))
    decoder = [p for part in ("stages", "transpconvs") for p in getattr(method.network.decoder, part).parameters()]
    assert all(p.requires_grad == (config.decoder == "unet") for p in decoder)
    assert not any(p.requires_grad for p in method.network.decoder.seg_layers.parameters())


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("mask_block") is None], ids=label)
def test_every_option_trains_a_transformer(build, options):
    method = build(config_of(**(options | {"decoder": "tokens"})), "Primus", channels=2)
    check_training(method, make_batch(method.config, channels=2))
    assert method.transfers == ("down_projection", "eva")
    assert not any(p.requires_grad for p in method.network.up_projection.parameters())
    assert all(p.requires_grad for p in method.network.eva.parameters())


@pytest.mark.parametrize("base", [AliceConfig.paper(), AliceConfig.official()], ids=["paper", "official"])
def test_the_literal_forms_train(build, base):
    method = build(config_of(base))
    check_training(method, make_batch(method.config))


def test_blocks_of_several_tokens(build):
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
def test_reconstruction_adds_the_crops_of_both_volumes(build, options):
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
def test_agreement_is_across_volumes_and_aligned_within_them(build, form):
    """Eqs. 2 to 5 from the outputs of the heads: query with key and key with query, and each with itself."""
    method = build(config_of(form=form, predictor=False))
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = make_batch(method.config, pairs=3)
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


def test_casa_asks_with_visible_tokens_only(build):
    method = build(config_of(mask_ratio=0.75))
    seen = []
    method.casa.register_forward_hook(lambda module, inputs, output: seen.append([t.shape for t in inputs]))
    method(make_batch(method.config))
    # 4^3 blocks, of which 16 are visible; the key and value tokens are those of the whole view.
    assert [shapes[0][:2] for shapes in seen] == [(4, 16), (4, 16)]
    assert [shapes[1][:2] for shapes in seen] == [(4, 64), (4, 64)]


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "Primus"])
def test_what_is_masked_is_not_seen(build, architecture):
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


def test_the_target_branch_gets_no_gradient(build):
    method = build(config_of())
    method(make_batch(method.config))["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in method.teacher.parameters())


def test_only_what_the_target_needs_is_copied(build):
    names = {k.split(".")[0] for k in build(config_of()).teacher.module.state_dict()}
    assert names == {"encoder", "token_head"}


def test_centres_follow_the_targets_logits(build):
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


def test_the_target_temperature_warms_up(build):
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


def test_the_order_of_the_pairs_does_not_matter(build):
    method = build(config_of())
    batch = make_batch(method.config, pairs=3)
    order = torch.tensor([2, 0, 1])
    shuffled = ViewBatch(
        batch.views[order], ViewSpecs(*(f[order] for f in batch.specs)), {k: v[order] for k, v in batch.targets.items()}
    )
    first, second = method.eval()(batch), method(shuffled)
    for name in ("loss", "reconstruction", "dv", "st", "masked_error", "matched"):
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-4), name


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "Primus"])
@pytest.mark.parametrize("form", ["paper", "official"])
def test_autocast_gives_a_finite_float32_loss(build, architecture, form):
    method = build(config_of(decoder="tokens" if architecture == "Primus" else "unet", form=form), architecture)
    batch = make_batch(method.config)
    expected = method.eval()(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = method(batch)
    assert result["loss"].dtype == torch.float32 and result["loss"].isfinite()
    assert result["reconstruction"].item() == pytest.approx(expected["reconstruction"].item(), rel=0.05)


def test_a_constant_part_of_all_embeddings_cannot_bring_the_cosines_to_one(build):
    """The projector's last BatchNorm takes it away, in both branches and over all tokens of the batch."""
    method = build(config_of())
    online, target = spy(method.token_head), spy(method.teacher.module["token_head"])
    batch = make_batch(method.config, pairs=3)
    first = method(batch)["dv"].item()
    for head in (method.token_head, method.teacher.module["token_head"]):
        head[-2].bias.data.add_(100.0)
    assert method(batch)["dv"].item() == pytest.approx(first, abs=0.02)
    for seen in (*online, *target):
        assert seen.mean((0, 1)).abs().max() < 0.01


def test_the_share_of_matched_pairs_is_reported(build):
    method = build(config_of())
    batch = make_batch(method.config)
    batch.targets["matched"] = torch.tensor([True, False])
    assert method(batch)["matched"] == 0.5


def test_a_view_of_constant_air_is_survived(build):
    for options in ({}, {"normalise": "block"}):
        method = build(config_of(**options))
        batch = make_batch(method.config)
        check_training(method, batch._replace(views=torch.full_like(batch.views, -7.0)))


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet", "Primus"])
def test_a_fixed_batch_is_learnt(build, architecture):
    """Masked voxels of these smooth volumes can be guessed from their neighbours."""
    method = build(config_of(decoder="tokens" if architecture == "Primus" else "unet", mask_ratio=0.5), architecture)
    batch = make_batch(method.config)
    steps, rate = (120, 1e-2) if architecture == "Primus" else (60, 5e-3)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=rate)
    first = method(batch)
    for step in range(steps):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
        method.after_step(step / steps)
    last = method(batch)
    assert last["masked_error"] < 0.6 < first["masked_error"]
    assert last["dv"] < first["dv"] and last["st"] < first["st"]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_transformer_has_no_decoder_to_reconstruct_through(build):
    with pytest.raises(
        ValueError, match=r"PlansPrimus has no decoder.*decoder='tokens' \(AlicePrimusPretrainTrainer\)"
    ):
        build(config_of(), "Primus")


def test_a_transformer_takes_views_of_its_patch_only():
    with pytest.raises(ValueError, match=r"planned for views of \(16, 16, 16\), got view_shape \(8, 8, 8\)"):
        Alice.resolve(config_of(view_shape=(8, 8, 8)), primus(), PATCH)
    resolved = Alice.resolve(config_of(view_shape=None), primus(), PATCH)
    assert resolved.view_shape == PATCH and resolved.mask_block == (4, 4, 4)


def test_views_and_blocks_of_a_unet_follow_from_the_plan(tiny_plans, tiny_network):
    network = tiny_network(tiny_plans())
    resolved = Alice.resolve(config_of(view_shape=None), network, (64, 64, 64))
    assert resolved.view_shape == (32, 32, 32) and resolved.mask_block == (4, 4, 4)
    with pytest.raises(ValueError, match="blocks of a mask must tile"):
        Alice.resolve(config_of(mask_block=(5, 4, 4)), network, PATCH)


def test_what_depends_on_the_network_has_to_be_resolved_first(tiny_plans, tiny_network):
    with pytest.raises(ValueError, match="must be resolved first, got None; see Alice.resolve"):
        Alice(tiny_network(tiny_plans()), config_of())
    with pytest.raises(ValueError, match="must be resolved before sampling"):
        Alice.view_sampler(config_of(), PATCH, (1, 1, 1))


def test_other_networks_are_refused():
    with pytest.raises(NotImplementedError, match="got Conv3d"):
        Alice.check_network(torch.nn.Conv3d(1, 1, 1))
