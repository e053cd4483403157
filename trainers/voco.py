"""VoCo as pretraining trainers."""

from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


class VoCoPretrainTrainer(PretrainTrainer):
    """VoCo with binned descriptors and a grid for volumes of every size: beyond the released code."""

    method_class = VoCo
    config = VoCoConfig()


class VoCoOfficialPretrainTrainer(PretrainTrainer):
    """VoCo as released: 4x4 bases, globally pooled descriptors, 250k steps."""

    method_class = VoCo
    config = VoCoConfig.official()
    epochs = 1000


class VoCoPaperPretrainTrainer(PretrainTrainer):
    """VoCo as the paper writes it: no teacher, the equations as printed, 100k steps."""

    method_class = VoCo
    config = VoCoConfig.paper()


class VoCoPretrainTrainer_quickstart(VoCoPretrainTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart --method voco``."""

    epochs = 16
    steps_per_epoch = 25
    validation_steps = 3


VoCoPretrainTrainer_1epoch = with_epochs(VoCoPretrainTrainer, 1)
VoCoPretrainTrainer_5epochs = with_epochs(VoCoPretrainTrainer, 5)
VoCoPretrainTrainer_10epochs = with_epochs(VoCoPretrainTrainer, 10)
VoCoPretrainTrainer_50epochs = with_epochs(VoCoPretrainTrainer, 50)
VoCoPretrainTrainer_100epochs = with_epochs(VoCoPretrainTrainer, 100)
VoCoOfficialPretrainTrainer_1epoch = with_epochs(VoCoOfficialPretrainTrainer, 1)
VoCoOfficialPretrainTrainer_5epochs = with_epochs(VoCoOfficialPretrainTrainer, 5)
VoCoOfficialPretrainTrainer_10epochs = with_epochs(VoCoOfficialPretrainTrainer, 10)
VoCoOfficialPretrainTrainer_50epochs = with_epochs(VoCoOfficialPretrainTrainer, 50)
VoCoOfficialPretrainTrainer_100epochs = with_epochs(VoCoOfficialPretrainTrainer, 100)
VoCoPaperPretrainTrainer_1epoch = with_epochs(VoCoPaperPretrainTrainer, 1)
VoCoPaperPretrainTrainer_5epochs = with_epochs(VoCoPaperPretrainTrainer, 5)
VoCoPaperPretrainTrainer_10epochs = with_epochs(VoCoPaperPretrainTrainer, 10)
VoCoPaperPretrainTrainer_50epochs = with_epochs(VoCoPaperPretrainTrainer, 50)
VoCoPaperPretrainTrainer_100epochs = with_epochs(VoCoPaperPretrainTrainer, 100)
