"""Alice as pretraining trainers."""

from nnssl_stc3d.methods.alice import Alice, AliceConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


class AlicePretrainTrainer(PretrainTrainer):
    """Alice that reconstructs through nnU-Net's own decoder, which is transferred too: beyond the paper."""

    method_class = Alice
    config = AliceConfig()


class AlicePaperPretrainTrainer(PretrainTrainer):
    """Alice as the paper writes it: light decoder, cosine losses, encoder only."""

    method_class = Alice
    config = AliceConfig.paper()


class AliceOfficialPretrainTrainer(PretrainTrainer):
    """Alice as its code was released: DINO losses, CASA with residuals, error on all voxels."""

    method_class = Alice
    config = AliceConfig.official()


class AlicePrimusPretrainTrainer(PretrainTrainer):
    """Alice on plans that name the transformer Primus: visible tokens only, light decoder."""

    method_class = Alice
    config = AliceConfig(decoder="tokens")


class AlicePretrainTrainer_quickstart(AlicePretrainTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart --method alice``."""

    epochs = 16
    steps_per_epoch = 25
    validation_steps = 3


AlicePretrainTrainer_1epoch = with_epochs(AlicePretrainTrainer, 1)
AlicePretrainTrainer_5epochs = with_epochs(AlicePretrainTrainer, 5)
AlicePretrainTrainer_10epochs = with_epochs(AlicePretrainTrainer, 10)
AlicePretrainTrainer_50epochs = with_epochs(AlicePretrainTrainer, 50)
AlicePretrainTrainer_100epochs = with_epochs(AlicePretrainTrainer, 100)
AlicePaperPretrainTrainer_1epoch = with_epochs(AlicePaperPretrainTrainer, 1)
AlicePaperPretrainTrainer_5epochs = with_epochs(AlicePaperPretrainTrainer, 5)
AlicePaperPretrainTrainer_10epochs = with_epochs(AlicePaperPretrainTrainer, 10)
AlicePaperPretrainTrainer_50epochs = with_epochs(AlicePaperPretrainTrainer, 50)
AlicePaperPretrainTrainer_100epochs = with_epochs(AlicePaperPretrainTrainer, 100)
AliceOfficialPretrainTrainer_1epoch = with_epochs(AliceOfficialPretrainTrainer, 1)
AliceOfficialPretrainTrainer_5epochs = with_epochs(AliceOfficialPretrainTrainer, 5)
AliceOfficialPretrainTrainer_10epochs = with_epochs(AliceOfficialPretrainTrainer, 10)
AliceOfficialPretrainTrainer_50epochs = with_epochs(AliceOfficialPretrainTrainer, 50)
AliceOfficialPretrainTrainer_100epochs = with_epochs(AliceOfficialPretrainTrainer, 100)
AlicePrimusPretrainTrainer_1epoch = with_epochs(AlicePrimusPretrainTrainer, 1)
AlicePrimusPretrainTrainer_5epochs = with_epochs(AlicePrimusPretrainTrainer, 5)
AlicePrimusPretrainTrainer_10epochs = with_epochs(AlicePrimusPretrainTrainer, 10)
AlicePrimusPretrainTrainer_50epochs = with_epochs(AlicePrimusPretrainTrainer, 50)
AlicePrimusPretrainTrainer_100epochs = with_epochs(AlicePrimusPretrainTrainer, 100)
