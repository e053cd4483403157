"""Whole runs of nnU-Net's own commands on tiny synthetic data, each made once and shared by the tests.

A process of nnU-Net takes seconds to start, so a run is made as rich as possible and looked at by many tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl_stc3d.cli.trainers import trainers_folder
from nnssl_stc3d.prepare.plans import SmallPlansConfig, write_small_plans

HERE = Path(__file__).resolve().parent
TIMEOUT = 500
CORES = 2
FOLD = 0
"""The fold that is finetuned."""

CT = "Dataset901_TinyCT"
"""6 cases of one channel and 1 mm, down to 16 voxels along an axis."""
MR = "Dataset902_TinyMR"
"""5 cases of two channels and 5 x 1 x 1 mm (z, y, x)."""

PLAIN, RESENC, ANISOTROPIC, ANISOTROPIC_RESENC = "tinyPlain", "tinyResEnc", "tinyAniso", "tinyAnisoResEnc"
"""Small plans: the first two for CT, the others for MR."""


@dataclass(frozen=True)
class Run:
    """A finished command."""

    returncode: int
    output: str
    folder: Path

    def ok(self) -> Run:
        assert self.returncode == 0, self.output[-6000:]
        return self


@dataclass(frozen=True)
class Workspace:
    """Folders and environment of nnU-Net."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        names = {name: str(self.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "TEST_"))},
            **names,
            "nnUNet_extTrainer": f"{trainers_folder()}{os.pathsep}{HERE / 'trainers'}",
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self, command: str, *arguments: object, **environment: str | None) -> subprocess.Popen[str]:
        """Starts a console command beside this Python; a value of None removes a variable."""
        merged: dict[str, str | None] = {**self.environment, **environment}
        return subprocess.Popen(
            [str(Path(sys.executable).parent / command), *map(str, arguments)],
            env={k: v for k, v in merged.items() if v is not None},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )

    def run(self, command: str, *arguments: object, **environment: str | None) -> Run:
        return self.finish(self.start(command, *arguments, **environment), self.root)

    def train(
        self, dataset: str, fold: str | int, trainer: str, plans: str, *arguments: object, **environment: str | None
    ) -> Run:
        """``nnUNetv2_train`` on the CPU."""
        process = self.start(
            "nnUNetv2_train", dataset, "3d_fullres", fold, "-tr", trainer, "-p", plans, "-device", "cpu", *arguments,
            **environment,
        )  # fmt: skip
        return self.finish(process, self.results(dataset, trainer, plans, fold))

    def predict(self, dataset: str, fold: str | int, trainer: str, plans: str, inputs: Path, output: Path) -> Run:
        """``nnUNetv2_predict`` on the CPU, with mirroring; keeps the probabilities."""
        return self.run(
            "nnUNetv2_predict", "-i", inputs, "-o", output, "-d", dataset, "-c", "3d_fullres", "-f", fold,
            "-tr", trainer, "-p", plans, "-device", "cpu", "-npp", 1, "-nps", 1,
            "--save_probabilities",
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], folder: Path) -> Run:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"timed out after {TIMEOUT} s:\n{output[-6000:]}") from None
        return Run(process.returncode, output, folder)

    def side_by_side(self, **tasks: Callable[[], Run]) -> dict[str, Run]:
        """Makes independent runs, one for each core at a time."""
        with ThreadPoolExecutor(CORES) as pool:
            futures = {name: pool.submit(task) for name, task in tasks.items()}
            return {name: future.result() for name, future in futures.items()}

    def preprocessed(self, dataset: str) -> Path:
        return self.root / "nnUNet_preprocessed" / dataset

    def results(self, dataset: str, trainer: str, plans: str, fold: str | int) -> Path:
        return self.root / "nnUNet_results" / dataset / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"


def write_raw_dataset(
    root: Path, name: str, channels: tuple[str, ...], spacing: tuple[float, ...], shapes: list[tuple[int, int, int]]
) -> None:
    """Writes noisy images of a bright ball in textured tissue; the ball is the label."""
    folder = root / "nnUNet_raw" / name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(len(channels))
    for case, shape in enumerate(shapes):
        axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
        center = rng.uniform(-0.3, 0.3, size=3)
        label = sum((a - c) ** 2 for a, c in zip(axes, center)) < 0.3
        for channel in range(len(channels)):
            tissue = 40 * np.sin(4 * axes[0] + case) + 30 * np.cos(5 * axes[1] * axes[2] + channel)
            image = tissue + 150 * label * (1 + channel) + rng.normal(0, 10, size=shape)
            _write(image.astype(np.float32), spacing, folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz")
        _write(label.astype(np.uint8), spacing, folder / "labelsTr" / f"case_{case}.nii.gz")
    description = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": {"background": 0, "ball": 1},
        "numTraining": len(shapes),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def _write(array: np.ndarray, spacing: tuple[float, ...], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing)))
    sitk.WriteImage(image, str(path))


