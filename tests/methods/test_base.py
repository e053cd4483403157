"""What every method shares, and that a method of one's own is one file."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnssl_stc3d.methods.base import (
    PretrainConfig,
    PretrainMethod,
    check_view_shape,
    config_from_dict,
    default_view_shape,
)
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.samplers import TransformRanges
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

# ---- configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleConfig(PretrainConfig):
    transforms: TransformRanges = field(default_factory=TransformRanges)
    grid: tuple[int, int, int] = (1, 2, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of 'adamw', 'adam', 'sgd', got 'lion'"),
        ({"schedule": "poly"}, "schedule must be one of 'cosine', 'constant', got 'poly'"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be positive, got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"gradient_clip": 0}, "gradient_clip must be positive, got 0"),
        ({"weight_decay": -1}, "weight_decay must not be negative, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"intensity": -0.5}, "intensity must not be negative, got -0.5"),
        ({"view_shape": (32, 32)}, r"three positive numbers \(Z, Y, X\) or None, got \(32, 32\)"),
        ({"view_shape": (0, 32, 32)}, "three positive numbers"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**values)


def test_configurations_cannot_change_after_they_were_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().batch_size = 8


def test_a_configuration_survives_json():
    config = ExampleConfig(view_shape=(8, 16, 8), transforms=TransformRanges(scaling=(0.5, 3.0)), grid=(4, 5, 6))
    restored = config_from_dict(ExampleConfig, json.loads(json.dumps(config.to_dict())))
    assert restored == config and isinstance(restored.transforms.scaling, tuple) and hash(restored) == hash(config)
    assert config_from_dict(ExampleConfig, ExampleConfig().to_dict()).view_shape is None


def test_missing_options_take_their_default():
    assert config_from_dict(ExampleConfig, {"batch_size": 2}) == ExampleConfig(batch_size=2)


def test_unknown_options_are_named_with_those_that_exist():
    with pytest.raises(ValueError, match="ExampleConfig has no option bacth_size, tau; options are .*batch_size"):
        config_from_dict(ExampleConfig, {"tau": 1, "bacth_size": 2})
    with pytest.raises(ValueError, match="TransformRanges has no option rotations; options are .*rotation"):
        config_from_dict(ExampleConfig, {"transforms": {"rotations": 3}})
    with pytest.raises(ValueError, match="rotation must lie in"):
        config_from_dict(ExampleConfig, {"transforms": {"rotation": 300}})


# ---- view shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch_size", "stride", "expected"),
    [
        ((128, 128, 128), (32, 32, 32), (64, 64, 64)),
        ((40, 56, 40), (8, 8, 8), (16, 32, 16)),
        ((20, 320, 256), (4, 64, 64), (8, 128, 128)),
        ((14, 384, 288), (1, 64, 32), (7, 192, 128)),
        ((16, 16, 16), (16, 16, 16), (32, 32, 16)),
        ((96, 160, 160), (16, 32, 32), (48, 64, 64)),
    ],
)
def test_default_views_have_half_the_patch(patch_size, stride, expected):
    assert default_view_shape(patch_size, stride) == expected


@pytest.mark.parametrize(
    ("patch_size", "stride", "share", "expected"),
    [
        ((24, 40, 24), (8, 8, 8), 1.0, (24, 40, 24)),
        ((20, 320, 256), (4, 64, 64), 1.0, (20, 320, 256)),
        ((128, 128, 128), (32, 32, 32), 0.75, (96, 96, 96)),
        ((128, 128, 128), (32, 32, 32), 0.1, (64, 64, 32)),
    ],
)
def test_views_can_have_another_share_of_the_patch(patch_size, stride, share, expected):
    assert default_view_shape(patch_size, stride, share) == expected


def test_default_views_fit_every_network():
    for patch_size in product((16, 20, 48, 80, 128), (32, 96, 320), (32, 112, 256)):
        for stride in ((1, 16, 16), (4, 32, 32), (8, 8, 8), (16, 32, 16), (32, 32, 32)):
            shape = default_view_shape(patch_size, stride)
            check_view_shape(shape, stride)
            assert sum(v // s >= 2 for v, s in zip(shape, stride)) >= 2
            assert all(v <= max(p / 2 + s / 2, 2 * s) for v, p, s in zip(shape, patch_size, stride))


@pytest.mark.parametrize(
    ("view_shape", "stride", "nearest"),
    [
        ((64, 64, 60), (32, 32, 32), (64, 64, 64)),
        ((32, 32, 32), (32, 32, 32), (64, 64, 64)),
        ((10, 100, 128), (4, 64, 64), (8, 128, 128)),
        ((1, 16, 16), (1, 16, 16), (2, 32, 32)),
    ],
)
def test_views_that_do_not_fit_are_refused_with_the_nearest_that_does(view_shape, stride, nearest):
    with pytest.raises(ValueError, match=re.escape(f"the nearest is {nearest}")) as error:
        check_view_shape(view_shape, stride)
    assert str(view_shape) in str(error.value) and str(stride) in str(error.value)
    check_view_shape(nearest, stride)


@pytest.mark.parametrize("view_shape", [(32, 64, 32), (64, 64, 64), (96, 32, 64)])
def test_views_that_fit_are_accepted(view_shape):
    check_view_shape(view_shape, (32, 32, 32))


# ---- the base class -------------------------------------------------------------------------------------------------


class Mean(PretrainMethod):
    """The smallest method: the mean of the bottleneck has to be 1."""

    name = "Mean"

    @classmethod
    def view_sampler(cls, config, patch_size, spacing) -> RegionSampler:
        return RegionSampler(config.view_shape, spacing, False, grid=None)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        return {"loss": (self.network.encoder(batch.views.flatten(0, 1))[-1].mean() - 1).square()}


def method_on(network: nn.Module, transfers: tuple[str, ...]) -> Mean:
    method = Mean(network, PretrainConfig(view_shape=(8, 8, 8)))
    method.transfers = transfers
    method.freeze_untrained()
    return method


@pytest.mark.parametrize("transfers", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_only_what_is_transferred_is_trained(architecture, tiny_plans, tiny_network, transfers):
    method = method_on(tiny_network(tiny_plans(architecture)), transfers)
    encoder = {id(p) for p in method.network.encoder.parameters()}
    heads = {id(p) for p in method.network.decoder.seg_layers.parameters()}
    for name, parameter in method.network.named_parameters():
        if id(parameter) in heads:
            expected = False
        else:
            expected = ("encoder" if id(parameter) in encoder else "decoder") in transfers
        assert parameter.requires_grad == expected, name


def test_a_network_without_encoder_and_decoder_is_refused():
    with pytest.raises(NotImplementedError, match="got Conv3d"):
        Mean(nn.Conv3d(1, 1, 1), PretrainConfig(view_shape=(8, 8, 8)))


def test_a_method_has_to_say_where_it_looks_and_what_it_minimises(tiny_plans, tiny_network):
    class Nothing(PretrainMethod):
        name = "Nothing"

    with pytest.raises(TypeError, match="abstract"):
        Nothing(tiny_network(tiny_plans()), PretrainConfig())


def test_after_step_is_optional(tiny_plans, tiny_network):
    assert method_on(tiny_network(tiny_plans()), ("encoder",)).after_step(0.5) is None


# ---- the example of documentation/extending.md ----------------------------------------------------------------------


@pytest.fixture
def example_folder(repository, tmp_path, monkeypatch):
    """The two files of the documentation's example as a user would save them."""
    text = (repository / "documentation" / "extending.md").read_text(encoding="utf-8")
    method, trainer = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "magnification.py").write_text(method)
    (tmp_path / "magnification_trainer.py").write_text(trainer)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(repository / "trainers"), str(tmp_path)]))
    yield tmp_path
    for name in ("magnification", "magnification_trainer"):
        sys.modules.pop(name, None)


