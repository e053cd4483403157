"""The phantom: stable anatomy, real variation, reproducible."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import label as components

from nnssl_stc3d.prepare.phantom import LABELS, PhantomConfig, generate_case
from nnssl_stc3d.prepare.raw_dataset import write_phantom_datasets

ORGANS = {name: value for name, value in LABELS.items() if value}
SEEDS = range(12)


@pytest.fixture(scope="module")
def cases():
    return [generate_case(seed) for seed in SEEDS]


def centres(case):
    """Organ -> centre in mm, (z, y, x)."""
    return {
        name: np.array(np.nonzero(case.labels == value)).mean(axis=1) * case.spacing for name, value in ORGANS.items()
    }


def test_every_case_has_every_organ_and_mostly_in_one_piece(cases):
    for seed, case in enumerate(cases):
        assert case.image.shape == case.labels.shape == case.body.shape == PhantomConfig().shape
        for name, value in ORGANS.items():
            pieces, _ = components(case.labels == value)
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.sum() > 150, f"seed {seed}: {name} has {sizes.sum()} voxels"
            assert sizes.max() > 0.7 * sizes.sum(), f"seed {seed}: {name} is in pieces {sizes}"


def test_topology_is_stable(cases):
    for seed, case in enumerate(cases):
        at = centres(case)
        left_of = [("liver", "stomach"), ("liver", "spleen"), ("right_kidney", "aorta"), ("aorta", "left_kidney")]
        for first, second in left_of:
            assert at[first][2] < at[second][2], f"seed {seed}: {first} must be to the right of {second}"
        assert at["liver"][0] > at["right_kidney"][0], f"seed {seed}: the liver lies above the right kidney"
        assert at["spleen"][0] > at["left_kidney"][0], f"seed {seed}: the spleen lies above the left kidney"
        assert at["stomach"][1] < at["spleen"][1], f"seed {seed}: the stomach lies in front of the spleen"
        assert (case.labels[case.body == 0] == 0).all(), f"seed {seed}: an organ lies outside the body"


def test_cases_differ_in_size_place_and_intensity(cases):
    for name, value in ORGANS.items():
        volumes = np.array([(c.labels == value).sum() * np.prod(c.spacing) for c in cases])
        places = np.array([centres(c)[name] for c in cases])
        levels = np.array([c.image[c.labels == value].mean() for c in cases])
        assert volumes.std() / volumes.mean() > 0.1, f"{name} varies too little in size: {volumes}"
        assert places.std(axis=0).max() > 4, f"{name} varies too little in place: {places.std(axis=0)} mm"
        assert levels.std() > 5, f"{name} varies too little in intensity: {levels}"
    assert len({c.spacing for c in cases}) == len(cases)


def test_intensity_alone_does_not_tell_the_organ(cases):
    """The best single window for an organ must also catch many other voxels: a threshold finds no organ."""
    for name, value in ORGANS.items():
        scores = []
        for case in cases[:4]:
            inside = case.image[case.labels == value]
            window = (case.image >= np.percentile(inside, 10)) & (case.image <= np.percentile(inside, 90))
            overlap = (window & (case.labels == value)).sum()
            scores.append(2 * overlap / (window.sum() + len(inside)))
        assert np.mean(scores) < 0.75, f"a threshold finds {name} with Dice {np.mean(scores):.2f}"


def test_kidneys_look_the_same_on_both_sides(cases):
    for case in cases:
        levels = [np.median(case.image[case.labels == LABELS[f"{side}_kidney"]]) for side in ("left", "right")]
        assert abs(levels[0] - levels[1]) < 25


def test_seeds_reproduce_and_differ():
    first, again, other = generate_case(3), generate_case(3), generate_case(4)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.spacing == again.spacing != other.spacing
    assert (first.labels != other.labels).mean() > 0.02


def test_other_sizes_show_the_whole_body():
    case = generate_case(0, PhantomConfig(shape=(24, 24, 32)))
    assert case.image.shape == (24, 24, 32)
    assert set(np.unique(case.labels)) == set(LABELS.values())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 16 voxels"):
        PhantomConfig(shape=(8, 32, 32))
    with pytest.raises(ValueError, match="positive voxel sizes"):
        PhantomConfig(spacing=(0.0, 1.0, 1.0))


def test_datasets_are_in_nnunet_format_and_share_no_individual(tmp_path):
    unlabelled, labelled = tmp_path / "Dataset801_A", tmp_path / "Dataset802_B"
    write_phantom_datasets(unlabelled, labelled, 2, 1, 1, config=PhantomConfig(shape=(16, 20, 24)))
    names = {
        file.name.removesuffix("_0000.nii.gz")
        for folder in (unlabelled / "imagesTr", labelled / "imagesTr", labelled / "imagesTs")
        for file in folder.iterdir()
    }
    assert len(names) == 4
    description = json.loads((labelled / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"] == LABELS and description["channel_names"] == {"0": "CT"}
    assert description["numTraining"] == 1 and description["file_ending"] == ".nii.gz"
    assert json.loads((unlabelled / "dataset.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "body": 1,
    }
    for image in (unlabelled / "imagesTr").iterdir():
        label = sitk.ReadImage(str(unlabelled / "labelsTr" / image.name.replace("_0000.nii.gz", ".nii.gz")))
        assert label.GetSpacing() == sitk.ReadImage(str(image)).GetSpacing()
        assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1}
    with pytest.raises(ValueError, match="got 0 unlabelled"):
        write_phantom_datasets(unlabelled, labelled, 0, 1, 1)
