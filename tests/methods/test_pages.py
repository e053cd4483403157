"""The pages of the methods say what the code does: options, defaults, and what the other trainers have instead."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest

from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.methods.pimpic import PiMPiCConfig
from nnssl_stc3d.methods.stc3d import STC3DConfig
from nnssl_stc3d.methods.voco import VoCoConfig
from nnssl_stc3d.methods.vox2vec import Vox2VecConfig
from nnssl_stc3d.views.samplers import TransformRanges


@dataclasses.dataclass(frozen=True)
class Page:
    """One page and what it documents.

    Args:
        name: of the file.
        configs: the default, then those that the table of choices sets beside it, in its order.
        choices: heading above the table of choices.
        columns: of that table. The last are the option and its value in each configuration.
        at_least: so many options are in it.
        default_beside_option: the table has no column of defaults but "option, default; option, default", and a value
            only where the other configuration differs, with an explanation after a colon.
        transforms: whether the ranges of the transformations are options of their own.
    """

    name: str
    configs: tuple[Any, ...]
    choices: str
    columns: int
    at_least: int
    default_beside_option: bool = False
    transforms: bool = True

    def options(self) -> list[dict[str, object]]:
        """Option -> value, for each configuration."""
        found = []
        for config in self.configs:
            own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "transforms"}
            found.append(own | (dataclasses.asdict(config.transforms) if self.transforms else {}))
        return found

    def named(self, cells: list[str]) -> dict[str, list[object]]:
        """Option -> its values in the configurations, as a row of the table of choices has them."""
        if not self.default_beside_option:
            option, *values = cells[-1 - len(self.configs) :]
            names = re.findall(r"`(?:transforms\.)?(\w+)`", option)
            return {name: [ast.literal_eval(value.strip()) for value in values] for name in names}
        defaults = documented(cells[-2], r"`(?:transforms\.)?(\w+)`, ([^;]+)")
        other = cells[-1].strip().split(":")[0] if defaults else ""
        return {name: [value, ast.literal_eval(other) if other else value] for name, value in defaults.items()}


PAGES = [
    Page(
        "stc3d", (STC3DConfig(), STC3DConfig.paper()), "## How we read the paper",
        columns=5, at_least=21, default_beside_option=True,
    ),
    Page(
        "voco", (VoCoConfig(), VoCoConfig.official(), VoCoConfig.paper()), "## Paper and released code",
        columns=7, at_least=19,
    ),
    Page(
        "pimpic", (PiMPiCConfig(), PiMPiCConfig.official(), PiMPiCConfig.paper()), "## Paper and released code",
        columns=7, at_least=19,
    ),
    Page(
        "vox2vec", (Vox2VecConfig(), Vox2VecConfig.official(), Vox2VecConfig.paper()), "## Paper and released code",
        columns=7, at_least=19,
    ),
    Page(
        "alice", (AliceConfig(), AliceConfig.paper(), AliceConfig.official()), "## Paper, released code, default",
        columns=5, at_least=19, transforms=False,
    ),
]  # fmt: skip
every_page = pytest.mark.parametrize("about", PAGES, ids=lambda about: about.name)


def documented(text: str, pattern: str) -> dict[str, object]:
    """Option -> value, as it is written in a table."""
    return {name: ast.literal_eval(value.strip()) for name, value in re.findall(pattern, text, re.MULTILINE)}


def section(text: str, heading: str) -> str:
    """From a heading to the next one of its level."""
    return text[text.index(f"{heading}\n") :].split("\n## ")[0]


@every_page
def test_every_option_is_listed_with_its_default(page, about):
    table = section(page(about.name), "## Options")
    assert documented(table, r"^\| `(\w+)` \| ([^|]+) \|") == about.options()[0]


@every_page
def test_the_table_of_choices_tells_the_truth(page, about):
    """Every value in it, and every option in which the trainers differ."""
    configs = about.options()
    seen = set()
    for line in section(page(about.name), about.choices).splitlines():
        cells = line.split("|")[1:-1]
        if len(cells) == about.columns:
            for name, values in about.named(cells).items():
                assert values == [config[name] for config in configs], line
                seen.add(name)
    differ = {name for name in configs[0] if len({repr(config[name]) for config in configs}) > 1}
    assert differ <= seen and len(seen) >= about.at_least, differ - seen


@pytest.mark.parametrize(
    ("name", "trainer", "config"),
    [
        ("stc3d", "STC3DHalfPretrainTrainer", STC3DConfig(dense_points=128, view_share=0.5)),
        ("voco", "VoCoFastPretrainTrainer", VoCoConfig(bases_through="teacher")),
        ("pimpic", "PiMPiCTurnedPretrainTrainer", PiMPiCConfig(transforms=TransformRanges(translation=0.0))),
    ],
    ids=["stc3d", "voco", "pimpic"],
)
def test_the_documented_trainer_works(run_examples, name, trainer, config):
    names, blocks = run_examples(name)
    assert blocks == 1 and names[trainer].config == config
