"""Blocks of masks: sizes that respect a network, voxels that are covered, tokens that stay visible."""

from __future__ import annotations

import pytest
import torch

from nnssl_stc3d.modules.masking import (
    check_block,
    default_block,
    expand_mask,
    stage_strides,
    take_tokens,
    visible_tokens,
)

NNUNET = [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 16, 16), (32, 32, 32)]
ANISOTROPIC = [(1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16)]


@pytest.mark.parametrize(
    ("view_shape", "strides", "expected"),
    [
        ((64, 64, 64), NNUNET, (16, 16, 16)),
        ((128, 128, 64), NNUNET, (32, 32, 16)),
        ((24, 24, 32), NNUNET[:4], (4, 4, 8)),
        ((8, 64, 96), ANISOTROPIC, (2, 16, 16)),
        ((2, 32, 32), ANISOTROPIC, (1, 8, 8)),
    ],
)
def test_the_default_block_leaves_four_along_each_axis(view_shape, strides, expected):
    assert default_block(view_shape, strides) == expected
    check_block(expected, view_shape, strides)


@pytest.mark.parametrize("block", [(6, 8, 8), (8, 8, 5), (64, 64, 64), (8, 8, 48)])
def test_blocks_that_cut_voxels_of_a_map_are_refused(block):
    with pytest.raises(ValueError, match=r"tile the view \(64, 64, 64\).*\[1, 2, 4, 8, 16, 32\].*None chooses one"):
        check_block(block, (64, 64, 64), NNUNET)


def test_no_voxel_of_a_map_lies_in_a_visible_and_a_masked_block():
    for block in ((4, 4, 4), (16, 16, 16), (32, 8, 64)):
        check_block(block, (64, 64, 64), NNUNET)
        mask = torch.rand(1, *(64 // b for b in block), generator=torch.Generator().manual_seed(0)) < 0.5
        voxels = expand_mask(mask, block)[0].float()
        for stride in NNUNET:
            cells = torch.nn.functional.avg_pool3d(voxels[None, None], stride).unique().tolist()
            if all(b % s == 0 for b, s in zip(block, stride)):
                assert set(cells) <= {0.0, 1.0}
            if all(s % b == 0 for b, s in zip(block, stride)):
                # Coarser cells hold whole blocks.
                whole = torch.nn.functional.avg_pool3d(mask[None].float(), [s // b for s, b in zip(stride, block)])
                assert sorted(cells) == sorted(whole.unique().tolist())


def test_strides_of_a_network(tiny_plans, tiny_network):
    network = tiny_network(tiny_plans(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]))
    assert stage_strides(network) == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]


def test_a_mask_covers_its_voxels():
    mask = torch.zeros(2, 2, 1, 3, dtype=torch.bool)
    mask[1, 0, 0, 2] = True
    voxels = expand_mask(mask, (2, 3, 4))
    assert voxels.shape == (2, 4, 3, 12) and voxels.dtype == torch.bool
    assert voxels.sum() == 2 * 3 * 4 and voxels[1, :2, :, 8:].all()


def test_visible_tokens_keep_their_order_and_place():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool).reshape(2, 1, 2, 2)
    index = visible_tokens(mask)
    assert index.tolist() == [[1, 3], [0, 1]]
    tokens = torch.arange(8.0).reshape(2, 4, 1) * torch.ones(3)
    assert take_tokens(tokens, index)[..., 0].tolist() == [[1, 3], [4, 5]]
