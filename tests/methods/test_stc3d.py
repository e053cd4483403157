"""STC3D: every option trains what it says, on views whose geometry is known."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnssl_stc3d.losses.info_nce import info_nce, masked_info_nce
from nnssl_stc3d.methods.base import EMBEDDINGS
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.modules.feature_pyramid import decoder_features
from nnssl_stc3d.modules.heads import sample_features
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.geometry import normalised_points
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.samplers import TransformRanges

VIEW_SHAPE = (8, 8, 8)
SMALL = {"view_shape": VIEW_SHAPE, "projector_hidden": 16, "projector_dim": 8, "dense_dim": 8, "dense_points": 16}
# Bases, two regions and their losses beside the voxels, so that most of the method is at work.
WHOLE = SMALL | {"regions": 2, "pred_weight": 1.0, "reg_weight": 1.0, "stage_weight": 0.0}
ONLY_DENSE = {"pred_weight": 0.0, "reg_weight": 0.0, "info_nce_weight": 0.0, "dense_weight": 1.0}


def config_of(**changes) -> STC3DConfig:
    return STC3DConfig(**(WHOLE | changes))


@pytest.fixture
def method_class():
    return STC3D


# ---- the sampler that a configuration asks for ----------------------------------------------------------------------


def test_the_sampler_draws_what_the_losses_need():
    def sampler(**changes) -> RegionSampler:
        return STC3D.view_sampler(config_of(**changes), (16, 16, 16), (1, 1, 1))

    assert sampler().n_views == 8 + 4 and sampler().points == 16 and sampler().bins is None
    assert sampler(**ONLY_DENSE).n_bases == 0
    assert sampler(pred_weight=0, reg_form="eq12").n_bases == 0
    assert sampler(dense_weight=0).points == 0
    assert sampler(info_nce_weight=1, info_nce_on="bins").bins == (2, 2, 2)
    assert sampler(regions=3, views_per_region=4).n_views == 8 + 12
    ranges = TransformRanges(rotation=5)
    assert sampler(transforms=ranges, cropping="edge").transforms == ranges
    assert sampler(cropping="edge").placement == "edge"


@pytest.mark.parametrize("changes", [{"pred_weight": 0.0, "reg_weight": 0.0}, {"pred_weight": 0.0, "reg_form": "eq12"}])
def test_regions_lie_where_they_do_with_bases(changes):
    """An arm without the bases' losses differs in its losses alone, and has negatives in the volume."""
    paper = dataclasses.replace(STC3DConfig.paper(), view_shape=VIEW_SHAPE)
    centers = []
    for config in (paper, dataclasses.replace(paper, **changes)):
        sampler = STC3D.view_sampler(config, (16, 16, 16), (1, 1, 1))
        box, specs, _ = sampler.sample([(60, 60, 60)], np.random.default_rng(0))
        centers.append(specs.center[sampler.n_bases :] + torch.tensor(box[0][0]))
    torch.testing.assert_close(*centers)
    assert (centers[1][:2].mean(0) - centers[1][2:].mean(0)).abs().max() > 4


def test_a_single_region_without_bases_lies_anywhere_in_the_volume():
    sampler = STC3D.view_sampler(STC3DConfig(**SMALL), (16, 16, 16), (1, 1, 1))
    rng = np.random.default_rng(0)
    # A region in a window of 2x2x2 views would be as close to the face of the volume in 7 % of the draws.
    assert sampler.n_bases == 0 and sampler.grid is None
    assert np.mean([sampler.sample([(24, 24, 24)], rng).boxes[0][0][0] < 3 for _ in range(200)]) > 0.15


def test_anisotropic_plans_rotate_in_plane():
    for patch_size, expected in (((16, 64, 64), True), ((32, 64, 64), False)):
        assert STC3D.view_sampler(config_of(), patch_size, (5, 1, 1)).in_plane == expected


def test_the_view_shape_has_to_be_resolved_first(network_of):
    with pytest.raises(ValueError, match="view_shape must be resolved"):
        STC3D(network_of("PlainConvUNet"), config_of(view_shape=None))


