"""Exports: what is inside, who can read them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from nnssl_stc3d.transfer.checkpoint import load_checkpoint, save_checkpoint_atomically
from nnssl_stc3d.transfer.export import export_nnunet, export_safetensors, export_stock_trainer
from nnssl_stc3d.transfer.load import load_pretrained


@pytest.fixture
def pretrained(tiny_plans, pretraining_checkpoint, architecture, tmp_path):
    """File and contents of a pretraining checkpoint in its results folder."""
    checkpoint = pretraining_checkpoint(tiny_plans(architecture))
    file = tmp_path / "STC3DPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all" / "checkpoint_final.pth"
    file.parent.mkdir(parents=True)
    save_checkpoint_atomically(checkpoint, file)
    return file, checkpoint


@pytest.fixture
def finetuned(tiny_plans, tiny_network, tiny_dataset_json, tmp_path):
    """Model folder as nnU-Net leaves it, with two folds and NumPy scalars in the checkpoints."""
    plans, dataset_json = tiny_plans(), tiny_dataset_json()
    folder = tmp_path / "Dataset004" / "STC3DFinetuneTrainer__nnUNetPlans__3d_fullres"
    for fold in (0, 1):
        (folder / f"fold_{fold}").mkdir(parents=True)
        init_args = {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": fold,
            "dataset_json": dataset_json,
            "device": torch.device("cpu"),
        }
        checkpoint = {
            "network_weights": tiny_network(plans, seed=fold).state_dict(),
            "optimizer_state": {"state": {}},
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5)]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 10,
            "init_args": init_args,
            "trainer_name": "STC3DFinetuneTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "dataset_fingerprint.json").write_text('{"spacings": []}')
    return folder


def test_nnunet_form_is_slim_and_complete(pretrained, tmp_path):
    file, checkpoint = pretrained
    written = export_nnunet(file, tmp_path / "out" / "encoder.pth")
    exported = torch.load(written, weights_only=True)
    assert {"method_state", "optimizer_state", "rng_state", "logging", "init_args"}.isdisjoint(exported)
    for key in ("method", "plans", "dataset_json", "configuration", "versions", "nnssl_adaptation_plan", "citations"):
        assert exported[key] == checkpoint[key]
    assert exported["network_weights"].keys() == checkpoint["network_weights"].keys()
    # Tensors with several names are stored once.
    assert written.stat().st_size < 2 * sum(
        4 * value.numel() for key, value in exported["network_weights"].items() if ".all_modules." not in key
    )


def test_nnunet_form_loads_with_the_stock_loader_and_with_ours(pretrained, tiny_network, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    file, checkpoint = pretrained
    written = export_nnunet(file.parent.parent, tmp_path / "encoder.pth")
    stock, ours = tiny_network(checkpoint["plans"]), tiny_network(checkpoint["plans"])
    load_pretrained_weights(stock, str(written))
    load_pretrained(ours, written, checkpoint["plans"], "3d_fullres")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name])
        assert ".seg_layers." in name or torch.equal(tensor, checkpoint["network_weights"][name])


def test_nnunet_form_for_more_channels_loads_with_the_stock_loader(pretrained, tiny_plans, tiny_network, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    file, checkpoint = pretrained
    written = export_nnunet(file, tmp_path / "encoder.pth", channels=3)
    exported = load_checkpoint(written)
    network = tiny_network(checkpoint["plans"], channels=3)
    load_pretrained_weights(network, str(written))
    key = exported["nnssl_adaptation_plan"]["keys_to_in_proj"][0] + ".weight"
    source = checkpoint["network_weights"][key]
    assert torch.equal(network.state_dict()[key], torch.cat([source] * 3, 1) / 3)
    assert exported["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 3


def test_safetensors_hold_each_encoder_tensor_once(pretrained, tiny_network, tmp_path):
    from safetensors import safe_open

    file, checkpoint = pretrained
    written = export_safetensors(file, tmp_path / "encoder.safetensors")
    with safe_open(written, framework="pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    encoder = tiny_network(checkpoint["plans"]).encoder
    assert all(name.startswith("encoder.") and ".all_modules." not in name for name in names)
    assert len(names) == len(list(encoder.parameters()))
    assert json.loads(metadata["plans"]) == checkpoint["plans"]
    assert json.loads(metadata["method"])["transfers"] == ["encoder"]


def test_safetensors_load_into_a_network(pretrained, tiny_network, tmp_path):
    file, checkpoint = pretrained
    written = export_safetensors(file, tmp_path / "encoder.safetensors")
    network = tiny_network(checkpoint["plans"])
    report = load_pretrained(network, written, checkpoint["plans"], "3d_fullres")
    assert report.parts == ("encoder",)
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, checkpoint["network_weights"][f"encoder.{name}"])


def test_safetensors_of_primus_hold_its_embedding_and_transformer(
    tiny_plans, tiny_network, pretraining_checkpoint, tmp_path
):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "nnssl_stc3d.modules.primus.PlansPrimus",
        "arch_kwargs": {
            "embed_dim": 24, "patch_embed_size": [8, 8, 8], "eva_depth": 1, "eva_numheads": 1,
            "input_shape": [16, 16, 16],
        },
        "_kw_requires_import": [],
    }  # fmt: skip
    checkpoint = pretraining_checkpoint(plans, transfers=("down_projection", "eva"))
    save_checkpoint_atomically(checkpoint, tmp_path / "checkpoint_final.pth")
    written = export_safetensors(tmp_path / "checkpoint_final.pth", tmp_path / "encoder.safetensors")
    network = tiny_network(plans)
    report = load_pretrained(network, written, plans, "3d_fullres")
    assert report.parts == ("down_projection", "eva") and report.loaded
    for part in report.parts:
        for name, tensor in getattr(network, part).state_dict().items():
            assert torch.equal(tensor, checkpoint["network_weights"][f"{part}.{name}"])


def test_safetensors_of_no_encoder_are_refused(tiny_plans, pretraining_checkpoint, tmp_path):
    file = tmp_path / "checkpoint_final.pth"
    save_checkpoint_atomically(pretraining_checkpoint(tiny_plans(), transfers=("decoder",)), file)
    with pytest.raises(ValueError, match="Expected a pretraining that trained an encoder.*transfers decoder"):
        export_safetensors(file, tmp_path / "encoder.safetensors")
    assert not (tmp_path / "encoder.safetensors").exists()


def test_truncated_safetensors_are_called_damaged(pretrained, tmp_path):
    written = export_safetensors(pretrained[0], tmp_path / "encoder.safetensors")
    written.write_bytes(written.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_checkpoint(written)


def test_stock_trainer_folder_is_complete(finetuned, tmp_path):
    written = export_stock_trainer(finetuned, tmp_path / "shared")
    assert written == tmp_path / "shared" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert json.loads((written / name).read_text(encoding="utf-8")) == json.loads(
            (finetuned / name).read_text(encoding="utf-8")
        )
    for fold in (0, 1):
        exported = torch.load(written / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)
        assert exported["trainer_name"] == "nnUNetTrainer"
        assert exported["inference_allowed_mirroring_axes"] == (0, 1, 2)
        assert "optimizer_state" not in exported
        original = load_checkpoint(finetuned / f"fold_{fold}" / "checkpoint_final.pth")
        for name, tensor in original["network_weights"].items():
            assert torch.equal(tensor, exported["network_weights"][name])


def test_stock_trainer_export_predicts_the_same_without_this_package(finetuned, tmp_path):
    written = export_stock_trainer(finetuned / "fold_0", tmp_path / "shared")
    script = f"""
        import importlib.abc, sys, numpy, torch
        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "nnssl_stc3d":
                    raise ImportError("this package is not there")
        sys.meta_path.insert(0, Blocker())
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder({str(written)!r}, use_folds=(0,))
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        image = torch.linspace(-1, 1, 16 ** 3).reshape(1, 16, 16, 16)
        logits = predictor.predict_sliding_window_return_logits(image)
        print("AXES", predictor.allowed_mirroring_axes)
        torch.save(logits, {str(tmp_path / "logits.pth")!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "AXES (0, 1, 2)" in result.stdout
    torch.testing.assert_close(torch.load(tmp_path / "logits.pth", weights_only=True), predict(finetuned))


def predict(folder):
    """Predicts with the weights of fold 0 as they were before the export."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    checkpoint = load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    dataset_json = checkpoint["init_args"]["dataset_json"]
    plans = PlansManager(checkpoint["init_args"]["plans"])
    network = nnUNetTrainer.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 3, False)
    network.load_state_dict(checkpoint["network_weights"])
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        network,
        plans,
        plans.get_configuration("3d_fullres"),
        [checkpoint["network_weights"]],
        dataset_json,
        "nnUNetTrainer",
        (0, 1, 2),
    )
    image = torch.linspace(-1, 1, 16**3).reshape(1, 16, 16, 16)
    return predictor.predict_sliding_window_return_logits(image)


def test_pretraining_has_to_be_finetuned_first(pretrained, tmp_path):
    with pytest.raises(ValueError, match="Finetune it first: nnUNetv2_train"):
        export_stock_trainer(pretrained[0], tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_finetuned_model_is_no_pretraining(finetuned, tmp_path):
    with pytest.raises(ValueError, match="Expected a pretraining checkpoint.*STC3DFinetuneTrainer"):
        export_nnunet(finetuned / "fold_0", tmp_path / "encoder.pth")


def test_weights_of_another_architecture_are_not_called_stock(finetuned, tmp_path):
    file = finetuned / "fold_0" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(file)
    checkpoint["network_weights"]["extra.weight"] = torch.ones(1)
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="does not fit the network that nnU-Net's own trainer builds"):
        export_stock_trainer(file, tmp_path / "shared")


def test_nothing_is_overwritten_unless_asked(pretrained, finetuned, tmp_path):
    file = tmp_path / "encoder.pth"
    file.write_text("precious")
    with pytest.raises(ValueError, match="exists already.*--overwrite"):
        export_nnunet(pretrained[0], file)
    assert file.read_text(encoding="utf-8") == "precious"
    export_nnunet(pretrained[0], file, overwrite=True)
    assert "network_weights" in load_checkpoint(file)

    export_stock_trainer(finetuned / "fold_0", tmp_path / "shared")
    with pytest.raises(ValueError, match="exists already"):
        export_stock_trainer(finetuned, tmp_path / "shared")
    assert not (tmp_path / "shared" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_1").exists()


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "dataset_fingerprint.json"])
def test_folds_of_another_model_are_not_mixed_in_unless_asked(finetuned, tmp_path, name):
    written = export_stock_trainer(finetuned / "fold_0", tmp_path / "shared")
    ours = (written / name).read_bytes()
    (written / name).write_text('{"of": "another dataset"}')
    with pytest.raises(ValueError, match=f"{name} differs from that of this model.*--overwrite"):
        export_stock_trainer(finetuned / "fold_1", tmp_path / "shared")
    assert (written / name).read_text(encoding="utf-8") == '{"of": "another dataset"}'
    assert not (written / "fold_1").exists()
    export_stock_trainer(finetuned / "fold_1", tmp_path / "shared", overwrite=True)
    assert (written / name).read_bytes() == ours


def test_a_network_of_this_package_is_not_called_stock(finetuned, tmp_path):
    file = finetuned / "fold_0" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(file)
    architecture = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "nnssl_stc3d.modules.fpn.VoxelFPN"
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="VoxelFPN, which nnU-Net cannot build without nnssl_stc3d"):
        export_stock_trainer(file, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_wrong_ending_and_empty_folder_are_explained(pretrained, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        export_safetensors(pretrained[0], tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"Expected checkpoint_final.pth in"):
        export_nnunet(tmp_path, tmp_path / "encoder.pth")
