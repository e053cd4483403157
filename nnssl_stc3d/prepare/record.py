"""What source became which case, kept in the dataset's folder, so that another run continues exactly."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from nnssl_stc3d.prepare.case import Case, Volume
from nnssl_stc3d.prepare.checks import Problem
from nnssl_stc3d.prepare.formats import file_hash
from nnssl_stc3d.prepare.parallel import run_all
from nnssl_stc3d.prepare.raw_dataset import write_json
from nnssl_stc3d.prepare.scan import ScannedCase
from nnssl_stc3d.prepare.voxels import Intensity

RECORD_FILE = "prepare.json"
_FORMAT = 1
_BATCH = 16


@dataclass(frozen=True)
class Source:
    """A volume as it was when it was looked at.

    Attributes:
        path: its first file.
        files: how many it has.
        bytes: of all of them.
        modified: latest modification, in nanoseconds.
        sha256: of the content; empty if not computed.
    """

    path: str
    files: int
    bytes: int
    modified: int
    sha256: str = ""

    @classmethod
    def of(cls, volume: Volume, hashed: bool = False) -> Source:
        """Looks at the files of a volume, and reads them all if `hashed`."""
        stats = [path.stat() for path in volume.files]
        return cls(
            path=os.path.abspath(volume.files[0]),
            files=len(stats),
            bytes=sum(s.st_size for s in stats),
            modified=max(s.st_mtime_ns for s in stats),
            sha256=content_hash(volume) if hashed else "",
        )

    def unchanged(self, other: Source) -> bool:
        """Whether files, sizes and times are the same."""
        return replace(self, sha256="") == replace(other, sha256="")


def content_hash(volume: Volume) -> str:
    """SHA-256 of a volume's file, or of the hashes of its files, in any order."""
    hashes = sorted(file_hash(path) for path in volume.files)
    return hashes[0] if len(hashes) == 1 else sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class CaseRecord:
    """A case that was written.

    Attributes:
        name: identifier.
        sources: of its channels.
        label: source of its segmentation; None for a body mask.
        test: whether it is in imagesTs.
        linked: whether its images are links.
        files: that were written, relative to the dataset's folder.
        intensity: low, median and high percentile of each channel.
    """

    name: str
    sources: tuple[Source, ...]
    label: Source | None
    test: bool
    linked: bool
    files: tuple[str, ...]
    intensity: tuple[tuple[float, float, float], ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CaseRecord:
        """Reads what `asdict` wrote."""
        return cls(
            **{
                **content,
                "sources": tuple(Source(**s) for s in content["sources"]),
                "label": Source(**content["label"]) if content["label"] else None,
                "files": tuple(content["files"]),
                "intensity": tuple((float(a), float(b), float(c)) for a, b, c in content["intensity"]),
            }
        )


@dataclass
class Record:
    """All cases of a dataset.

    Attributes:
        settings: under which they were written: ending, channels, ...; another run has to have the same.
        cases: by name.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, CaseRecord] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Reads the record of a dataset, None if there is none.

        Raises:
            ValueError: it is not one that this version wrote.
        """
        file = folder / RECORD_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            return cls(content["settings"], {c["name"]: CaseRecord.from_json(c) for c in content["cases"]})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a record of this version of prepare ({error}). Move it away.") from error

    def write(self, folder: Path) -> None:
        """Writes the record; readers see the old one or the new one."""
        cases = [asdict(self.cases[name]) for name in sorted(self.cases)]
        write_json(folder / RECORD_FILE, {"format": _FORMAT, "settings": self.settings, "cases": cases})


def with_record(cases: Sequence[ScannedCase], record: Record, jobs: int) -> list[ScannedCase]:
    """Marks the cases that were written before, the changed ones, and copies of the same content.

    A case has changed if its images or its segmentation have. Copies have the same images, whatever their segmentations
    are. Only files of the same size as another are read.

    Args:
        cases: that were found.
        record: of the dataset.
        jobs: processes.

    Returns:
        The cases; those that were written before have the name that they were given then.
    """
    readable = [i for i, c in enumerate(cases) if c.found and not c.problems]
    now = {i: tuple(Source.of(v) for v in cases[i].case.channels) for i in readable}
    by_path = {tuple(s.path for s in c.sources): c for c in record.cases.values()}
    by_size: dict[tuple[int, ...], list[CaseRecord]] = defaultdict(list)
    for written in record.cases.values():
        by_size[tuple(s.bytes for s in written.sources)].append(written)
    result = list(cases)
    unknown, doubtful = [], []
    for i in readable:
        written_before = by_path.get(tuple(s.path for s in now[i]))
        if written_before is None:
            unknown.append(i)
        elif _unchanged(written_before, now[i], cases[i].case.label):
            result[i] = _known(cases[i], written_before)
        else:
            doubtful.append(i)
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i in unknown:
        sizes[tuple(s.bytes for s in now[i])].append(i)
    alike = [i for size, same in sizes.items() for i in same if (len(same) > 1 or size in by_size)]
    # Slices of one size are the rule: series are compared by what is in them only where instances are the same.
    alike = [i for i in alike if not _series_is_unique(cases, i, sizes[tuple(s.bytes for s in now[i])], by_size)]
    hashes = _hashes(cases, [*doubtful, *alike], jobs)
    for i in doubtful:
        before = by_path[tuple(s.path for s in now[i])]
        if hashes[i].images == tuple(s.sha256 for s in before.sources):
            result[i] = _with_label_checked(cases[i], before, hashes[i])
        else:
            message = f"has changed since it became case {before.name}"
            result[i] = _changed(cases[i], before, message, cases[i].found[0].volume)
    first: dict[tuple[str, ...], str] = {tuple(s.sha256 for s in c.sources): c.name for c in record.cases.values()}
    present = {c.case.name for c in result if c.known}
    for i in alike:
        copy_of = first.get(hashes[i].images)
        if copy_of is None:
            first[hashes[i].images] = cases[i].found[0].volume.id
        elif (
            copy_of in record.cases
            and copy_of not in present
            and not Path(record.cases[copy_of].sources[0].path).exists()
        ):
            result[i] = _with_label_checked(cases[i], record.cases[copy_of], hashes[i])
            present.add(copy_of)
        else:
            problem = Problem("duplicate", f"has the content of {copy_of}", cases[i].found[0].volume.id)
            result[i] = cases[i].with_problems([problem])
    return result


class _Hashes(NamedTuple):
    """Hashes of a case's content; that of the label is empty if it has none."""

    images: tuple[str, ...]
    label: str


def _unchanged(written: CaseRecord, sources: Sequence[Source], label: Volume | None) -> bool:
    """Whether images and segmentation are those of the record, by the sizes and times of their files."""
    if not all(a.unchanged(b) for a, b in zip(written.sources, sources)):
        return False
    if written.label is None or label is None:
        return written.label is label
    return written.label.unchanged(Source.of(label))


def _with_label_checked(case: ScannedCase, written: CaseRecord, hashes: _Hashes) -> ScannedCase:
    """A case whose images are known; it has changed if its segmentation has."""
    if hashes.label == (written.label.sha256 if written.label else ""):
        return _known(case, written)
    message = f"is not the segmentation that case {written.name} was written with"
    if case.case.label is None:
        message = f"has lost the segmentation that case {written.name} was written with"
    return _changed(case, written, message, case.case.label or case.found[0].volume)


def _changed(case: ScannedCase, written: CaseRecord, message: str, where: Volume) -> ScannedCase:
    known = replace(case, case=replace(case.case, name=written.name), known=True)
    return known.with_problems([Problem("changed", message, where.id)])


def _known(case: ScannedCase, written: CaseRecord) -> ScannedCase:
    seen = tuple(Intensity(*values) for values in written.intensity)
    return replace(case, case=replace(case.case, name=written.name), known=True, intensity=seen)


def _series_is_unique(
    cases: Sequence[ScannedCase], index: int, same: Sequence[int], by_size: dict[tuple[int, ...], list[CaseRecord]]
) -> bool:
    mine = [f.instances for f in cases[index].found]
    if not all(mine) or tuple(f.bytes for f in cases[index].found) in by_size:
        return False
    return not any([f.instances for f in cases[other].found] == mine for other in same if other != index)


def _hashes(cases: Sequence[ScannedCase], indices: Iterable[int], jobs: int) -> dict[int, _Hashes]:
    items = [(i, cases[i].case) for i in indices]
    return dict(run_all(_hash, items, jobs, "files of the same size", _BATCH))


def _hash(item: tuple[int, Case]) -> tuple[int, _Hashes]:
    index, case = item
    images = tuple(content_hash(volume) for volume in case.channels)
    return index, _Hashes(images, content_hash(case.label) if case.label else "")