# ---- every combination trains ---------------------------------------------------------------------------------------

COMBINATIONS = [
    {"pred_weight": pred, "reg_weight": float(reg is not None), "reg_form": reg or "discrepancy",
     "info_nce_weight": float(contrast is not None), "info_nce_on": contrast or "views", "dense_weight": dense}
    for pred, reg, contrast, dense in product(
        (0.0, 0.5), (None, "discrepancy", "overlap_weighted", "eq12"), (None, "views", "bins"), (0.0, 2.0)
    )
    if pred or reg or contrast or dense
]  # fmt: skip
OPTIONS = [
    {"pred_form": "paper"},
    {"descriptor_stages": "bottleneck", "info_nce_weight": 1.0},
    {"descriptor_stages": "bottleneck", "info_nce_weight": 1.0, "info_nce_on": "bins"},
    {"bins": (1, 1, 1)},
    {"bins": (1, 2, 3), "info_nce_weight": 1.0, "info_nce_on": "bins"},
    {"dense_negatives": "batch"},
    {"dense_pyramid": "decoder"},
    {"dense_pyramid": "encoder"},
    {"dense_pyramid": "both"},
    {"stage_weight": 2.0},
    {"stage_weight": 1.0, "dense_weight": 0.0, "dense_pyramid": "decoder"},
    {"stage_weight": 1.0, "dense_pyramid": "encoder", "dense_negatives": "batch"},
    {"views_per_region": 3, "regions": 1, "info_nce_weight": 1.0},
    {"regions": 3, "cropping": "center", "grid": (1, 2, 2), "region_scale": None},
    {"transforms": TransformRanges(quarter_turns=1.0, scaling_per_axis=True), "cropping": "edge"},
    {"dense_weight": 0.0, "batch_size": 1, "info_nce_weight": 1.0},
]


def label(options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items() if not isinstance(v, TransformRanges))


@pytest.fixture
def check_training(check_step, check_transfers):
    """Function ``(method, batch)``: checks one step, and what is trained and transferred."""

    def check(method: STC3D, batch: ViewBatch) -> None:
        config = method.config
        weights = {
            "pred": config.pred_weight,
            "reg": config.reg_weight,
            "info_nce": config.info_nce_weight,
            "dense": config.dense_weight,
            "stages": config.stage_weight,
        }
        check_step(method, batch, weights)
        check_transfers(method, config.needs_points and config.dense_pyramid != "encoder")

    return check


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
def test_every_combination_of_losses_trains(build, make_batch, check_training, options):
    config = config_of(**options)
    check_training(build(config), make_batch(config))


@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_every_option_trains(build, make_batch, check_training, options, architecture):
    config = config_of(**options)
    check_training(build(config, architecture, channels=2), make_batch(config, min(2, config.batch_size), channels=2))


def test_the_default_trains(build, make_batch, check_training):
    config = STC3DConfig(**SMALL)
    check_training(build(config), make_batch(config))


def test_the_literal_paper_trains(build, make_batch, check_training):
    config = dataclasses.replace(STC3DConfig.paper(), **SMALL)
    check_training(build(config), make_batch(config, shape=(40, 40, 40)))


def test_no_parameter_belongs_to_a_loss_that_is_off(build):
    heads = {
        "projector": config_of(dense_weight=0),
        "dense_projector": config_of(**ONLY_DENSE),
        "stage_projectors": config_of(**(ONLY_DENSE | {"dense_weight": 0, "stage_weight": 1})),
        "bin_projector": config_of(**(ONLY_DENSE | {"dense_weight": 0, "info_nce_weight": 1, "info_nce_on": "bins"})),
    }
    for name, config in heads.items():
        others = {n.split(".")[0] for n, _ in build(config).named_parameters()} - {"network"}
        assert others == {name}


def test_autocast_gives_a_finite_float32_loss(build, make_batch, check_autocast):
    config = config_of(info_nce_weight=1.0)
    method, batch = build(config), make_batch(config)
    check_autocast(method, batch, rel=0.1)


