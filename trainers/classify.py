"""Classification of whole cases (STC3D Table 4)."""

from nnssl_stc3d.training.classify_trainer import ClassifyTrainer
from nnssl_stc3d.training.variants import with_epochs


class STC3DClassifyTrainer(ClassifyTrainer):
    """Finetuning of the encoder on the labels of ``classification.csv``."""


STC3DClassifyTrainer_1epoch = with_epochs(STC3DClassifyTrainer, 1)
STC3DClassifyTrainer_5epochs = with_epochs(STC3DClassifyTrainer, 5)
STC3DClassifyTrainer_10epochs = with_epochs(STC3DClassifyTrainer, 10)
STC3DClassifyTrainer_50epochs = with_epochs(STC3DClassifyTrainer, 50)
