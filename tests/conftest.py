"""Fixtures that need no nnU-Net run: tiny plans, the networks that belong to them, and checkpoints of both kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

# Two processes and many small networks: threads would only get in each other's way.
torch.set_num_threads(1)

CONFIGURATION = "3d_fullres"
ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")


def make_plans(architecture: str = "PlainConvUNet", channels: int = 1, **changes: Any) -> dict[str, Any]:
    """Makes plans of a three-stage U-Net of 4, 8 and 8 features; ``changes`` go into ``arch_kwargs``."""
    convolutions = (
        {"n_conv_per_stage": [2, 2, 2]} if architecture == "PlainConvUNet" else {"n_blocks_per_stage": [1, 1, 2]}
    )
    arch_kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        **convolutions,
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "spacing": [1.5, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{architecture}",
            "arch_kwargs": {**arch_kwargs, **changes},
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return copy.deepcopy(
        {
            "dataset_name": "Dataset801_Unlabelled",
            "plans_name": "nnUNetPlans",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {},
            "configurations": {CONFIGURATION: configuration},
        }
    )


def make_network(plans: dict[str, Any], channels: int = 1, classes: int = 3, seed: int = 0) -> nn.Module:
    """Builds the network of ``make_plans`` as nnU-Net's trainer does, with weights that depend on the seed."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    torch.manual_seed(seed)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        allow_init=True,
        deep_supervision=True,
    )
    # Norms and biases start as constants, so that swapped ones would look equal.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return network


def make_dataset_json(channels: int = 1) -> dict[str, Any]:
    """Makes a dataset.json with background and two classes."""
    return {
        "channel_names": {str(channel): "CT" for channel in range(channels)},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }


def make_pretraining_checkpoint(
    plans: dict[str, Any],
    channels: int = 1,
    transfers: tuple[str, ...] = ("encoder", "decoder"),
    seed: int = 1,
) -> dict[str, Any]:
    """Makes what a pretraining trainer writes, with a head and an optimiser that an export has to drop."""
    from nnssl_stc3d.transfer.adaptation_plan import build_adaptation_plan

    network = make_network(plans, channels, classes=2, seed=seed)
    return {
        "network_weights": network.state_dict(),
        "method_state": {"head.weight": torch.ones(4, 4)},
        "method": {"name": "STC3D", "config": {"temperature": 0.2}, "transfers": list(transfers)},
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"train_losses": [1.0, 0.5]},
        "_best_ema": 0.5,
        "current_epoch": 7,
        "init_args": {"configuration": CONFIGURATION, "fold": "all"},
        "trainer_name": "STC3DPretrainTrainer",
        "inference_allowed_mirroring_axes": [0, 1, 2],
        "rng_state": {"torch": torch.get_rng_state()},
        "plans": plans,
        "dataset_json": make_dataset_json(channels),
        "configuration": CONFIGURATION,
        "versions": {"nnssl_stc3d": "0.1.0"},
        "nnssl_adaptation_plan": build_adaptation_plan(plans, CONFIGURATION, channels, network),
        "citations": [],
    }


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the U-Net classes that nnU-Net's planners write."""
    return request.param


@pytest.fixture
def configuration() -> str:
    """Name of the configuration in ``tiny_plans``."""
    return CONFIGURATION


@pytest.fixture
def tiny_plans() -> Callable[..., dict[str, Any]]:
    """Function ``(architecture, channels=1, **arch_kwargs) -> plans``."""
    return make_plans


@pytest.fixture
def tiny_network() -> Callable[..., nn.Module]:
    """Function ``(plans, channels=1, classes=3, seed=0) -> U-Net``."""
    return make_network


@pytest.fixture
def tiny_dataset_json() -> Callable[..., dict[str, Any]]:
    """Function ``(channels=1) -> dataset.json``."""
    return make_dataset_json


@pytest.fixture
def pretraining_checkpoint() -> Callable[..., dict[str, Any]]:
    """Function ``(plans, channels=1, transfers=("encoder", "decoder"), seed=1) -> checkpoint``."""
    return make_pretraining_checkpoint


@pytest.fixture
def repository() -> Path:
    """Root of the repository that the tests lie in."""
    return Path(__file__).resolve().parents[1]


def make_ct(seed: int = 0, shape: tuple[int, int, int] = (12, 16, 20)) -> np.ndarray:
    """A bright ellipsoid with a lung in air, (z, y, x) in HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    array = np.full(shape, -1000.0)
    array[(y / 0.8) ** 2 + (x / 0.8) ** 2 < 1] = 40
    array[(y / 0.3) ** 2 + (x / 0.3) ** 2 + (z / 0.5) ** 2 < 1] = -850
    return (array + rng.normal(0, 10, shape)).astype(np.int16)


@pytest.fixture
def ct() -> Callable[..., np.ndarray]:
    """Function ``(seed=0, shape=(12, 16, 20)) -> (z, y, x) int16 in HU``."""
    return make_ct


@pytest.fixture
def save() -> Callable[..., Path]:
    """Function ``(path, array, spacing=(1, 1.5, 2), origin=(5, -6, 7), direction=identity) -> path``; (x, y, z)."""

    def write(path, array, spacing=(1.0, 1.5, 2.0), origin=(5.0, -6.0, 7.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(array, isVector=False)
        if array.ndim == 3:
            image.SetSpacing(spacing)
            image.SetOrigin(origin)
            image.SetDirection(direction)
        sitk.WriteImage(image, str(path), path.name.endswith(("gz", "nrrd", "mha")))
        return path

    return write


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """nnU-Net's folder of raw data, empty; the variables name all three."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("NNSSL_STC3D_DEBUG", raising=False)
    return tmp_path / "nnUNet_raw"


def write_dicom_series(
    folder: Path,
    array: np.ndarray,
    spacing: tuple[float, float, float] = (0.7, 0.8, 2.5),
    origin: tuple[float, float, float] = (-10.5, 20.25, -300.0),
    direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
    series: str = "1.2.826.0.1.1",
    prefix: str = "s",
    **tags: str,
) -> list[Path]:
    """Writes the slices of a volume (z, y, x) as one DICOM series; geometry in (x, y, z); `tags` as "0008_0060"."""
    folder.mkdir(parents=True, exist_ok=True)
    matrix = np.array(direction, dtype=float).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    files = []
    for k in range(array.shape[0]):
        image = sitk.GetImageFromArray(array[k : k + 1], isVector=array.ndim == 4)
        image.SetSpacing(spacing)
        position = np.array(origin) + matrix[:, 2] * spacing[2] * k
        meta = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0018": f"{series}.{k + 1}",
            "0008|0060": "CT",
            "0018|0050": str(spacing[2]),
            "0020|000d": "1.2.826.0.1",
            "0020|000e": series,
            "0020|0011": "3",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.8f}" for v in (*matrix[:, 0], *matrix[:, 1])),
            **{key.replace("_", "|"): value for key, value in tags.items()},
        }
        for key, value in meta.items():
            image.SetMetaData(key, value)
        # The order of the names is not that of the positions.
        files.append(folder / f"{prefix}{(7 * k) % array.shape[0]:03d}_{k:03d}.dcm")
        writer.SetFileName(str(files[-1]))
        writer.Execute(image)
    return files


@pytest.fixture(scope="session")
def dicom_series() -> Callable[..., list[Path]]:
    """Function ``(folder, array, spacing, origin, direction, series, prefix, **tags) -> files``."""
    return write_dicom_series


@pytest.fixture
def full_disk(monkeypatch) -> None:
    """From here on, torch.save writes half a file and fails."""

    def save(value: object, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save)
