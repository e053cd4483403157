"""``nnssl_stc3d doctor``: checks what a training needs, and prints the fix for whatever is wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nnssl_stc3d import __version__
from nnssl_stc3d.cli.trainers import trainers_folder

OK, WARNING, WRONG = "ok", "warning", "wrong"

PYTHON_FROM, PYTHON_BELOW = (3, 10), (3, 14)
# Distributions and the version that each must have at least; the same as in setup.py.
PACKAGES = {
    "nnunetv2": "2.8.1",
    "torch": "2.6",
    "batchgenerators": "",
    "batchgeneratorsv2": "",
    "dynamic-network-architectures": "",
    "SimpleITK": "",
    "acvl-utils": "",
    "numpy": "",
    "scipy": "",
    "matplotlib": "",
    "tqdm": "",
    "blosc2": "",
    "safetensors": "",
    "scikit-learn": "",
    "nvidia-ml-py": "",
}
FOLDERS = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
TRAINERS = ("STC3DPretrainTrainer", "STC3DFinetuneTrainer")
COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_preprocess", "nnUNetv2_train", "nnUNetv2_predict")
EXT_TRAINER = "nnUNet_extTrainer"
# A preprocessed CT takes some 100 MB, and a checkpoint of a large network 400 MB.
MINIMUM_DISK_GIB = 10.0
# Loader workers hand their batches over in shared memory.
MINIMUM_SHARED_MEMORY_GIB = 1.0


class Check(NamedTuple):
    """Outcome of one check: ``ok``, ``warning`` or ``wrong``, what was found, and the command that fixes it."""

    status: str
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"[{self.status:^7}] {self.name}: {self.found}"
        return f"{line}\n          fix: {self.fix}" if self.fix else line


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Adds the parser of ``doctor``."""
    return subparsers.add_parser(
        "doctor",
        description="Checks versions, environment variables, the look-up of the trainers, devices, disk and commands; "
        "prints the fix for each thing that is wrong, and exits with 1 if there is one.",
    )


