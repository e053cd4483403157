"""vox2vec's options are saved as they are, and the code on its page works."""

from __future__ import annotations

import pytest

from nnssl_stc3d.methods.vox2vec import Vox2VecConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    "config",
    [Vox2VecConfig(), Vox2VecConfig.paper(), Vox2VecConfig.official(), Vox2VecConfig(transforms=TransformRanges())],
    ids=["default", "paper", "official", "rotated"],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


def test_the_documented_code_works(run_examples):
    names, _ = run_examples("vox2vec")
    unet = names["Vox2VecPaperUNetPretrainTrainer"].config
    assert unet.network == "any" and unet.loss_form == "paper"
    assert names["Vox2VecRotatedPretrainTrainer"].config.transforms.rotation == 30
