"""One benchmark at a time in a folder."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

if sys.platform != "win32":
    import fcntl

LOCK_FILE = "lock.txt"


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Keeps other benchmarks out of a folder.

    The system releases the lock when this process ends, however it ends; the file stays and means nothing by itself.
    Where the system or the file system has no such locks, nobody is kept out.

    Raises:
        ValueError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        if _is_held_by_another(file):
            file.seek(0)
            raise ValueError(
                f"another benchmark is writing to {folder}: process {file.read().strip() or 'unknown'}. Wait for it, "
                "end it, or choose another output folder."
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _is_held_by_another(file: TextIO) -> bool:
    """Takes the lock, or tells that it is taken."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