def test_a_method_of_ones_own_trains(example_folder, tiny_plans, tiny_network):
    lines = (example_folder / "magnification.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line and not line.startswith(("from", "import"))]) < 25
    module = importlib.import_module("magnification")
    config = module.MagnificationConfig(view_shape=(8, 8, 8))
    torch.manual_seed(0)
    method = module.Magnification(tiny_network(tiny_plans()), config)
    method.freeze_untrained()
    sampler = module.Magnification.view_sampler(config, (16, 16, 16), (1.5, 1.0, 1.0))
    rng = np.random.default_rng(0)
    volume = torch.randn(1, 1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))
    samples, views = [], []
    for _ in range(4):
        (box,), specs, _ = sampler.sample([(24, 24, 24)], rng)
        crop = volume[(..., *(slice(a, b) for a, b in zip(*box)))]
        samples.append(specs)
        views.append(render_views(crop, ViewSpecs(*(f[None] for f in specs)), config.view_shape)[0])
    specs = stack_specs(samples)
    batch = ViewBatch(torch.stack(views), specs, sampler.targets(specs, rng))
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_nnunet_finds_the_trainer_of_ones_own(example_folder):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

    trainer = recursive_find_trainer_class_by_name("MagnificationPretrainTrainer")
    assert issubclass(trainer, PretrainTrainer) and trainer.method_class.name == "Magnification"
    assert trainer.config.scaling == (0.5, 1.0)
