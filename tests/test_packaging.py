"""What is built from the repository is complete, and an installed wheel needs nothing of the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TREE = ("nnssl_stc3d", "trainers", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel that is built from the unpacked sdist, without network."""
    repository = Path(__file__).resolve().parents[1]
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    # A copy, since building writes into the tree.
    for name in TREE:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, tree / name)
    # Without options, build makes the wheel from the sdist, so this covers installing from an sdist too.
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)],
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "dist"


def expected_files(repository: Path) -> set[str]:
    package = {str(path.relative_to(repository)) for path in (repository / "nnssl_stc3d").rglob("*.py")}
    trainers = {f"nnssl_stc3d/trainers/{path.name}" for path in (repository / "trainers").glob("*.py")}
    return package | trainers | {"nnssl_stc3d/py.typed"}


def test_wheel_has_every_module_and_the_trainers(built, repository):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not expected_files(repository) - names
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"nnssl_stc3d"}


def test_sdist_has_the_trainers_where_the_repository_has_them(built, repository):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"trainers/{path.name}" for path in (repository / "trainers").glob("*.py")} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_unpacked_wheel_prints_its_own_trainers(built, tmp_path):
    """The installed layout: trainers inside the package, no repository beside it."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "nnssl_stc3d", "trainers"], capture_output=True, encoding="utf-8", cwd=tmp_path
    )
    assert Path(result.stdout.strip()) == (tmp_path / "nnssl_stc3d" / "trainers").resolve(), result.stderr


def test_wheel_metadata(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "Requires-Dist: nnunetv2>=2.8.1" in metadata
    (python,) = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Python: ")]
    assert set(python.split(",")) == {">=3.10", "<3.14"}
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "nnssl_stc3d = nnssl_stc3d.cli.main:main" in archive.read(entry_points).decode()
