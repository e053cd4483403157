"""Body masks: what is body, where the masks are kept, and when they are made again."""

from __future__ import annotations

import os
import pickle
from collections import Counter

import numpy as np
import pytest

from nnssl_stc3d.data import guides
from nnssl_stc3d.data.body import BodyRule, body_mask, otsu_threshold
from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.guides import body_guides, guide_folder
from nnssl_stc3d.prepare.phantom import PhantomConfig, generate_case

MEAN, STD = 100.0, 80.0


def rule_of(
    schemes=("CTNormalization",), masked=(False,), clip=(-900.0, 1000.0), spacing=(4.0, 4.0, 4.0), transpose=(0, 1, 2)
):
    channel = {"mean": MEAN, "std": STD, "percentile_00_5": clip[0], "percentile_99_5": clip[1]}
    plans = {
        "transpose_forward": list(transpose),
        "foreground_intensity_properties_per_channel": {str(i): channel for i in range(len(schemes))},
    }
    configuration = {
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(masked),
        "spacing": list(spacing),
    }
    return BodyRule.of_plan(plans, configuration)


def preprocessed(hounsfield: np.ndarray, clip=(-900.0, 1000.0)) -> np.ndarray:
    """What nnU-Net's CTNormalization makes of Hounsfield units."""
    return (np.clip(hounsfield, *clip) - MEAN) / STD


def block_with_a_lung() -> np.ndarray:
    """A block of tissue (y, x) that runs through all slices, with a lung that does too and a notch in its surface."""
    volume = np.full((4, 10, 10), -1000.0)
    volume[:, 2:8, 2:8] = 40
    volume[:, 4:6, 4:6] = -900
    volume[1, 2, 5] = -1000
    return volume


# ---- rules ----------------------------------------------------------------------------------------------------------


def test_the_threshold_of_ct_is_in_hounsfield_units():
    rule = rule_of()
    assert rule.kind == "threshold" and rule.channel == 0
    assert rule.threshold * STD + MEAN == pytest.approx(-500)
    assert "-500 HU" in rule.description


def test_where_clipping_removed_500_hu_the_threshold_lies_just_above_the_clip():
    rule = rule_of(clip=(-175.0, 250.0))
    assert -175 < rule.threshold * STD + MEAN < -160
    assert "clips at -175 HU" in rule.description


