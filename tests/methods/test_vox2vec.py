"""vox2vec: every option trains what it says, on views whose geometry is known."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from nnssl_stc3d.losses.info_nce import info_nce
from nnssl_stc3d.methods.base import EMBEDDINGS, config_from_dict
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.samplers import TransformRanges

VIEW_SHAPE = (8, 8, 8)
SMALL = {"view_shape": VIEW_SHAPE, "points": 20, "head_hidden": 16, "head_dim": 8, "rows": 16}
ROTATED = TransformRanges(rotation=40, scaling=(0.8, 1.2), min_overlap=0.3)


def config_of(**changes) -> Vox2VecConfig:
    return Vox2VecConfig(**(SMALL | changes))


@pytest.fixture
def method_class():
    return Vox2Vec


@pytest.fixture
def anatomy(anatomy):
    """Structure at the scale of the receptive fields."""
    return partial(anatomy, shape=(18, 20, 16), grain=2)


# ---- every option trains --------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"pyramid": "encoder"},
    {"pyramid": "decoder"},
    {"reading": "nearest"},
    {"loss_form": "paper"},
    {"head_per_view": False},
    {"head_hidden": None},
    {"pairs": 3},
    {"transforms": ROTATED},
    {"rows": None},
    {"guided": False},
]


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet", "VoxelFPN"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains(build, make_batch, check_step, check_transfers, options, name):
    config = config_of(**options)
    method = build(config, name, channels=2)
    check_step(method, make_batch(config, channels=2))
    check_transfers(method, config.pyramid != "encoder")


def test_the_paper_and_the_released_code_are_configurations(build, make_batch):
    paper, official = Vox2VecConfig.paper(), Vox2VecConfig.official()
    assert (paper.batch_size, paper.pairs, paper.points, paper.loss_form) == (10, 1, 1000, "paper")
    assert (official.batch_size, official.pairs, official.points, official.loss_form) == (1, 10, 1024, "official")
    for config in (paper, official):
        assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 3e-4, 0)
        assert config.view_shape == (32, 128, 128) and config.temperature == 0.1
        assert config_from_dict(Vox2VecConfig, config.to_dict()) == config
    tiny = dataclasses.replace(paper, view_shape=VIEW_SHAPE, points=10)
    method = build(tiny, "VoxelFPN")
    # 1008-BN-ReLU-1008-BN-ReLU-128 on the paper's network.
    assert [layer.out_features for layer in method.head if isinstance(layer, nn.Linear)] == [20, 20, 128]
    assert method(make_batch(tiny))["loss"].isfinite()


def test_options_with_ranges_survive_a_checkpoint():
    config = config_of(transforms=ROTATED)
    assert config_from_dict(Vox2VecConfig, config.to_dict()) == config


def test_the_form_for_the_fpn_names_the_way_out_on_a_unet(build):
    config = dataclasses.replace(Vox2VecConfig.paper(), view_shape=VIEW_SHAPE)
    unet, fpn = build(config_of()).network, build(config_of(), "VoxelFPN").network
    with pytest.raises(ValueError, match="plan names PlainConvUNet.*network-plans"):
        Vox2Vec.resolve(config, unet, (16, 16, 16))
    assert Vox2Vec.resolve(config, fpn, (16, 16, 16)) == config
    assert Vox2Vec.resolve(config_of(view_shape=None), unet, (32, 32, 32)).view_shape == (16, 16, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "unet"}, {"pyramid": "decoders"}, {"reading": "cubic"}, {"loss_form": "mean"}, {"pairs": 0},
        {"points": 0}, {"temperature": 0.0}, {"head_hidden": 0}, {"head_dim": 0}, {"rows": 0},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_work_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_of(**changes)


def test_the_view_shape_has_to_be_resolved_first():
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        Vox2Vec.view_sampler(config_of(view_shape=None), (16, 16, 16), (1, 1, 1))


# ---- what the loss is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reading": "nearest"}, {}, {"transforms": ROTATED}], ids=str)
def test_voxels_are_read_at_corresponding_points(coordinates, make_batch, sees_positions, options):
    """On views of an image of positions, both embeddings of a pair are the same voxel of the same volume."""
    config = config_of(points=200, pairs=2, pyramid="decoder", **options)
    method = Vox2Vec(sees_positions, config)
    method.head = nn.Identity()
    batch = make_batch(config, [coordinates((18, 20, 16)), coordinates((18, 20, 16), 100)])
    first, second = method._descriptors(batch)
    assert len(first) == int(batch.targets["points_inside"].sum()) > 100
    # The last three channels are the finest map; rotated views cut its outermost half voxel.
    torch.testing.assert_close(first[:, 3:], second[:, 3:], atol=0.8 if "transforms" in options else 1e-3, rtol=0)
    assert (first[:, :3] - second[:, :3]).abs().max() < 2
    if "transforms" not in options:
        assert (first[:, 3:] - first[:, 3:].round()).abs().max() < 1e-3
    volumes = (first[:, 3:].mean(1) > 60).long()
    assert volumes.bincount().tolist() == batch.targets["points_inside"].flatten(1).sum(1).tolist()


def test_the_loss_is_info_nce_over_all_volumes(build, make_batch):
    config = config_of(pairs=2)
    method, batch = build(config), make_batch(config, 3)
    first, second = (method.head(vectors) for vectors in method._descriptors(batch))
    assert len(first) == int(batch.targets["points_inside"].sum()) > 60
    expected = info_nce(first, second, 0.1, rows=None)
    assert method(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    paper = build(dataclasses.replace(config, loss_form="paper"))
    assert paper(batch)["loss"].item() == pytest.approx(2 * len(first) * expected.item(), rel=1e-4)


def test_the_head_sees_views_together_or_one_at_a_time(build, make_batch):
    apart, together = (build(config_of(head_per_view=per_view)) for per_view in (True, False))
    batch = make_batch(apart.config)
    sizes: list[int] = []
    for method in (apart, together):
        method.head.register_forward_hook(lambda module, given, result: sizes.append(len(given[0])))
        method(batch)
    assert sizes[0] == sizes[1] == sizes[2] / 2
    # The views differ in brightness only: their own statistics remove that, common ones do not.
    batch.views[:, 1] = batch.views[:, 0]
    batch.targets["points"][:, :, 1] = batch.targets["points"][:, :, 0]
    shifted = [v + 3 * i for i, v in enumerate(apart._descriptors(batch))]
    a, b = (apart.head(v) for v in shifted)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    c, d = together.head(torch.cat(shifted)).chunk(2)
    assert (c - d).abs().max() > 0.1


def test_the_order_of_the_volumes_does_not_matter(build, make_batch, reordered):
    config = config_of()
    method, batch = build(config), make_batch(config, 4)
    shuffled = reordered(batch, [2, 0, 3, 1])
    for name in ("loss", "voxel_retrieval"):
        assert method(batch)[name].item() == pytest.approx(method(shuffled)[name].item(), rel=1e-4)


def test_evaluation_computes_the_same_loss(build, make_batch):
    config = config_of()
    method, batch = build(config), make_batch(config)
    assert method.train()(batch)["loss"].item() == pytest.approx(method.eval()(batch)["loss"].item(), rel=1e-6)


def test_autocast_gives_a_finite_float32_loss(build, make_batch, check_autocast):
    config = config_of()
    method, batch = build(config), make_batch(config)
    check_autocast(method, batch, rel=0.15)


def test_embeddings_for_the_monitors_are_few_positive_pairs(build, make_batch):
    config = config_of(points=300)
    method, batch = build(config), make_batch(config)
    pairs = method(batch)[EMBEDDINGS]
    assert int(batch.targets["points_inside"].sum()) > 256 and pairs.shape == (256, 2, 8)


def test_training_finds_the_voxels_again(build, make_batch, overfit):
    config = config_of(points=30, transforms=ROTATED)
    method = build(config)
    batch = make_batch(config)
    before, after = overfit(method, batch, 60, rate=3e-3)
    assert after["loss"] < 0.6 * before["loss"]
    assert after["voxel_retrieval"] > before["voxel_retrieval"] + 0.2


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("head_per_view", [True, False])
def test_a_batch_with_hardly_a_shared_voxel_is_survived(build, make_batch, shared, head_per_view):
    config = config_of(head_per_view=head_per_view)
    method, batch = build(config), make_batch(config)
    batch.targets["points_inside"].zero_()
    batch.targets["points_inside"][0, 0, :shared] = True
    result = method(batch)
    result["loss"].backward()
    assert all(value.isfinite().all() for value in result.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    if shared < 2:
        assert result["loss"] == 0 and result["voxel_retrieval"] == 0


@pytest.mark.parametrize("body", ["empty", "full"])
def test_any_body_mask_and_a_batch_of_one_are_survived(build, make_batch, body):
    config = config_of(batch_size=1, pairs=2)
    guide = Guide((1.0, 1.0, 1.0), np.full((18, 20, 16), body == "full"))
    method, batch = build(config), make_batch(config, 1, guide=guide)
    result = method(batch)
    result["loss"].backward()
    assert result["loss"].isfinite() and (result["loss"] > 0) == (body == "full")


def test_volumes_smaller_than_a_view_are_shown_magnified(build, make_batch):
    config = config_of(view_shape=(24, 16, 32))
    method, batch = build(config), make_batch(config, shape=(16, 16, 16))
    assert (torch.linalg.det(batch.specs.matrix) < 1).all()
    assert method(batch)["loss"] > 0 and batch.targets["points_inside"].all()
