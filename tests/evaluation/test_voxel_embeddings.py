"""Embedding whole volumes: every cell from its own place, alike in every window and every case."""

from __future__ import annotations

import json
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnssl_stc3d.data.embeddings import EmbeddingRecord, embedding_folder, read_map
from nnssl_stc3d.evaluation.voxel_embeddings import (
    VoxelEmbedder,
    _assign,
    calibrated,
    embed_cases,
    load_embedder,
    sha256,
)
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.modules.heads import Projector

CPU = torch.device("cpu")
SMALL = {"view_shape": (8, 8, 8), "dense_dim": 8, "projector_hidden": 8, "projector_dim": 4}


class SeesPositions:
    """A method whose voxel embedding is what the image holds, at full and at half resolution."""

    voxel_head = nn.Identity()

    def to(self, device: torch.device) -> SeesPositions:
        return self

    def eval(self) -> SeesPositions:
        return self

    def voxel_maps(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool3d(images, 2)]


def positions(shape: tuple[int, ...]) -> np.ndarray:
    """An image of positions, ``(3, Z, Y, X)``, far from the origin so that directions tell them apart."""
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))


# ---- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "size", "window"), [(5, 20, 8), (7, 8, 8), (40, 37, 16), (1, 9, 8), (13, 100, 8)])
def test_every_cell_is_in_one_window_and_well_inside(cells, size, window):
    centers = (np.arange(cells) + 0.5) * size / cells - 0.5
    found = _assign(centers, size, window)
    seen = np.concatenate([np.arange(cells)[part] for _, part, _ in found])
    np.testing.assert_array_equal(seen, np.arange(cells))
    for start, part, inside in found:
        assert 0 <= start <= size - window
        np.testing.assert_allclose(inside + start, centers[part])
        assert (inside >= -0.5).all() and (inside <= window - 0.5).all()
        # Away from the volume's own ends, a quarter of the window lies on either side.
        free = (centers[part] > window / 4) & (centers[part] < size - 1 - window / 4)
        assert (np.abs(inside[free] - (window - 1) / 2) <= window / 4 + 1).all()


@pytest.mark.parametrize("shape", [(20, 17, 31), (8, 8, 8), (5, 30, 9)])
def test_cells_are_embedded_from_their_own_place(shape):
    """On an image of positions each cell's embedding is its own position, whichever window it was read in."""
    embedder = VoxelEmbedder(SeesPositions(), (8, 8, 8), CPU)
    grid = tuple(max(1, n // 3) for n in shape)
    result = embedder(positions(shape), grid).astype(np.float32)
    assert result.shape == (6, *grid)
    for cell in np.ndindex(*grid):
        place = (np.array(cell) + 0.5) * shape / np.array(grid) - 0.5
        expected = np.concatenate((place, place))
        got = result[(slice(None), *cell)]
        # The map of half resolution is cut at the borders of windows and volume, half a voxel of it.
        got = got * np.linalg.norm(expected) / np.linalg.norm(got)
        np.testing.assert_allclose(got, expected, atol=1.3)


def test_a_volume_smaller_than_the_window():
    embedder = VoxelEmbedder(SeesPositions(), (16, 16, 16), CPU)
    assert np.isfinite(embedder(positions((5, 20, 9)), (2, 5, 3)).astype(np.float32)).all()


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_a_calibrated_head_embeds_a_point_the_same_in_any_company():
    torch.manual_seed(0)
    head, rows = Projector(6, 8, 4, affine=True), torch.randn(50, 6) * 3 + 2
    fixed = calibrated(head, rows)
    with torch.no_grad():
        expected = head(rows)
        # Running variances are unbiased, those of a batch are not.
        assert torch.allclose(fixed(rows), expected, atol=0.05)
        assert torch.allclose(fixed(rows[:1]), fixed(rows)[:1], atol=1e-6)
    assert all(m.running_mean is None for m in head.modules() if isinstance(m, nn.BatchNorm1d))


def test_fewer_directions_keep_the_cosines():
    generator = np.random.default_rng(0)
    volume = generator.normal(size=(6, 12, 12, 12)).astype(np.float32)
    volume[3:] = 0.05 * volume[3:]
    embedder = VoxelEmbedder(SeesPositions(), (8, 8, 8), CPU)
    full = embedder(volume, (6, 6, 6)).reshape(12, -1).astype(np.float32)
    kept = embedder.calibrate([volume], [(6, 6, 6)], width=6)
    few = embedder(volume, (6, 6, 6)).reshape(6, -1).astype(np.float32)
    assert 0.98 < kept <= 1 and np.abs(full.T @ full - few.T @ few).max() < 0.1


def test_air_does_not_decide_what_no_similarity_is():
    """Scaled over the body alone, unrelated places of it have cosines about 0, however much air there is."""
    rng = np.random.default_rng(0)
    body = np.zeros((6, 6, 6), bool)
    body[:3, :4] = True
    inside = np.kron(body, np.ones((2, 2, 2), bool))
    volume = np.where(inside, rng.normal(5, 1, (6, 12, 12, 12)), 0.1 * rng.normal(size=(6, 12, 12, 12))).astype(
        np.float32
    )

    class Scaled(SeesPositions):
        voxel_head = nn.BatchNorm1d(12, affine=False, track_running_stats=False)

    def mean_cosine(bodies):
        embedder = VoxelEmbedder(Scaled(), (16, 16, 16), CPU)
        embedder.calibrate([volume], [(6, 6, 6)], 12, bodies)
        vectors = embedder(volume, (6, 6, 6)).astype(np.float32)[:, body]
        return float((vectors.T @ vectors).mean())

    assert abs(mean_cosine([body])) < 0.05 < 0.3 < mean_cosine(None)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_plans, tiny_network, tiny_dataset_json):
    """Function ``(method="STC3D", channels=1, **options) -> checkpoint`` of a pretraining."""

    def make(method: str = "STC3D", channels: int = 1, **options) -> dict:
        plans = tiny_plans(channels=channels)
        network = tiny_network(plans, channels)
        torch.manual_seed(0)
        if method == "STC3D":
            made = STC3D(network, STC3DConfig(**(SMALL | options)))
        else:
            made = Vox2Vec(network, Vox2VecConfig(**({"view_shape": (8, 8, 8), "head_dim": 8} | options)))
        state = made.state_dict()
        return {
            "network_weights": network.state_dict(),
            "method_state": {k: v for k, v in state.items() if not k.startswith("network.")},
            "method": {"name": made.name, "config": made.config.to_dict(), "transfers": list(made.transfers)},
            "plans": plans,
            "dataset_json": tiny_dataset_json(channels),
            "configuration": "3d_fullres",
        }

    return make


@pytest.mark.parametrize("method", ["STC3D", "vox2vec"])
def test_a_method_is_rebuilt_from_its_checkpoint(checkpoint, method):
    saved = checkpoint(method)
    embedder = load_embedder(saved, CPU)
    assert embedder.window == (8, 8, 8) and not embedder.method.training
    for key, value in embedder.method.state_dict().items():
        expected = saved["network_weights"] | saved["method_state"]
        assert torch.equal(value, expected[key.removeprefix("network.")]), key
    volume = np.random.default_rng(0).normal(size=(1, 12, 9, 10)).astype(np.float32)
    embedder.calibrate([volume], [(4, 3, 3)], width=4)
    result = embedder(volume, (4, 3, 3))
    assert result.shape == (4, 4, 3, 3) and result.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(result.astype(np.float32), axis=0), 1, atol=5e-3)


