"""BTCV, FLARE 22, AMOS, LiTS and KiTS: where their files lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnssl_stc3d.prepare.corpora.corpus import (
    TEST,
    TRAINING,
    UNLABELLED,
    VALIDATION,
    CorpusCase,
    CorpusOptions,
    by_name,
    matches,
    pairs,
)

_NIFTI = r"\.nii(?:\.gz)?"
# The last CT of AMOS; the scans after it are MR.
_LAST_AMOS_CT = 500

# Image, segmentation and test image of each form in which BTCV is found: RawData.zip, the same after MONAI's renaming
# of its folders, and the single files on Synapse.
_BTCV = (
    (
        rf"Training/img/img(?P<id>\d{{4}}){_NIFTI}",
        rf"Training/label/label(?P<id>\d{{4}}){_NIFTI}",
        rf"Testing/img/img(?P<id>\d{{4}}){_NIFTI}",
        "img",
    ),
    (
        rf"imagesTr/img(?P<id>\d{{4}}){_NIFTI}",
        rf"labelsTr/label(?P<id>\d{{4}}){_NIFTI}",
        rf"imagesTs/img(?P<id>\d{{4}}){_NIFTI}",
        "img",
    ),
    (
        rf"averaged-training-images/(?P<id>DET\d+)_avg{_NIFTI}",
        rf"averaged-training-labels/(?P<id>DET\d+)_avg_seg{_NIFTI}",
        rf"averaged-testing-images/(?P<id>DET\d+)_avg{_NIFTI}",
        "",
    ),
)


def list_btcv(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """Cases of the first form that is there."""
    for image, label, test, prefix in _BTCV:
        images = by_name(files, image)
        if images:

            def name(key: str, prefix: str = prefix) -> str:
                return f"{prefix}{key}"

            tests = pairs(by_name(files, test), {}, TEST, name, required=False)
            return [*pairs(images, by_name(files, label), name=name), *tests]
    return []


def list_flare22(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """50 with labels, 2000 without, 50 for validation, with labels in later releases, and the test set if it came."""
    labelled = by_name(files, rf"(?P<id>FLARE22_Tr_\d{{4}})_0000{_NIFTI}")
    unlabelled = by_name(files, rf"(?P<id>Case_\d{{5}})_0000{_NIFTI}")
    test = by_name(files, rf"Testing/(?:images/)?(?P<id>FLARE(?:22)?_?Ts_\d{{4}})_0000{_NIFTI}")
    rest = [path for path in files if path not in set(test.values())]
    validation = by_name(rest, rf"(?P<id>FLARE(?:22)?_?Ts_\d{{4}})_0000{_NIFTI}")
    return [
        *pairs(labelled, by_name(files, rf"(?P<id>FLARE22_Tr_\d{{4}}){_NIFTI}")),
        *pairs(unlabelled, {}, UNLABELLED, required=False),
        *pairs(
            validation, by_name(files, rf"labels/(?P<id>FLARE(?:22)?_?Ts_\d{{4}}){_NIFTI}"), VALIDATION, required=False
        ),
        # The numbers are those of the validation set.
        *pairs(test, {}, TEST, lambda key: f"test_{key}", required=False),
    ]


def list_amos(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """The scans of one modality; validation has labels since the challenge ended."""

    def chosen(pattern: str) -> dict[str, Path]:
        found = by_name(files, rf"{pattern}/(?P<id>amos_\d{{4}}){_NIFTI}")
        is_ct = options.modality == "CT"
        return {key: path for key, path in found.items() if (int(key[-4:]) <= _LAST_AMOS_CT) == is_ct}

    return [
        *pairs(chosen("imagesTr"), chosen("labelsTr")),
        *pairs(chosen("imagesVa"), chosen("labelsVa"), VALIDATION, required=False),
        *pairs(chosen("imagesTs"), chosen("labelsTs"), TEST, required=False),
    ]


def list_lits(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """131 with labels in two batches, and 70 test volumes."""
    images = by_name(files, rf"(?P<id>volume-\d+){_NIFTI}")
    labels = {key.replace("segmentation", "volume"): path for key, path in _lits_labels(files).items()}
    test = by_name(files, rf"(?P<id>test-volume-\d+){_NIFTI}")
    return [*pairs(images, labels), *pairs(test, {}, TEST, required=False)]


def _lits_labels(files: Sequence[Path]) -> dict[str, Path]:
    return by_name(files, rf"(?P<id>segmentation-\d+){_NIFTI}")


def list_kits(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """All releases: cases without a segmentation are the test set of KiTS19.

    KiTS21 has several segmentations of each case, of which the majority vote is taken.
    """
    cases = []
    labels = {match["id"]: path for path, match in matches(files, rf"(?P<id>case_\d{{5}})/segmentation{_NIFTI}")}
    labels |= by_name(files, rf"(?P<id>case_\d{{5}})/aggregated_MAJ_seg{_NIFTI}")
    for key, image in by_name(files, rf"(?P<id>case_\d{{5}})/imaging{_NIFTI}").items():
        cases.append(CorpusCase(key, (image,), labels.get(key), TRAINING if key in labels else TEST))
    return cases
