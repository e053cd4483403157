"""vox2vec's options are saved as they are, and the code on its page works."""

from __future__ import annotations

import json

import pytest

from nnssl_stc3d.methods.vox2vec import Vox2VecConfig
from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    "config",
    [Vox2VecConfig(), Vox2VecConfig.paper(), Vox2VecConfig.official(), Vox2VecConfig(transforms=TransformRanges())],
    ids=["default", "paper", "official", "rotated"],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


def test_the_documented_code_works(run_examples, tmp_path, monkeypatch, tiny_plans, tiny_network):
    deep = {"n_stages": 6, "features_per_stage": [4] * 6, "kernel_sizes": [[3, 3, 3]] * 6, "n_conv_per_stage": [1] * 6}
    deep |= {"strides": [[1, 1, 1], *[[2, 2, 2]] * 5], "n_conv_per_stage_decoder": [1] * 5}
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset801_Unlabelled"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(tiny_plans(**deep)))
    monkeypatch.chdir(tmp_path)
    names, _ = run_examples("vox2vec")
    network = tiny_network(json.loads((folder / "nnUNetFPNPlans.json").read_text()))
    assert isinstance(network, VoxelFPN) and sum(network.encoder.output_channels) == 1008
    unet = names["Vox2VecPaperUNetPretrainTrainer"].config
    assert unet.network == "any" and unet.loss_form == "paper"
    assert names["Vox2VecRotatedPretrainTrainer"].config.transforms.rotation == 30