def test_a_batch_in_which_no_points_correspond_is_survived(build, make_batch):
    config = config_of()
    method, batch = build(config), make_batch(config)
    batch.targets["points_inside"].zero_()
    result = method(batch)
    result["loss"].backward()
    assert result["dense"] == 0 and result["voxel_retrieval"] == 0 and result["loss"].isfinite()


# ---- what the loss depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("info_nce_on", ["views", "bins"])
def test_the_order_of_the_volumes_does_not_matter(build, make_batch, reordered, info_nce_on):
    config = config_of(info_nce_weight=1.0, info_nce_on=info_nce_on, reg_form="overlap_weighted")
    method, batch = build(config), make_batch(config, 4)
    first, second = method(batch), method(reordered(batch, [2, 0, 3, 1]))
    for name in ("loss", "pred", "reg", "info_nce", "dense", "position_accuracy", "voxel_retrieval"):
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-4), name


def test_evaluation_computes_the_same_losses(build, make_batch):
    config = config_of(info_nce_weight=1.0)
    method, batch = build(config), make_batch(config)
    assert method.train()(batch)["loss"].item() == pytest.approx(method.eval()(batch)["loss"].item(), rel=1e-6)


def test_embeddings_for_the_monitors_are_positive_pairs(build, make_batch):
    config = config_of(views_per_region=3)
    method, batch = build(config), make_batch(config)
    assert method(batch)[EMBEDDINGS].shape == (2 * 2 * 2, 2, 8)
    config = config_of(**ONLY_DENSE)
    method, batch = build(config), make_batch(config)
    assert method(batch)[EMBEDDINGS].shape == (int(batch.targets["points_inside"].sum()), 2, 8)


