"""``nnUNetv2_train -pretrained_weights`` and ``nnUNetv2_predict`` after a pretraining."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

CT, MR = "Dataset901_TinyCT", "Dataset902_TinyMR"
RUNS = {
    "stock": (CT, "ShortStockTrainer", "tinyPlain", "plain"),
    "finetune": (MR, "ShortFinetuneTrainer", "tinyAniso", "anisotropic"),
}


def pretrained_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint_final.pth", weights_only=True)["network_weights"]


def initial_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "initial_weights.pt", weights_only=True)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_finetuning_starts_from_the_pretrained_weights(finetuned, pretrained, name):
    run = finetuned[name].ok()
    source, start = pretrained_weights(pretrained[RUNS[name][3]].folder), initial_weights(run.folder)
    assert set(source) == set(start)
    for key, value in start.items():
        if ".seg_layers." not in key:
            assert torch.equal(value, source[key]), key
        if key.startswith("encoder."):
            assert torch.equal(value, start[f"decoder.{key}"]), key
    fresh = [k for k in start if ".seg_layers." in k and k.endswith("weight")]
    assert fresh and not any(torch.equal(start[k], source[k]) for k in fresh)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_finetuning_trains_and_validates(finetuned, name):
    run = finetuned[name].ok()
    saved = torch.load(run.folder / "checkpoint_final.pth", weights_only=False)
    assert saved["trainer_name"] == RUNS[name][1]
    start = initial_weights(run.folder)
    assert any(not torch.equal(v, start[k]) for k, v in saved["network_weights"].items() if k.startswith("encoder."))
    assert (run.folder / "validation" / "summary.json").is_file()


def test_an_encoder_only_pretraining_leaves_the_decoder_to_finetuning(finetuned, pretrained):
    run = finetuned["encoder_only"].ok()
    source, start = pretrained_weights(pretrained["resenc_paper"].folder), initial_weights(run.folder)
    for key, value in start.items():
        if key.startswith("encoder."):
            assert torch.equal(value, source[key]), key
            assert torch.equal(value, start[f"decoder.{key}"]), key
    decoder = [k for k in start if k.startswith("decoder.stages") and k.endswith("conv.weight")]
    assert decoder and not any(torch.equal(start[k], source[k]) for k in decoder)


@pytest.mark.parametrize(
    ("name", "parts", "fresh"),
    [
        ("finetune", "encoder, decoder", "decoder.seg_layers"),
        ("encoder_only", "encoder", "decoder.seg_layers, decoder.stages, decoder.transpconvs"),
    ],
)
def test_the_log_reports_the_transfer(finetuned, name, parts, fresh):
    (log,) = finetuned[name].ok().folder.glob("training_log_*.txt")
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if "Pretrained weights from" in line)
    assert "checkpoint_final.pth (STC3D, 1 epoch" in lines[start] and lines[start].endswith(f"): {parts}")
    assert re.fullmatch(r"\d+ tensors loaded, 0 adapted, \d+ fresh; compared afterwards: equal", lines[start + 1])
    assert lines[start + 2] == f"fresh: {fresh}"


def test_weights_of_other_plans_are_refused_with_the_difference_and_the_commands(finetuned):
    run = finetuned["foreign"]
    assert run.returncode != 0
    assert "do not fit this network" in run.output
    assert "strides: pretrained with" in run.output and "this network has" in run.output
    assert "Give your dataset the plans of the pretraining" in run.output
    assert "nnUNetv2_" in run.output.split("then train with them:")[1]
    assert "Epoch 0" not in run.output


@pytest.fixture(scope="module")
def predicted(workspace, finetuned, pretrained, tmp_path_factory):
    """Predictions of the cases that the finetunings validated on, and an attempt with a pretraining."""
    folders = {}
    for name, (dataset, *_) in RUNS.items():
        inputs, output = tmp_path_factory.mktemp(f"{name}_in"), tmp_path_factory.mktemp(f"{name}_out")
        cases = [f.name.removesuffix(".nii.gz") for f in (finetuned[name].ok().folder / "validation").glob("*.nii.gz")]
        for case in cases:
            for image in (workspace.root / "nnUNet_raw" / dataset / "imagesTr").glob(f"{case}_*.nii.gz"):
                (inputs / image.name).symlink_to(image)
        folders[name] = (inputs, output)
    attempt = tmp_path_factory.mktemp("attempt")
    runs = workspace.side_by_side(
        **{
            name: lambda name=name, dataset=dataset, trainer=trainer, plans=plans: workspace.predict(
                dataset, 0, trainer, plans, *folders[name]
            )
            for name, (dataset, trainer, plans, _) in RUNS.items()
        },
        attempt=lambda: workspace.predict(CT, "all", "ShortPretrainTrainer", "tinyPlain", folders["stock"][0], attempt),
    )
    return {name: (run, folders[name][1] if name in folders else attempt) for name, run in runs.items()}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_prediction_equals_the_validation_of_the_training(finetuned, predicted, name):
    run, output = predicted[name]
    run.ok()
    validation = finetuned[name].folder / "validation"
    cases = sorted(f.name for f in validation.glob("*.nii.gz"))
    assert cases and cases == sorted(f.name for f in output.glob("*.nii.gz"))
    for case in cases:
        a, b = (sitk.ReadImage(str(folder / case)) for folder in (validation, output))
        assert a.GetSpacing() == b.GetSpacing()
        np.testing.assert_array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
        probabilities = [
            np.load(folder / case.replace(".nii.gz", ".npz"))["probabilities"] for folder in (validation, output)
        ]
        np.testing.assert_allclose(probabilities[0], probabilities[1], rtol=0, atol=1e-5)
        assert probabilities[0][1].std() > 1e-4, "the comparison would be trivial"


@pytest.mark.parametrize("name", sorted(RUNS))
def test_the_prediction_uses_mirroring(finetuned, name):
    saved = torch.load(finetuned[name].ok().folder / "checkpoint_final.pth", weights_only=False)
    assert tuple(saved["inference_allowed_mirroring_axes"]) == (0, 1, 2)


def test_a_pretraining_says_that_it_must_be_finetuned_first(predicted):
    run, output = predicted["attempt"]
    assert run.returncode != 0
    assert "Finetune it first" in run.output and "-tr STC3DFinetuneTrainer" in run.output
    assert not list(output.glob("*.nii.gz"))
