"""Finds volumes below a folder and reads their headers, never their voxels."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nnssl_stc3d.prepare import dicom
from nnssl_stc3d.prepare.case import Header, Volume
from nnssl_stc3d.prepare.checks import Problem, VolumeError
from nnssl_stc3d.prepare.formats import NUMPY_ENDINGS, PART_ENDINGS, FileVolume, NumpyVolume, ending_of
from nnssl_stc3d.prepare.parallel import run_all

# Headers take a millisecond each: sent to the processes in batches.
_BATCH = 64


@dataclass(frozen=True)
class Found:
    """A volume that was found.

    Attributes:
        volume: where it is.
        header: None if it could not be read.
        problems: what is wrong with it.
        bytes: size of its files.
        instances: SOP Instance UIDs of a DICOM series, by which copies are told.
        number: of a DICOM series.
    """

    volume: Volume
    header: Header | None
    problems: tuple[Problem, ...] = ()
    bytes: int = 0
    instances: frozenset[str] = frozenset()
    number: str = ""


@dataclass
class Search:
    """What was found below a folder.

    Attributes:
        volumes: in the order of their paths.
        ignored: number of files that are no volumes, by ending.
        problems: folders that could not be read, and files that look like DICOM and are not.
    """

    volumes: list[Found] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


Probe = tuple[Path, "Found | dicom.Slice | Problem | None"]


def find_volumes(
    root: Path,
    spacing: tuple[float, float, float] | None = None,
    exclude: Sequence[str] = (),
    skip: Sequence[Path] = (),
    jobs: int = 1,
    recursive: bool = True,
) -> Search:
    """Looks through a folder.

    Args:
        root: the folder.
        spacing: mm along (z, y, x) of NumPy files without one.
        exclude: patterns such as "*/labelsTr/*", compared with paths relative to the folder.
        skip: folders that are not looked into, such as the dataset that is written.
        jobs: processes.
        recursive: look into folders below it.
    """
    search = Search()
    files = list(walk_files(root, exclude, {p.resolve() for p in skip}, search, recursive))
    return probe_files(files, spacing, jobs, search)


def probe_files(
    files: Sequence[Path], spacing: tuple[float, float, float] | None, jobs: int, search: Search | None = None
) -> Search:
    """Reads the headers of files and puts DICOM slices together.

    Args:
        files: to look at.
        spacing: mm along (z, y, x) of NumPy files without one.
        jobs: processes.
        search: result so far.
    """
    search = search or Search()
    series: dict[tuple[Path, str], list[dicom.Slice]] = defaultdict(list)
    parts = [f for f in files if f.name.lower().endswith(PART_ENDINGS)]
    search.ignored.update({"parts of other files": len(parts)} if parts else {})
    wanted = [f for f in files if not f.name.lower().endswith(PART_ENDINGS)]
    for path, result in run_all(partial(_probe, spacing=spacing), wanted, jobs, "headers", _BATCH):
        if isinstance(result, Found):
            search.volumes.append(result)
        elif isinstance(result, dicom.Slice):
            series[path.parent, result.series].append(result)
        elif isinstance(result, Problem):
            search.problems.append(result)
        else:
            search.ignored[path.suffix.lower() or "no ending"] += 1
    in_folder = Counter(folder for folder, _ in series)
    for (folder, _), slices in series.items():
        volume, header, problems = dicom.stack(sorted(slices, key=lambda s: s.path.name), in_folder[folder] == 1)
        instances = frozenset(s.instance for s in slices)
        size = sum(s.bytes for s in slices)
        search.volumes.append(Found(volume, header, tuple(problems), size, instances, slices[0].number))
    search.volumes.sort(key=lambda f: f.volume.id)
    search.problems.sort(key=lambda p: p.where)
    return search


def walk_files(
    root: Path, exclude: Sequence[str], skip: set[Path], search: Search, recursive: bool = True
) -> Iterator[Path]:
    """Files below a folder, without hidden ones; a folder that links lead to twice is visited once.

    Args:
        root: the folder.
        exclude: patterns, compared with paths relative to the folder.
        skip: folders that are not looked into, resolved.
        search: gets the folders that could not be read as problems.
        recursive: look into folders below it.
    """
    visited: set[Path] = set()

    def failed(error: OSError) -> None:
        code = "no-permission" if isinstance(error, PermissionError) else "unreadable"
        search.problems.append(Problem(code, f"folder cannot be read: {error.strerror}", str(error.filename)))

    for folder, folders, names in os.walk(root, onerror=failed, followlinks=True):
        here = Path(folder)
        real = here.resolve()
        if real in visited or real in skip:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(names):
            path = here / name
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or any(fnmatch.fnmatch(relative, pattern) for pattern in exclude):
                continue
            yield path


def _probe(path: Path, spacing: tuple[float, float, float] | None) -> Probe:
    """What a file is: a volume, a slice, something wrong, or nothing of interest."""
    ending = ending_of(path)
    try:
        if ending is None:
            return path, dicom.read_slice(path) if dicom.is_dicom(path) else None
        plain = ending.removesuffix(".gz")
        volume: Volume = NumpyVolume(path, spacing) if plain in NUMPY_ENDINGS else FileVolume(path)
    except VolumeError as error:
        return path, error.problem
    try:
        header = volume.header()  # type: ignore[attr-defined]
        return path, Found(volume, header, (), sum(f.stat().st_size for f in volume.files))
    except VolumeError as error:
        return path, Found(volume, None, (error.problem,))
    except Exception as error:  # A damaged header may break a reader anywhere; one file must not end the search.
        problem = Problem("unreadable", f"cannot be read ({type(error).__name__}: {error})"[:200], volume.id)
        return path, Found(volume, None, (problem,))
