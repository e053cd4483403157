"""MM-WHS and BraTS 21: where their files lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnssl_stc3d.prepare.checks import Problem
from nnssl_stc3d.prepare.corpora.corpus import (
    TEST,
    VALIDATION,
    CorpusCase,
    CorpusOptions,
    by_name,
    matches,
    pairs,
)

_NIFTI = r"\.nii(?:\.gz)?"
BRATS_CHANNELS = ("t1", "t1ce", "t2", "flair")
"""In the order of nnU-Net's converter, so that its trained models fit."""


def list_mmwhs(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """The scans of one modality: 20 with labels, 40 for testing."""
    prefix = options.modality.lower()
    images = by_name(files, rf"(?P<id>{prefix}_train_\d{{4}})_image{_NIFTI}")
    labels = by_name(files, rf"(?P<id>{prefix}_train_\d{{4}})_label{_NIFTI}")
    test = by_name(files, rf"(?P<id>{prefix}_test_\d{{4}})_image{_NIFTI}")
    return [*pairs(images, labels), *pairs(test, {}, TEST, required=False)]


def list_brats21(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """Four channels a case; those without a segmentation are the validation set."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    pattern = rf"(?P<id>BraTS2021_\d{{5}})_(?P<kind>{'|'.join(BRATS_CHANNELS)}|seg){_NIFTI}"
    for path, match in matches(files, pattern):
        by_kind = found[match["id"]]
        if match["kind"] in by_kind:
            raise ValueError(
                f"{match['id']} is there twice: {by_kind[match['kind']]} and {path}. Give the folder of one copy with "
                "-i."
            )
        by_kind[match["kind"]] = path
    cases = []
    for name, kinds in sorted(found.items()):
        missing = [channel for channel in BRATS_CHANNELS if channel not in kinds]
        problems = (Problem("channels", f"lacks {', '.join(missing)}", name),) if missing else ()
        images = tuple(kinds[channel] for channel in BRATS_CHANNELS if channel in kinds)
        label = kinds.get("seg")
        case = CorpusCase(name, images, label, problems=problems)
        cases.append(case if label else CorpusCase(name, images, None, VALIDATION, problems=problems))
    return cases
