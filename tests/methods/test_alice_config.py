"""Alice's options: checked and saved as they are."""

from __future__ import annotations

import re

import pytest

from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.views.samplers import TransformRanges


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder": "light"}, "decoder must be one of 'unet', 'tokens', got 'light'"),
        ({"reconstruct": "some"}, "reconstruct must be one of 'masked', 'all', got 'some'"),
        ({"normalise": True}, "normalise must be one of 'view', 'block', 'not', got True"),
        ({"form": "dino"}, "form must be one of 'paper', 'official', got 'dino'"),
        ({"head": "mlp"}, "head must be one of 'dino', 'projector', got 'mlp'"),
        ({"casa": "none"}, "casa must be one of 'paper', 'official', got 'none'"),
        ({"target_tokens": "both"}, "target_tokens must be one of 'encoder', 'decoder', got 'both'"),
        ({"descriptor": "cls"}, "descriptor must be one of 'tokens', 'bottleneck', got 'cls'"),
        ({"mask_ratio": 1.0}, r"mask_ratio must lie in \(0, 1\), got 1.0"),
        ({"mask_ratio": 0}, r"mask_ratio must lie in \(0, 1\), got 0"),
        ({"mask_block": (4, 4)}, r"mask_block must be three positive numbers \(Z, Y, X\) or None, got \(4, 4\)"),
        ({"mask_block": (4, 0, 4)}, "mask_block must be three positive numbers"),
        ({"reconstruction_weight": 0}, "reconstruction_weight must be positive, got 0"),
        ({"dv_weight": -1}, "dv_weight must not be negative, got -1"),
        ({"ema_momentum": 1.1}, r"ema_momentum must lie in \[0, 1\], got 1.1"),
        ({"teacher_temperature": 0}, "teacher_temperature must be positive, got 0"),
        ({"search": 0}, "search must be positive, got 0"),
        ({"attempts": 0}, "attempts must be positive, got 0"),
        ({"decoder_width": 20, "decoder_heads": 8}, "decoder_width must be a multiple of decoder_heads, got 20 and 8"),
        ({"head_dim": 12}, "head_dim must be a multiple of casa_heads, got 12 and 8"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\), got 1.0"),
        ({"weight_decay_end": -0.1}, "weight_decay_end must not be negative, got -0.1"),
        ({"optimizer": "lars"}, "optimizer must be one of"),
    ],
)
def test_options_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        AliceConfig(**values)


@pytest.mark.parametrize(
    "config",
    [
        AliceConfig(),
        AliceConfig.paper(),
        AliceConfig.official(),
        AliceConfig(mask_block=(4, 8, 8), transforms=TransformRanges(scaling=(0.5, 1.0)), search=None),
    ],
)
def test_the_configuration_survives_the_checkpoint(from_checkpoint, config):
    restored = from_checkpoint(config)
    assert restored == config and restored.transforms == config.transforms


def test_the_paper_reading():
    paper = AliceConfig.paper()
    assert (paper.form, paper.casa, paper.target_tokens, paper.descriptor) == ("paper", "paper", "encoder", "tokens")
    assert (paper.decoder, paper.normalise, paper.reconstruct) == ("tokens", "block", "masked")
    assert (paper.head, paper.head_hidden, paper.predictor) == ("dino", 2048, True)
    assert (paper.optimizer, paper.learning_rate, paper.momentum, paper.beta2) == ("adamw", 5e-5, 0.9, 0.95)
    assert paper.reconstruction_weight == paper.dv_weight == paper.st_weight == 1
    assert paper.mask_ratio == 0.75 and paper.transforms.flips > 0 and paper.transforms.rotation > 0
    assert not paper.augment_online and paper.intensity > 0


def test_the_released_reading():
    released = AliceConfig.official()
    assert (released.form, released.casa, released.descriptor) == ("official", "official", "bottleneck")
    assert (released.target_tokens, released.reconstruct, released.normalise) == ("decoder", "all", "not")
    assert released.reconstruction_weight == 5 and released.mask_columns and released.mask_ratio == 0.75
    assert (released.weight_decay, released.weight_decay_end, released.ema_momentum) == (0.04, 0.4, 0.996)
    assert (released.head_hidden, released.head_bottleneck, released.head_dim) == (2048, 256, 512)
    assert (released.student_temperature, released.teacher_temperature) == (0.1, 0.01)
    assert released.gradient_clip == 3 and released.transforms == TransformRanges.none() and released.intensity == 0


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_names_the_trainers(page):
    trainers = set(re.findall(r"`(Alice\w*PretrainTrainer)`", page("alice")))
    assert trainers == {
        "AlicePretrainTrainer", "AlicePaperPretrainTrainer", "AliceOfficialPretrainTrainer",
        "AlicePrimusPretrainTrainer",
    }  # fmt: skip
