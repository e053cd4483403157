"""Batches follow from their index alone, whatever loads them."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.loader import ViewDataset, batches, endless
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.region_sampler import RegionSampler
from nnssl_stc3d.views.samplers import TransformRanges, ViewSampler, to_sampled

VIEW = (8, 8, 8)


def region_sampler(**changes) -> RegionSampler:
    options = {"view_shape": VIEW, "spacing": (1.0, 1.0, 1.0), "in_plane": False, "grid": (1, 2, 2), "points": 8}
    return RegionSampler(**{**options, **changes})


@dataclass
class CornerSampler(ViewSampler):
    """Looks at the first voxels of each of several volumes without any transformation; draws nothing."""

    view_shape: tuple[int, int, int] = VIEW
    n_sources: int = 1
    n_views: int = 1

    def sample(self, shapes, rng):
        center = (np.asarray(self.view_shape) - 1) / 2
        return to_sampled(
            [center] * self.n_views, [np.eye(3)] * self.n_views, range(self.n_views), shapes, self.view_shape
        )


def make(folder, names=None, sampler=None, batch_size=2, intensity=1.0, seed=(0, 0, 0)) -> ViewDataset:
    cases = CaseDataset(folder, names or CaseDataset.list_identifiers(folder))
    return ViewDataset(cases, sampler or region_sampler(), batch_size, intensity, seed)


def tensors(loaded):
    return [loaded.batch.views, *loaded.batch.specs, *(loaded.batch.targets[k] for k in sorted(loaded.batch.targets))]


def assert_same(a, b):
    assert a.cases == b.cases
    assert a.batch.targets.keys() == b.batch.targets.keys()
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_bit_equal_with_any_number_of_workers(folder, workers):
    dataset = make(folder)
    expected = [dataset[i] for i in range(5)]
    # Other random numbers before and between must not matter.
    torch.rand(3)
    np.random.rand(3)
    loaded = list(batches(dataset, 0, 5, workers, pin_memory=False))
    assert len(loaded) == 5
    for a, b in zip(expected, loaded, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restart_continues_with_the_batches_that_would_have_come(folder, workers):
    whole = list(batches(make(folder), 0, 6, 0, pin_memory=False))
    rest = list(batches(make(folder), 3, 6, workers, pin_memory=False))
    for a, b in zip(whole[3:], rest, strict=True):
        assert_same(a, b)


def test_batches_differ_by_index_and_by_every_part_of_the_seed(folder):
    reference = make(folder)[0].batch.views
    others = [make(folder)[1]] + [make(folder, seed=s)[0] for s in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for other in others:
        assert not torch.equal(reference, other.batch.views)


def test_loading_leaves_the_global_random_state_alone(folder):
    """A resumed run makes its loader after it restored torch's state: drawing from it there would change dropout."""
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset = make(folder)
    list(batches(dataset, 0, 2, 0, pin_memory=False))
    list(batches(dataset, 0, 2, 1, pin_memory=False, persistent=True))
    dataset.preview(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_no_case_comes_twice_in_a_batch_as_long_as_there_are_enough(folder):
    dataset = make(folder, batch_size=8)
    for index in range(4):
        names = [n for names in dataset[index].cases for n in names]
        assert sorted(names) == [f"case_{i}" for i in range(8)]


def test_every_case_is_used_over_time(folder):
    dataset = make(folder, batch_size=2, intensity=0)
    seen = {n for i in range(40) for names in dataset[i].cases for n in names}
    assert seen == {f"case_{i}" for i in range(8)}


def test_fewer_cases_than_the_batch_are_repeated_evenly(folder):
    names = [n for names in make(folder, ["case_0", "case_1"], batch_size=5)[0].cases for n in names]
    assert sorted(names.count(n) for n in set(names)) == [2, 3]


@pytest.mark.parametrize("cases", [2, 3])
def test_the_volumes_of_a_sample_differ_even_when_cases_are_repeated(folder, cases):
    dataset = make(folder, [f"case_{i}" for i in range(cases)], CornerSampler(n_sources=2, n_views=2), batch_size=4)
    for index in range(10):
        assert all(len(set(names)) == 2 for names in dataset[index].cases)


def test_the_names_of_a_batch_are_those_of_the_voxels(folder):
    loaded = make(folder, intensity=0, batch_size=4)[0]
    for views, names in zip(loaded.batch.views, loaded.cases, strict=True):
        # The fixture adds 1000 times the case's number.
        assert round(float(views.mean()) / 1000) == int(names[0].removeprefix("case_"))


def test_views_of_several_sources_show_their_own_source(folder):
    loaded = make(folder, sampler=CornerSampler(n_sources=3, n_views=3), batch_size=2, intensity=0)[0]
    assert [len(names) for names in loaded.cases] == [3, 3]
    for views, names in zip(loaded.batch.views, loaded.cases, strict=True):
        shown = [round(float(v.mean()) / 1000) for v in views]
        assert shown == [int(n.removeprefix("case_")) for n in names]


def test_a_method_that_needs_more_cases_than_there_are_is_refused(folder):
    with pytest.raises(ValueError, match="looks at 3 cases at once, got 2"):
        make(folder, ["case_0", "case_1"], sampler=CornerSampler(n_sources=3, n_views=3))


def test_untransformed_views_are_the_voxels_themselves_in_every_channel(tmp_path, write):
    image = write(tmp_path, "a", np.random.default_rng(1).normal(size=(3, 16, 17, 18)))
    loaded = make(tmp_path, sampler=CornerSampler(), batch_size=1, intensity=0)[0]
    assert loaded.batch.views.shape == (1, 1, 3, *VIEW)
    np.testing.assert_allclose(loaded.batch.views[0, 0], image[:, :8, :8, :8], atol=1e-5)


def test_views_larger_than_the_smallest_volume_work(tmp_path, write):
    write(tmp_path, "a", np.random.default_rng(1).normal(size=(1, 16, 16, 16)))
    sampler = region_sampler(view_shape=(32, 32, 32), base_scale=1.5, transforms=TransformRanges(scaling=(0.5, 2)))
    views = make(tmp_path, sampler=sampler, batch_size=1, intensity=0)[0].batch.views
    assert torch.isfinite(views).all()
    # Zero padding would show as planes of constant value.
    assert float(views.std((-3, -2, -1)).min()) > 0.1
    assert not (views == 0).flatten(1).all(0).any()


def test_views_are_augmented_one_by_one(folder):
    # One sample: augmentation draws from the same generator as the next sample's views.
    plain, augmented = (make(folder, batch_size=1, intensity=strength)[0] for strength in (0, 3.0))
    assert plain.cases == augmented.cases
    assert torch.equal(plain.batch.specs.center, augmented.batch.specs.center)
    difference = (plain.batch.views - augmented.batch.views).abs().flatten(2).amax(-1)
    assert (difference > 0).float().mean() > 0.5


def test_a_sampler_may_leave_its_first_views_plain(folder):
    sampler = region_sampler()
    sampler.n_plain = 2
    plain, augmented = (make(folder, sampler=sampler, batch_size=1, intensity=s)[0].batch.views[0] for s in (0, 3.0))
    assert torch.equal(plain[:2], augmented[:2]) and not torch.equal(plain[2:], augmented[2:])


def test_preview_is_the_first_sample_of_the_batch(folder):
    dataset = make(folder)
    sample, names = dataset.preview(3)
    loaded = dataset[3]
    assert names == loaded.cases[0]
    assert torch.equal(sample.views, loaded.batch.views[0])
    assert torch.equal(sample.specs.center, loaded.batch.specs.center[0])
    assert len(sample.sources) == 1 and sample.sources[0].ndim == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_reaches_the_caller_with_its_traceback_and_the_case(folder, write, workers):
    write(folder, "broken", np.full((1, 20, 20, 20), np.nan))
    loader = batches(make(folder, ["broken"], batch_size=1), 0, 3, workers, pin_memory=False)
    with pytest.raises(ValueError, match="broken holds NaN or infinite values") as error:
        next(iter(loader))
    if workers:
        assert "Traceback (most recent call last)" in str(error.value)
        assert "in _sample" in str(error.value)


def test_a_case_that_disappears_while_training_is_named(folder):
    dataset = make(folder, ["case_0"], batch_size=1)
    (folder / "case_0.b2nd").unlink()
    with pytest.raises(FileNotFoundError, match="case_0"):
        next(iter(batches(dataset, 0, 1, 1, pin_memory=False)))


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_repeats_the_same_batches(folder, workers):
    dataset = make(folder, intensity=0)
    loader = endless(batches(dataset, 0, 2, workers, pin_memory=False, persistent=True))
    loaded = [next(loader) for _ in range(5)]
    for index, batch in enumerate(loaded):
        assert_same(batch, dataset[index % 2])


def test_pickles_and_works_with_spawned_workers(folder):
    dataset = make(folder)
    copy = pickle.loads(pickle.dumps(dataset))
    assert_same(copy[2], dataset[2])


def test_workers_are_gone_when_the_loader_is(folder):
    before = set(multiprocessing.active_children())
    iterator = iter(batches(make(folder), 0, 50, 1, pin_memory=False))
    next(iterator)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 1
    del iterator
    for process in started:
        process.join(10)
        assert not process.is_alive()


@dataclass
class GuidedSampler(CornerSampler):
    """Notes how many cells of each guide are body, and a random number."""

    guided: bool = True

    def sample(self, shapes, rng, guides=()):
        found = super().sample(shapes, rng)
        cells = torch.tensor([guide.body.sum() for guide in guides])
        return found._replace(targets={"cells": cells, "drawn": torch.tensor(rng.uniform())})

    def targets(self, specs, rng):
        return {"samples": torch.tensor(len(specs.source))}


def guides_of(names) -> dict[str, Guide]:
    """Case i gets i + 1 cells of body."""
    counts = {name: int(name.removeprefix("case_")) + 1 for name in names}
    return {name: Guide((3.0, 3.0, 3.0), np.ones((1, 1, count), dtype=bool)) for name, count in counts.items()}


@pytest.mark.parametrize("workers", [0, 1])
def test_guided_samplers_get_the_guides_of_their_cases_and_their_targets_are_stacked(folder, workers):
    cases = CaseDataset(folder, CaseDataset.list_identifiers(folder))
    sampler = GuidedSampler(n_sources=2, n_views=2)
    dataset = ViewDataset(cases, sampler, 3, 0.0, (0, 0, 0), guides_of(cases.identifiers))
    for loaded in batches(dataset, 0, 3, workers, pin_memory=False):
        expected = [[int(name.removeprefix("case_")) + 1 for name in names] for names in loaded.cases]
        assert loaded.batch.targets["cells"].tolist() == expected
        assert loaded.batch.targets["drawn"].shape == (3,) and loaded.batch.targets["drawn"].unique().numel() == 3
        assert loaded.batch.targets["samples"] == 3


def test_a_guided_sampler_without_guides_is_refused(folder):
    with pytest.raises(ValueError, match="GuidedSampler samples with guides, got none"):
        make(folder, sampler=GuidedSampler())


def test_other_samplers_are_not_bothered_with_guides(folder):
    cases = CaseDataset(folder, CaseDataset.list_identifiers(folder))
    loaded = ViewDataset(cases, CornerSampler(), 2, 0.0, (0, 0, 0), guides_of(cases.identifiers))[0]
    assert loaded.batch.targets == {}
