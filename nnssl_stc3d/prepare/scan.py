"""Makes cases of the volumes that were found: by their names, or by a table; and looks at the values of some."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nnssl_stc3d.prepare.case import Case, Channel, Header
from nnssl_stc3d.prepare.checks import (
    Problem,
    VolumeError,
    geometry_difference,
    header_problems,
    thinned,
    voxel_problems,
)
from nnssl_stc3d.prepare.dicom import SeriesVolume
from nnssl_stc3d.prepare.find import Found, Search, find_volumes, probe_files
from nnssl_stc3d.prepare.formats import stem_of
from nnssl_stc3d.prepare.parallel import run_all
from nnssl_stc3d.prepare.voxels import Intensity, array_of, intensity_of, read_volume

_NUMBERED = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class ScannedCase:
    """A case as it was found.

    Attributes:
        case: what would be written.
        found: its volumes, one per channel.
        problems: what is wrong with it.
        accepted: what would be wrong with it, had the user not accepted it.
        intensity: of each channel; empty if it was not looked at.
        known: whether it has been written before.
    """

    case: Case
    found: tuple[Found, ...]
    problems: tuple[Problem, ...] = ()
    accepted: tuple[Problem, ...] = ()
    intensity: tuple[Intensity, ...] = ()
    known: bool = False

    @property
    def header(self) -> Header | None:
        """Of the first channel."""
        return self.found[0].header.spatial() if self.found and self.found[0].header else None

    def accepting(self, codes: Sequence[str]) -> ScannedCase:
        """The case without the problems that the user accepts."""
        problems = tuple(p for p in self.problems if p.code not in codes)
        accepted = tuple(p for p in self.problems if p.code in codes)
        return replace(self, problems=problems, accepted=(*self.accepted, *accepted))

    def with_problems(self, problems: Iterable[Problem]) -> ScannedCase:
        """The case with more problems."""
        return replace(self, problems=(*self.problems, *problems))


def case_name(parts: Sequence[str]) -> str:
    """Joins the parts of a path to an identifier of letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(parts)).strip("_.") or "case"


def cases_by_name(search: Search, root: Path, channels: Sequence[Channel]) -> list[ScannedCase]:
    """Makes a case of every volume, or of the volumes whose names differ in the suffix of their channel only.

    Names are made of the path below `root`, so that they do not depend on what else is there.

    Args:
        search: what was found.
        root: folder that was searched.
        channels: of every case.

    Raises:
        ValueError: there is one channel, but names of all files say several.
    """
    bases: dict[str, dict[str, Found]] = defaultdict(dict)
    cases: list[ScannedCase] = []
    names = {f.volume.id: volume_name(f, root) for f in search.volumes}
    single = len(channels) == 1
    numbered = _numbered(list(names.values())) if single else {}
    if single and len(numbered) > 1 and len({frozenset(n) for n in numbered.values()}) == 1:
        suffixes = sorted(next(iter(numbered.values())))
        if len(suffixes) > 1 and len(suffixes) * len(numbered) == len(names):
            raise ValueError(
                f"Every name ends in one of {', '.join('_' + s for s in suffixes)}: these look like the channels of "
                f"{len(numbered)} cases. Name the channels with --channels, or list the cases with --cases-csv."
            )
    for found in search.volumes:
        name = names[found.volume.id]
        if single:
            base = name[: -len("_0000")] if numbered.get(name[: -len("_0000")]) == {"0000"} else name
            cases.append(make_case(base, (found,), channels))
            continue
        suffix = max((c.suffix for c in channels if name.endswith(c.suffix)), key=len, default=None)
        if suffix is None or suffix in bases[name[: -len(suffix)]]:
            expected = ", ".join(f"{c.suffix} ({c.name})" for c in channels)
            message = f"its name ends in none of {expected}" if suffix is None else "is there twice for one channel"
            problem = Problem("channels", message, found.volume.id)
            cases.append(ScannedCase(Case(name, (found.volume,)), (found,), (*found.problems, problem)))
        else:
            bases[name[: -len(suffix)]][suffix] = found
    for base, by_suffix in bases.items():
        there = tuple(by_suffix[c.suffix] for c in channels if c.suffix in by_suffix)
        missing = [c for c in channels if c.suffix not in by_suffix]
        if not there:
            continue
        case = make_case(base, there, [c for c in channels if c.suffix in by_suffix])
        if missing:
            words = ", ".join(f"{c.name} ({base}{c.suffix})" for c in missing)
            case = case.with_problems([Problem("channels", f"lacks {words}", base)])
        cases.append(case)
    return sorted(cases, key=lambda c: c.case.name)


