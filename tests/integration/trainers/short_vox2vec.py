"""Short vox2vec trainers for the tests; nnU-Net finds them through ``nnUNet_extTrainer``."""

from dataclasses import replace

import torch

from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.views.samplers import TransformRanges

SMALL = {"batch_size": 2, "points": 24, "head_hidden": 16, "head_dim": 8}


class ShortVox2VecTrainer(PretrainTrainer):
    """vox2vec on rotated views for one epoch of 3 steps."""

    method_class = Vox2Vec
    config = replace(Vox2VecConfig(), transforms=TransformRanges(rotation=20), learning_rate=1e-2, **SMALL)
    epochs = 1
    steps_per_epoch = 3
    validation_steps = 1

    def initialize(self) -> None:
        torch.set_num_threads(1)
        super().initialize()


class ShortVox2VecFPNTrainer(ShortVox2VecTrainer):
    """The paper's form, on FPN plans only, with views that fit the tests' volumes."""

    config = replace(Vox2VecConfig.paper(), view_shape=None, **SMALL)
