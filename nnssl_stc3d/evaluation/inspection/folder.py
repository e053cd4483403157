"""The folder that an inspection writes: its own is made anew, another one is left alone unless asked."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nnssl_stc3d.evaluation.inspection.report import RESULTS, is_own


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that something else filled, or that cannot be written to.

    Raises:
        ValueError: if it holds files and no results of an inspection, unless they may be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to write to, got the file {folder}")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder to write to, got no right to write into {existing}. Give another folder.")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()) or _own(folder):
        return
    raise ValueError(
        f"{folder} holds files and no results of nnssl_stc3d inspect. Give another folder, or --overwrite to write "
        "into it (files of the same names are replaced, others stay)."
    )


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files into a folder inside first, then move them in, the page's numbers last.

    Files of an earlier inspection that this one did not make are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = _listed(folder) - set(files)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".inspect-") as temporary:
        for name, content in files.items():
            (Path(temporary) / name).write_bytes(content)
        for name in sorted(files, key=lambda n: n == RESULTS):
            os.replace(Path(temporary) / name, folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def _own(folder: Path) -> bool:
    file = folder / RESULTS
    return file.is_file() and is_own(file.read_bytes())


def _listed(folder: Path) -> set[str]:
    """Plain names of files that an earlier inspection says it wrote."""
    if not _own(folder):
        return set()
    names = json.loads((folder / RESULTS).read_bytes()).get("files", [])
    return {
        n for n in names if isinstance(n, str) and n == Path(n).name and Path(n).suffix in (".png", ".csv", ".html")
    }
