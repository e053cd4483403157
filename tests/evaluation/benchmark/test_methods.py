"""Methods and variants by name, and the trainers that are written for them."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, replace

import pytest
import torch

from nnssl_stc3d.evaluation.benchmark.methods import (
    ABLATIONS,
    METHODS,
    SCHEDULES,
    find_methods,
    parse_schedule,
    with_options,
)
from nnssl_stc3d.evaluation.benchmark.trainer_source import finetuning_trainer, trainers_source
from nnssl_stc3d.methods.stc3d import STC3DConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.fixture
def written(tmp_path):
    """Writes the trainers of methods and imports them as nnU-Net does, by file."""

    def write(steps, schedules=SCHEDULES, **more):
        file = tmp_path / "benchmark_trainers.py"
        file.write_text(trainers_source(steps, 30, schedules, **more), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("benchmark_trainers", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return write


def test_every_method_and_variant_becomes_a_trainer_of_its_length(written):
    torch.manual_seed(3)
    methods = list(METHODS.values()) + [m for ablation in ABLATIONS.values() for m in ablation]
    module = written(dict.fromkeys(methods, 250))
    for method in methods:
        trainer = getattr(module, method.trainer_name("250steps"))
        assert trainer.epochs * trainer.steps_per_epoch == 250
        parent = trainer.__mro__[1]
        assert parent.__name__ == method.trainer
        changed = {key: value for key, value in asdict(trainer.config).items() if value != asdict(parent.config)[key]}
        assert changed.keys() == {"seed", *dict(method.changes)}
        assert trainer.config.seed == 3  # that of the process
        assert all(getattr(trainer.config, key) == value for key, value in method.changes)
        assert getattr(module, method.trainer_name("calibration")).epochs == 2


def test_a_seed_that_is_set_stays(written):
    (method,) = with_options(find_methods(["stc3d"]), ["stc3d.seed=7"])
    assert getattr(written({method: 250}), method.trainer_name("250steps")).config.seed == 7


def test_finetunings_of_every_kind_have_the_same_number_of_steps(written):
    module = written({})
    for schedule, (_, parent) in SCHEDULES.items():
        trainer = getattr(module, finetuning_trainer(schedule, 30))
        # Saved and seeded epoch by epoch, on top of what the trainer does.
        assert [base.__name__ for base in trainer.__bases__] == ["ContinuingTrainer", parent]
        if schedule != "stock":
            assert trainer.epochs * trainer.steps_per_epoch == 30


def test_longer_finetunings_and_those_that_are_measured(written):
    schedules = ["stc3d@0.003", "stock"]
    module = written({}, schedules, longer={"stc3d@0.003": 120, "stock": 0})
    for length, (epochs, steps) in {30: (10, 3), 120: (10, 12), "calibration": (2, 20)}.items():
        trainer = getattr(module, finetuning_trainer("stc3d@0.003", length))
        assert (trainer.epochs, trainer.steps_per_epoch, trainer.learning_rate) == (epochs, steps, 0.003)
    assert hasattr(module, "nnUNetTrainer_calibration") and not hasattr(module, "nnUNetTrainer_0steps")


def test_finetunings_without_mirroring(written, tmp_path, monkeypatch, tiny_plans, tiny_dataset_json):
    """Neither in training nor at prediction; what else a trainer sets up stays."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    without = [f"{schedule}-no-mirroring@0.003" for schedule in SCHEDULES]
    module = written({}, [*SCHEDULES, *without])
    for schedule, mirrored in [(name, True) for name in SCHEDULES] + [(name, False) for name in without]:
        plans = {**tiny_plans(), "continue_training": False}
        trainer = getattr(module, finetuning_trainer(schedule, 30))(
            plans, "3d_fullres", 0, tiny_dataset_json(), torch.device("cpu")
        )
        rotation, _, initial, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert axes == trainer.inference_allowed_mirroring_axes == ((0, 1, 2) if mirrored else None), schedule
        assert rotation is not None and min(initial) > 0
        assert trainer.num_epochs * trainer.num_iterations_per_epoch == 30
        if not mirrored:
            assert trainer.initial_lr == 0.003


def test_unknown_ways_of_finetuning():
    with pytest.raises(ValueError, match="stc3d, stock.* each also with -no-mirroring .* got 'no-mirroring'"):
        parse_schedule("no-mirroring")
    assert parse_schedule("linear-probe-no-mirroring@0.1") == ("linear-probe", False, 0.1)


