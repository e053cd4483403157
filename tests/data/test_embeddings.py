"""Maps of embeddings: written whole, refused when they belong to other data, read as features of guides."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from nnssl_stc3d.data.embeddings import (
    RECORD,
    EmbeddedGuides,
    EmbeddingRecord,
    embedded_guides,
    embedding_folder,
    has_map,
    read_map,
    remove_maps,
    unit_features,
    write_map,
)
from nnssl_stc3d.views.guide import Guide

COMMAND = "nnssl_stc3d embed CHECKPOINT -d 801"
SPACING = (2.0, 1.0, 1.0)


def features(seed: int = 0, width: int = 4, grid=(3, 4, 5)) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(width, *grid))
    return drawn / np.linalg.norm(drawn, axis=0)


def record(**changes) -> EmbeddingRecord:
    options = {
        "plans": "nnUNetPlans", "configuration": "3d_fullres", "spacing": SPACING, "checkpoint": "some.pth",
        "checkpoint_sha256": "ab", "method": "vox2vec", "width": 4,
        "calibration": ("a", "b"),
    }  # fmt: skip
    return EmbeddingRecord(**(options | changes))


@pytest.fixture
def guides() -> dict[str, Guide]:
    """Of volumes of 6 x 8 x 10 voxels in cells of 2."""
    return {name: Guide((2.0, 2.0, 2.0), np.ones((3, 4, 5), dtype=bool)) for name in ("a", "b", "c")}


@pytest.fixture
def preprocessed(tmp_path):
    folder = tmp_path / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    embedding_folder(folder).mkdir()
    return folder


def embedded(guides, preprocessed, log=None, plans="nnUNetPlans", configuration="3d_fullres", spacing=SPACING):
    return embedded_guides(
        guides, preprocessed, COMMAND, plans, configuration, spacing, (log if log is not None else []).append
    )


# ---- files ----------------------------------------------------------------------------------------------------------


def test_maps_lie_beside_the_cases(preprocessed):
    assert embedding_folder(preprocessed).parent == preprocessed.parent
    assert embedding_folder(preprocessed).name == "nnUNetPlans_3d_fullres_embeddings"


def test_a_map_is_read_as_it_was_written(tmp_path):
    assert not has_map(tmp_path, "a")
    write_map(tmp_path, "a", features(), (6, 8, 10))
    assert has_map(tmp_path, "a")
    found = read_map(tmp_path, "a", (6, 8, 10))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, features(), atol=1e-3)
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    write_map(tmp_path, "a", features(1), (6, 8, 10))

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        write_map(tmp_path, "a", features(2), (6, 8, 10))
    np.testing.assert_allclose(read_map(tmp_path, "a"), features(1), atol=1e-3)
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def test_a_map_of_another_volume(tmp_path):
    write_map(tmp_path, "a", features(), (6, 8, 10))
    with pytest.raises(
        ValueError, match=r"a.npz was made for a volume of \(6, 8, 10\).*the case has \(6, 8, 11\).*--overwrite"
    ):
        read_map(tmp_path, "a", (6, 8, 11))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"no archive at all"])
def test_a_damaged_map_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as a map(.|\n)*'features'(.|\n)*embed CHECKPOINT"):
        read_map(tmp_path, "a")


def test_a_map_cannot_run_code(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_map(tmp_path, "a")


@pytest.mark.parametrize("array", [np.zeros((3, 4, 5)), np.zeros((0, 3, 4, 5)), np.zeros((2, 3, 4, 5), dtype=int)])
def test_other_arrays_are_refused(tmp_path, array):
    np.savez(tmp_path / "a.npz", features=array)
    with pytest.raises(ValueError, match=r"expected 'features' \(D, z, y, x\) of floats, got"):
        read_map(tmp_path, "a")


def test_removing_maps_leaves_other_files(tmp_path):
    write_map(tmp_path, "a", features(), (6, 8, 10))
    record().write(tmp_path)
    (tmp_path / "notes.txt").touch()
    remove_maps(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_the_record_survives(tmp_path):
    assert EmbeddingRecord.read(tmp_path) is None
    record().write(tmp_path)
    assert EmbeddingRecord.read(tmp_path) == record()


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"spacing": [1, 1, 1], "plans": "x"})])
def test_a_record_that_makes_no_sense(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ValueError, match=r"embeddings.json is not what nnssl_stc3d embed writes(.|\n)*--overwrite"):
        EmbeddingRecord.read(tmp_path)


# ---- grids ----------------------------------------------------------------------------------------------------------


def test_maps_of_other_grids_and_lengths_are_brought_to_the_guides():
    """A user's map may be finer or coarser and need not be normalised."""
    fine = features(grid=(6, 8, 10)).repeat(2, axis=1) * 5
    result = unit_features(fine, (3, 4, 5))
    assert result.shape == (4, 3, 4, 5) and result.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(result.astype(np.float32), axis=0), 1, atol=2e-3)
    for z, y, x in np.ndindex(3, 4, 5):
        place = fine[:, 4 * z + 2, 2 * y + 1, 2 * x + 1] / 5
        np.testing.assert_allclose(result[:, z, y, x], place, atol=2e-3)
    coarse = unit_features(features(grid=(1, 2, 1)), (3, 4, 5))
    assert (coarse[:, :, :2] == coarse[:, :1, :1, :1]).all() and (coarse[:, :, 2:] == coarse[:, :1, 3:, :1]).all()