def _numbered(names: Sequence[str]) -> dict[str, set[str]]:
    """Names without their four digits -> the digits that they occur with."""
    result: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            result[match[1]].add(match[2])
    return result


def volume_name(found: Found, root: Path) -> str:
    """Identifier of a volume's case, made of its path below a folder."""
    volume = found.volume
    if not isinstance(volume, SeriesVolume):
        path = volume.files[0]
        return case_name([*path.relative_to(root).parent.parts, stem_of(path)])
    parts = list(volume.folder.relative_to(root).parts) or [root.resolve().name]
    if not volume.alone:
        # The number is for people; the end of the UID keeps series apart that have none.
        parts.append(f"s{found.number}" if found.number else f"s{volume.series[-8:]}")
    return case_name(parts)


def make_case(name: str, found: Sequence[Found], channels: Sequence[Channel]) -> ScannedCase:
    """Puts a case together and checks its headers.

    Args:
        name: identifier.
        found: its volumes, one for each channel.
        channels: of every case.
    """
    problems: list[Problem] = []
    for part, channel in zip(found, channels):
        problems += part.problems
        if part.header is not None:
            problems += header_problems(part.header, channel.modality, part.volume.id)
    headers = [p.header.spatial() for p in found if p.header is not None]
    for part, header in zip(found[1:], headers[1:] if len(headers) == len(found) else []):
        if difference := geometry_difference(headers[0], header):
            problems.append(Problem("channels-differ", f"differs from the first channel: {difference}", part.volume.id))
    return ScannedCase(Case(name, tuple(p.volume for p in found)), tuple(found), tuple(problems))


def channel_columns(table: Path) -> list[str]:
    """Names of the channel columns of a table of cases.

    Raises:
        ValueError: the table cannot be read or has no column "case" followed by others.
    """
    return _read_table(table)[0]