class Given(nn.Module):
    """A projector that answers with given embeddings."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == len(self.embeddings)
        return self.embeddings


@pytest.mark.parametrize("neutral_overlap", [0.0, 0.3, 1.0])
def test_views_of_a_region_attract_and_other_regions_and_volumes_repel(build, make_batch, neutral_overlap):
    config = config_of(
        pred_weight=0.0, reg_weight=0.0, dense_weight=0.0, info_nce_weight=1.0, neutral_overlap=neutral_overlap,
        regions=3, temperature=0.5, transforms=TransformRanges(translation=0.4, min_overlap=0.2),
    )  # fmt: skip
    method, batch = build(config), make_batch(config, shape=(16, 20, 16))
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    method.projector = Given(z)
    overlap = batch.targets["overlap"]
    positives, negatives = torch.zeros(12, 12, dtype=torch.bool), torch.zeros(12, 12, dtype=torch.bool)
    neutral = 0
    for i, j in product(range(12), range(12)):
        # Views are ordered by volume, then region: two of each.
        if i // 2 == j // 2:
            positives[i, j] = i != j
        elif i // 6 == j // 6 and max(overlap[i // 6, i % 6, j % 6], overlap[i // 6, j % 6, i % 6]) > neutral_overlap:
            neutral += 1
        else:
            negatives[i, j] = True
    assert (neutral > 0) == (neutral_overlap < 1)
    expected = masked_info_nce(z, positives, negatives, 0.5)
    assert method(batch)["info_nce"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_views_are_compared_with_the_bases_of_their_own_volume(build, make_batch):
    config = config_of(dense_weight=0.0)
    method, batch = build(config), make_batch(config, shape=(24, 24, 24))
    labels = batch.targets["position"]
    bases = torch.eye(16)
    # Each view is the sum of its bases, weighted by their overlap; the second volume's bases are the last 8 axes.
    views = torch.zeros(2, 4, 16)
    views[0, :, :8], views[1, :, 8:] = labels[0], labels[1]
    method.projector = Given(torch.cat((bases[:8], views[0], bases[8:], views[1])))
    result = method(batch)
    assert result["position_accuracy"] == 1 and result["reg"] == 0
    wrong = torch.cat((bases[:8], views[1], bases[8:], views[0]))
    method.projector = Given(wrong)
    assert method(batch)["pred"] > 2 * result["pred"]


def test_voxel_embeddings_are_taken_at_corresponding_points(coordinates, make_batch, sees_positions):
    """On views of an image of positions both embeddings of a pair have to be the same position."""
    config = config_of(**ONLY_DENSE, dense_points=64, views_per_region=3, dense_pyramid="decoder")
    method = STC3D(sees_positions, config)
    method.dense_projector = nn.Identity()
    shape = (40, 44, 36)
    batch = make_batch(config, [coordinates(shape), coordinates(shape) + 100])
    result = method(batch)
    # The last three channels are the highest resolution, exact everywhere; coarse ones are cut at the view's border.
    pairs = result[EMBEDDINGS][..., 3:]
    assert (pairs[:, 0] - pairs[:, 1]).abs().max() < 1e-3
    coarse = result[EMBEDDINGS][..., :3]
    assert (coarse[:, 0] - coarse[:, 1]).abs().max() < 2
    assert len(pairs) == int(batch.targets["points_inside"].sum()) > 300
    # Half of the pairs look into each volume, in the order of the batch.
    first = int(batch.targets["points_inside"][0].sum())
    assert pairs[:first].max() < 100 <= pairs[first:].min()


def test_voxels_can_be_contrasted_within_their_volume_only(build, make_batch):
    results = {}
    for negatives in ("batch", "volume"):
        config = config_of(**ONLY_DENSE, dense_negatives=negatives, dense_temperature=0.5)
        method, batch = build(config), make_batch(config, 3)
        results[negatives] = method(batch)
    first, second = results["batch"][EMBEDDINGS].unbind(1)
    assert results["batch"]["dense"].item() == pytest.approx(info_nce(first, second, 0.5).item(), rel=1e-5)
    groups = torch.arange(3).repeat_interleave(batch.targets["points_inside"].flatten(1).sum(1))
    assert results["volume"]["dense"].item() == pytest.approx(info_nce(first, second, 0.5, groups).item(), rel=1e-5)
    assert results["volume"]["dense"] < results["batch"]["dense"]


@pytest.mark.parametrize("pyramid", ["both", "decoder", "encoder"])
def test_every_stage_is_contrasted_by_itself(build, make_batch, pyramid):
    """The mean over the stages of what each of them, read alone, gives with a head of its own."""
    config = config_of(
        **(ONLY_DENSE | {"dense_weight": 0.0}), stage_weight=1.0, dense_pyramid=pyramid, dense_temperature=0.5
    )
    method, batch = build(config), make_batch(config, 3)
    skips = method.network.encoder(batch.views.flatten(0, 1))
    stages = skips if pyramid == "encoder" else decoder_features(method.network.decoder, skips)
    assert len(method.stage_projectors) == len(stages)
    groups = torch.arange(3).repeat_interleave(batch.targets["points_inside"].flatten(1).sum(1))
    points = normalised_points(batch.targets["points"], VIEW_SHAPE)
    losses = []
    for stage, head in zip(stages, method.stage_projectors):
        # (B * regions * 2, C, ...) as pairs; each view of a pair at its own points.
        read = sample_features([stage], points.flatten(0, 2)).unflatten(0, points.shape[:3])
        pairs = read.transpose(2, 3)[batch.targets["points_inside"]]
        first, second = head(pairs.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        losses.append(info_nce(first, second, 0.5, groups).item())
    assert max(losses) > min(losses)
    assert method(batch)["stages"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_bins_are_contrasted_with_the_bins_they_land_in(coordinates, make_batch, sees_positions):
    config = config_of(
        **(ONLY_DENSE | {"dense_weight": 0.0, "info_nce_weight": 1.0}), info_nce_on="bins", bins=(2, 2, 2)
    )
    config = dataclasses.replace(config, transforms=TransformRanges(quarter_turns=1.0, translation=0.05))
    method = STC3D(sees_positions, config)
    seen = []
    method.bin_projector = nn.Identity()
    method.bin_projector.register_forward_hook(lambda module, inputs, output: seen.append(output))
    shape = (40, 44, 36)
    method(make_batch(config, [coordinates(shape)] * 4))
    pairs = seen[0].unflatten(0, (-1, 2))[..., :3]
    apart = (pairs[:, 0] - pairs[:, 1]).norm(dim=1)
    # Bins are 4 voxels wide; without the known quarter turn, partners would be up to a view's diagonal apart.
    assert len(pairs) > 20 and apart.max() < 4 and apart.mean() < 2


@pytest.mark.parametrize("neutral_overlap", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("views_per_region", [2, 3])
def test_bins_that_overlap_are_neither_positive_nor_negative(build, make_batch, neutral_overlap, views_per_region):
    config = config_of(
        pred_weight=0.0, reg_weight=0.0, dense_weight=0.0, info_nce_weight=1.0, info_nce_on="bins",
        neutral_overlap=neutral_overlap, temperature=0.5, views_per_region=views_per_region,
    )  # fmt: skip
    method, batch = build(config), make_batch(config, shape=(10, 12, 11))
    inside, overlap = batch.targets["bins_inside"].flatten(1), batch.targets["bins_overlap"]
    rows = [(b, i) for b, i in product(range(2), range(inside.shape[1])) if inside[b, i]]
    n = len(rows)
    z = torch.randn(2 * n, 5, generator=torch.Generator().manual_seed(0))
    # The projector sees the two of a pair side by side.
    method.bin_projector = Given(z)
    positives, negatives = torch.zeros(2 * n, 2 * n, dtype=torch.bool), torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    neutral = 0
    for i, j in product(range(2 * n), range(2 * n)):
        (b, one), (other_b, other) = rows[i // 2], rows[j // 2]
        if i // 2 == j // 2:
            positives[i, j] = i != j
        elif b == other_b and max(overlap[b, one, other], overlap[b, other, one]) > neutral_overlap:
            neutral += 1
        else:
            negatives[i, j] = True
    assert n > 10 and (neutral > 0) == (neutral_overlap < 1)
    expected = masked_info_nce(z, positives, negatives, 0.5)
    assert method(batch)["info_nce"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_bins_far_from_each_other_are_all_negatives(build, make_batch):
    config = config_of(
        **(ONLY_DENSE | {"dense_weight": 0.0, "info_nce_weight": 1.0}), info_nce_on="bins", regions=1, temperature=0.5
    )
    method, batch = build(config), make_batch(config)
    result = method(batch)
    first, second = result[EMBEDDINGS].unbind(1)
    assert result["info_nce"].item() == pytest.approx(info_nce(first, second, 0.5).item(), rel=1e-5)
    # Where no bins correspond there is nothing to learn, but no error.
    batch.targets["bins_inside"].zero_()
    result = method(batch)
    result["loss"].backward()
    assert result["info_nce"] == 0 and result["loss"].isfinite()


# ---- it learns ------------------------------------------------------------------------------------------------------


def test_a_fixed_batch_is_learnt(build, make_batch, overfit, architecture):
    config = config_of(dense_points=32, projector_dim=32)
    method = build(config, architecture)
    batch = make_batch(config, shape=(28, 28, 28))
    before, after = overfit(method, batch, 20)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["pred"] < before["pred"] and after["dense"] < before["dense"]
    # Chance is 1 in 8 bases, and 1 in some 120 points.
    assert after["position_accuracy"] > 0.6
    assert after["voxel_retrieval"] > 0.2 > before["voxel_retrieval"]


def test_a_fixed_batch_is_learnt_as_the_paper_writes_it(build, make_batch, overfit):
    config = dataclasses.replace(STC3DConfig.paper(), **SMALL)
    before, after = overfit(build(config), make_batch(config, shape=(40, 40, 40)), 20)
    assert after["loss"] < 0.7 * before["loss"]
    for term in ("pred", "reg", "info_nce"):
        assert after[term] < before[term]
