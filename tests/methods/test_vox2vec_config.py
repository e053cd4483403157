"""vox2vec's options are documented as they are."""

from __future__ import annotations

import ast
import dataclasses
import json
import re

import pytest

from nnssl_stc3d.methods.base import config_from_dict
from nnssl_stc3d.methods.vox2vec import Vox2VecConfig
from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.fixture
def page(repository) -> str:
    return (repository / "documentation" / "vox2vec.md").read_text(encoding="utf-8")


def options_of(config: Vox2VecConfig) -> dict[str, object]:
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "transforms"}
    return options | dataclasses.asdict(config.transforms)


@pytest.mark.parametrize(
    "config",
    [Vox2VecConfig(), Vox2VecConfig.paper(), Vox2VecConfig.official(), Vox2VecConfig(transforms=TransformRanges())],
    ids=["default", "paper", "official", "rotated"],
)
def test_the_configuration_survives_the_checkpoint(config):
    assert config_from_dict(Vox2VecConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_the_documentation_lists_every_option_with_its_default(page):
    table = page[page.index("## Options") :]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    assert {name: ast.literal_eval(value.strip()) for name, value in rows} == options_of(Vox2VecConfig())


def test_the_table_of_choices_tells_the_truth(page):
    """Columns: topic, paper, released code, option, default, official trainer, paper trainer."""
    table = page[page.index("## Paper and released code") : page.index("## Rotated and scaled views")]
    configs = [options_of(c) for c in (Vox2VecConfig(), Vox2VecConfig.official(), Vox2VecConfig.paper())]
    seen = set()
    for row in (line.split("|")[1:-1] for line in table.splitlines() if line.count("|") == 8):
        for name in re.findall(r"`(?:transforms\.)?(\w+)`", row[3]):
            values = [ast.literal_eval(cell.strip()) for cell in row[4:]]
            assert values == [config[name] for config in configs], row
            seen.add(name)
    differ = {name for name in configs[0] if len({str(c[name]) for c in configs}) > 1}
    assert differ <= seen and len(seen) > 18, differ - seen


def test_the_documented_code_works(page, tmp_path, monkeypatch, tiny_plans, tiny_network):
    deep = {"n_stages": 6, "features_per_stage": [4] * 6, "kernel_sizes": [[3, 3, 3]] * 6, "n_conv_per_stage": [1] * 6}
    deep |= {"strides": [[1, 1, 1], *[[2, 2, 2]] * 5], "n_conv_per_stage_decoder": [1] * 5}
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset801_Unlabelled"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans(**deep)))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "vox2vec.md", "exec"), names)
    network = tiny_network(json.loads((folder / "nnUNetFPNPlans.json").read_text()))
    assert isinstance(network, VoxelFPN) and sum(network.encoder.output_channels) == 1008
    unet = names["Vox2VecPaperUNetPretrainTrainer"].config
    assert unet.network == "any" and unet.loss_form == "paper"
    assert names["Vox2VecRotatedPretrainTrainer"].config.transforms.rotation == 30