def test_embeddings_read_the_pyramid_that_was_trained(checkpoint):
    """Against the method's own head on its own maps, at the centre of one window."""
    embedder = load_embedder(checkpoint(dense_pyramid="decoder"), CPU)
    volume = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    embedder.calibrate([volume], [(4, 4, 4)], width=8)
    method = embedder.method
    with torch.no_grad():
        maps = method.voxel_maps(torch.from_numpy(volume)[None])
        # Cell (1, 2, 1) of 2 voxels is centred at (2.5, 4.5, 2.5): a voxel of the map of stride 2; between those of
        # stride 1; and a quarter of the way from one voxel of stride 4 (centres 1.5 and 5.5) to the other.
        coarse, middle, fine = (m[0] for m in maps)
        near = torch.tensor([0.75, 0.25])
        descriptor = torch.cat((
            torch.einsum("czyx,z,y,x->c", coarse, near, near.flip(0), near),
            middle[:, 1, 2, 1],
            fine[:, 2:4, 4:6, 2:4].mean((1, 2, 3)),
        ))  # fmt: skip
        expected = nn.functional.normalize(embedder.head(descriptor[None]), dim=1)[0]
    found = embedder(volume, (4, 4, 4))[:, 1, 2, 1].astype(np.float32)
    assert found @ (embedder.basis.T @ expected).numpy() == pytest.approx(1, abs=5e-3)


def test_checkpoints_that_embed_no_voxels(checkpoint):
    saved = checkpoint()
    with pytest.raises(ValueError, match=r"contrasts voxels \(vox2vec, STC3D\), got one of VoCo"):
        load_embedder(saved | {"method": saved["method"] | {"name": "VoCo"}}, CPU)
    with pytest.raises(ValueError, match="holds no heads"):
        load_embedder(saved | {"method_state": {}}, CPU)
    with pytest.raises(ValueError, match="without its voxel-level contrast"):
        load_embedder(checkpoint(dense_weight=0.0), CPU)
    broken = dict(list(saved["network_weights"].items())[1:])
    with pytest.raises(ValueError, match="do not fit its own plans"):
        load_embedder(saved | {"network_weights": broken}, CPU)


# ---- all cases ------------------------------------------------------------------------------------------------------


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    folder = tmp_path / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        for suffix in ("", "_seg"):
            image = rng.normal(size=(1, 16 + index, 18, 20)).astype(np.float32)
            blosc2.asarray(image, urlpath=str(folder / f"case_{index}{suffix}.b2nd"))
    return folder


