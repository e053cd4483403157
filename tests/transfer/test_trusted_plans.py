"""Plans of strangers: what nnU-Net would import and call is refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnssl_stc3d.cli.main import main
from nnssl_stc3d.evaluation.voxel_embeddings import build_network
from nnssl_stc3d.transfer.trusted_plans import check_plans


@pytest.fixture
def forged(tiny_plans, tmp_path):
    """Function ``(**changes) -> plans`` whose network runs a command, by default through its nonlinearity."""

    def forge(network=None, nonlin="os.system"):
        plans = tiny_plans()
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["network_class_name"] = network or architecture["network_class_name"]
        architecture["arch_kwargs"] |= {"nonlin": nonlin, "nonlin_kwargs": {"command": f"touch {tmp_path}/ran"}}
        return plans

    return forge


@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_networks_of_nnunet_are_accepted(tiny_plans, network):
    check_plans(tiny_plans(network), "plans")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nonlin": ["os.system"]},
        {"nonlin": "exec"},
        {"nonlin": "torch.utils.collect_env.run"},
        {"nonlin": "torch.nn.functional.relu"},
        # Reached through a module of a known package, which imports it.
        {"nonlin": "torch.nn.functional.importlib.import_module"},
        {"network": "subprocess.run"},
        {"network": "PlainConvUNet"},
    ],
)
def test_other_names_are_refused_and_nothing_runs(forged, tmp_path, changes, tiny_dataset_json):
    with pytest.raises(ValueError, match="no network or layer of a known package.*NNSSL_STC3D_TRUST"):
        build_network(forged(**changes), "3d_fullres", tiny_dataset_json())
    assert not (tmp_path / "ran").exists()


def test_a_package_of_ones_own(forged, monkeypatch, tiny_plans):
    plans = forged(nonlin="mine.layers.Wave")
    with pytest.raises(ValueError, match="'mine.layers.Wave'"):
        check_plans(plans, "plans")
    monkeypatch.setenv("NNSSL_STC3D_TRUST", "other, mine")
    check_plans(plans, "plans")
    # A name that merely begins alike is another package.
    with pytest.raises(ValueError, match="'mineral.Layer'"):
        check_plans(forged(nonlin="mineral.Layer"), "plans")


def test_plans_of_a_checkpoint_are_not_copied(forged, tmp_path, tiny_dataset_json, capsys, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name / "Dataset004_Made").mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / name))
    file = tmp_path / "checkpoint_final.pth"
    content = {"network_weights": {"encoder.weight": torch.zeros(1)}, "plans": forged(), "configuration": "3d_fullres"}
    torch.save(content | {"dataset_json": tiny_dataset_json()}, file)
    assert main(["align-plans", "--checkpoint", str(file), "--target", "4"]) == 1
    assert "'os.system'" in capsys.readouterr().err
    assert not list(Path(tmp_path / "nnUNet_preprocessed").rglob("*.json")) and not (tmp_path / "ran").exists()
