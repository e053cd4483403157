"""Checkpoint files: written so that a crash never leaves half a file, read without executing what is in them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nnssl_stc3d.files import written_whole

SAFETENSORS_SUFFIX = ".safetensors"


def save_checkpoint_atomically(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint so that ``path`` holds either the previous one or the complete new one, whatever happens.

    Args:
        checkpoint: What ``torch.save`` shall write.
        path: Destination; its folder must exist.

    Raises:
        RuntimeError: If the file cannot be written, for example because the disk is full.
    """
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that takes its name when it is complete on disk; see :func:`nnssl_stc3d.files.written_whole`.

    Args:
        path: Destination; its folder must exist.
        write: Writes the contents to the open file that it gets.

    Raises:
        RuntimeError: If the file cannot be written, for example because the disk is full.
    """
    destination = Path(path)
    try:
        with written_whole(destination) as beside, beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch wraps the error of a full disk in a RuntimeError of its own.
        raise RuntimeError(_explain_failed_write(destination, error)) from error
    _sync_folder(destination.parent)


def _explain_failed_write(destination: Path, error: Exception) -> str:
    folder = destination.parent
    if not folder.is_dir():
        return f"Cannot write {destination}: its folder does not exist. Create it first."
    kept = "The previous file of that name is untouched. " if destination.is_file() else ""
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"Cannot write {destination} ({error.__context__ or error}); {free:.0f} MiB are free in {folder}. {kept}"
        "Free some space or check the permissions, then repeat the command (a training continues with --c)."
    )


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut, where the platform can open folders (Windows cannot)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(
    path: str | os.PathLike[str], map_location: Any = "cpu", *, pretraining: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``: reading a file from a stranger runs no code.

    The plans in it name Python classes, which :func:`nnssl_stc3d.transfer.trusted_plans.check_plans` looks at before a
    network is built from them.

    Besides plain values and tensors, NumPy scalars and arrays are accepted, since ordinary nnU-Net checkpoints hold
    some. An encoder that was exported as ``.safetensors`` is read into the same form.

    Args:
        path: A ``.pth`` file of nnU-Net or of this package, or a ``.safetensors`` file of this package.
        map_location: As in ``torch.load``.
        pretraining: Whether to insist on a checkpoint that a pretraining of this package wrote.

    Returns:
        The checkpoint; it has at least ``network_weights``, a dictionary of tensors.

    Raises:
        ValueError: If the file is missing, truncated, no checkpoint, or not what ``pretraining`` asks for.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a checkpoint file, but {file} is not there. Check the path.{_neighbours(file)}")
    if file.suffix == SAFETENSORS_SUFFIX:
        checkpoint = _read_safetensors(file, map_location)
    else:
        checkpoint = _read_torch(file, map_location)
    weights = checkpoint.get("network_weights") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"Expected a checkpoint of nnU-Net or nnssl_stc3d, a dictionary with network_weights; got "
            f"{_describe(checkpoint)} in {file}. Weights of other projects need to be converted to nnU-Net's names."
        )
    if pretraining and not is_pretraining(checkpoint):
        raise ValueError(
            f"Expected a pretraining checkpoint of nnssl_stc3d, but {file} was written by "
            f"{checkpoint.get('trainer_name', 'something else')} and does not say how it was pretrained. "
            "Give the checkpoint_final.pth of an STC3DPretrainTrainer results folder."
        )
    return checkpoint


def is_pretraining(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint holds a pretrained network, as trained or as exported, rather than a finetuned one."""
    return isinstance(checkpoint.get("method"), dict)


def _read_torch(file: Path, map_location: Any) -> Any:
    if file.stat().st_size == 0:
        raise ValueError(f"The checkpoint {file} is empty (0 bytes). Copy or write it again.")
    with open(file, "rb") as opened:
        is_archive = opened.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(file):
        raise ValueError(_damaged(file, "its end is missing"))
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if is_archive:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(
                f"The checkpoint {file} holds Python objects other than tensors and plain values "
                f"({named.group(1) if named else _first_line(error)}), which could run code and are not read. Save it "
                "again with only tensors, numbers, strings, lists and dictionaries."
            ) from error
        raise ValueError(_foreign(file)) from error
    except (RuntimeError, EOFError, KeyError, IndexError, UnicodeDecodeError, OSError) as error:
        raise ValueError(_damaged(file, _first_line(error)) if is_archive else _foreign(file)) from error


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    """Reads an exported encoder and the JSON strings beside it into the form of a checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {key: opened.get_tensor(key) for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(_damaged(file, _first_line(error))) from error
    device = torch.device(map_location)
    fields: dict[str, Any] = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
    return {**fields, "network_weights": {key: value.to(device) for key, value in weights.items()}}


def to_plain(value: Any) -> Any:
    """Replaces NumPy scalars and arrays by plain Python, and tensors by contiguous ones on the CPU.

    nnU-Net's networks list a weight under up to four names. It stays one tensor, which ``torch.save`` writes once.

    Args:
        value: Nested dictionaries, lists, tuples, tensors and scalars.

    Returns:
        The same structure, which loads with ``torch.load(weights_only=True)`` and no further permissions.
    """
    return _to_plain(value, {})


def _to_plain(value: Any, known: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {_to_plain(key, known): _to_plain(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_plain(item, known) for item in value]
    if isinstance(value, tuple):
        return tuple(_to_plain(item, known) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if same not in known:
            known[same] = value.detach().cpu().contiguous()
        return known[same]
    return value


def _numpy_globals() -> list[Any]:
    """What pickled NumPy scalars and arrays refer to, under the module names of NumPy 1 and 2."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefdU"}
    return [
        np.dtype,
        np.ndarray,
        *dtypes,
        *(
            (getattr(multiarray, name), f"{module}.{name}")
            for module in ("numpy.core.multiarray", "numpy._core.multiarray")
            for name in ("scalar", "_reconstruct")
        ),
    ]


def _neighbours(file: Path) -> str:
    found = sorted(entry.name for entry in file.parent.glob("*.pth")) if file.parent.is_dir() else []
    return f" That folder has {', '.join(found)}." if found else ""


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = [str(key) for key in value]
        return f"a dictionary with {', '.join(keys[:5]) or 'nothing'}{', ...' if len(keys) > 5 else ''}"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _damaged(file: Path, reason: str) -> str:
    return (
        f"The checkpoint {file} ({file.stat().st_size} bytes) is damaged or truncated: {reason}. Copy it again and "
        "compare the sizes, or use another checkpoint of the same folder."
    )


def _foreign(file: Path) -> str:
    return f"Expected a checkpoint written by torch.save or safetensors, but {file} is neither. Check the path."
