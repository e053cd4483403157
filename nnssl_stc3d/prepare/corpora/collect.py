"""From the cases of a corpus to those that `prepare` looks at and writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnssl_stc3d.prepare.case import BODY_LABELS, Channel, DatasetTarget
from nnssl_stc3d.prepare.checks import Problem, geometry_difference
from nnssl_stc3d.prepare.corpora.corpus import (
    TEST,
    TRAINING,
    UNLABELLED,
    VALIDATION,
    Corpus,
    CorpusCase,
    CorpusOptions,
    wrong_layout,
)
from nnssl_stc3d.prepare.find import Found, Search, probe_files, walk_files
from nnssl_stc3d.prepare.scan import ScannedCase, make_case

# What macOS puts into archives.
_EXCLUDED = ("__MACOSX/*", "*/__MACOSX/*")


@dataclass(frozen=True)
class Collected:
    """Cases of a corpus that are to be written.

    Attributes:
        cases: as `prepare` takes them.
        search: what else was found.
        splits: the published split as nnU-Net writes it; None if there is none.
        case_labels: case -> class of the whole case, patient; empty if the corpus has no such classes.
        parts: number of cases of each part that was found, and of those that are left out.
        left_out: parts of which no case is taken.
    """

    cases: list[ScannedCase]
    search: Search
    splits: list[dict[str, list[str]]] | None
    case_labels: Mapping[str, tuple[str, str]]
    parts: Mapping[str, int]
    left_out: tuple[str, ...]


def corpus_channels(corpus: Corpus, modality: str) -> tuple[Channel, ...]:
    """Channels of a corpus's cases."""
    names = corpus.channels or (modality,)
    return tuple(Channel(name, modality, f"_{index:04d}") for index, name in enumerate(names))


def corpus_target(corpus: Corpus, folder: Path, modality: str, unlabelled: bool) -> DatasetTarget:
    """The dataset that a corpus is written to.

    Args:
        corpus: the corpus.
        folder: nnUNet_raw/DatasetXXX_Name.
        modality: one of the corpus's.
        unlabelled: body masks instead of the segmentations.
    """
    body = unlabelled or corpus.labels is None
    extra: dict[str, Any] = {"name": corpus.title, "reference": corpus.page, "licence": corpus.licence}
    extra |= {key: value for key, value in corpus.extra.items() if not (body and key == "regions_class_order")}
    labels = BODY_LABELS if body or corpus.labels is None else corpus.labels
    return DatasetTarget(folder, corpus_channels(corpus, modality), dict(labels), extra=extra)


def collect(
    corpus: Corpus,
    folder: Path,
    options: CorpusOptions,
    unlabelled: bool = False,
    held_out: bool = False,
    skip: Sequence[Path] = (),
) -> Collected:
    """Finds the cases of a corpus and reads their headers.

    With labels, training cases and validation cases that have labels go to imagesTr, all others to imagesTs. Without,
    only training cases are taken: what a split keeps for validation and testing must not be pretrained on unnoticed.

    Args:
        corpus: the corpus.
        folder: that it was unpacked to.
        options: what the user chose.
        unlabelled: body masks instead of the segmentations.
        held_out: take validation and test cases all the same.
        skip: folders that are not looked into.

    Raises:
        ValueError: the folder does not hold the corpus.
    """
    if not folder.is_dir():
        raise ValueError(f"-i {folder} is not a folder.")
    search = Search()
    files = list(walk_files(folder, _EXCLUDED, {path.resolve() for path in skip}, search))
    listed = corpus.list_cases(files, options)
    if not listed:
        kind = f"no {options.modality} case" if len(corpus.modalities) > 1 else "no case"
        raise wrong_layout(corpus, folder, files, kind)
    body = unlabelled or corpus.labels is None
    if not body and not any(case.label for case in listed):
        raise wrong_layout(corpus, folder, files, "no segmentation (--unlabelled does without)")
    placed = [(case, _placed(case, body, held_out)) for case in listed]
    taken = [case for _, case in placed if case is not None]
    if not taken:
        raise ValueError(
            f"{folder} holds only what {corpus.title} keeps for validation and testing ({_counts(listed)}). Give the "
            "folder with the training cases" + (", or pass --with-held-out." if body else ".")
        )
    cases = _scanned(corpus, taken, options)
    classes = {case.name: (case.diagnosis, case.patient) for case in taken if case.diagnosis}
    left_out = tuple(sorted({case.part for case, place in placed if place is None and case.images}))
    parts = Counter(case.part for case in listed)
    return Collected(cases, search, _splits(taken, body), classes, parts, left_out)


def _counts(cases: Sequence[CorpusCase]) -> str:
    return ", ".join(f"{count} {part}" for part, count in Counter(case.part for case in cases).items())


def _placed(case: CorpusCase, body: bool, held_out: bool) -> CorpusCase | None:
    """The case as it is taken; None if it is not. Cases of the part "test" go to imagesTs."""
    if body:
        is_label_only = case.label is not None and not case.images
        if is_label_only or (case.part in (VALIDATION, TEST) and not held_out):
            return None
        # A missing segmentation is no problem then.
        problems = tuple(problem for problem in case.problems if problem.code != "label")
        return replace(case, label=None, part=TRAINING, problems=problems)
    if case.part == UNLABELLED:
        return None
    return replace(case, part=TEST) if case.part == VALIDATION and case.label is None else case


def _scanned(corpus: Corpus, taken: Sequence[CorpusCase], options: CorpusOptions) -> list[ScannedCase]:
    """Reads the headers of images and segmentations and compares them."""
    paths = {path for case in taken for path in (*case.images, case.label) if isinstance(path, Path)}
    headers = {found.volume.files[0]: found for found in probe_files(sorted(paths), None, options.jobs).volumes}
    channels = corpus_channels(corpus, options.modality)
    result = []
    for case in taken:
        images = [headers[image] if isinstance(image, Path) else image for image in case.images]
        scanned = make_case(case.name, images, channels)
        problems = list(case.problems)
        inner = replace(scanned.case, test=case.part == TEST)
        if case.label is not None:
            label = headers[case.label]
            problems += _label_problems(images, label)
            inner = replace(inner, label=label.volume, label_values=corpus.label_values)
        result.append(replace(scanned, case=inner).with_problems(problems))
    return sorted(result, key=lambda case: case.case.name)


def _label_problems(images: Sequence[Found], label: Found) -> list[Problem]:
    problems = list(label.problems)
    first = images[0].header if images else None
    if first is not None and label.header is not None:
        difference = geometry_difference(first.spatial(), label.header.spatial())
        if difference:
            problems.append(Problem("label", f"the segmentation differs from the image: {difference}", label.volume.id))
    return problems


def _splits(taken: Sequence[CorpusCase], body: bool) -> list[dict[str, list[str]]] | None:
    """The published split in nnU-Net's form."""
    inside = [case for case in taken if case.part != TEST and case.images]
    folds = [case.fold for case in inside if case.fold is not None]
    if folds:
        return [
            {
                "train": sorted(case.name for case in inside if case.fold != fold),
                "val": sorted(case.name for case in inside if case.fold == fold),
            }
            for fold in range(max(folds) + 1)
        ]
    validation = sorted(case.name for case in inside if case.part == VALIDATION)
    if body or not validation:
        return None
    return [{"train": sorted(case.name for case in inside if case.part == TRAINING), "val": validation}]
