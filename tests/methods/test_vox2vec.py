"""vox2vec: every option trains what it says, on views whose geometry is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.losses.info_nce import info_nce
from nnssl_stc3d.methods.base import EMBEDDINGS, config_from_dict
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

VIEW_SHAPE = (8, 8, 8)
SMALL = {"view_shape": VIEW_SHAPE, "points": 20, "head_hidden": 16, "head_dim": 8, "rows": 16}
ROTATED = TransformRanges(rotation=40, scaling=(0.8, 1.2), min_overlap=0.3)
FPN = "nnssl_stc3d.modules.fpn.VoxelFPN"


def config_of(**changes) -> Vox2VecConfig:
    return Vox2VecConfig(**(SMALL | changes))


def anatomy(seed: int, shape: tuple[int, ...] = (18, 20, 16), channels: int = 1) -> Tensor:
    """A smooth volume with structure at the scale of a view, ``(1, 1, C, Z, Y, X)``."""
    noise = torch.randn(1, channels, *[n // 2 for n in shape], generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=shape, mode="trilinear")[None]


def make_batch(config: Vox2VecConfig, volumes: list[Tensor], guide: Guide | None = None, seed: int = 0) -> ViewBatch:
    """What the loader makes of volumes ``(1, 1, C, Z, Y, X)``, one for each sample."""
    sampler = Vox2Vec.view_sampler(config, (16, 16, 16), (1.5, 1.0, 1.0))
    rng = np.random.default_rng(seed)
    samples, views = [], []
    for volume in volumes:
        sampled = sampler.sample([volume.shape[3:]], rng, [guide] if guide else ())
        (box,) = sampled.boxes
        crop = volume[(..., *(slice(a, b) for a, b in zip(*box)))]
        views.append(render_views(crop, ViewSpecs(*(f[None] for f in sampled.specs)), config.view_shape)[0])
        samples.append(sampled)
    targets = {name: torch.stack([s.targets[name] for s in samples]) for name in samples[0].targets}
    return ViewBatch(torch.stack(views), stack_specs([s.specs for s in samples]), targets)


@pytest.fixture
def build(tiny_plans, tiny_network):
    """Function ``(config, architecture, channels) -> method`` with frozen parts frozen."""

    def make(config: Vox2VecConfig, architecture: str = "PlainConvUNet", channels: int = 1) -> Vox2Vec:
        plans = tiny_plans("ResidualEncoderUNet" if architecture == "VoxelFPN" else architecture, channels)
        if architecture == "VoxelFPN":
            plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = FPN
        network = tiny_network(plans, channels)
        torch.manual_seed(0)
        method = Vox2Vec(network, config)
        method.freeze_untrained()
        return method

    return make


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
def test_every_option_trains(build, options, name):
    config = config_of(**options)
    method = build(config, name, channels=2)
    batch = make_batch(config, [anatomy(s, channels=2) for s in range(2)])
    result = method(batch)
    assert all(value.isfinite().all() for value in result.values())
    assert all(not value.requires_grad for key, value in result.items() if key != "loss")
    result["loss"].backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        else:
            assert parameter.grad is None, parameter_name
    decoder = config.pyramid != "encoder"
    assert method.transfers == (("encoder", "decoder") if decoder else ("encoder",))
    assert all(p.requires_grad == decoder for p in method.network.decoder.stages.parameters())
    assert not any(p.requires_grad for p in method.network.decoder.seg_layers.parameters())


def test_the_paper_and_the_released_code_are_configurations(build):
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
    assert method(make_batch(tiny, [anatomy(0), anatomy(1)]))["loss"].isfinite()


def test_options_with_ranges_survive_a_checkpoint():
    config = config_of(transforms=ROTATED)
    assert config_from_dict(Vox2VecConfig, config.to_dict()) == config


def test_the_form_for_the_fpn_names_the_way_out_on_a_unet(build):
    config = dataclasses.replace(Vox2VecConfig.paper(), view_shape=VIEW_SHAPE)
    unet, fpn = build(config_of()).network, build(config_of(), "VoxelFPN").network
    with pytest.raises(ValueError, match="plan names PlainConvUNet.*write_fpn_plans"):
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


class SeesPositions(nn.Module):
    """A U-Net of stride 2 whose features are what a view shows."""

    class Encoder(nn.Module):
        output_channels = [3, 3]
        strides = [[1, 1, 1], [2, 2, 2]]

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, F.avg_pool3d(x, 2)]

    class KeepSkip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 3:]

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList([self.KeepSkip()])
        self.decoder.transpconvs = nn.ModuleList([nn.Upsample(scale_factor=2)])
        self.decoder.seg_layers = nn.ModuleList([nn.Identity()])


def coordinates(shape: tuple[int, ...], offset: float) -> Tensor:
    return torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))[None, None] + offset


@pytest.mark.parametrize("options", [{"reading": "nearest"}, {}, {"transforms": ROTATED}], ids=str)
def test_voxels_are_read_at_corresponding_points(options):
    """On views of an image of positions, both embeddings of a pair are the same voxel of the same volume."""
    config = config_of(points=200, pairs=2, pyramid="decoder", **options)
    method = Vox2Vec(SeesPositions(), config)
    method.head = nn.Identity()
    batch = make_batch(config, [coordinates((18, 20, 16), 0), coordinates((18, 20, 16), 100)])
    first, second = method._descriptors(batch)
    assert len(first) == int(batch.targets["points_inside"].sum()) > 100
    # The last three channels are the finest map; rotated views cut its outermost half voxel.
    torch.testing.assert_close(first[:, 3:], second[:, 3:], atol=0.8 if "transforms" in options else 1e-3, rtol=0)
    assert (first[:, :3] - second[:, :3]).abs().max() < 2
    if "transforms" not in options:
        assert (first[:, 3:] - first[:, 3:].round()).abs().max() < 1e-3
    volumes = (first[:, 3:].mean(1) > 60).long()
    assert volumes.bincount().tolist() == batch.targets["points_inside"].flatten(1).sum(1).tolist()


def test_the_loss_is_info_nce_over_all_volumes(build):
    config = config_of(pairs=2)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(3)])
    first, second = (method.head(vectors) for vectors in method._descriptors(batch))
    assert len(first) == int(batch.targets["points_inside"].sum()) > 60
    expected = info_nce(first, second, 0.1, rows=None)
    assert method(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    paper = build(dataclasses.replace(config, loss_form="paper"))
    assert paper(batch)["loss"].item() == pytest.approx(2 * len(first) * expected.item(), rel=1e-4)


def test_the_head_sees_views_together_or_one_at_a_time(build):
    apart, together = (build(config_of(head_per_view=per_view)) for per_view in (True, False))
    batch = make_batch(apart.config, [anatomy(0), anatomy(1)])
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


def test_the_order_of_the_volumes_does_not_matter(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(4)])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ViewBatch(
        batch.views[order], ViewSpecs(*(f[order] for f in batch.specs)), {k: v[order] for k, v in batch.targets.items()}
    )
    for name in ("loss", "voxel_retrieval"):
        assert method(batch)[name].item() == pytest.approx(method(shuffled)[name].item(), rel=1e-4)


def test_evaluation_computes_the_same_loss(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    assert method.train()(batch)["loss"].item() == pytest.approx(method.eval()(batch)["loss"].item(), rel=1e-6)


def test_autocast_gives_a_finite_float32_loss(build):
    config = config_of()
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = method(batch)
    assert result["loss"].dtype == torch.float32
    assert result["loss"].item() == pytest.approx(method(batch)["loss"].item(), rel=0.15)


def test_embeddings_for_the_monitors_are_few_positive_pairs(build):
    config = config_of(points=300)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    pairs = method(batch)[EMBEDDINGS]
    assert int(batch.targets["points_inside"].sum()) > 256 and pairs.shape == (256, 2, 8)


def test_training_finds_the_voxels_again(build):
    config = config_of(points=30, transforms=ROTATED)
    method = build(config)
    batch = make_batch(config, [anatomy(s) for s in range(2)])
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 3e-3)
    before = method(batch)
    for _ in range(60):
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    after = method(batch)
    assert after["loss"] < 0.6 * before["loss"]
    assert after["voxel_retrieval"] > before["voxel_retrieval"] + 0.2


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("head_per_view", [True, False])
def test_a_batch_with_hardly_a_shared_voxel_is_survived(build, shared, head_per_view):
    config = config_of(head_per_view=head_per_view)
    method, batch = build(config), make_batch(config, [anatomy(s) for s in range(2)])
    batch.targets["points_inside"].zero_()
    batch.targets["points_inside"][0, 0, :shared] = True
    result = method(batch)
    result["loss"].backward()
    assert all(value.isfinite().all() for value in result.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
    if shared < 2:
        assert result["loss"] == 0 and result["voxel_retrieval"] == 0


@pytest.mark.parametrize("body", ["empty", "full"])
def test_any_body_mask_and_a_batch_of_one_are_survived(build, body):
    config = config_of(batch_size=1, pairs=2)
    guide = Guide((1.0, 1.0, 1.0), np.full((18, 20, 16), body == "full"))
    method, batch = build(config), make_batch(config, [anatomy(0)], guide)
    result = method(batch)
    result["loss"].backward()
    assert result["loss"].isfinite() and (result["loss"] > 0) == (body == "full")


def test_volumes_smaller_than_a_view_are_shown_magnified(build):
    config = config_of(view_shape=(24, 16, 32))
    method, batch = build(config), make_batch(config, [anatomy(s, (16, 16, 16)) for s in range(2)])
    assert (torch.linalg.det(batch.specs.matrix) < 1).all()
    assert method(batch)["loss"] > 0 and batch.targets["points_inside"].all()
