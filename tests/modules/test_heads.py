"""Projection heads against the released ones, descriptors and features at points against direct indexing."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnssl_stc3d.modules.heads import Projector, pooled_descriptor, sample_features
from nnssl_stc3d.views.geometry import normalised_points


def wave(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)


def fill(projector: Projector) -> Projector:
    """Fill linear layers as the reference does: weight, bias, weight, ... are numbered whether or not we have them."""
    projector.double()
    linear = [m for m in projector if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for index, layer in enumerate(linear):
            layer.weight.copy_(wave(tuple(layer.weight.shape), 0.37, 2 * index, 0.5))
            if layer.bias is not None:
                layer.bias.copy_(wave(tuple(layer.bias.shape), 0.37, 2 * index + 1, 0.5))
    return projector


# ---- projector ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_released_head_of_voco(training):
    projector = fill(Projector(12, 16, 8)).train(training)
    expected = [
        [1.0696538001399465, 0.09650911489787856, 0.049523470830792005, 1.5822693504756553,
         1.2766355726206013, 1.312628376406083, 1.04444112971379, 0.765722133464519],
        [-0.3645719311667106, -1.0137870332648522, 0.2970067397351789, -0.34986632568659937,
         0.8802417388654749, 0.17493467300851206, 0.08764890871271229, 1.2107896171184138],
        [-0.7051572063833444, -1.5221022773657427, 1.5201429572769158, -1.665632303045772,
         1.0259410394502821, 0.19625467484112008, 1.866058334877436, -0.01151308600217571],
        [-2.596103645045498, -1.5954537022086557, -1.4079458720051794, -0.7527804353912182,
         -0.23091367197716112, -1.7315043000854322, -0.9042171120588436, -0.5242907014118938],
        [-1.0432625402842544, -0.7581942614963344, -1.272899331003893, 1.0037729248986285,
         0.9428708992421846, -0.049036467705499964, 0.03396118996748765, -0.8907964734063758],
    ]  # fmt: skip
    got = projector(wave((5, 12), 0.9))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_released_head_of_vox2vec():
    projector = fill(Projector(14, 14, 4, affine=True))
    assert [name for name, _ in projector.named_parameters()] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "6.weight", "6.bias",
    ]  # fmt: skip
    expected = [
        [-0.47543470097886853, -0.3605834454869534, -0.7784549828530148, -0.19480570735274552],
        [-0.3448506632076388, -0.8579303583996665, -0.2913470803192831, 0.24525578282866395],
        [0.6513619760965836, 0.2865552567672642, -0.5318824380994115, 0.4590367446686884],
        [0.462134193525726, 0.07940596037227513, -0.5029885078281482, 0.7260366668595303],
        [-0.21315226206833612, -0.26723332988763376, -0.9270570985246585, -0.1540051838327532],
    ]
    got = F.normalize(projector(wave((5, 14), 0.9)), dim=1)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_every_parameter_of_a_projector_matters():
    """None is removed by the normalisation that follows it, and none is left without a gradient."""
    for affine in (False, True):
        projector = Projector(6, 5, 3, affine).double()
        assert (projector[0].bias is not None) == affine
        projector(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad is not None for p in projector.parameters())
    assert not list(projector.buffers())


def test_small_differences_between_samples_are_brought_to_scale():
    """A descriptor right after InstanceNorm is nearly constant; what differs has to survive."""
    base = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    nearly_equal = base + 1e-3 * torch.randn(16, 20, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    z = F.normalize(Projector(20, 32, 8)(nearly_equal), dim=1)
    assert torch.pdist(z).mean() > 0.5


# ---- pooled descriptors ---------------------------------------------------------------------------------------------


def test_one_bin_is_global_average_pooling():
    maps = [torch.randn(3, 4, 8, 6, 4), torch.randn(3, 5, 4, 3, 2)]
    expected = torch.cat([f.mean((2, 3, 4)) for f in maps], dim=1)
    torch.testing.assert_close(pooled_descriptor(maps, (1, 1, 1)), expected)


def test_bins_are_means_of_blocks_in_a_fixed_order():
    f = torch.randn(2, 3, 8, 6, 4)
    got = pooled_descriptor([f], (2, 3, 1))
    expected = [
        f[:, c, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2].mean((1, 2, 3))
        for c, i, j in product(range(3), range(2), range(3))
    ]
    torch.testing.assert_close(got, torch.stack(expected, dim=1))


def test_maps_with_fewer_voxels_than_bins_repeat_them():
    f = torch.randn(2, 3, 1, 2, 2)
    got = pooled_descriptor([f], (2, 2, 2)).reshape(2, 3, 2, 2, 2)
    torch.testing.assert_close(got, f.expand(2, 3, 2, 2, 2))


# ---- features at points ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 4), (4, 4, 2)])
def test_features_at_voxel_centres_are_the_voxels(stride):
    """A feature voxel of stride s covers s view voxels; its centre lies at ``s i + (s - 1) / 2``."""
    view_shape = (8, 16, 8)
    shape = [v // s for v, s in zip(view_shape, stride)]
    f = torch.randn(1, 3, *shape, dtype=torch.float64)
    index = list(product(*[range(n) for n in shape]))
    points = torch.tensor([[[s * i + (s - 1) / 2 for i, s in zip(voxel, stride)] for voxel in index]])
    got = sample_features([f], normalised_points(points.double(), view_shape))
    expected = torch.stack([f[0, :, z, y, x] for z, y, x in index])[None]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_a_pyramid_of_coordinate_images_shows_the_same_position_at_every_stride():
    view_shape = (16, 24, 8)
    maps = []
    for stride in [(1, 1, 1), (2, 2, 2), (4, 2, 4)]:
        axes = [torch.arange(v // s, dtype=torch.float64) * s + (s - 1) / 2 for v, s in zip(view_shape, stride)]
        maps.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(2, -1, -1, -1, -1))
    # Further from the edge than half the coarsest voxel.
    room = torch.tensor(view_shape, dtype=torch.float64) - 1 - 4
    points = 2 + torch.rand(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * room
    got = sample_features(maps, normalised_points(points, view_shape))
    assert got.shape == (2, 50, 9)
    torch.testing.assert_close(got, points.repeat(1, 1, 3), rtol=0, atol=1e-9)


def test_points_of_each_map_are_its_own():
    f = torch.randn(3, 2, 4, 4, 4)
    points = torch.rand(3, 5, 3) * 2 - 1
    together = sample_features([f], points)
    for n in range(3):
        torch.testing.assert_close(together[n : n + 1], sample_features([f[n : n + 1]], points[n : n + 1]))


def test_features_at_points_pass_gradients():
    f = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    sample_features([f], torch.zeros(1, 1, 3)).sum().backward()
    # The middle of an even map lies between its 8 central voxels.
    torch.testing.assert_close(f.grad[0, 0, 1:3, 1:3, 1:3], torch.full((2, 2, 2), 0.125))


def test_the_released_look_up_of_vox2vec():
    """Voxel ``i`` of the finest level is read from voxel ``i // 2**level`` of the others."""
    levels = [wave((2, 8, 8, 8), 0.01), wave((4, 4, 4, 4), 0.03, 0.2), wave((8, 2, 2, 2), 0.2, 0.7)]
    voxels = torch.tensor([[0, 0, 0], [7, 7, 7], [3, 4, 5], [6, 1, 2]])
    points = normalised_points(voxels.double(), (8, 8, 8))
    read = sample_features([level[None] for level in levels], points[None], nearest=True)[0]
    assert read.shape == (4, 14)
    for row, voxel in zip(read, voxels):
        expected = [level[(slice(None), *(voxel // 2**i))] for i, level in enumerate(levels)]
        assert torch.equal(row, torch.cat(expected))
    # The first values of two voxels, and the last of the last.
    released = [
        [0.0, 0.9568074818951499, 0.19866933079506122],
        [0.940403423278055, -0.9842750721183763, -0.97934279078],
    ]
    torch.testing.assert_close(read[:2, :3], torch.tensor(released, dtype=torch.float64))
    assert read[3, -1].item() == pytest.approx(0.9605472048282051)
