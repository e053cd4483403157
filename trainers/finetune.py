"""Finetuning trainers."""

from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
    nnUNetTrainerNoMirroring,
)

from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.variants import with_epochs


class STC3DFinetuneTrainer(FinetuneTrainer):
    """Finetuning schedule of STC3D A.3.3; its own class name keeps it apart from stock results."""


class STC3DFinetuneTrainerNoMirroring(nnUNetTrainerNoMirroring, FinetuneTrainer):
    """Finetuning without mirrored images, for structures that lie on one side and for short schedules."""


class STC3DFrozenStartTrainer(FinetuneTrainer):
    """Finetuning whose encoder stays as it is for the first third of the epochs (vox2vec 4.2)."""

    frozen_share = 1 / 3


class STC3DFinetuneTrainer_quickstart(STC3DFinetuneTrainer):
    """A few minutes on a laptop: ``nnssl_stc3d quickstart``."""

    epochs = 16
    steps_per_epoch = 25
    validation_steps = 4
    # High: in so few steps, structures appear late or not at all at lower ones.
    learning_rate = 2.5e-2


STC3DFinetuneTrainer_1epoch = with_epochs(STC3DFinetuneTrainer, 1)
STC3DFinetuneTrainer_5epochs = with_epochs(STC3DFinetuneTrainer, 5)
STC3DFinetuneTrainer_10epochs = with_epochs(STC3DFinetuneTrainer, 10)
STC3DFinetuneTrainer_50epochs = with_epochs(STC3DFinetuneTrainer, 50)
STC3DFinetuneTrainer_100epochs = with_epochs(STC3DFinetuneTrainer, 100)
STC3DFinetuneTrainerNoMirroring_1epoch = with_epochs(STC3DFinetuneTrainerNoMirroring, 1)
STC3DFinetuneTrainerNoMirroring_5epochs = with_epochs(STC3DFinetuneTrainerNoMirroring, 5)
STC3DFinetuneTrainerNoMirroring_10epochs = with_epochs(STC3DFinetuneTrainerNoMirroring, 10)
STC3DFinetuneTrainerNoMirroring_50epochs = with_epochs(STC3DFinetuneTrainerNoMirroring, 50)
STC3DFinetuneTrainerNoMirroring_100epochs = with_epochs(STC3DFinetuneTrainerNoMirroring, 100)
STC3DFrozenStartTrainer_1epoch = with_epochs(STC3DFrozenStartTrainer, 1)
STC3DFrozenStartTrainer_5epochs = with_epochs(STC3DFrozenStartTrainer, 5)
STC3DFrozenStartTrainer_10epochs = with_epochs(STC3DFrozenStartTrainer, 10)
STC3DFrozenStartTrainer_50epochs = with_epochs(STC3DFrozenStartTrainer, 50)
STC3DFrozenStartTrainer_100epochs = with_epochs(STC3DFrozenStartTrainer, 100)
