"""The frame of the command line: quick, lazy, and with errors that a user can read."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from nnssl_stc3d import __version__
from nnssl_stc3d.cli import main as main_module
from nnssl_stc3d.cli.main import COMMANDS, DEBUG_VARIABLE, load_command, main


def fake_command(action):
    """Makes a command module whose ``run`` does ``action``."""
    module = types.SimpleNamespace()
    module.add_parser = lambda subparsers: subparsers.add_parser("doctor")
    module.run = action
    return module


def test_help_lists_every_command_and_imports_none(capsys):
    before = set(sys.modules)
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert not [name for name in set(sys.modules) - before if name.startswith("nnssl_stc3d.")]


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"nnssl_stc3d {__version__}"


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["pretrain"])
    assert caught.value.code == 2
    assert "trainers" in capsys.readouterr().err


def test_no_command_is_an_error():
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


@pytest.mark.parametrize("error", [ValueError, RuntimeError, NotImplementedError, FileNotFoundError])
def test_explained_failures_have_no_traceback(monkeypatch, capsys, error):
    def fail(args):
        raise error("expected that, got this, do so")

    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    monkeypatch.setattr(main_module, "load_command", lambda name: fake_command(fail))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().err
    assert "nnssl_stc3d doctor: error: expected that, got this, do so" in printed and "Traceback" not in printed


def test_debug_variable_shows_where_a_failure_comes_from(monkeypatch):
    def fail(args):
        raise ValueError("wrong")

    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    monkeypatch.setattr(main_module, "load_command", lambda name: fake_command(fail))
    with pytest.raises(ValueError, match="wrong"):
        main(["doctor"])


def test_exit_code_of_the_command_is_returned(monkeypatch):
    monkeypatch.setattr(main_module, "load_command", lambda name: fake_command(lambda args: 7))
    assert main(["doctor"]) == 7


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_registered_command_exists_and_has_help(name, capsys):
    module = load_command(name)
    assert callable(module.add_parser) and callable(module.run)
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"nnssl_stc3d {name}" in capsys.readouterr().out


def test_module_and_console_command_run(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "nnssl_stc3d", "--version"], capture_output=True, encoding="utf-8", cwd=tmp_path
    )
    assert (result.returncode, result.stdout.strip()) == (0, f"nnssl_stc3d {__version__}")
