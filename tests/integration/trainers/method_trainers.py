"""Every other method for a single epoch, on views and heads that are as small as the tests' networks."""

from dataclasses import replace

from short_trainers import SMALL, OneStepPretrainTrainer

from nnssl_stc3d.methods.voco import VoCo, VoCoConfig


class ShortVoCoTrainer(OneStepPretrainTrainer):
    """VoCo with its teacher."""

    method_class = VoCo
    config = replace(VoCoConfig(), **SMALL)
    steps_per_epoch = 2
