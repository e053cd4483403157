"""The light decoder: what it sees, and where."""

from __future__ import annotations

import torch

from nnssl_stc3d.modules.token_decoder import TokenDecoder


def decoder(**changes) -> TokenDecoder:
    torch.manual_seed(0)
    options = {"features": 6, "tokens": 8, "voxels": 5, "width": 8, "depth": 2, "heads": 2} | changes
    return TokenDecoder(**options)


def test_tokens_return_to_their_places():
    """Visible tokens given in any order, with their places, make the same view."""
    light, tokens = decoder(), torch.randn(2, 3, 6)
    index = torch.tensor([[0, 3, 7], [2, 4, 5]])
    order = torch.tensor([2, 0, 1])
    first, second = light(tokens, index), light(tokens[:, order], index[:, order])
    assert first.shape == (2, 8, 6) and light.to_voxels(first).shape == (2, 8, 5)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, light(tokens, index.flip(1)), atol=1e-3)


def test_masked_places_differ_by_their_position_only():
    light = decoder()
    result = light(torch.randn(1, 3, 6), torch.tensor([[0, 3, 7]]))[0]
    masked = result[[1, 2, 4, 5, 6]]
    assert torch.pdist(masked).min() > 1e-4
    with torch.no_grad():
        light.position.zero_()
    result = light(torch.randn(1, 3, 6), torch.tensor([[0, 3, 7]]))[0]
    assert torch.pdist(result[[1, 2, 4, 5, 6]]).max() < 1e-5


def test_masked_tokens_learn_from_visible_ones():
    light, tokens = decoder(), torch.randn(1, 2, 6, requires_grad=True)
    light(tokens, torch.tensor([[1, 4]]))[0, 6].sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()
    missing = [n for n, p in light.named_parameters() if p.grad is None and not n.startswith("to_voxels")]
    assert not missing


def test_all_visible():
    light, tokens = decoder(), torch.randn(2, 8, 6)
    everywhere = torch.arange(8).expand(2, -1)
    assert torch.allclose(light(tokens, None), light(tokens, everywhere), atol=1e-6)
