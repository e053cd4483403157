"""``nnssl_stc3d trainers``: the folder in which nnU-Net finds this package's trainers."""

from __future__ import annotations

import argparse
from pathlib import Path


def trainers_folder() -> Path:
    """Finds the folder of the trainers without importing it.

    Returns:
        Absolute path: inside the installed package, or beside it in a clone or an editable install.

    Raises:
        RuntimeError: If neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "trainers", package.parent / "trainers"):
        if (folder / "__init__.py").is_file():
            return folder
    raise RuntimeError(
        f"The trainers were expected in {package / 'trainers'} (installed) or {package.parent / 'trainers'} (clone), "
        "but neither is there. Install the package again: pip install --force-reinstall --no-deps nnssl_stc3d"
    )


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``trainers``."""
    return subparsers.add_parser(
        "trainers",
        description="Prints the folder of the trainers. All the wiring nnU-Net needs is: "
        'export nnUNet_extTrainer="$(nnssl_stc3d trainers)"',
    )


def run(args: argparse.Namespace) -> int:
    """Prints the folder."""
    print(trainers_folder())
    return 0
