"""Reading preprocessed cases: what is read, and what is refused by name."""

from __future__ import annotations

import pickle

import blosc2
import numpy as np
import pytest

from nnssl_stc3d.data.dataset import CaseDataset

VIEW = (32, 32, 32)


def test_missing_folder_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*case_0.*nnUNetv2_plan_and_preprocess"):
        CaseDataset(tmp_path / "nowhere", ["case_0"])


def test_missing_cases_are_counted_and_named(folder):
    with pytest.raises(FileNotFoundError, match=r"2 cases are missing, the first is case_98"):
        CaseDataset(folder, ["case_0", "case_99", "case_98"])


def test_no_case_at_all_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="holds no case"):
        CaseDataset(folder, [])


def test_segmentations_are_not_listed_as_cases(folder):
    assert CaseDataset.list_identifiers(folder) == [f"case_{i}" for i in range(8)]


def test_order_of_the_identifiers_does_not_matter(folder):
    assert (
        CaseDataset(folder, ["case_3", "case_1"]).identifiers == CaseDataset(folder, ["case_1", "case_3"]).identifiers
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_box_is_that_part_of_every_channel(tmp_path, write, channels):
    image = write(tmp_path, "a", np.random.default_rng(0).normal(size=(channels, 20, 21, 22)))
    cases = CaseDataset(tmp_path, ["a"])
    assert cases.shape("a") == (20, 21, 22)
    box = cases.read("a", ((2, 0, 5), (9, 21, 6)))
    assert box.dtype == np.float32
    np.testing.assert_array_equal(box, image[:, 2:9, :, 5:6])


def test_a_box_decompresses_only_the_blocks_it_touches(tmp_path, write):
    image = write(
        tmp_path,
        "a",
        np.random.default_rng(0).normal(size=(1, 64, 64, 64)),
        chunks=(1, 16, 16, 16),
        blocks=(1, 8, 8, 8),
    )
    file = tmp_path / "a.b2nd"
    assert blosc2.open(str(file)).chunks == (1, 16, 16, 16)
    # Chunks far from the box are overwritten: who reads them gets an error or other voxels.
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 4] = bytes(len(content) // 4)
    file.write_bytes(content)
    cases = CaseDataset(tmp_path, ["a"])
    np.testing.assert_array_equal(cases.read("a", ((0, 0, 0), (12, 12, 12))), image[:, :12, :12, :12])
    with pytest.raises(Exception):  # noqa: B017  (whatever blosc2 says; the point is that it looked)
        np.testing.assert_array_equal(cases.read("a", ((0, 0, 0), (64, 64, 64))), image)


def test_cases_are_opened_lazily(folder, monkeypatch):
    opened = []
    original = blosc2.open
    monkeypatch.setattr(blosc2, "open", lambda path, **options: opened.append(path) or original(path, **options))
    cases = CaseDataset(folder, CaseDataset.list_identifiers(folder))
    assert opened == []
    cases.read("case_4", ((0, 0, 0), (4, 4, 4)))
    assert len(opened) == 1 and opened[0].endswith("case_4.b2nd")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_reading_what_is_not_finite_names_the_case(folder, write, value):
    image = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    image[0, 3, 4, 5] = value
    write(folder, "broken", image)
    cases = CaseDataset(folder, ["broken", "case_0"])
    cases.read("broken", ((4, 0, 0), (20, 20, 20)))
    with pytest.raises(ValueError, match=r"broken holds NaN or infinite values(.|\n)*preprocess again"):
        cases.read("broken", ((0, 0, 0), (20, 20, 20)))


def test_check_accepts_good_cases(folder):
    CaseDataset(folder, CaseDataset.list_identifiers(folder)).check(VIEW, progress=False)


def test_check_names_every_unusable_case_at_once(folder, write):
    good = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    hidden = good.copy()
    hidden[0, 1, 2, 3] = np.nan
    write(folder, "hidden_nan", hidden)
    write(folder, "flat", np.full((1, 20, 20, 20), 3.0))
    write(folder, "thin", good[:, :15])
    cases = CaseDataset(folder, ["case_0", "hidden_nan", "flat", "thin"])
    with pytest.raises(ValueError) as error:
        cases.check(VIEW, progress=False)
    message = str(error.value)
    assert message.startswith("3 case(s)")
    assert "hidden_nan holds NaN" in message
    assert "flat is constant" in message
    assert "thin: volumes need at least (16, 16, 16) voxels" in message and "(15, 20, 20)" in message
    assert "case_0" not in message


def test_ranks_share_the_cases_and_find_what_one_would(folder, write):
    names = ["case_0", *(f"flat_{i}" for i in range(5))]
    for name in names[1:]:
        write(folder, name, np.full((1, 20, 20, 20), 3.0))
    cases = CaseDataset(folder, names)
    alone = cases.problems(VIEW, progress=False)
    shares = [cases.problems(VIEW, progress=False, workers=2, share=(rank, 2)) for rank in (0, 1)]
    assert [len(found) for found in shares] == [2, 3]
    assert sorted(shares[0] + shares[1]) == alone == [f"flat_{i} is constant" for i in range(5)]


def test_a_volume_of_16_voxels_is_accepted(tmp_path, write):
    write(tmp_path, "smallest", np.random.default_rng(0).normal(size=(1, 16, 16, 16)))
    CaseDataset(tmp_path, ["smallest"]).check(VIEW, progress=False)


def test_a_flat_volume_is_accepted_for_flat_views(folder, write):
    """The folder holds volumes that are larger along every axis."""
    write(folder, "thick_slices", np.random.default_rng(0).normal(size=(1, 8, 20, 20)))
    cases = CaseDataset(folder, ["case_0", "thick_slices"])
    cases.check((16, 32, 32), progress=False)
    with pytest.raises(ValueError, match=r"(?s)^1 case.*thick_slices.*\(9, 16, 16\) voxels .*\(18, 32, 32\)"):
        cases.check((18, 32, 32), progress=False)


def test_large_data_are_checked_in_central_planes(tmp_path, write, monkeypatch):
    monkeypatch.setattr("nnssl_stc3d.data.dataset._FULL_CHECK_BYTES", 0)
    image = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    image[0, 10, 2, 3] = np.nan
    write(tmp_path, "nan", image)
    write(tmp_path, "flat", np.zeros((1, 20, 20, 20)))
    with pytest.raises(ValueError, match=r"(?s)flat is constant.*nan holds NaN"):
        CaseDataset(tmp_path, ["nan", "flat"]).check(VIEW, progress=False)


def test_pickles_without_open_files(folder):
    cases = CaseDataset(folder, ["case_0", "case_1"])
    before = cases.read("case_1", ((0, 0, 0), (5, 5, 5)))
    copy = pickle.loads(pickle.dumps(cases))
    assert copy.identifiers == cases.identifiers
    np.testing.assert_array_equal(copy.read("case_1", ((0, 0, 0), (5, 5, 5))), before)
