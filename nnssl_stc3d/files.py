"""Files that are there in whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[Path]:
    """Gives a file beside another one to write; it takes that one's name when the block ends without an error.

    After an error, what was written is removed and the file of that name is what it was. If nothing was written,
    nothing happens.

    Args:
        path: Destination; its folder must exist.
        shared: Whether several processes may write the destination at the same time. Each has a file of its own then.
            Otherwise the name is fixed, and the next process removes what a killed one left.

    Yields:
        The path to write to.
    """
    destination = Path(path)
    beside = destination.with_name(f"{destination.name}.{os.getpid()}.tmp" if shared else f"{destination.name}.tmp")
    # Of a process that was killed: it must not be taken for what the block writes.
    beside.unlink(missing_ok=True)
    try:
        yield beside
        if beside.is_file():
            beside.replace(destination)
    finally:
        beside.unlink(missing_ok=True)
