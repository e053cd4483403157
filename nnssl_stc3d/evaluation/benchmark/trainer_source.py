"""Trainers of a benchmark, which nnU-Net finds by name: methods and ways of finetuning of the chosen length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from nnssl_stc3d.evaluation.benchmark.methods import SCHEDULES, STOCK, Method, parse_schedule

# Pretrainings log their monitors as often as this, finetunings validate as often.
EPOCHS = 10
VALIDATION_STEPS = 5
CALIBRATION = "calibration"
CALIBRATION_STEPS = 20


def finetuning_trainer(schedule: str, length: int | str) -> str:
    """Name of the trainer of a finetuning schedule, with its learning rate if it has one, for a number of steps."""
    name, mirroring, rate = parse_schedule(schedule)
    ending = f"{length}steps" if isinstance(length, int) else length
    trainer = f"{SCHEDULES[name][1]}{'' if mirroring else 'NoMirroring'}_{ending}"
    return trainer if rate is None else f"{trainer}_lr{re.sub(r'[^0-9e]', '_', f'{rate:g}')}"


def trainers_source(
    steps: Mapping[Method, int],
    finetuning_steps: int,
    schedules: Iterable[str],
    calibration_steps: int = CALIBRATION_STEPS,
    longer: Mapping[str, int] | None = None,
) -> str:
    """Source of the module with the benchmark's trainers; nnU-Net finds trainers by name and takes no options.

    Args:
        steps: method -> steps of its pretraining; 0 while they are not known.
        finetuning_steps: of every finetuning.
        schedules: of the finetunings.
        calibration_steps: of each of the two epochs in which the seconds of a step are measured.
        longer: schedule -> steps of trainings from scratch that are longer; 0 while they are not known.
    """
    finetuning = {SCHEDULES[parse_schedule(schedule).name][0] for schedule in schedules}
    modules = sorted({m.module for m in steps} | finetuning - {""})
    lines = [
        '"""Trainers of one benchmark, written by nnssl_stc3d benchmark."""',
        "",
        "from dataclasses import replace",
        "",
        "import torch",
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer",
        "from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (",
        "    nnUNetTrainerNoMirroring,",
        ")",
        "",
        *(f"from nnssl_stc3d.trainers import {module}" for module in modules),
        "from nnssl_stc3d.evaluation.benchmark.continuing import ContinuingTrainer",
        "from nnssl_stc3d.views.samplers import TransformRanges",
    ]
    for method, number in steps.items():
        parent = f"{method.module}.{method.trainer}"
        # nnU-Net imports the module in the seeded process, so that every seed has views of its own.
        values = {"seed": "torch.initial_seed()"} | {key: repr(value) for key, value in method.changes}
        changes = ", ".join(f"{key}={value}" for key, value in values.items())
        config = [f"    config = replace({parent}.config, {changes})"]
        lines += _subclass(method.trainer_name(CALIBRATION), parent, 2, calibration_steps, 1) + config
        if number:
            name = method.trainer_name(f"{number}steps")
            lines += _subclass(name, parent, EPOCHS, number // EPOCHS, VALIDATION_STEPS) + config
    for schedule in schedules:
        lengths = {finetuning_trainer(schedule, n): (EPOCHS, n // EPOCHS) for n in (finetuning_steps, *_known(longer))}
        if longer is not None:
            lengths[finetuning_trainer(schedule, CALIBRATION)] = (2, calibration_steps)
        for name, length in lengths.items():
            lines += _finetuning_subclass(name, schedule, *length)
    return "\n".join(lines) + "\n"


def _known(longer: Mapping[str, int] | None) -> list[int]:
    return [steps for steps in (longer or {}).values() if steps]


def _finetuning_subclass(name: str, schedule: str, epochs: int, steps: int) -> list[str]:
    """Lines of a finetuning trainer of another length."""
    key, mirroring, rate = parse_schedule(schedule)
    module, trainer = SCHEDULES[key]
    # nnU-Net's own variant goes on top: it changes what the trainers below it have set up.
    parents = f"ContinuingTrainer, {'' if mirroring else 'nnUNetTrainerNoMirroring, '}"
    if key == STOCK:
        return _stock_subclass(name, parents + trainer, epochs, steps, rate)
    lines = _subclass(name, f"{parents}{module}.{trainer}", epochs, steps, VALIDATION_STEPS)
    return lines + ([] if rate is None else [f"    learning_rate = {rate!r}"])


def _stock_subclass(name: str, parents: str, epochs: int, steps: int, rate: float | None) -> list[str]:
    """Lines of nnU-Net's trainer of another length, which it has no class attributes for."""
    return [
        "",
        "",
        f"class {name}({parents}):",
        "    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device('cuda')):",
        "        super().__init__(plans, configuration, fold, dataset_json, device)",
        f"        self.num_epochs, self.num_iterations_per_epoch = {epochs}, {steps}",
        f"        self.num_val_iterations_per_epoch = {VALIDATION_STEPS}",
        *([] if rate is None else [f"        self.initial_lr = {rate!r}"]),
    ]


def _subclass(name: str, parents: str, epochs: int, steps: int, validation_steps: int) -> list[str]:
    """Lines of a trainer of another length."""
    return [
        "",
        "",
        f"class {name}({parents}):",
        f"    epochs, steps_per_epoch, validation_steps = {epochs}, {steps}, {validation_steps}",
    ]
