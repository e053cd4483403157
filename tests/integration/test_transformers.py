"""Plans of ``nnssl_stc3d network-plans`` for transformers, through stock nnU-Net's training and prediction."""

from __future__ import annotations

import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk
import torch

CT, SOURCE = "Dataset901_TinyCT", "tinyPlain"
FOLD, TRAINER = 0, "ShortStockTrainer"
NETWORKS = {
    # The smallest patch with more than one voxel at the deepest stage, larger than the volumes of the tests.
    "swin-unetr": ("tinySwin", ["--patch-size", 32, 32, 64], {"feature_size": 12}),
    "primus": ("tinyPrimusS", ["--size", "S", "--patch-size", 32, 32, 32], {"eva_depth": 2}),
}
MONAI = importlib.util.find_spec("monai") is not None
PARAMETERS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "swin-unetr" and not MONAI, reason="MONAI is optional"))
    for name in NETWORKS
]


def plan_and_train(workspace, name):
    """A run of stock nnU-Net on plans that the command wrote; smaller than published, which saves most of the time."""
    plans, arguments, smaller = NETWORKS[name]
    workspace.run(
        "nnssl_stc3d", "network-plans", "-d", 901, "--network", name, "-p", SOURCE, "-o", plans, *arguments
    ).ok()
    file = workspace.preprocessed(CT) / f"{plans}.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(smaller)
    file.write_text(json.dumps(written))
    return workspace.train(CT, FOLD, TRAINER, plans, "--npz")


@pytest.fixture(scope="module")
def trained(workspace):
    names = [name for name in NETWORKS if MONAI or name != "swin-unetr"]
    return workspace.side_by_side(**{name: partial(plan_and_train, workspace, name) for name in names})


@pytest.fixture(scope="module")
def predicted(workspace, trained, tmp_path_factory):
    """Predictions of one validation case, and their folders."""
    tasks, folders = {}, {}
    for name, run in trained.items():
        case = sorted(run.ok().folder.glob("validation/*.nii.gz"))[0].name.replace(".nii.gz", "_0000.nii.gz")
        inputs, folders[name] = (tmp_path_factory.mktemp(part) for part in ("in", "out"))
        (inputs / case).symlink_to(workspace.root / "nnUNet_raw" / CT / "imagesTr" / case)
        tasks[name] = partial(workspace.predict, CT, FOLD, TRAINER, NETWORKS[name][0], inputs, folders[name])
    return {name: (run, folders[name]) for name, run in workspace.side_by_side(**tasks).items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_stock_nnunet_trains_and_validates(trained, name):
    folder = trained[name].ok().folder
    saved = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    start = torch.load(folder / "initial_weights.pt", weights_only=True)
    architecture = saved["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]
    expected = {"swin-unetr": "swin_unetr.PlansSwinUNETR", "primus": "primus.PlansPrimus"}[name]
    assert architecture["network_class_name"] == f"nnssl_stc3d.modules.{expected}"
    moved = [key for key, value in saved["network_weights"].items() if not torch.equal(value, start[key])]
    assert set(start) == set(saved["network_weights"]) and len(moved) > len(start) / 2
    assert all(value.isfinite().all() for value in saved["network_weights"].values())
    assert (folder / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_prediction_is_that_of_the_training(workspace, trained, predicted, name):
    run, output = predicted[name]
    run.ok()
    (file,) = output.glob("*.nii.gz")
    case = file.name.removesuffix(".nii.gz")
    image = sitk.ReadImage(str(workspace.root / "nnUNet_raw" / CT / "imagesTr" / f"{case}_0000.nii.gz"))
    segmentation = sitk.ReadImage(str(file))
    assert segmentation.GetSize() == image.GetSize() and segmentation.GetSpacing() == image.GetSpacing()
    given, expected = (
        np.load(folder / f"{case}.npz")["probabilities"] for folder in (output, trained[name].folder / "validation")
    )
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(given.sum(0), 1, atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(segmentation), given.argmax(0))
    assert given[1].std() > 1e-4, "the comparison would be trivial"
