"""vox2vec as pretraining trainers."""

from dataclasses import replace

from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.training.variants import with_epochs


class Vox2VecPretrainTrainer(PretrainTrainer):
    """vox2vec on the pyramid of the plan's own network, encoder and decoder."""

    method_class = Vox2Vec
    config = Vox2VecConfig()


class Vox2VecPaperPretrainTrainer(PretrainTrainer):
    """vox2vec as the paper writes it, on the plans of its FPN: 10 volumes a step, 100k steps."""

    method_class = Vox2Vec
    config = Vox2VecConfig.paper()


class Vox2VecOfficialPretrainTrainer(PretrainTrainer):
    """vox2vec as released, on the plans of its FPN: 10 pairs of views of one volume a step."""

    method_class = Vox2Vec
    config = Vox2VecConfig.official()


class Vox2VecPretrainTrainer_quickstart(Vox2VecPretrainTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart --method vox2vec``."""

    config = replace(Vox2VecConfig(), points=100)
    epochs = 16
    steps_per_epoch = 25
    validation_steps = 3


Vox2VecPretrainTrainer_1epoch = with_epochs(Vox2VecPretrainTrainer, 1)
Vox2VecPretrainTrainer_5epochs = with_epochs(Vox2VecPretrainTrainer, 5)
Vox2VecPretrainTrainer_10epochs = with_epochs(Vox2VecPretrainTrainer, 10)
Vox2VecPretrainTrainer_50epochs = with_epochs(Vox2VecPretrainTrainer, 50)
Vox2VecPretrainTrainer_100epochs = with_epochs(Vox2VecPretrainTrainer, 100)
Vox2VecPaperPretrainTrainer_1epoch = with_epochs(Vox2VecPaperPretrainTrainer, 1)
Vox2VecPaperPretrainTrainer_5epochs = with_epochs(Vox2VecPaperPretrainTrainer, 5)
Vox2VecPaperPretrainTrainer_10epochs = with_epochs(Vox2VecPaperPretrainTrainer, 10)
Vox2VecPaperPretrainTrainer_50epochs = with_epochs(Vox2VecPaperPretrainTrainer, 50)
Vox2VecPaperPretrainTrainer_100epochs = with_epochs(Vox2VecPaperPretrainTrainer, 100)
Vox2VecOfficialPretrainTrainer_1epoch = with_epochs(Vox2VecOfficialPretrainTrainer, 1)
Vox2VecOfficialPretrainTrainer_5epochs = with_epochs(Vox2VecOfficialPretrainTrainer, 5)
Vox2VecOfficialPretrainTrainer_10epochs = with_epochs(Vox2VecOfficialPretrainTrainer, 10)
Vox2VecOfficialPretrainTrainer_50epochs = with_epochs(Vox2VecOfficialPretrainTrainer, 50)
Vox2VecOfficialPretrainTrainer_100epochs = with_epochs(Vox2VecOfficialPretrainTrainer, 100)
