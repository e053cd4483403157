"""Every other method for a single epoch, on views and heads that are as small as the tests' networks."""

from dataclasses import replace

from short_trainers import SMALL, OneStepPretrainTrainer

from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig


class ShortVoCoTrainer(OneStepPretrainTrainer):
    """VoCo with its teacher."""

    method_class = VoCo
    config = replace(VoCoConfig(), **SMALL)
    steps_per_epoch = 2


class ShortPiMPiCTrainer(OneStepPretrainTrainer):
    """PiMPiC on a network that has only one of its deep levels."""

    method_class = PiMPiC
    config = replace(PiMPiCConfig(), batch_size=2, patches=4, projector_dim=8, warmup_steps=2, learning_rate=1e-2)
    steps_per_epoch = 2