def test_the_rule_follows_normalisation():
    assert rule_of(["ZScoreNormalization", "CTNormalization"], [False, False]).channel == 1
    assert rule_of(["ZScoreNormalization"]).kind == "otsu"
    assert rule_of(["ZScoreNormalization"] * 2, [False, True]).kind == "nonzero"
    # Plans without intensity properties cannot undo a CT normalisation.
    plans = {"transpose_forward": [0, 1, 2], "foreground_intensity_properties_per_channel": {}}
    configuration = {"normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], "spacing": [1, 1, 1]}
    assert BodyRule.of_plan(plans, configuration).kind == "otsu"


def test_cells_are_about_4_mm_and_never_smaller_than_a_voxel():
    assert rule_of(spacing=(1.0, 2.0, 8.0)).grid((40, 40, 40)) == (10, 20, 40)
    assert rule_of(spacing=(0.5, 0.5, 0.5)).grid((3, 3, 3)) == (1, 1, 1)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_lungs_are_body_and_a_notch_in_the_surface_is_not():
    """The released code of vox2vec finds 143 body voxels here (its volume has the slices last)."""
    body, told_apart = body_mask(preprocessed(block_with_a_lung()), rule_of())
    assert told_apart and body.sum() == 143
    assert body[:, 4:6, 4:6].all() and not body[1, 2, 5]


@pytest.mark.parametrize("transpose", [(1, 0, 2), (1, 2, 0)])
def test_a_scan_may_cut_lungs_along_its_own_axis_however_plans_transpose_it(transpose):
    # nnU-Net transposes with transpose_forward, so original axis 0 ends at the index of 0.
    body, _ = body_mask(preprocessed(block_with_a_lung().transpose(transpose)), rule_of(transpose=transpose))
    assert body.sum() == 143


def test_only_the_largest_component_is_the_body():
    volume = block_with_a_lung()
    volume[:, 9:, :] = 40
    body, _ = body_mask(preprocessed(volume), rule_of())
    assert body.sum() == 143 and not body[:, 9].any()


def test_fat_is_body_where_plans_clip_air_away():
    clip = (-175.0, 250.0)
    volume = np.full((4, 10, 10), -1000.0)
    volume[:, 2:8, 2:8] = -100
    volume[:, 3:7, 3:7] = 40
    body, told_apart = body_mask(preprocessed(volume, clip), rule_of(clip=clip))
    assert told_apart and body.sum() == 4 * 36


@pytest.mark.parametrize("schemes", ["CTNormalization", "ZScoreNormalization"])
@pytest.mark.parametrize("value", [-1000.0, 40.0])
def test_a_volume_of_air_or_of_tissue_is_body_everywhere(schemes, value):
    body, told_apart = body_mask(preprocessed(np.full((5, 6, 7), value)), rule_of([schemes]))
    assert body.all() and not told_apart


def test_otsu_separates_two_classes_and_survives_one():
    rng = np.random.default_rng(0)
    values = np.concatenate((rng.normal(0, 0.1, 300), rng.normal(5, 0.5, 700)))
    assert 0.5 < otsu_threshold(values) < 3
    assert otsu_threshold(np.full(10, 3.0)) == 3


def test_otsu_finds_the_body_of_an_mr_like_volume():
    rng = np.random.default_rng(0)
    volume = np.abs(rng.normal(0, 5, (8, 20, 20)))
    volume[:, 5:15, 4:16] += rng.normal(200, 40, (8, 10, 12))
    volume = (volume - volume.mean()) / volume.std()
    body, told_apart = body_mask(volume, rule_of(["ZScoreNormalization"]))
    expected = np.zeros_like(body)
    expected[:, 5:15, 4:16] = True
    assert told_apart and (body == expected).mean() > 0.99


def test_tissue_is_not_mistaken_for_air_where_there_is_none():
    """A crop inside an organ: Otsu's threshold exists, but the darker half is no air."""
    volume = np.random.default_rng(0).normal(0, 1, (10, 12, 14))
    body, told_apart = body_mask(volume, rule_of(["ZScoreNormalization"]))
    assert body.all() and not told_apart


def test_phantoms_have_the_body_that_they_were_painted_with(tmp_path, write):
    dice = []
    for seed in range(3):
        case = generate_case(seed, PhantomConfig(shape=(32, 40, 48), spacing=(8.0, 6.5, 6.5)))
        write(tmp_path / "cases", f"case_{seed}", preprocessed(case.image)[None])
        rule = rule_of(spacing=case.spacing)
        body = body_guides(CaseDataset(tmp_path / "cases", [f"case_{seed}"]), rule, progress=False)[f"case_{seed}"].body
        dice.append(2 * (body & (case.body > 0)).sum() / (body.sum() + case.body.sum()))
    assert min(dice) > 0.95


# ---- the folder of masks --------------------------------------------------------------------------------------------


@pytest.fixture
def cases(tmp_path, write) -> CaseDataset:
    for name, shape in (("a", (16, 40, 40)), ("b", (20, 32, 36)), ("air", (16, 16, 16))):
        volume = np.full(shape, -1000.0)
        if name != "air":
            volume[:, 8:24, 8:28] = 40
        write(tmp_path / "plans_3d", name, preprocessed(volume)[None])
    return CaseDataset(tmp_path / "plans_3d", ["a", "b", "air"])


def make(cases, log=lambda line: None, **options):
    return body_guides(cases, options.pop("rule", rule_of(spacing=(2.0, 1.0, 1.0))), log, progress=False, **options)


def test_a_guide_covers_its_volume(cases):
    found = make(cases)
    assert list(found) == ["a", "air", "b"] and len(found) == 3
    assert found["a"].body.shape == (8, 10, 10) and found["a"].cell == (2.0, 4.0, 4.0)
    for name in ("a", "b"):
        points = np.stack(np.meshgrid(*[np.arange(n) for n in cases.shape(name)], indexing="ij"), axis=-1)
        expected = np.zeros(cases.shape(name), dtype=bool)
        expected[:, 8:24, 8:28] = True
        assert (found[name].in_body(points) == expected).mean() > 0.97
    with pytest.raises(KeyError):
        found["c"]


def test_what_was_found_is_said_once(cases):
    lines: list[str] = []
    assert make(cases, lines.append)["air"].body.all()
    assert len(lines) == 2 and "-500 HU" in lines[0] and "1 of 3 cases (first: air)" in lines[1]
    # Cached masks say the same.
    make(cases, lines.append)
    assert lines[2:] == lines[:2]


def made_cases(monkeypatch) -> Counter:
    """Counts the cases that are looked at."""
    made: Counter = Counter()
    original = guides._coarse

    def count(cases, identifier, rule):
        made[identifier] += 1
        return original(cases, identifier, rule)

    monkeypatch.setattr(guides, "_coarse", count)
    return made


def test_masks_are_made_once_and_beside_the_cases(cases, monkeypatch):
    made = made_cases(monkeypatch)
    first = make(cases)
    again = make(cases)
    assert made == {"a": 1, "b": 1, "air": 1}
    assert guide_folder(cases.folder) == cases.folder.parent / "plans_3d_body"
    assert {f.name for f in guide_folder(cases.folder).iterdir()} == {"a.npz", "b.npz", "air.npz"}
    assert {f.suffix for f in cases.folder.iterdir()} == {".b2nd"}
    np.testing.assert_array_equal(first["a"].body, again["a"].body)


def test_masks_of_other_plans_of_changed_cases_and_damaged_ones_are_made_again(cases, monkeypatch, write):
    make(cases)
    made = made_cases(monkeypatch)
    make(cases, rule=rule_of(clip=(-175.0, 250.0)))
    assert made == {"a": 1, "b": 1, "air": 1}
    rule = rule_of(spacing=(2.0, 1.0, 1.0))
    make(cases, rule=rule)
    made.clear()
    (guide_folder(cases.folder) / "a.npz").write_bytes(b"half a file")
    write(cases.folder, "b", preprocessed(np.full((18, 20, 22), 40.0))[None])
    old = guide_folder(cases.folder) / "air.npz"
    os.utime(old, (0, 0))
    found = make(cases, rule=rule)
    assert made == {"a": 1, "b": 1, "air": 1}
    assert found["a"].body.shape == (8, 10, 10) and found["b"].body.shape == (9, 5, 6)


def test_ranks_share_the_work_and_each_has_all_masks(cases, monkeypatch):
    made = made_cases(monkeypatch)
    order: list[str] = []
    original = guides._cached
    monkeypatch.setattr(guides, "_cached", lambda f, c, i, k: order.append(i) or original(f, c, i, k))
    assert len(make(cases, share=(1, 2))) == 3
    # Its own share first: "air" of (a, air, b).
    assert order[0] == "air" and made == {"a": 1, "b": 1, "air": 1}
    assert len(make(cases, share=(0, 2))) == 3 and made == {"a": 1, "b": 1, "air": 1}


def test_several_workers_find_the_same(cases):
    alone = {name: guide.body for name, guide in make(cases).items()}
    for file in guide_folder(cases.folder).iterdir():
        file.unlink()
    for name, guide in make(cases, workers=2).items():
        np.testing.assert_array_equal(guide.body, alone[name])


def test_guides_travel_to_workers(cases):
    found = make(cases)
    copy = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(copy["b"].body, found["b"].body)
    assert len(pickle.dumps(found)) < 500


def test_a_folder_that_cannot_be_written_is_named(cases, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(f"no: {self}")

    monkeypatch.setattr(type(cases.folder), "mkdir", refuse)
    with pytest.raises(PermissionError, match="plans_3d_body, which cannot be written"):
        make(cases)


def test_values_that_are_not_finite_do_not_stop_the_masks(tmp_path, write):
    """The check of the data set names such cases; the masks are made before."""
    image = np.full((1, 16, 16, 16), 1.0)
    image[0, 3, 3, 3] = np.nan
    write(tmp_path / "bad", "a", image)
    assert make(CaseDataset(tmp_path / "bad", ["a"]), rule=rule_of(["ZScoreNormalization"]))["a"].body.any()


def test_voxels_that_the_normalisation_left_out_are_not_body(tmp_path, write):
    image = np.zeros((2, 16, 32, 32))
    image[:, :, 8:24, 8:24] = np.random.default_rng(0).normal(size=(2, 16, 16, 16))
    write(tmp_path / "masked", "a", image)
    rule = rule_of(["ZScoreNormalization"] * 2, [True, True], spacing=(1.0, 1.0, 1.0))
    body = make(CaseDataset(tmp_path / "masked", ["a"]), rule=rule)["a"].body
    expected = np.zeros((4, 8, 8), dtype=bool)
    expected[:, 2:6, 2:6] = True
    np.testing.assert_array_equal(body, expected)


def test_what_resampling_left_of_the_zeros_is_not_body(tmp_path, write):
    """nnU-Net normalises, then resamples: its cubic splines ring far beyond the edge of the body."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    image = np.zeros((1, 24, 48, 48))
    image[:, :, 12:36, 12:36] = np.random.default_rng(0).normal(size=(1, 24, 24, 24))
    resampled = resample_data_or_seg_to_shape(image, (40, 80, 80), (1.0,) * 3, (0.6,) * 3, is_seg=False)
    assert (resampled != 0).mean() > 0.9
    write(tmp_path / "masked", "a", resampled)
    rule = rule_of(["ZScoreNormalization"], [True], spacing=(0.6, 0.6, 0.6))
    found = make(CaseDataset(tmp_path / "masked", ["a"]), rule=rule)["a"]
    points = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 80, 80)], indexing="ij"), axis=-1)
    expected = np.zeros((40, 80, 80), dtype=bool)
    expected[:, 20:60, 20:60] = True
    assert not found.body.all() and (found.in_body(points) == expected).mean() > 0.9
