"""Plans of one dataset made to give the network and the preprocessing of another."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from nnssl_stc3d.prepare.align import Side, align
from nnssl_stc3d.prepare.align_table import decision_table, format_rows, show
from nnssl_stc3d.transfer.differences import compare, describe_plans
from nnssl_stc3d.transfer.load import load_pretrained

ORGAN = {"mean": 100.0, "std": 50.0, "percentile_00_5": -50.0, "percentile_99_5": 250.0}
BODY = {"mean": 10.0, "std": 300.0, "percentile_00_5": -900.0, "percentile_99_5": 900.0}
# What two datasets may differ in: an anisotropic target, its axes in another order, and one more convolution.
TARGET = {
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "features_per_stage": [4, 8, 16],
}


def plans_of(tiny_plans, dataset, channels, statistics=BODY, scheme="CTNormalization", **changes):
    plans = tiny_plans("PlainConvUNet", len(channels), **changes)
    plans["dataset_name"] = dataset
    plans["foreground_intensity_properties_per_channel"] = {str(i): dict(statistics) for i in range(len(channels))}
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme] * len(channels)
    return plans


def side_of(plans, channels, shapes=((60, 60, 60),) * 3, spacings=((1.5, 1.0, 1.0),) * 3):
    fingerprint = {"shapes_after_crop": shapes, "spacings": spacings}
    return Side.read(
        plans["dataset_name"], plans, "3d_fullres", {"channel_names": dict(enumerate(channels))}, fingerprint
    )


@pytest.fixture
def pretraining(tiny_plans):
    plans = plans_of(tiny_plans, "Dataset801_Unlabelled", ["CT"])
    plans["image_reader_writer"] = "NibabelIO"
    return side_of(plans, ["CT"])


@pytest.fixture
def target(tiny_plans):
    plans = plans_of(tiny_plans, "Dataset004_Liver", ["CT"], ORGAN, **TARGET)
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    plans["configurations"]["3d_fullres"] |= {
        "spacing": [2.0, 1.0, 1.0],
        "patch_size": [8, 32, 32],
        "batch_dice": True,
        "next_stage": "3d_cascade_fullres",
    }
    return side_of(plans, ["CT"])


def test_the_plans_give_the_targets_network_and_preprocessing(target, pretraining):
    before = copy.deepcopy((target.plans, pretraining.plans))
    plans = align(target, pretraining, "nnUNetPlans_Dataset004").plans
    assert (target.plans, pretraining.plans) == before
    written, followed = plans["configurations"]["3d_fullres"], target.plans["configurations"]["3d_fullres"]
    for key in ("architecture", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm"):
        assert written[key] == followed[key], key
    for key in ("transpose_forward", "transpose_backward", "foreground_intensity_properties_per_channel"):
        assert plans[key] == target.plans[key], key
    assert "next_stage" not in written and list(plans["configurations"]) == ["3d_fullres"]


def test_what_belongs_to_the_dataset_stays(target, pretraining):
    plans = align(target, pretraining, "nnUNetPlans_Dataset004").plans
    assert plans["dataset_name"] == "Dataset801_Unlabelled" and plans["plans_name"] == "nnUNetPlans_Dataset004"
    assert plans["image_reader_writer"] == "NibabelIO"
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_Dataset004_3d_fullres"
    assert "batch_dice" not in plans["configurations"]["3d_fullres"]


def test_batch_dice_stays_with_the_labels(target, pretraining):
    plans = align(pretraining, target, "nnUNetPlans_Dataset801").plans
    assert plans["configurations"]["3d_fullres"]["batch_dice"] is True


def test_sizes_are_counted_in_the_order_of_the_plans_axes(target, pretraining):
    """Files of 60 voxels of (1.5, 1, 1) mm; the plans' first axis is the files' last one, at 2 mm."""
    plans = align(target, pretraining, "x").plans
    assert plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] == [30, 90, 60]
    assert plans["original_median_spacing_after_transp"] == [1.0, 1.5, 1.0]
    assert plans["original_median_shape_after_transp"] == [60, 60, 60]


@pytest.mark.parametrize("to_target", [True, False])
def test_weights_go_from_one_to_the_other(target, pretraining, tiny_network, pretraining_checkpoint, to_target):
    if to_target:
        source, labelled = align(target, pretraining, "new").plans, target.plans
    else:
        source, labelled = pretraining.plans, align(pretraining, target, "new").plans
    report = load_pretrained(tiny_network(labelled), pretraining_checkpoint(source), labelled, "3d_fullres")
    assert not report.warnings and not report.adapted


@pytest.mark.parametrize("planner", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nothing_differs_afterwards(tiny_plans, pretraining, planner):
    plans = tiny_plans(planner)
    reference = side_of(plans | {"dataset_name": "Dataset004_Liver"}, ["CT"])
    aligned = align(reference, pretraining, "new")
    described = [describe_plans(side.reference) for side in (reference, side_of(aligned.plans, ["CT"]))]
    assert described[0]["architecture class"] == planner
    assert not compare(*described, with_decoder=True)


# ---- channels -------------------------------------------------------------------------------------------------------


def statistics_of(aligned):
    return [aligned.plans["foreground_intensity_properties_per_channel"][str(i)] for i in range(2)]


def test_each_channel_is_normalised_like_the_one_of_its_name(tiny_plans):
    target = plans_of(tiny_plans, "Dataset004_Liver", ["arterial", "venous"])
    target["foreground_intensity_properties_per_channel"] = {"0": ORGAN, "1": BODY}
    other = plans_of(tiny_plans, "Dataset801_Unlabelled", ["Venous", "Arterial"], {})
    aligned = align(side_of(target, ["arterial", "venous"]), side_of(other, ["Venous", "Arterial"]), "new")
    assert statistics_of(aligned) == [BODY, ORGAN]
    assert not aligned.warnings


def test_channels_of_the_same_kind_without_a_name_in_common(tiny_plans):
    target = plans_of(tiny_plans, "Dataset004_Liver", ["CT"], ORGAN)
    other = plans_of(tiny_plans, "Dataset801_Unlabelled", ["plain", "contrast"])
    aligned = align(side_of(target, ["CT"]), side_of(other, ["plain", "contrast"]), "new")
    assert statistics_of(aligned) == [ORGAN, ORGAN]
    assert aligned.plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"] * 2
    assert [d.why for d in aligned.decisions if d.name.startswith("channel")] == ["channel of the same kind (CT)"] * 2
    (warning,) = aligned.warnings
    assert "has 1 channels (CT), Dataset801_Unlabelled 2 (plain, contrast)" in warning


def test_another_modality_keeps_its_own_normalisation_and_is_named(tiny_plans):
    """Hounsfield statistics would turn MR into noise."""
    target = plans_of(tiny_plans, "Dataset004_Liver", ["CT"], ORGAN)
    other = plans_of(tiny_plans, "Dataset801_Unlabelled", ["T1"], BODY, "ZScoreNormalization")
    other["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    aligned = align(side_of(target, ["CT"]), side_of(other, ["T1"]), "new")
    written = aligned.plans["configurations"]["3d_fullres"]
    assert written["normalization_schemes"] == ["ZScoreNormalization"] and written["use_mask_for_norm"] == [True]
    assert aligned.plans["foreground_intensity_properties_per_channel"] == {"0": BODY}
    assert len(aligned.warnings) == 1 and "No channel of Dataset004_Liver is like T1" in aligned.warnings[0]


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_plans_that_suit_the_images_warn_of_nothing(tiny_plans, pretraining):
    plans = plans_of(tiny_plans, "Dataset004_Liver", ["CT"])
    assert not align(side_of(plans, ["CT"]), pretraining, "new").warnings


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        (
            {"shapes": [(10, 60, 60)] * 2 + [(60, 60, 60)]},
            "16 x 16 x 16 voxels (24 x 16 x 16 mm) is larger than 2 of the 3 volumes of Dataset801_Unlabelled",
        ),
        (
            {"spacings": [(5.0, 1.0, 1.0)] * 3},
            "far finer than that of Dataset801_Unlabelled, whose median is 5 x 1 x 1",
        ),
        ({"spacings": [(1.5, 0.3, 0.3)] * 3}, "far coarser than that of Dataset801_Unlabelled"),
    ],
)
def test_images_that_do_not_suit_the_plans(tiny_plans, cases, words):
    target = side_of(plans_of(tiny_plans, "Dataset004_Liver", ["CT"]), ["CT"])
    own = side_of(plans_of(tiny_plans, "Dataset801_Unlabelled", ["CT"]), ["CT"], **cases)
    (warning,) = align(target, own, "new").warnings
    assert words in warning


def test_volumes_that_a_pretraining_would_refuse_are_counted(tiny_plans):
    """Views of 16 voxels need 8."""
    target = side_of(plans_of(tiny_plans, "Dataset004_Liver", ["CT"]), ["CT"])
    own = side_of(
        plans_of(tiny_plans, "Dataset801_Unlabelled", ["CT"]), ["CT"], shapes=[(8, 60, 60), (7, 60, 60), (60, 60, 60)]
    )
    padding, small = align(target, own, "new").warnings
    assert "padding" in padding
    assert "1 of the 3 volumes of Dataset801_Unlabelled are too small" in small and "fewer than 8 x 8 x 8" in small


def test_another_order_of_axes_is_named(target, pretraining):
    (warning,) = align(target, pretraining, "new").warnings
    assert "order the axes of Dataset801_Unlabelled as [0, 1, 2], these plans have [2, 0, 1]" in warning


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["spacing", "architecture", "transpose_forward"])
def test_incomplete_plans_are_refused(target, pretraining, key):
    holder = target.plans if key == "transpose_forward" else target.plans["configurations"]["3d_fullres"]
    del holder[key]
    with pytest.raises(ValueError, match=f"of Dataset004_Liver lack {key}"):
        align(target, pretraining, "new")


def test_2d_is_refused(target, pretraining):
    target.plans["configurations"]["3d_fullres"]["patch_size"] = [64, 64]
    with pytest.raises(NotImplementedError, match="only 3D"):
        align(target, pretraining, "new")


@pytest.mark.parametrize(
    ("dataset_json", "fingerprint", "message"),
    [
        ({}, None, "channel_names in the dataset.json of Dataset004_Liver, got None"),
        ({"channel_names": {"0": "CT"}}, {"spacings": [[1, 1, 1]]}, "fingerprint of Dataset004_Liver cannot be read"),
        ({"channel_names": {"0": "CT"}}, {"spacings": [[1, 1]], "shapes_after_crop": []}, "cannot be read"),
    ],
)
def test_broken_files_are_named(tiny_plans, dataset_json, fingerprint, message):
    with pytest.raises(ValueError, match=message):
        Side.read("Dataset004_Liver", tiny_plans(), "3d_fullres", dataset_json, fingerprint)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_shows_both_sides_and_what_was_chosen(target, pretraining):
    aligned = align(target, pretraining, "new")
    lines = decision_table(aligned.decisions, "target", "pretraining", False).splitlines()
    assert lines[0].split() == ["pretraining", "target", "chosen", "why"]
    (strides,) = (line for line in lines if line.startswith("strides"))
    cells = [cell.strip() for cell in strides.split("  ") if cell.strip()]
    assert cells == ["strides", "1x1x1, 2 of 2x2x2", *["1x1x1, 1x2x2, 2x2x2"] * 2, "same network"]
    swapped = decision_table(aligned.decisions, "target", "pretraining", True).splitlines()
    assert swapped[0].split() == ["target", "pretraining", "chosen", "why"]
    assert decision_table(aligned.decisions, None, "own", False).splitlines()[0].split() == ["own", "chosen", "why"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (1.0, "1"), ([1.5, 1, 0.33333], "1.5 1 0.3333"), ([[3, 3], [3, 3], [1, 3]], "2 of 3x3, 1x3")],
)
def test_values_are_shown_in_few_words(value, expected):
    assert show(value) == expected


def test_long_cells_are_wrapped():
    text = format_rows([["", "a"], ["b", "word " * 20]])
    assert max(map(len, text.splitlines())) <= 3 + 30 and text.count("word") == 20


def test_sizes_are_unknown_without_a_fingerprint(tiny_plans):
    side = Side.read("Dataset004_Liver", tiny_plans(), "3d_fullres", {"modality": {"0": "CT"}})
    assert side.channels == ("CT",) and side.sizes([1, 1, 1], [0, 1, 2]) is None
    known = side_of(tiny_plans(), ["CT"], shapes=[(10, 20, 40)], spacings=[(3.0, 1.0, 1.0)])
    np.testing.assert_array_equal(known.sizes([1, 1, 2], [0, 1, 2]), [[30, 20, 20]])