def _read_table(table: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--cases-csv {table} cannot be read: {error}") from error
    if not rows or rows[0][0].lower() != "case" or len(rows[0]) < 2:
        raise ValueError(
            f"The first line of {table} has to be: case, and the name of each channel, with commas between."
        )
    short = [i for i, row in enumerate(rows, 1) if len(row) != len(rows[0]) or not all(row)]
    if short:
        raise ValueError(f"Line {short[0]} of {table} does not have a value for each of {', '.join(rows[0])}.")
    if len(rows) == 1:
        raise ValueError(f"{table} lists no case.")
    return rows[0][1:], rows[1:]


def cases_by_table(
    table: Path, root: Path, channels: Sequence[Channel], spacing: tuple[float, float, float] | None, jobs: int
) -> tuple[list[ScannedCase], Search]:
    """Makes the cases that a table lists.

    Args:
        table: CSV file: case, then one file for each channel. A cell may be a folder with one DICOM series, or
            FOLDER#UID for one of several.
        root: what relative paths are relative to.
        channels: as many as the table has.
        spacing: mm along (z, y, x) of NumPy files without one.
        jobs: processes.

    Raises:
        ValueError: the table is not well formed.
    """
    columns, rows = _read_table(table)
    if len(columns) != len(channels):
        raise ValueError(f"{table} has {len(columns)} channels, but --channels names {len(channels)}.")
    paths = [root / cell for row in rows for cell in row[1:]]
    search = probe_files(sorted({p for p in paths if p.is_file()}), spacing, jobs)
    lookup = {f.volume.files[0]: f for f in search.volumes if not isinstance(f.volume, SeriesVolume)}
    search.volumes = list(lookup.values())
    series: dict[Path, list[Found]] = {}
    for folder in sorted({Path(str(p).partition("#")[0]) for p in paths if not p.is_file()}):
        if folder.is_dir():
            inside = find_volumes(folder, spacing, jobs=jobs, recursive=False)
            series[folder] = [f for f in inside.volumes if isinstance(f.volume, SeriesVolume)]
            search.problems += inside.problems

    def find(cell: str) -> Found | Problem:
        path = root / cell
        if path in lookup:
            return lookup[path]
        folder, _, uid = str(path).partition("#")
        there = [f for f in series.get(Path(folder), []) if not uid or f.volume.series == uid]  # type: ignore[attr-defined]
        if len(there) == 1:
            return there[0]
        reason = f"holds {len(there)} DICOM series, expected one" if there else "is not there or is no volume"
        return Problem("unreadable", reason, str(path))

    cases = []
    for row in rows:
        cells = [find(cell) for cell in row[1:]]
        found = [c for c in cells if isinstance(c, Found)]
        case = make_case(case_name([row[0]]), found, channels)
        cases.append(case.with_problems([c for c in cells if isinstance(c, Problem)]))
    return cases, search


def with_collisions(cases: Sequence[ScannedCase], taken: Iterable[str] = ()) -> list[ScannedCase]:
    """Names the cases whose identifiers are the same, on file systems that ignore case too.

    Args:
        cases: to look at.
        taken: identifiers that are in the dataset already.
    """
    users: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        users[case.case.name.lower()].append(_where(case))
    written = {name.lower() for name in taken}
    result = []
    for case in cases:
        key = case.case.name.lower()
        others = [o for o in users[key] if o != _where(case)]
        if not case.known and key in written:
            others = ["a case that was written before"]
        if others and not case.known:
            message = f"would be case {case.case.name}, as would {', '.join(others[:3])}"
            if others[0].startswith("a case"):
                message = f"would be case {case.case.name}, the name of {others[0]}"
            case = case.with_problems([Problem("name-collision", message, _where(case))])
        result.append(case)
    return result


def _where(case: ScannedCase) -> str:
    return case.found[0].volume.id if case.found else case.case.name


def look_at_some(cases: Sequence[ScannedCase], channels: Sequence[Channel], count: int, jobs: int) -> list[ScannedCase]:
    """Reads the voxels of a sample, evenly spread over the cases, for statistics and for checks of the values.

    Args:
        cases: all of them.
        channels: of every case.
        count: cases to look at; those with problems are not.
        jobs: processes; each holds one volume.
    """
    good = [i for i, c in enumerate(cases) if not c.problems and not c.known]
    chosen = sorted({good[int(k)] for k in np.linspace(0, len(good) - 1, min(count, len(good)))} if good else ())
    result = list(cases)
    items = [(i, cases[i]) for i in chosen]
    for index, intensity, problems in run_all(
        partial(_look, channels=tuple(channels)), items, jobs, "sample of values"
    ):
        result[index] = replace(cases[index], intensity=intensity).with_problems(problems)
    return result


def _look(
    item: tuple[int, ScannedCase], channels: tuple[Channel, ...]
) -> tuple[int, tuple[Intensity, ...], list[Problem]]:
    index, case = item
    intensity, problems = [], []
    for found, channel in zip(case.found, channels):
        try:
            image, _ = read_volume(found.volume)
        except VolumeError as error:
            problems.append(error.problem)
            continue
        array = array_of(image)
        problems += voxel_problems(array, channel.modality, found.volume.id)
        intensity.append(intensity_of(thinned(array)))
    return index, tuple(intensity), problems
