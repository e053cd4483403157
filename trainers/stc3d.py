"""STC3D as pretraining trainers."""

from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


class STC3DPretrainTrainer(PretrainTrainer):
    """STC3D's InfoNCE between voxels, at every stage of encoder and decoder: beyond the paper."""

    method_class = STC3D
    config = STC3DConfig()


class STC3DPaperPretrainTrainer(PretrainTrainer):
    """STC3D as the paper writes it: pooled descriptors, InfoNCE between views, encoder only."""

    method_class = STC3D
    config = STC3DConfig.paper()


class STC3DPretrainTrainer_quickstart(STC3DPretrainTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart``."""

    epochs = 16
    steps_per_epoch = 25
    validation_steps = 3


STC3DPretrainTrainer_1epoch = with_epochs(STC3DPretrainTrainer, 1)
STC3DPretrainTrainer_5epochs = with_epochs(STC3DPretrainTrainer, 5)
STC3DPretrainTrainer_10epochs = with_epochs(STC3DPretrainTrainer, 10)
STC3DPretrainTrainer_50epochs = with_epochs(STC3DPretrainTrainer, 50)
STC3DPretrainTrainer_100epochs = with_epochs(STC3DPretrainTrainer, 100)
STC3DPaperPretrainTrainer_1epoch = with_epochs(STC3DPaperPretrainTrainer, 1)
STC3DPaperPretrainTrainer_5epochs = with_epochs(STC3DPaperPretrainTrainer, 5)
STC3DPaperPretrainTrainer_10epochs = with_epochs(STC3DPaperPretrainTrainer, 10)
STC3DPaperPretrainTrainer_50epochs = with_epochs(STC3DPaperPretrainTrainer, 50)
STC3DPaperPretrainTrainer_100epochs = with_epochs(STC3DPaperPretrainTrainer, 100)
