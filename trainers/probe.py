"""Probing: heads on frozen features (vox2vec 3.4)."""

from nnssl_stc3d.training.probe_trainer import ProbeTrainer
from nnssl_stc3d.training.variants import with_epochs


class STC3DLinearProbeTrainer(ProbeTrainer):
    """A linear head on the stages of a frozen encoder."""


class STC3DNonlinearProbeTrainer(ProbeTrainer):
    """A decoder whose kernels are 1 on the stages of a frozen encoder."""

    head = "nonlinear"


class STC3DLinearProbeDecoderTrainer(ProbeTrainer):
    """A linear head on the stages of a frozen decoder; vox2vec's own protocol on its FPN."""

    pyramid = "decoder"


class STC3DNonlinearProbeDecoderTrainer(ProbeTrainer):
    """A decoder whose kernels are 1 on the stages of a frozen decoder; vox2vec's own protocol on its FPN."""

    head = "nonlinear"
    pyramid = "decoder"


STC3DLinearProbeTrainer_1epoch = with_epochs(STC3DLinearProbeTrainer, 1)
STC3DLinearProbeTrainer_5epochs = with_epochs(STC3DLinearProbeTrainer, 5)
STC3DLinearProbeTrainer_10epochs = with_epochs(STC3DLinearProbeTrainer, 10)
STC3DLinearProbeTrainer_50epochs = with_epochs(STC3DLinearProbeTrainer, 50)
STC3DLinearProbeTrainer_100epochs = with_epochs(STC3DLinearProbeTrainer, 100)
STC3DNonlinearProbeTrainer_1epoch = with_epochs(STC3DNonlinearProbeTrainer, 1)
STC3DNonlinearProbeTrainer_5epochs = with_epochs(STC3DNonlinearProbeTrainer, 5)
STC3DNonlinearProbeTrainer_10epochs = with_epochs(STC3DNonlinearProbeTrainer, 10)
STC3DNonlinearProbeTrainer_50epochs = with_epochs(STC3DNonlinearProbeTrainer, 50)
STC3DNonlinearProbeTrainer_100epochs = with_epochs(STC3DNonlinearProbeTrainer, 100)
STC3DLinearProbeDecoderTrainer_1epoch = with_epochs(STC3DLinearProbeDecoderTrainer, 1)
STC3DLinearProbeDecoderTrainer_5epochs = with_epochs(STC3DLinearProbeDecoderTrainer, 5)
STC3DLinearProbeDecoderTrainer_10epochs = with_epochs(STC3DLinearProbeDecoderTrainer, 10)
STC3DLinearProbeDecoderTrainer_50epochs = with_epochs(STC3DLinearProbeDecoderTrainer, 50)
STC3DLinearProbeDecoderTrainer_100epochs = with_epochs(STC3DLinearProbeDecoderTrainer, 100)
STC3DNonlinearProbeDecoderTrainer_1epoch = with_epochs(STC3DNonlinearProbeDecoderTrainer, 1)
STC3DNonlinearProbeDecoderTrainer_5epochs = with_epochs(STC3DNonlinearProbeDecoderTrainer, 5)
STC3DNonlinearProbeDecoderTrainer_10epochs = with_epochs(STC3DNonlinearProbeDecoderTrainer, 10)
STC3DNonlinearProbeDecoderTrainer_50epochs = with_epochs(STC3DNonlinearProbeDecoderTrainer, 50)
STC3DNonlinearProbeDecoderTrainer_100epochs = with_epochs(STC3DNonlinearProbeDecoderTrainer, 100)