def test_a_learning_rate_of_ones_own(written, tmp_path, monkeypatch, tiny_plans, tiny_dataset_json):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    plans = {**tiny_plans(), "continue_training": False}
    schedules = ["stc3d", "stc3d@0.003", "stc3d@1e-5", "stock@0.5", "linear-probe@0.1"]
    module = written({}, schedules)
    names = [finetuning_trainer(schedule, 30) for schedule in schedules]
    assert len(set(names)) == len(schedules) and all(name.isidentifier() for name in names)
    # nnU-Net takes continue_training out of the plans that it gets.
    args = ("3d_fullres", 0, tiny_dataset_json(), torch.device("cpu"))
    trainers = [getattr(module, name)(dict(plans), *args) for name in names]
    assert [trainer.initial_lr for trainer in trainers] == [3e-4, 0.003, 1e-5, 0.5, 0.1]
    assert {trainer.num_epochs * trainer.num_iterations_per_epoch for trainer in trainers} == {30}


@pytest.mark.parametrize("text", ["stc3d@", "stc3d@fast", "stock@0", "stock@-1", "stock@nan", "stock@inf"])
def test_learning_rates_that_are_none(text):
    with pytest.raises(ValueError, match="expected a positive learning rate after @, such as st"):
        parse_schedule(text)


def test_variants_of_an_ablation_differ_and_share_what_is_equal():
    for name, methods in ABLATIONS.items():
        assert len({(m.trainer, m.changes) for m in methods}) == len(methods), name
        assert len({m.key for m in methods}) == len(methods), name
    alike = [m for ablation in ABLATIONS.values() for m in ablation if m.changes == (("reg_weight", 0.0),)]
    assert {m.key for m in alike if m.trainer == "STC3DPaperPretrainTrainer"} == {
        next(m for m in ABLATIONS["regulariser"] if m.changes).key
    }


def test_transformations_are_switched_one_by_one():
    ranges = {m.name: dict(m.changes).get("transforms") for m in ABLATIONS["transformations"]}
    default = STC3DConfig().transforms
    assert ranges["stc3d-no-transformation"] == TransformRanges.none()
    rotation = ranges["stc3d-rotation"]
    assert (rotation.rotation, rotation.translation, rotation.scaling) == (default.rotation, 0.0, (1.0, 1.0))


def test_options_of_a_method():
    (vox2vec, stc3d) = with_options(
        find_methods(["vox2vec", "scratch", "stc3d"]),
        ["vox2vec.points=100", "stc3d.bins=[1, 3, 3]", "stc3d.reg_form=eq12"],
    )
    assert vox2vec.changes == (("points", 100),) and vox2vec.name == "vox2vec"
    assert dict(stc3d.changes) == {"bins": (1, 3, 3), "reg_form": "eq12"}
    assert vox2vec.key != "vox2vec" and vox2vec.described() == "vox2vec (points=100)"
    assert METHODS["vox2vec"].changes == ()


def test_an_option_of_a_part_leaves_the_others(written):
    options = ["stc3d.transforms.rotation=15", "stc3d.transforms.scaling=[0.9, 1.1]", "pimpic.transforms.rotation=15"]
    stc3d, pimpic = with_options(find_methods(["stc3d", "pimpic"]), options)
    expected = TransformRanges(rotation=15, scaling=(0.9, 1.1))
    assert stc3d.config().transforms == expected != STC3DConfig().transforms
    assert pimpic.config().transforms == replace(TransformRanges.none(), rotation=15), "what the method had before"
    assert getattr(written({stc3d: 250}), stc3d.trainer_name("250steps")).config.transforms == expected


@pytest.mark.parametrize("option", ["points=100", "voco.points=100", "stc3d.points", "stc3d."])
def test_options_that_cannot_be_read(option):
    with pytest.raises(ValueError, match="METHOD.OPTION=VALUE with a method of stc3d"):
        with_options(find_methods(["stc3d"]), [option])


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("stc3d.pints=1", "pints"),
        ("stc3d.grid=(1, 1)", "three positive numbers"),
        ("stc3d.transforms.rotation=200", "0..180 degrees, got 200"),
        ("stc3d.transforms.turn=1", "turn"),
        ("stc3d.grid.rotation=1", "dataclass"),
        ("stc3d.pints.rotation=1", "pints"),
    ],
)
def test_options_that_a_method_does_not_have(option, reason):
    with pytest.raises(ValueError, match=rf"stc3d.*{reason}"):
        with_options(find_methods(["stc3d"]), [option])


@pytest.mark.parametrize("names", [[], ["stc3d", "stc3d"], ["mae"], [""]])
def test_unknown_methods(names):
    with pytest.raises(ValueError, match="different methods of scratch, scratch-longer, stc3d.*or variants"):
        find_methods(names)
