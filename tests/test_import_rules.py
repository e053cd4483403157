"""Imports point downwards only, so that each part can be understood and used without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "nnssl_stc3d"
ALL = {"views", "losses", "modules", "methods", "data", "training", "transfer", "evaluation", "prepare"}
# Each part and the parts of the package that it may import, besides itself.
ALLOWED = {
    "views": set(),
    "losses": set(),
    "modules": set(),
    "transfer": set(),
    "methods": {"views", "losses", "modules"},
    "data": {"views"},
    "prepare": {"views", "data", "transfer"},
    "training": {"methods", "data", "views", "transfer", "modules"},
    "evaluation": {"transfer", "training", "methods", "data", "views", "modules"},
    "cli": ALL,
    "trainers": {"training", "methods"},
}
# The parts that have to work without nnU-Net.
WITHOUT_NNUNET = ("views", "losses", "modules", "methods")


def imported_modules(source: str) -> list[str]:
    """Lists what a module imports, wherever in the file it does, with the names of ``from nnssl_stc3d import ...``."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("relative import")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def part_of(module: str) -> str | None:
    """Returns the part of this package that a module belongs to, or None."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 and names[1] in ALLOWED else None


def source_files(repository: Path) -> list[tuple[str, Path]]:
    """Lists the files of each part."""
    roots = [(part, repository / (part if part == "trainers" else f"{PACKAGE}/{part}")) for part in ALLOWED]
    return [(part, file) for part, root in roots for file in sorted(root.rglob("*.py"))]


def test_imports_point_downwards(repository):
    files = source_files(repository)
    assert len(files) > 20
    offences = [
        f"{file.relative_to(repository)} imports {module}"
        for part, file in files
        for module in imported_modules(file.read_text(encoding="utf-8"))
        if part_of(module) not in {None, part} | ALLOWED[part]
    ]
    assert not offences, "\n".join(offences)


def test_the_core_does_not_know_nnunet(repository):
    offences = [
        f"{file.relative_to(repository)} imports {module}"
        for part, file in source_files(repository)
        if part in WITHOUT_NNUNET
        for module in imported_modules(file.read_text(encoding="utf-8"))
        if module.split(".")[0] == "nnunetv2"
    ]
    assert not offences, "\n".join(offences)


def test_every_folder_of_the_package_is_a_known_part(repository):
    folders = {entry.name for entry in (repository / PACKAGE).iterdir() if (entry / "__init__.py").is_file()}
    assert folders <= set(ALLOWED), f"say in ALLOWED what these may import: {folders - set(ALLOWED)}"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import nnssl_stc3d.cli.main", "nnssl_stc3d.cli.main"),
        ("from nnssl_stc3d import cli", "nnssl_stc3d.cli"),
        ("def f():\n    from nnssl_stc3d.cli.main import main", "nnssl_stc3d.cli.main.main"),
    ],
)
def test_the_rule_sees_every_kind_of_import(source, module):
    assert imported_modules(source) == [module]
    assert part_of(module) == "cli"
