"""PiMPiC's options: checked, saved, and what the trainers have."""

from __future__ import annotations

import pytest

from nnssl_stc3d.methods.pimpic import PiMPiCConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pim_form": "eq1"}, "pim_form must be one of 'official', 'paper', got 'eq1'"),
        ({"pic_form": "eq2"}, "pic_form must be one of 'official', 'paper', got 'eq2'"),
        ({"patches": 1}, r"patches must be at least 2 \(overlaps are between patches of a volume\), got 1"),
        ({"reach": -1}, "reach must not be negative, got -1"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"projector_dim": 0}, "projector_dim must be positive, got 0"),
        ({"pim_weight": -1}, "pim_weight must not be negative, got -1"),
        ({"pair_overlap": 0}, r"pair_overlap must lie in \(0, 1\], got 0"),
        ({"pim_strides": ()}, r"pim_strides must be different positive numbers, such as \(4, 8, 16\), got \(\)"),
        ({"pic_strides": (1, 1)}, r"pic_strides must be different positive numbers, .* got \(1, 1\)"),
        ({"pic_strides": (0, 1)}, "pic_strides must be different positive numbers"),
        ({"pim_weight": 0, "pic_weight": 0}, "both 0: there is nothing to train"),
        ({"optimizer": "lars"}, "optimizer must be one of"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        PiMPiCConfig(**values)


@pytest.mark.parametrize(
    "config",
    [
        PiMPiCConfig(),
        PiMPiCConfig.official(),
        PiMPiCConfig.paper(),
        PiMPiCConfig(view_shape=(8, 8, 8), transforms=TransformRanges(flips=0.5), pim_strides=(8,)),
    ],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


@pytest.mark.parametrize("name", ["official", "paper"])
def test_the_literal_settings(name):
    config = getattr(PiMPiCConfig, name)()
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-5, 0.0)
    assert (config.schedule, config.warmup_steps, config.batch_size * config.patches) == ("constant", 0, 32)
    assert config.pim_strides == (4, 8, 16) and config.pic_strides == (1, 2, 4) and config.temperature == 1
    assert (config.pim_hidden, config.pic_hidden, config.projector_dim) == (256, 128, 128)
    assert config.pim_form == config.pic_form == name and config.transforms == TransformRanges.none()
    assert config.pair_overlap == (0.01 if name == "official" else 1e-6) and config.reach == 0.8


def test_trainers_run_what_they_are_called(check_trainers):
    check_trainers(
        "pimpic",
        {
            "PiMPiC": (PiMPiCConfig(), 100_000),
            "PiMPiCOfficial": (PiMPiCConfig.official(), 98_000),
            "PiMPiCPaper": (PiMPiCConfig.paper(), 20_000),
        },
    )
