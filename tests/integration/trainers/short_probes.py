"""Short probes and a short classification for the tests."""

from os.path import join

import torch

from nnssl_stc3d.training.classify_trainer import ClassifyTrainer
from nnssl_stc3d.training.probe_trainer import ProbeTrainer


class _Short:
    """One epoch of three steps on one thread; keeps the weights that it starts from."""

    epochs = 1
    steps_per_epoch = 3
    validation_steps = 1
    learning_rate = 1e-2

    def on_train_start(self):
        torch.set_num_threads(1)
        torch.save(self.network.state_dict(), join(self.output_folder, "initial_weights.pt"))
        super().on_train_start()


class ShortLinearProbeTrainer(_Short, ProbeTrainer):
    """A linear head on the encoder."""


class ShortNonlinearDecoderProbeTrainer(_Short, ProbeTrainer):
    """A non-linear head on the decoder."""

    head = "nonlinear"
    pyramid = "decoder"


class ShortClassifyTrainer(_Short, ClassifyTrainer):
    """Classification of whole cases."""
