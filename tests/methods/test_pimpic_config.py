"""PiMPiC's options: checked, saved, and documented as they are."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re

import pytest

from nnssl_stc3d.methods.base import config_from_dict
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
def test_the_configuration_survives_the_checkpoint(config):
    restored = config_from_dict(PiMPiCConfig, json.loads(json.dumps(config.to_dict())))
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


def test_trainers_run_what_they_are_called(repository):
    spec = importlib.util.spec_from_file_location("pimpic_trainers", repository / "trainers" / "pimpic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, config, steps in (
        ("PiMPiC", PiMPiCConfig(), 100_000),
        ("PiMPiCOfficial", PiMPiCConfig.official(), 98_000),
        ("PiMPiCPaper", PiMPiCConfig.paper(), 20_000),
    ):
        trainer = getattr(module, f"{name}PretrainTrainer")
        assert trainer.config == config and trainer.epochs * trainer.steps_per_epoch == steps
        for epochs in (1, 5, 10, 50, 100):
            variant = getattr(module, f"{name}PretrainTrainer_{epochs}epoch{'' if epochs == 1 else 's'}")
            assert variant.epochs == epochs and variant.config == config
    assert module.PiMPiCPretrainTrainer_quickstart.config == PiMPiCConfig()


# ---- the documentation ----------------------------------------------------------------------------------------------


def documented(text: str, pattern: str) -> dict[str, object]:
    """Option -> value, as it is written in a table."""
    return {name: ast.literal_eval(value.strip()) for name, value in re.findall(pattern, text, re.MULTILINE)}


def options_of(config: PiMPiCConfig) -> dict[str, object]:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "transforms"}
    return options | dataclasses.asdict(config.transforms)


def test_the_documentation_lists_every_option_with_its_default(repository):
    text = (repository / "documentation" / "pimpic.md").read_text(encoding="utf-8")
    table = text[text.index("## Options") :]
    assert documented(table, r"^\| `(\w+)` \| ([^|]+) \|") == options_of(PiMPiCConfig())


def test_the_table_of_choices_tells_the_truth(repository):
    """Columns: topic, paper, released code, option, default, official trainer, paper trainer."""
    text = (repository / "documentation" / "pimpic.md").read_text(encoding="utf-8")
    table = text[text.index("## Paper and released code") : text.index("## How patches are drawn")]
    configs = [options_of(c) for c in (PiMPiCConfig(), PiMPiCConfig.official(), PiMPiCConfig.paper())]
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
    text = (repository / "documentation" / "pimpic.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(code, "pimpic.md", "exec"), names)
    assert names["PiMPiCTurnedPretrainTrainer"].config == PiMPiCConfig(transforms=TransformRanges(translation=0.0))
