"""Which networks Alice takes, and what of its configuration follows from them."""

from __future__ import annotations

import pytest
import torch

from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig

PATCH = (16, 16, 16)


@pytest.fixture
def method_class():
    return Alice


def test_a_transformer_has_no_decoder_to_reconstruct_through(build):
    with pytest.raises(
        ValueError, match=r"PlansPrimus has no decoder.*decoder='tokens' \(AlicePrimusPretrainTrainer\)"
    ):
        build(AliceConfig(view_shape=PATCH), "Primus")


def test_a_transformer_takes_views_of_its_patch_only(network_of):
    with pytest.raises(ValueError, match=r"planned for views of \(16, 16, 16\), got view_shape \(8, 8, 8\)"):
        Alice.resolve(AliceConfig(view_shape=(8, 8, 8)), network_of("Primus"), PATCH)
    resolved = Alice.resolve(AliceConfig(view_shape=None), network_of("Primus"), PATCH)
    assert resolved.view_shape == PATCH and resolved.mask_block == (4, 4, 4)


def test_views_and_blocks_of_a_unet_follow_from_the_plan(network_of):
    network = network_of("PlainConvUNet")
    resolved = Alice.resolve(AliceConfig(view_shape=None), network, (64, 64, 64))
    assert resolved.view_shape == (32, 32, 32) and resolved.mask_block == (4, 4, 4)
    with pytest.raises(ValueError, match="blocks of a mask must tile"):
        Alice.resolve(AliceConfig(view_shape=PATCH, mask_block=(5, 4, 4)), network, PATCH)


def test_what_depends_on_the_network_has_to_be_resolved_first(network_of):
    with pytest.raises(ValueError, match="must be resolved first, got None"):
        Alice(network_of("PlainConvUNet"), AliceConfig(view_shape=PATCH))
    with pytest.raises(ValueError, match="must be resolved first, got None"):
        Alice.view_sampler(AliceConfig(view_shape=PATCH), PATCH, (1, 1, 1))


def test_other_networks_are_refused():
    with pytest.raises(NotImplementedError, match="got Conv3d"):
        Alice.check_network(torch.nn.Conv3d(1, 1, 1))