def edit_plans(file: Path, **arch_kwargs: object) -> None:
    """Changes the architecture of plans of one configuration."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(arch_kwargs)
    file.write_text(json.dumps(plans))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """Both datasets, planned and preprocessed, with small plans of both architectures."""
    space = Workspace(tmp_path_factory.mktemp("nnunet"))
    (space.root / "nnUNet_results").mkdir()
    sizes = [(28, 30, 32), (30, 28, 26), (32, 32, 32), (16, 28, 30), (16, 16, 16), (30, 31, 29)]
    write_raw_dataset(space.root, CT, ("CT",), (1.0, 1.0, 1.0), sizes)
    write_raw_dataset(space.root, MR, ("T1", "T2"), (5.0, 1.0, 1.0), [(16, 40 + i, 44 - i) for i in range(5)])
    planned = [
        space.start(
            "nnUNetv2_plan_and_preprocess", "-d", dataset[7:10], "-c", "3d_fullres", "-np", 1, "-npfp", 1,
            "--verify_dataset_integrity", nnUNet_n_proc_DA="1",
        )
        for dataset in (CT, MR)
    ]  # fmt: skip
    for process in planned:
        space.finish(process, space.root).ok()
    # The plans share the preprocessed data of the default ones.
    space.run("nnUNetv2_plan_experiment", "-d", 901, 902, "-pl", "nnUNetPlannerResEncM", nnUNet_n_proc_DA="1").ok()
    plain, resenc = "nnUNetPlans", "nnUNetResEncUNetMPlans"
    for dataset, source, target, patch in (
        (CT, plain, PLAIN, (32, 32, 32)),
        (CT, resenc, RESENC, (32, 32, 32)),
        # Longer than three times its first axis: what nnU-Net calls anisotropic.
        (MR, plain, ANISOTROPIC, (12, 48, 48)),
        (MR, resenc, ANISOTROPIC_RESENC, (12, 48, 48)),
    ):
        small = SmallPlansConfig(base_features=4, max_features=16, patch_size=patch, batch_size=2, stages=3)
        write_small_plans(space.preprocessed(dataset), source, target, "3d_fullres", small)
    # Dropout draws from torch's generator at every step, so that a resume has to restore it.
    edit_plans(space.preprocessed(CT) / f"{PLAIN}.json", dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.1})
    return space


@pytest.fixture(scope="session")
def wandb_record(workspace) -> Path:
    """What the stand-in for W&B was told in the run ``plain``."""
    return workspace.root / "wandb.jsonl"


@pytest.fixture(scope="session")
def pretrained(workspace, wandb_record) -> dict[str, Run]:
    """One pretraining of each kind of plans."""
    one_step = "OneStepPretrainTrainer"
    stubs = os.pathsep.join(filter(None, (str(HERE / "stubs"), os.environ.get("PYTHONPATH"))))
    runs = workspace.side_by_side(
        plain=lambda: workspace.train(
            CT, "all", "ShortPretrainTrainer", PLAIN, nnUNet_compile="1", nnUNet_wandb_enabled="1",
            nnUNet_wandb_mode="offline", PYTHONPATH=stubs, TEST_WANDB_RECORD=str(wandb_record),
        ),
        resenc_paper=lambda: workspace.train(CT, FOLD, "ShortPaperPretrainTrainer", RESENC, nnUNet_n_proc_DA="2"),
        anisotropic=lambda: workspace.train(MR, "all", one_step, ANISOTROPIC, nnUNet_n_proc_DA="1"),
        not_saved=lambda: workspace.train(MR, FOLD, one_step, ANISOTROPIC_RESENC, "--disable_checkpointing"),
    )  # fmt: skip
    return {name: run.ok() for name, run in runs.items()}


@pytest.fixture(scope="session")
def finetuned(workspace, pretrained) -> dict[str, Run]:
    """Finetunings from these; ``foreign`` gets the weights of another dataset's plans and fails."""
    weights = {name: run.folder / "checkpoint_final.pth" for name, run in pretrained.items()}
    # Where plans of the MR data meet weights of the CT data.
    foreign = str(workspace.root / "foreign_results")
    return workspace.side_by_side(
        stock=lambda: workspace.train(
            CT, FOLD, "ShortStockTrainer", PLAIN, "-pretrained_weights", weights["plain"], "--npz"
        ),
        finetune=lambda: workspace.train(
            MR, FOLD, "ShortFinetuneTrainer", ANISOTROPIC, "-pretrained_weights", weights["anisotropic"], "--npz"
        ),
        encoder_only=lambda: workspace.train(
            CT, FOLD, "ShortFinetuneTrainer", RESENC, "-pretrained_weights", weights["resenc_paper"]
        ),
        foreign=lambda: workspace.train(
            MR, FOLD, "ShortFinetuneTrainer", ANISOTROPIC, "-pretrained_weights", weights["plain"],
            nnUNet_results=foreign,
        ),
    )  # fmt: skip
