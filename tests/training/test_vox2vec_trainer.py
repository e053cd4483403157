"""The trainer gives guided samplers the body masks of its cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.guides import GuideFolder
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

CONFIG = replace(Vox2VecConfig(), batch_size=2, points=16, head_hidden=8, head_dim=4)


class TinyVox2Vec(PretrainTrainer):
    method_class = Vox2Vec
    config = CONFIG
    epochs = 2
    steps_per_epoch = 2
    validation_steps = 1


class TinyPaperVox2Vec(TinyVox2Vec):
    config = replace(Vox2VecConfig.paper(), view_shape=None, batch_size=2, points=16)


def test_training_and_validation_share_the_masks_of_all_cases(make_trainer, nnunet):
    trainer = make_trainer(TinyVox2Vec)
    trainer.initialize()
    training, validation = trainer._datasets()
    assert isinstance(training.guides, GuideFolder) and training.guides is validation.guides
    assert list(training.guides) == CaseDataset.list_identifiers(nnunet)
    assert len(list(nnunet.with_name(f"{nnunet.name}_body").iterdir())) == 6


def test_a_run_trains_and_continues(make_trainer, tmp_path):
    trainer = make_trainer(TinyVox2Vec)
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    for key in ("train_losses", "val_losses", "val_voxel_retrieval", "effective_rank"):
        assert len(log[key]) == 2 and np.isfinite(log[key]).all()
    again = make_trainer(TinyVox2Vec)
    again.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert again.current_epoch == 2
    for name, value in again.method.state_dict().items():
        assert torch.equal(value, trainer.method.state_dict()[name]), name


def test_the_papers_form_says_which_plans_it_needs(make_trainer):
    with pytest.raises(ValueError, match="pretrains the paper's FPN, but the plan names PlainConvUNet"):
        make_trainer(TinyPaperVox2Vec).initialize()


def test_the_papers_form_trains_on_fpn_plans(make_trainer, tiny_plans):
    plans = tiny_plans("ResidualEncoderUNet")
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "nnssl_stc3d.modules.fpn.VoxelFPN"
    trainer = make_trainer(TinyPaperVox2Vec, plans)
    trainer.initialize()
    training, _ = trainer.get_dataloaders()
    terms = trainer.train_step(next(training))
    assert np.isfinite(terms["loss"]) and trainer.optimizer.param_groups[0]["lr"] == 3e-4
