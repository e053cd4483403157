"""What the tests of all methods share; functions come as fixtures, because test files cannot import each other."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnssl_stc3d.methods.base import config_from_dict

# ---- configurations, trainers and pages -----------------------------------------------------------------------------


@pytest.fixture
def page(repository: Path) -> Callable[[str], str]:
    """Function ``(name) -> text`` of a page of the documentation."""

    def read(name: str) -> str:
        return (repository / "documentation" / f"{name}.md").read_text(encoding="utf-8")

    return read


@pytest.fixture
def run_examples(page: Callable[[str], str]) -> Callable[[str], tuple[dict[str, Any], int]]:
    """Function ``(name) -> (names, blocks)``: runs the Python of a page, one block after the other."""

    def run(name: str) -> tuple[dict[str, Any], int]:
        names: dict[str, Any] = {"__name__": "example"}
        blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
        for code in blocks:
            exec(compile(code, f"{name}.md", "exec"), names)
        return names, len(blocks)

    return run


@pytest.fixture
def from_checkpoint() -> Callable[[Any], Any]:
    """Function ``(config) -> config`` as it comes back from a checkpoint."""
    return lambda config: config_from_dict(type(config), json.loads(json.dumps(config.to_dict())))


@pytest.fixture
def check_trainers(repository: Path) -> Callable[..., None]:
    """Function ``(file, {prefix: (config, steps)})``: trainers of a file and their variants are what they are called.

    The first prefix is that of the default, which has a quickstart.
    """

    def check(file: str, expected: dict[str, tuple[Any, int]]) -> None:
        spec = importlib.util.spec_from_file_location(f"{file}_trainers", repository / "trainers" / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for prefix, (config, steps) in expected.items():
            trainer = getattr(module, f"{prefix}PretrainTrainer")
            assert trainer.config == config and trainer.epochs * trainer.steps_per_epoch == steps
            for epochs in (1, 5, 10, 50, 100):
                variant = getattr(module, f"{prefix}PretrainTrainer_{epochs}epoch{'' if epochs == 1 else 's'}")
                assert variant.epochs == epochs and variant.config == config
        default, (config, _) = next(iter(expected.items()))
        assert getattr(module, f"{default}PretrainTrainer_quickstart").config == config

    return check
