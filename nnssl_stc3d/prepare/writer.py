"""Writes a dataset in nnU-Net's raw format from cases, whoever found them.

All files are made in a hidden folder beside the dataset and moved into it when every case is ready, dataset.json last.
So the dataset is either as it was or complete, and a run that was interrupted continues where it stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nnssl_stc3d.prepare.case import Case, DatasetTarget
from nnssl_stc3d.prepare.checks import ACCEPTABLE, Problem
from nnssl_stc3d.prepare.convert import RECORDS, Job, Outcome, convert_case
from nnssl_stc3d.prepare.formats import LINK_ENDINGS, file_hash
from nnssl_stc3d.prepare.parallel import run_all
from nnssl_stc3d.prepare.raw_dataset import write_dataset_json, write_json
from nnssl_stc3d.prepare.record import RECORD_FILE, CaseRecord, Record, Source

LINKS = ("absolute", "relative", "copy")
SHOWN = 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SETTINGS = "settings.json"
SPLITS_FILE = "splits_final.json"
# Entry of the record: SHA-256 of the published split as it was written.
_SPLITS = "splits_sha256"


@dataclass(frozen=True)
class WriteOptions:
    """How a dataset is written.

    Attributes:
        jobs: processes; each holds one case.
        links: "absolute" or "relative" links to files that can be used as they are, or "copy".
        skip_bad: leave out cases that turn out to be bad, instead of writing nothing.
        accept: codes of problems that are none, of `checks.ACCEPTABLE`.
        ending: of all files; None takes that which needs the fewest conversions.
    """

    jobs: int = 1
    links: str = "absolute"
    skip_bad: bool = False
    accept: tuple[str, ...] = ()
    ending: str | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.jobs < 1:
            raise ValueError(f"Expected one process or more, got {self.jobs}.")
        if self.links not in LINKS:
            raise ValueError(f"Expected links to be one of {', '.join(LINKS)}, got {self.links}.")
        if unknown := set(self.accept) - set(ACCEPTABLE):
            raise ValueError(f"Only {', '.join(ACCEPTABLE)} can be accepted, got {', '.join(sorted(unknown))}.")
        if self.ending is not None and self.ending not in LINK_ENDINGS:
            raise ValueError(f"Expected an ending of {', '.join(LINK_ENDINGS)}, got {self.ending}.")


@dataclass(frozen=True)
class WriteResult:
    """What was written.

    Attributes:
        new: records of the cases that this run added.
        total: cases in imagesTr.
        failed: what was wrong with the cases that were left out.
        ending: of the files.
    """

    new: tuple[CaseRecord, ...]
    total: int
    failed: tuple[Outcome, ...]
    ending: str


class CasesFailed(ValueError):
    """Cases turned out to be bad while their voxels were read; nothing was added to the dataset."""

    def __init__(self, failed: Sequence[Outcome], ready: int) -> None:
        self.failed = tuple(failed)
        lines = [f"  {o.name}: {p}\n    {p.advice}" for o in failed[:SHOWN] for p in o.problems]
        more = [f"  and {len(failed) - SHOWN} more"] if len(failed) > SHOWN else []
        super().__init__(
            f"{len(failed)} cases cannot be used, and nothing was added to the dataset:\n"
            + "\n".join([*lines, *more])
            + f"\nMend them, or leave them out with --skip-bad. {ready} cases are ready and will not be made again."
        )


def open_record(target: DatasetTarget) -> Record:
    """Reads what is in the dataset already.

    Raises:
        ValueError: the folder was not written by this command, or for other channels or labels.
    """
    folder = target.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Choose another dataset number or name.")
    record = Record.read(folder)
    if record is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} exists and was not written by this command. Nothing in it is changed: choose another "
                f"dataset number or name."
            )
        return Record()
    ours = _settings(target, record.settings["ending"])
    different = [key for key in ours if record.settings.get(key) != ours[key]]
    if different:
        raise ValueError(
            f"{folder} was written with other {' and '.join(different)}: {record.settings.get(different[0])}, now "
            f"{ours[different[0]]}. Use the same, or write another dataset."
        )
    return record


def write_dataset(cases: Sequence[Case], target: DatasetTarget, options: WriteOptions | None = None) -> WriteResult:
    """Writes cases, or adds those that are new to a dataset that was written before.

    Args:
        cases: to write; those that are in the dataset already are left as they are.
        target: the dataset.
        options: how.

    Returns:
        What was written.

    Raises:
        ValueError: the cases do not suit the dataset, or (`CasesFailed`) some are bad and `skip_bad` is not set.
        OSError: the disk is full or may not be written to. What is ready is kept for the next run.
    """
    options = options or WriteOptions()
    record = open_record(target)
    _check_cases(cases, target)
    ending = record.settings.get("ending") or options.ending or choose_ending(cases)
    staging = staging_folder(target.folder)
    settings = _settings(target, ending)
    ready = _staged(staging, settings)
    jobs, failed = [], []
    for case in cases:
        before = record.cases.get(case.name)
        sources = _sources(case)
        if before is not None:
            if not _unchanged(before, sources):
                message = f"is not what case {case.name} was made of ({before.sources[0].path})"
                failed.append(Outcome(case.name, None, (Problem("changed", message, case.channels[0].id),)))
        elif case.name not in ready or not _unchanged(ready[case.name], sources):
            jobs.append(Job(case, target.channels, staging, target.folder, ending, options.links, options.accept))
    wanted = {case.name for case in cases}
    new = {name: entry for name, entry in ready.items() if name in wanted and name not in {j.case.name for j in jobs}}
    if jobs:
        _make(staging, settings)
    try:
        for outcome in run_all(convert_case, jobs, options.jobs, "cases"):
            if outcome.record is None:
                failed.append(outcome)
            else:
                new[outcome.name] = outcome.record
    except OSError as error:
        raise OSError(
            f"{error}. {target.folder.name} is as it was; {len(new)} cases are ready in {staging} and will not be "
            f"converted again: make room or correct the permissions, and run the same command."
        ) from error
    failed.sort(key=lambda outcome: outcome.name)
    if failed and not options.skip_bad:
        raise CasesFailed(failed, len(new))
    record.settings = {**record.settings, **settings}
    if not new and not record.cases:
        raise CasesFailed(failed, 0) if failed else ValueError("There is no case to write.")
    _publish(staging, target, record, new)
    total = sum(not c.test for c in record.cases.values())
    return WriteResult(tuple(new[n] for n in sorted(new)), total, tuple(failed), ending)


def staging_folder(folder: Path) -> Path:
    """Hidden folder beside a dataset; nnU-Net takes every folder whose name begins with the number for a dataset."""
    return folder.with_name(f".prepare_{folder.name}")


def choose_ending(cases: Sequence[Case]) -> str:
    """The ending with which most files can be linked; .nii.gz if none can."""
    count = Counter(volume.link_ending for case in cases for volume in case.channels)
    return max(LINK_ENDINGS, key=lambda ending: count[ending])


def _settings(target: DatasetTarget, ending: str) -> dict[str, Any]:
    content = {
        "ending": ending,
        "channels": [[c.name, c.modality] for c in target.channels],
        "labels": dict(target.labels),
    }
    return json.loads(json.dumps(content))


def _check_cases(cases: Sequence[Case], target: DatasetTarget) -> None:
    """Raises ValueError if cases do not suit the dataset."""
    repeated = [name for name, count in Counter(c.name.lower() for c in cases).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} names belong to several cases: {', '.join(repeated[:SHOWN])}.")
    for case in cases:
        if not _NAME.fullmatch(case.name):
            raise ValueError(f"Case names have letters, digits, dot, dash and underscore, got {case.name!r}.")
        if len(case.channels) != len(target.channels):
            raise ValueError(f"{case.name} has {len(case.channels)} channels, the dataset {len(target.channels)}.")
        if not case.test and target.without_labels != (case.label is None):
            expected = "none, since body masks are the labels" if target.without_labels else "one"
            raise ValueError(f"{case.name} has {'no' if case.label is None else 'a'} label; expected {expected}.")


def _sources(case: Case) -> tuple[list[Source], Source | None] | None:
    """Sources as they are now; None if they cannot be looked at."""
    try:
        return [Source.of(v) for v in case.channels], None if case.label is None else Source.of(case.label)
    except OSError:
        return None


def _unchanged(before: CaseRecord, now: tuple[list[Source], Source | None] | None) -> bool:
    if now is None or (before.label is None) != (now[1] is None):
        return False
    pairs = [*zip(before.sources, now[0]), *([(before.label, now[1])] if before.label and now[1] else [])]
    return len(before.sources) == len(now[0]) and all(a.unchanged(b) for a, b in pairs)


def _staged(staging: Path, settings: dict[str, Any]) -> dict[str, CaseRecord]:
    """Cases that an interrupted run has finished; what it made under other settings is removed."""
    if not staging.is_dir():
        return {}
    try:
        same = json.loads((staging / _SETTINGS).read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(staging)
        return {}
    result = {}
    for file in sorted((staging / RECORDS).glob("*.json")):
        entry = CaseRecord.from_json(json.loads(file.read_text(encoding="utf-8")))
        result[entry.name] = entry
    return result


def _make(staging: Path, settings: dict[str, Any]) -> None:
    try:
        staging.mkdir(parents=True, exist_ok=True)
        write_json(staging / _SETTINGS, settings)
    except PermissionError as error:
        raise PermissionError(f"{staging.parent} may not be written to ({error}). Change its permissions.") from error


def _publish_splits(folder: Path, splits: Sequence[Mapping[str, Sequence[str]]], record: Record) -> None:
    """Writes the published split of the cases that are in the dataset; one that a user has changed is left alone."""
    file = folder / SPLITS_FILE
    before: list[Mapping[str, Sequence[str]]] = []
    if file.exists():
        if file_hash(file) != record.settings.get(_SPLITS):
            return
        before = json.loads(file.read_text(encoding="utf-8"))
    known = {name for name, case in record.cases.items() if not case.test}
    merged = []
    nothing: Mapping[str, Sequence[str]] = {}
    for old, new in zip_longest(before, splits, fillvalue=nothing):
        parts = {part: known & {*old.get(part, ()), *new.get(part, ())} for part in ("train", "val")}
        merged.append({part: sorted(names) for part, names in parts.items()})
    if merged != before and any(parts["val"] for parts in merged):
        write_json(file, merged)
        record.settings = {**record.settings, _SPLITS: file_hash(file)}
        record.write(folder)


def _publish(staging: Path, target: DatasetTarget, record: Record, new: dict[str, CaseRecord]) -> None:
    """Moves finished cases into the dataset, then writes the record and dataset.json."""
    folder = target.folder
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD_FILE).is_file():
        # A run that is interrupted from here on finds its own dataset.
        record.write(folder)
    for entry in new.values():
        for relative in entry.files:
            source, place = staging / relative, folder / relative
            place.parent.mkdir(exist_ok=True)
            if os.path.lexists(source):
                if os.path.lexists(place):
                    raise OSError(f"{place} exists and is not replaced. Remove it if it is not needed")
                source.rename(place)
    if new:
        record.cases.update(new)
        record.write(folder)
    count = sum(not c.test for c in record.cases.values())
    file = folder / "dataset.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("numTraining") != count:
            write_json(file, {**content, "numTraining": count})
    else:
        ending = record.settings["ending"]
        extra = {**target.extra}
        if ending == ".nii":
            extra["overwrite_image_reader_writer"] = "SimpleITKIO"
        channels = {str(i): c.nnunet_name for i, c in enumerate(target.channels)}
        write_dataset_json(folder, target.labels, channels, ending, count, **extra)
    if target.splits is not None:
        _publish_splits(folder, target.splits, record)
    if staging.is_dir():
        shutil.rmtree(staging)
