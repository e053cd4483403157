"""The classifier and its windows over a volume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl_stc3d.modules.classifier import ClassifierNetwork, classify_volume, window_starts


def test_it_reads_mean_and_maximum_of_every_stage(tiny_plans, tiny_network, architecture):
    network = ClassifierNetwork(tiny_network(tiny_plans(architecture)), 2)
    assert not any("decoder" in name for name in network.state_dict())
    images = torch.randn(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), torch.zeros(3, 2)), "all classes are equally likely at first"
    nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(1))
    pooled = []
    for stage in network.backbone.encoder(images):
        for pool in (torch.mean, torch.amax):
            pooled.append(torch.stack([torch.stack([pool(c, dim=(0, 1, 2)) for c in image]) for image in stage]))
    expected = torch.cat(pooled, 1) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    network(images).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_other_networks_are_refused():
    with pytest.raises(NotImplementedError, match="classification supports PlainConvUNet"):
        ClassifierNetwork(nn.Linear(1, 1), 2)


@pytest.mark.parametrize(("size", "window"), [(16, 16), (17, 16), (40, 16), (24, 16), (5, 1), (100, 33)])
def test_windows_cover_an_axis(size, window):
    starts = window_starts(size, window)
    assert starts[0] == 0 and starts[-1] == size - window and len(set(starts)) == len(starts)
    assert all(0 < b - a <= max(1, window // 2) + 1 for a, b in zip(starts, starts[1:]))
    if size == window:
        assert starts == [0]


class MeanOfWindow(nn.Module):
    """One logit is the mean of the window, the other counts windows."""

    def forward(self, images):
        assert images.shape == (1, 1, 4, 4, 4)
        return torch.stack((images.mean((1, 2, 3, 4)), torch.ones(len(images))), dim=1)


def test_logits_of_windows_are_averaged():
    volume = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    means = [volume[:, :, y : y + 4, x : x + 4].mean() for y in (0, 2) for x in (0, 2, 4)]
    logits = classify_volume(MeanOfWindow(), volume, (4, 4, 4), torch.device("cpu"))
    torch.testing.assert_close(logits, torch.stack((torch.stack(means).mean(), torch.tensor(1.0))))


def test_small_volumes_are_filled_up_with_zeros():
    logits = classify_volume(MeanOfWindow(), torch.ones(1, 2, 4, 1), (4, 4, 4), torch.device("cpu"))
    assert float(logits[0]) == pytest.approx(8 / 64)