def run(args: argparse.Namespace) -> int:
    """Runs and prints all checks."""
    print(f"nnssl_stc3d {__version__} in {Path(__file__).resolve().parents[1]}")
    wrong = 0
    for group in GROUPS:
        for check in group():
            print(check, flush=True)
            wrong += check.status == WRONG
    if wrong:
        print(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong. Apply the fixes above and run this again.")
        return 1
    print("Everything that a training needs is there.")
    return 0


def check_python() -> Iterator[Check]:
    """Checks the version of the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHON_FROM <= sys.version_info[:2] < PYTHON_BELOW:
        yield Check(OK, "Python", f"{version} ({sys.executable})")
    else:
        needed = f"{'.'.join(map(str, PYTHON_FROM))} or newer and below {'.'.join(map(str, PYTHON_BELOW))}"
        fix = "make an environment with another Python, for example: python3.12 -m venv .venv"
        yield Check(WRONG, "Python", f"{version}, needed is {needed}", fix)


def check_packages() -> Iterator[Check]:
    """Checks that every package is installed, and new enough."""
    for name, minimum in PACKAGES.items():
        fix = f"{sys.executable} -m pip install --upgrade '{name}{'>=' + minimum if minimum else ''}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(WRONG, name, "not installed", fix)
            continue
        if minimum and parse_version(version) < parse_version(minimum):
            yield Check(WRONG, name, f"{version}, needed is at least {minimum}", fix)
        else:
            yield Check(OK, name, version)


def parse_version(version: str) -> tuple[int, ...]:
    """Reads the leading numbers of a version, such as (2, 8, 1) of 2.8.1+cpu."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def check_folders() -> Iterator[Check]:
    """Checks that nnU-Net's three folders are named, exist and can be written."""
    for variable, name in FOLDERS.items():
        value = os.environ.get(variable)
        if not value:
            suggestion = f"$HOME/nnunet/{name}"
            yield Check(WRONG, variable, "not set", f'mkdir -p "{suggestion}" && export {variable}="{suggestion}"')
        elif not Path(value).is_dir():
            yield Check(WRONG, variable, f"{value} is not a folder", f'mkdir -p "{value}"')
        elif not _is_writable(Path(value)):
            # Reading raw data is all that training needs.
            status = WARNING if variable == "nnUNet_raw" else WRONG
            yield Check(status, variable, f"{value} cannot be written", f'chmod u+w "{value}", or use another folder')
        else:
            free = shutil.disk_usage(value).free / 2**30
            if free < MINIMUM_DISK_GIB and variable != "nnUNet_raw":
                fix = f"free some space, or move the folder to a larger disk and export {variable} again"
                yield Check(WARNING, variable, f"{value}, only {free:.1f} GiB free", fix)
            else:
                yield Check(OK, variable, f"{value} ({free:.0f} GiB free)")


def _is_writable(folder: Path) -> bool:
    """Tries it, since permission bits say little on network drives and in containers."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_trainers() -> Iterator[Check]:
    """Checks that nnU-Net finds the trainers, with its own look-up."""
    folder = trainers_folder()
    value = os.environ.get(EXT_TRAINER, "")
    listed = [Path(entry) for entry in value.split(os.pathsep) if entry.strip()]
    if folder not in [entry.resolve() for entry in listed]:
        others = f"${EXT_TRAINER}{os.pathsep}" if listed else ""
        found = f"{value} does not list {folder}" if listed else "not set"
        yield Check(WRONG, EXT_TRAINER, found, f'export {EXT_TRAINER}="{others}$(nnssl_stc3d trainers)"')
        return
    yield Check(OK, EXT_TRAINER, value)
    for entry in listed:
        if not entry.is_dir():
            fix = f"leave {entry} out of {EXT_TRAINER}"
            yield Check(WARNING, EXT_TRAINER, f"{entry} is not a folder, nnU-Net skips it", fix)
    for name in TRAINERS:
        yield look_up(name)


def look_up(name: str) -> Check:
    """Lets nnU-Net look for a trainer, as ``nnUNetv2_train -tr`` does."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            trainer = recursive_find_trainer_class_by_name(name)
    except Exception as error:  # nnU-Net imports every module in the folders, so anything can be raised here
        inspected = re.findall(r"Inspecting module: (\S+)", printed.getvalue())
        where = f" while importing {inspected[-1]}" if inspected else ""
        fix = f"repair that, or list only {trainers_folder()} in {EXT_TRAINER}: nnU-Net imports every module there"
        return Check(WRONG, name, f"nnU-Net's look-up failed{where}: {type(error).__name__}: {error}", fix)
    return Check(OK, name, f"found by nnU-Net in {trainer.__module__}")


def check_devices() -> Iterator[Check]:
    """Reports what ``-device`` can be."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(WRONG, "torch", f"cannot be imported: {error}", f"{sys.executable} -m pip install --upgrade torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Check(OK, "-device cuda", f"GPU {index}, {properties.name}, {memory}, CUDA {torch.version.cuda}")
    elif shutil.which("nvidia-smi"):
        fix = "install the build of torch for your driver, see https://pytorch.org/get-started/locally"
        yield Check(WARNING, "-device cuda", f"a GPU driver is there, but torch {torch.__version__} cannot use it", fix)
    if torch.backends.mps.is_available():
        yield Check(OK, "-device mps", "available")
    if not torch.cuda.is_available():
        yield Check(OK, "-device cpu", f"{os.cpu_count()} cores; without CUDA, nnU-Net's commands need -device")


def check_shared_memory() -> Iterator[Check]:
    """Checks the size of /dev/shm, which containers keep small, where there is one."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total / 2**30
    if size < MINIMUM_SHARED_MEMORY_GIB:
        fix = "start the container with --shm-size=8g, or set nnUNet_n_proc_DA=0 for nnUNetv2_train"
        yield Check(WARNING, str(folder), f"{size:.2f} GiB, loader workers may die", fix)
    else:
        yield Check(OK, str(folder), f"{size:.1f} GiB")


def check_commands() -> Iterator[Check]:
    """Checks that nnU-Net's commands are there and that the shell finds those of this environment."""
    scripts = Path(sysconfig.get_path("scripts"))
    for name in COMMANDS:
        file = next((path for path in (scripts / name, scripts / f"{name}.exe") if path.is_file()), None)
        found = shutil.which(name)
        if file is None:
            fix = f"{sys.executable} -m pip install --force-reinstall --no-deps nnunetv2"
            yield Check(WRONG, name, f"not in {scripts}", fix)
        elif found is None or Path(found).resolve() != file.resolve():
            fix = f'export PATH="{scripts}:$PATH"'
            yield Check(WARNING, name, f"in {scripts}, but the shell finds {found or 'none'}", fix)
        else:
            yield Check(OK, name, str(file))


GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_packages,
    check_folders,
    check_trainers,
    check_devices,
    check_shared_memory,
    check_commands,
)
