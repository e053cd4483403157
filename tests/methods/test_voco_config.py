"""VoCo's options: checked, saved, and what the trainers have."""

from __future__ import annotations

import pytest

from nnssl_stc3d.methods.voco import VoCoConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coverage": "body"}, "coverage must be one of 'window', 'volume', got 'body'"),
        ({"bases_through": "student"}, "bases_through must be one of 'both', 'teacher', got 'student'"),
        ({"pred_form": "eq3"}, "pred_form must be one of 'official', 'paper', got 'eq3'"),
        ({"reg_form": "eq5"}, "reg_form must be one of 'official', 'symmetric', 'paper', got 'eq5'"),
        ({"descriptor_stages": "decoder"}, "descriptor_stages must be one of .*, got 'decoder'"),
        ({"base_scale": 0}, "base_scale must be positive, got 0"),
        ({"crops": 0}, "crops must be positive, got 0"),
        ({"reg_weight": -1}, "reg_weight must not be negative, got -1"),
        ({"grid": (4, 4)}, r"grid must be three positive numbers \(Z, Y, X\), got \(4, 4\)"),
        ({"bins": (2, 0, 2)}, r"bins must be three positive numbers \(Z, Y, X\), got \(2, 0, 2\)"),
        ({"grid": (1, 1, 1)}, r"needs at least 2 bases, got grid \(1, 1, 1\)"),
        ({"teacher_momentum": 1.1}, r"teacher_momentum must lie in \[0, 1\] or be None, got 1.1"),
        ({"teacher_momentum": None, "bases_through": "teacher"}, "bases_through='teacher' needs a teacher"),
        ({"optimizer": "lars"}, "optimizer must be one of"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        VoCoConfig(**values)


@pytest.mark.parametrize(
    "config",
    [
        VoCoConfig(),
        VoCoConfig.official(),
        VoCoConfig.paper(),
        VoCoConfig(view_shape=(8, 8, 8), transforms=TransformRanges(flips=0.5)),
    ],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


def test_the_released_settings():
    official = VoCoConfig.official()
    assert (official.optimizer, official.learning_rate, official.weight_decay, official.amsgrad) == (
        "adamw", 1e-4, 1e-2, True,
    )  # fmt: skip
    assert (official.warmup_steps, official.schedule, official.batch_size, official.crops) == (5000, "cosine", 2, 2)
    assert (official.grid, official.coverage, official.base_scale) == ((1, 4, 4), "volume", 1.5)
    assert official.teacher_momentum == 0.9 and official.bases_through == "both"
    assert official.pred_form == official.reg_form == "official" and official.reg_weight == 1
    assert official.bins == (1, 1, 1) and official.projector_hidden == official.projector_dim == 2048
    # Of four quarter turns one changes nothing.
    assert official.transforms.quarter_turns * 3 / 4 == pytest.approx(0.2) and official.transforms.flips == 0.2
    assert official.transforms.rotation == official.transforms.translation == 0 and official.turn_bases


def test_the_printed_settings():
    paper = VoCoConfig.paper()
    assert (paper.optimizer, paper.learning_rate, paper.weight_decay, paper.momentum) == ("adamw", 1e-3, 1e-2, 0.9)
    assert (paper.warmup_steps, paper.schedule, paper.batch_size, paper.crops) == (100, "cosine", 4, 4)
    assert paper.pred_form == paper.reg_form == "paper" and paper.reg_weight == 1 and paper.teacher_momentum is None
    assert paper.grid == (1, 4, 4) and paper.bins == (1, 1, 1) and paper.projector_dim == 2048


def test_trainers_run_what_they_are_called(check_trainers):
    check_trainers(
        "voco",
        {
            "VoCo": (VoCoConfig(), 100_000),
            "VoCoOfficial": (VoCoConfig.official(), 250_000),
            "VoCoPaper": (VoCoConfig.paper(), 100_000),
        },
    )
