"""Entry point of the ``nnssl_stc3d`` command: finds the command that was asked for and imports only that one."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from nnssl_stc3d import __version__

# Name of each command and its line in `nnssl_stc3d --help`. Its module is nnssl_stc3d.cli.<name, - as _> or in MODULES.
COMMANDS = {
    "trainers": "print the folder for nnUNet_extTrainer",
    "doctor": "check the installation and print the fix for whatever is wrong",
    "prepare": "make an nnU-Net dataset of a folder of scans without labels",
    "import": "make an nnU-Net dataset of a public corpus",
    "quickstart": "pretrain, finetune, predict and compare on a small example or on your data",
    "small-plans": "write plans that train in minutes on a CPU",
    "align-plans": "write plans that give a pretraining dataset and a target the same network and preprocessing",
    "network-plans": "write plans that name another network, such as vox2vec's",
    "export": "write a checkpoint in a form for use elsewhere",
    "benchmark": "compare pretraining methods with training from scratch when few cases are labelled",
    "classify": "classify new scans with a model of STC3DClassifyTrainer",
    "inspect": "show what a checkpoint has learnt: spectrum, invariance, similarity, voxel embeddings, neighbours",
    "embed": "write maps of voxel embeddings, by which Alice finds the same place in two volumes",
}
# A keyword of Python is no name for a module, and one of the standard library's had better not be taken.
MODULES = {"import": "import_corpus", "inspect": "inspect_checkpoint"}
DEBUG_VARIABLE = "NNSSL_STC3D_DEBUG"


def load_command(name: str) -> ModuleType:
    """Imports the module of one command.

    Args:
        name: A key of ``COMMANDS``.

    Returns:
        The module, which has ``add_parser`` and ``run``.
    """
    return importlib.import_module(f"nnssl_stc3d.cli.{MODULES.get(name, name.replace('-', '_'))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        Exit code: 0 for success, 1 for a failure that was explained on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="nnssl_stc3d", description=f"Self-supervised pretraining for nnU-Net v2 (version {__version__})."
    )
    parser.add_argument("--version", action="version", version=f"nnssl_stc3d {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    command: ModuleType | None = None
    for name, summary in COMMANDS.items():
        if name == chosen:
            command = load_command(name)
            command.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    if command is None:
        parser.error(f"no command in {arguments}; it comes first, for example: nnssl_stc3d doctor")
    try:
        return int(command.run(args))
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"nnssl_stc3d {chosen}: error: {error}", file=sys.stderr)
        print(f"(Set {DEBUG_VARIABLE}=1 to see where it was raised.)", file=sys.stderr)
        return 1
