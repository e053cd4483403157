"""What is known of a public corpus, and how its files are told from others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl_stc3d.prepare.checks import Problem
from nnssl_stc3d.prepare.find import Found

TRAINING, VALIDATION, TEST, UNLABELLED = "training", "validation", "test", "unlabelled"
"""Parts of a published split."""
_SHOWN = 8


@dataclass(frozen=True)
class CorpusCase:
    """A case of a corpus.

    Attributes:
        name: as published.
        images: one for each channel: a file, or a volume that was looked at already.
        label: segmentation; None if it has none.
        part: of the published split.
        fold: in whose validation part it is, where a cross-validation was published.
        diagnosis: class of the whole case; empty if it has none.
        patient: identifier of the person; empty if not known.
        problems: that were seen.
    """

    name: str
    images: tuple[Path | Found, ...]
    label: Path | None = None
    part: str = TRAINING
    fold: int | None = None
    diagnosis: str = ""
    patient: str = ""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class CorpusOptions:
    """What the user chose.

    Attributes:
        modality: one of the corpus's.
        spacing: mm along (z, y, x), for corpora without one.
        jobs: processes.
    """

    modality: str
    spacing: tuple[float, float, float] | None = None
    jobs: int = 1


Lister = Callable[[Sequence[Path], CorpusOptions], list[CorpusCase]]


@dataclass(frozen=True)
class Corpus:
    """A public corpus.

    Attributes:
        title: its name.
        page: where to get it.
        licence: as far as it could be confirmed.
        layout: lines that show where its files lie.
        list_cases: finds its cases among files; empty if there are none.
        modalities: of which one is imported; the first by default.
        channels: names of the channels; empty for one that is named after the modality.
        labels: of the segmentations, as in dataset.json; None if there are none, and body masks are the labels.
        label_values: value in the files -> value in the dataset; every value that occurs has to be there.
        split: the published split in words; empty if there is none.
        extra: further entries of dataset.json.
    """

    title: str
    page: str
    licence: str
    layout: tuple[str, ...]
    list_cases: Lister
    modalities: tuple[str, ...] = ("CT",)
    channels: tuple[str, ...] = ()
    labels: Mapping[str, Any] | None = None
    label_values: Mapping[int, int] | None = None
    split: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def organs(*names: str) -> dict[str, int]:
    """Labels of a dataset whose structures have the values 1, 2, 3, ..."""
    return {"background": 0, **{name: value for value, name in enumerate(names, 1)}}


def same_values(labels: Mapping[str, int]) -> dict[int, int]:
    """Values that stay as they are."""
    return {value: value for value in labels.values()}


def matches(files: Iterable[Path], pattern: str) -> list[tuple[Path, re.Match[str]]]:
    """Files whose path ends as a pattern says, whatever folders they lie in.

    Args:
        files: to look at.
        pattern: regular expression for the last parts of a path, with "/" between them.
    """
    compiled = re.compile(rf"(?:^|/){pattern}$")
    found = ((path, compiled.search(path.as_posix())) for path in files)
    return [(path, match) for path, match in found if match]


def by_name(files: Iterable[Path], pattern: str) -> dict[str, Path]:
    """Files by the part of their path that the group ``id`` of a pattern names.

    Raises:
        ValueError: two files have the same.
    """
    result: dict[str, Path] = {}
    for path, match in matches(files, pattern):
        name = match["id"]
        if name in result:
            raise ValueError(f"{name} is there twice: {result[name]} and {path}. Give the folder of one copy with -i.")
        result[name] = path
    return result


def pairs(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    part: str = TRAINING,
    name: Callable[[str], str] = str,
    required: bool = True,
) -> list[CorpusCase]:
    """Cases of one channel with their segmentations.

    Args:
        images: by identifier.
        labels: likewise.
        part: of the published split.
        name: of the case, from its identifier.
        required: whether an image without a segmentation is worth a problem.
    """
    cases = []
    for key, image in images.items():
        missing = required and key not in labels
        problems = (Problem("label", "has no segmentation", str(image)),) if missing else ()
        cases.append(CorpusCase(name(key), (image,), labels.get(key), part, problems=problems))
    for key, label in labels.items():
        if key not in images:
            problem = Problem("label", "is a segmentation without its image", str(label))
            cases.append(CorpusCase(name(key), (), label, part, problems=(problem,)))
    return cases


def wrong_layout(corpus: Corpus, folder: Path, files: Sequence[Path], wanted: str) -> ValueError:
    """An error for a folder that is not the corpus: what was expected and what was found.

    Args:
        corpus: that was expected.
        folder: that was given.
        files: below it.
        wanted: what is missing, in words.
    """
    entries = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    endings = Counter("".join(path.suffixes[-2:]) or "no ending" for path in files).most_common(4)
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings) or "no file"
    return ValueError(
        f"{folder} is not {corpus.title} as it is published: {wanted} was found.\nExpected, in this folder or below:\n"
        + "".join(f"  {line}\n" for line in corpus.layout)
        + f"Found: {', '.join([*entries[:_SHOWN], *more]) or 'nothing'}\n({kinds}, with all folders below)\n"
        f"Where to get it: {corpus.page}. Any other folder of scans can be prepared with `nnssl_stc3d prepare`."
    )