def test_a_vector_of_zeros_stays_finite():
    found = features()
    found[:, 1, 1, 1] = 0
    result = unit_features(found, (3, 4, 5))
    assert np.isfinite(result).all() and (result[:, 1, 1, 1] == 0).all()


# ---- guides ---------------------------------------------------------------------------------------------------------


def test_guides_get_features_where_there_are_maps(guides, preprocessed):
    folder = embedding_folder(preprocessed)
    record().write(folder)
    for index, name in enumerate(("a", "b")):
        write_map(folder, name, features(index), (6, 8, 10))
    log: list[str] = []
    found = embedded(guides, preprocessed, log)
    np.testing.assert_allclose(found["b"].features, features(1), atol=2e-3)
    assert found["b"].cell == (2.0, 2.0, 2.0) and found["b"].body is guides["b"].body
    assert found["c"] is guides["c"] and sorted(found) == ["a", "b", "c"] and len(found) == 3
    assert "vox2vec, some.pth" in log[0]
    assert "1 of 3 cases have no map (first: c)" in log[1]
    travelled = pickle.loads(pickle.dumps(found))
    assert isinstance(travelled, EmbeddedGuides)
    np.testing.assert_array_equal(travelled["a"].features, found["a"].features)


def test_without_maps_the_log_says_what_happens_instead(guides, preprocessed):
    embedding_folder(preprocessed).rmdir()
    log: list[str] = []
    found = embedded(guides, preprocessed, log)
    assert all(found[name].features is None for name in guides)
    assert "box around the body" in log[0] and COMMAND in log[0] and len(log) == 1


def test_maps_of_a_user_need_no_record(guides, preprocessed):
    for name in guides:
        np.savez(embedding_folder(preprocessed) / f"{name}.npz", features=features(grid=(2, 2, 2)) * 7)
    log: list[str] = []
    found = embedded(guides, preprocessed, log)
    assert found["a"].features.shape == (4, 3, 4, 5)
    assert "given by the user" in log[0] and len(log) == 1


@pytest.mark.parametrize("changes", [{"spacing": (2.0, 1.0, 1.1)}, {"configuration": "3d_lowres"}])
def test_maps_of_another_plan_are_refused_with_the_command_that_remakes_them(guides, preprocessed, changes):
    folder = embedding_folder(preprocessed)
    record(plans="oldPlans", **changes).write(folder)
    write_map(folder, "a", features(), (6, 8, 10))
    with pytest.raises(ValueError) as caught:
        embedded(guides, preprocessed)
    message = str(caught.value)
    assert "oldPlans" in message and "2 x 1 x 1 mm" in message and f"{COMMAND} --overwrite" in message


def test_plans_that_share_their_data_share_their_maps(guides, preprocessed):
    folder = embedding_folder(preprocessed)
    record(plans="nnUNetPlans").write(folder)
    write_map(folder, "a", features(), (6, 8, 10))
    assert embedded(guides, preprocessed, plans="nnUNetSmallPlans")["a"].features is not None


def test_maps_of_different_widths_are_refused(guides, preprocessed):
    for name, width in (("a", 4), ("b", 5)):
        write_map(embedding_folder(preprocessed), name, features(width=width), (6, 8, 10))
    with pytest.raises(ValueError, match=r"different widths \(\[4, 5\]\).*embed CHECKPOINT"):
        embedded(guides, preprocessed)
