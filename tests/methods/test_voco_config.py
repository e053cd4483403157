"""VoCo's options: checked, saved, and documented as they are."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re

import pytest

from nnssl_stc3d.methods.base import config_from_dict
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
def test_the_configuration_survives_the_checkpoint(config):
    restored = config_from_dict(VoCoConfig, json.loads(json.dumps(config.to_dict())))
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


def test_trainers_run_what_they_are_called(repository):
    spec = importlib.util.spec_from_file_location("voco_trainers", repository / "trainers" / "voco.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, config, steps in (
        ("VoCo", VoCoConfig(), 100_000),
        ("VoCoOfficial", VoCoConfig.official(), 250_000),
        ("VoCoPaper", VoCoConfig.paper(), 100_000),
    ):
        trainer = getattr(module, f"{name}PretrainTrainer")
        assert trainer.config == config and trainer.epochs * trainer.steps_per_epoch == steps
        for epochs in (1, 5, 10, 50, 100):
            variant = getattr(module, f"{name}PretrainTrainer_{epochs}epoch{'' if epochs == 1 else 's'}")
            assert variant.epochs == epochs and variant.config == config
    assert module.VoCoPretrainTrainer_quickstart.config == VoCoConfig()


# ---- the documentation ----------------------------------------------------------------------------------------------


def documented(text: str, pattern: str) -> dict[str, object]:
    """Option -> value, as it is written in a table."""
    return {name: ast.literal_eval(value.strip()) for name, value in re.findall(pattern, text, re.MULTILINE)}


def options_of(config: VoCoConfig) -> dict[str, object]:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "transforms"}
    return options | dataclasses.asdict(config.transforms)


def test_the_documentation_lists_every_option_with_its_default(repository):
    text = (repository / "documentation" / "voco.md").read_text(encoding="utf-8")
    table = text[text.index("## Options") :]
    assert documented(table, r"^\| `(\w+)` \| ([^|]+) \|") == options_of(VoCoConfig())


def test_the_table_of_choices_tells_the_truth(repository):
    """Columns: topic, paper, released code, option, default, official trainer, paper trainer."""
    text = (repository / "documentation" / "voco.md").read_text(encoding="utf-8")
    table = text[text.index("## Paper and released code") : text.index("## How views are drawn")]
    configs = [options_of(c) for c in (VoCoConfig(), VoCoConfig.official(), VoCoConfig.paper())]
    seen = set()
    for row in (line.split("|")[1:-1] for line in table.splitlines() if line.count("|") == 8):
        names = re.findall(r"`(?:transforms\.)?(\w+)`", row[3])
        if len(names) == 1:
            for cell, config in zip(row[4:], configs):
                assert ast.literal_eval(cell.strip()) == config[names[0]], row
            seen.add(names[0])
    differ = {name for name in configs[0] if len({str(c[name]) for c in configs}) > 1}
    assert differ <= seen, differ - seen


def test_the_documented_trainer_works(repository):
    text = (repository / "documentation" / "voco.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(code, "voco.md", "exec"), names)
    assert names["VoCoFastPretrainTrainer"].config == VoCoConfig(bases_through="teacher")
