"""The folder for nnUNet_extTrainer: from an installation and from a bare clone, and usable by nnU-Net."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.cli.trainers import trainers_folder


def run_look_up(folder: str, name: str, cwd: Path) -> subprocess.CompletedProcess:
    """Lets nnU-Net look for a trainer in a process of its own."""
    script = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        f"print('FOUND', find({name!r}).__name__)"
    )
    environment = {**os.environ, "nnUNet_extTrainer": folder}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", env=environment, cwd=cwd
    )


def test_command_prints_one_absolute_folder(capsys):
    assert main(["trainers"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert Path(line).is_absolute() and (Path(line) / "__init__.py").is_file()
    assert Path(line) == trainers_folder()


def test_command_imports_no_torch(tmp_path):
    script = "import sys; from nnssl_stc3d.cli.main import main; main(['trainers']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


@pytest.mark.parametrize("name", ["STC3DPretrainTrainer", "STC3DFinetuneTrainer", "STC3DPretrainTrainer_1epoch"])
def test_nnunet_finds_trainers_there(tmp_path, name):
    result = run_look_up(str(trainers_folder()), name, tmp_path)
    assert f"FOUND {name}" in result.stdout, result.stderr


def test_every_module_there_is_importable_on_its_own(tmp_path):
    """nnU-Net imports them one after another as top-level modules; one failure hides every trainer."""
    modules = sorted(path.stem for path in trainers_folder().glob("*.py") if path.stem != "__init__")
    assert modules
    script = f"import sys; sys.path.insert(0, {str(trainers_folder())!r})\n" + "\n".join(f"import {m}" for m in modules)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_clone_that_is_not_installed_prints_its_own_folder(repository):
    result = subprocess.run(
        [sys.executable, "-m", "nnssl_stc3d", "trainers"], capture_output=True, encoding="utf-8", cwd=repository
    )
    assert Path(result.stdout.strip()) == repository / "trainers", result.stderr


def test_nnunet_finds_the_trainers_of_a_clone_that_is_not_installed(repository, tmp_path):
    # A finder in front that hides every installed copy, so that only sys.path entries outside site-packages count.
    script = """
        import sys
        from importlib.machinery import PathFinder
        class NotInstalled:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name != "nnssl_stc3d":
                    return None
                spec = PathFinder.find_spec(name, [entry for entry in sys.path if "site-packages" not in entry])
                if spec is None or spec.origin is None:
                    raise ModuleNotFoundError("not installed", name=name)
                return spec
        sys.meta_path.insert(0, NotInstalled)
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
        print("FOUND", find("STC3DPretrainTrainer").__name__, "in", sys.modules["nnssl_stc3d"].__file__)
    """
    environment = {**os.environ, "nnUNet_extTrainer": str(repository / "trainers")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        cwd=tmp_path,
    )
    assert f"FOUND STC3DPretrainTrainer in {repository / 'nnssl_stc3d'}" in result.stdout, result.stderr


def test_missing_folder_is_explained(monkeypatch, tmp_path, capsys):
    import nnssl_stc3d.cli.trainers as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "nnssl_stc3d" / "cli" / "trainers.py"))
    assert main(["trainers"]) == 1
    assert "Install the package again" in capsys.readouterr().err
