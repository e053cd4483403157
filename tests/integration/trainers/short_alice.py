"""Short trainers of Alice for the tests."""

from dataclasses import replace

import torch

from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

SMALL = {"batch_size": 2, "head_hidden": 16, "head_bottleneck": 8, "head_dim": 8, "decoder_width": 16}


class ShortAlicePretrainTrainer(PretrainTrainer):
    """The default for one epoch of two steps."""

    method_class = Alice
    config = replace(AliceConfig(), min_score=-1.0, **SMALL)
    epochs = 1
    steps_per_epoch = 2
    validation_steps = 1

    def initialize(self) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        super().initialize()


class ShortAlicePrimusPretrainTrainer(ShortAlicePretrainTrainer):
    """The same on plans that name a transformer."""

    config = replace(AliceConfig(decoder="tokens", form="official"), **SMALL)