def record_of(saved: dict, **changes) -> EmbeddingRecord:
    options = {
        "plans": "nnUNetPlans", "configuration": "3d_fullres", "spacing": (1.5, 1.0, 1.0), "checkpoint": "some.pth",
        "checkpoint_sha256": "ab", "method": saved["method"]["name"], "width": 4,
        "calibration": ("case_0", "case_1", "case_2"),
    }  # fmt: skip
    return EmbeddingRecord(**(options | changes))


def embed(saved: dict, preprocessed: Path, overwrite: bool = False, log=None, **changes) -> Path:
    embedder = load_embedder(saved, CPU)
    return embed_cases(
        embedder, preprocessed, saved["plans"], record_of(saved, **changes), "nnssl_stc3d embed some.pth -d 801",
        overwrite, (log if log is not None else []).append,
    )  # fmt: skip


def test_all_cases_are_embedded_at_about_four_mm(checkpoint, preprocessed):
    saved, log = checkpoint(), []
    folder = embed(saved, preprocessed, log=log)
    assert folder == embedding_folder(preprocessed)
    assert {f.name for f in preprocessed.iterdir()} == {f"case_{i}{s}.b2nd" for i in range(3) for s in ("", "_seg")}
    for index, depth in enumerate((16, 17, 18)):
        found = read_map(folder, f"case_{index}", (depth, 18, 20))
        assert found.shape == (4, round(depth * 1.5 / 4), 4, 5)
    assert EmbeddingRecord.read(folder) == record_of(saved)
    assert "3 of 3 cases to embed" in log[0] and "directions keep" in log[1]


def test_what_an_interrupted_run_left_is_kept(checkpoint, preprocessed):
    saved, log = checkpoint(), []
    folder = embed(saved, preprocessed)
    expected = {i: read_map(folder, f"case_{i}") for i in range(3)}
    kept = (folder / "case_0.npz").stat().st_mtime_ns
    (folder / "case_1.npz").unlink()
    (folder / "case_2.npz").write_bytes(b"half a file")
    embed(saved, preprocessed, log=log)
    assert "2 of 3 cases to embed" in log[0]
    assert (folder / "case_0.npz").stat().st_mtime_ns == kept
    for index, values in expected.items():
        np.testing.assert_array_equal(read_map(folder, f"case_{index}"), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_sha256": "cd"}, r"made with another checkpoint \(some.pth\)"),
        ({"spacing": (1.5, 1.0, 1.2)}, "were made for the plans nnUNetPlans"),
        ({"width": 3}, "made with --width 4, not 3"),
    ],
)
def test_maps_of_another_checkpoint_or_plan_are_refused_unless_overwritten(checkpoint, preprocessed, changes, message):
    saved = checkpoint()
    folder = embed(saved, preprocessed)
    with pytest.raises(ValueError, match=rf"(?s){message}.*embed some.pth -d 801 --overwrite"):
        embed(saved, preprocessed, **changes)
    assert EmbeddingRecord.read(folder) == record_of(saved)
    log: list[str] = []
    embed(saved, preprocessed, overwrite=True, log=log, **changes)
    assert "3 of 3" in log[0] and EmbeddingRecord.read(folder) == record_of(saved, **changes)


def test_a_case_that_is_added_is_embedded_like_the_others(checkpoint, preprocessed):
    saved, log = checkpoint(), []
    folder = embed(saved, preprocessed)
    names = [f"case_{i}" for i in range(3)]
    kept = {name: read_map(folder, name) for name in names}
    for suffix in ("", "_seg"):
        image = np.asarray(blosc2.open(str(preprocessed / f"case_1{suffix}.b2nd")))
        blosc2.asarray(3 * image + 1, urlpath=str(preprocessed / f"a_new_one{suffix}.b2nd"))
        blosc2.asarray(image, urlpath=str(preprocessed / f"copy_of_1{suffix}.b2nd"))
    embed(saved, preprocessed, log=log)
    assert "2 of 5 cases to embed" in log[0]
    np.testing.assert_array_equal(read_map(folder, "copy_of_1"), kept["case_1"])
    assert all((read_map(folder, name) == values).all() for name, values in kept.items())
    for suffix in ("", "_seg"):
        (preprocessed / f"case_1{suffix}.b2nd").unlink()
    with pytest.raises(ValueError, match="case case_1, which is not there any more"):
        embed(saved, preprocessed)


def test_maps_of_a_user_are_not_overwritten_unasked(checkpoint, preprocessed):
    folder = embedding_folder(preprocessed)
    folder.mkdir()
    np.savez(folder / "case_1.npz", features=np.ones((3, 2, 2, 2)))
    with pytest.raises(ValueError, match="did not make. Move them away"):
        embed(checkpoint(), preprocessed)
    assert not (folder / "embeddings.json").exists()


def test_the_hash_is_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_record_is_plain_json(checkpoint, preprocessed):
    folder = embed(checkpoint(), preprocessed)
    assert json.loads((folder / "embeddings.json").read_text(encoding="utf-8"))["spacing"] == [1.5, 1.0, 1.0]
