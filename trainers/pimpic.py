"""PiMPiC as pretraining trainers."""

from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


class PiMPiCPretrainTrainer(PretrainTrainer):
    """PiMPiC with patches of several volumes a step and the package's schedule."""

    method_class = PiMPiC
    config = PiMPiCConfig()


class PiMPiCOfficialPretrainTrainer(PretrainTrainer):
    """PiMPiC as released: 32 patches of one volume, 98k steps."""

    method_class = PiMPiC
    config = PiMPiCConfig.official()
    epochs = 392


class PiMPiCPaperPretrainTrainer(PretrainTrainer):
    """PiMPiC as the paper writes it: the equations as printed, 20k steps."""

    method_class = PiMPiC
    config = PiMPiCConfig.paper()
    epochs = 80


class PiMPiCPretrainTrainer_quickstart(PiMPiCPretrainTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart --method pimpic``."""

    epochs = 16
    steps_per_epoch = 25
    validation_steps = 3


PiMPiCPretrainTrainer_1epoch = with_epochs(PiMPiCPretrainTrainer, 1)
PiMPiCPretrainTrainer_5epochs = with_epochs(PiMPiCPretrainTrainer, 5)
PiMPiCPretrainTrainer_10epochs = with_epochs(PiMPiCPretrainTrainer, 10)
PiMPiCPretrainTrainer_50epochs = with_epochs(PiMPiCPretrainTrainer, 50)
PiMPiCPretrainTrainer_100epochs = with_epochs(PiMPiCPretrainTrainer, 100)
PiMPiCOfficialPretrainTrainer_1epoch = with_epochs(PiMPiCOfficialPretrainTrainer, 1)
PiMPiCOfficialPretrainTrainer_5epochs = with_epochs(PiMPiCOfficialPretrainTrainer, 5)
PiMPiCOfficialPretrainTrainer_10epochs = with_epochs(PiMPiCOfficialPretrainTrainer, 10)
PiMPiCOfficialPretrainTrainer_50epochs = with_epochs(PiMPiCOfficialPretrainTrainer, 50)
PiMPiCOfficialPretrainTrainer_100epochs = with_epochs(PiMPiCOfficialPretrainTrainer, 100)
PiMPiCPaperPretrainTrainer_1epoch = with_epochs(PiMPiCPaperPretrainTrainer, 1)
PiMPiCPaperPretrainTrainer_5epochs = with_epochs(PiMPiCPaperPretrainTrainer, 5)
PiMPiCPaperPretrainTrainer_10epochs = with_epochs(PiMPiCPaperPretrainTrainer, 10)
PiMPiCPaperPretrainTrainer_50epochs = with_epochs(PiMPiCPaperPretrainTrainer, 50)
PiMPiCPaperPretrainTrainer_100epochs = with_epochs(PiMPiCPaperPretrainTrainer, 100)
