"""A pretraining of Alice through the trainer: what is saved and continues, what the log says, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_stc3d.data.embeddings import EmbeddingRecord, embedding_folder, write_map
from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.transfer.load import load_pretrained

SMALL = {
    "batch_size": 2, "head_hidden": 8, "head_bottleneck": 8, "head_dim": 8, "decoder_width": 8, "decoder_depth": 1,
}  # fmt: skip
PRIMUS = {
    "network_class_name": "nnssl_stc3d.modules.primus.PlansPrimus",
    "arch_kwargs": {
        "embed_dim": 24, "patch_embed_size": [8, 8, 8], "eva_depth": 1, "eva_numheads": 1, "input_shape": [16, 16, 16],
    },
    "_kw_requires_import": [],
}  # fmt: skip


class AliceTrainer(PretrainTrainer):
    method_class = Alice
    config = replace(AliceConfig(), **SMALL)
    epochs = 2
    steps_per_epoch = 2
    validation_steps = 1


class ReleasedTrainer(AliceTrainer):
    config = replace(AliceConfig.official(), **SMALL)


class TokensTrainer(AliceTrainer):
    config = replace(AliceConfig(decoder="tokens", form="official"), **SMALL)


def steps(trainer, count):
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(count)]


@pytest.fixture
def primus_plans(tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"] = PRIMUS
    return plans


@pytest.mark.parametrize("trainer_class", [AliceTrainer, ReleasedTrainer, TokensTrainer])
def test_target_branch_centres_and_schedules_continue(make_trainer, primus_plans, trainer_class):
    plans = primus_plans if trainer_class is TokensTrainer else None
    whole = make_trainer(trainer_class, plans)
    whole.on_train_start()
    steps(whole, 2)
    whole.current_epoch = 1
    whole._save(f"{whole.output_folder}/checkpoint_latest.pth")
    path = f"{whole.output_folder}/checkpoint_latest.pth"
    saved = torch.load(path, weights_only=True)
    state = saved["method_state"]
    assert any(k.startswith("teacher.module.") for k in state) and state["progress"] == 0.5
    if whole.config.form == "official":
        assert state["dv_centre"].abs().sum() > 0 and state["st_centre"].abs().sum() > 0
    assert not any("teacher" in k for k in saved["network_weights"])

    continued = make_trainer(trainer_class, plans)
    continued.load_checkpoint(path)
    continued.on_train_start()
    whole.on_train_start()
    assert steps(continued, 2) == steps(whole, 2)
    for key, value in whole.method.state_dict().items():
        assert torch.equal(value, continued.method.state_dict()[key]), key
    decay = {group["weight_decay"] for t in (whole, continued) for group in t.optimizer.param_groups}
    assert len(decay) == 1


def test_the_optimiser_is_the_configured_one_and_leaves_the_target_alone(make_trainer):
    trainer = make_trainer(ReleasedTrainer)
    trainer.on_train_start()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in trainer.method.teacher.parameters()}
    assert {id(p) for p in trainer.method.network.encoder.parameters()} <= optimised
    (group,) = trainer.optimizer.param_groups
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == pytest.approx(0.04)
    steps(trainer, 2)
    # Half of the cosine from .04 to .4 (the released schedule's middle).
    assert group["weight_decay"] == pytest.approx(0.22)


def test_the_validation_reports_the_pretext_measure_and_the_monitors(make_trainer):
    trainer = make_trainer(AliceTrainer)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    log = trainer.logger.local_logger.my_fantastic_logging
    for key in ("val_masked_error", "val_reconstruction", "val_dv", "val_st", "val_matched", "effective_rank"):
        assert np.isfinite(log[key][-1]), key
    assert log["val_matched"][-1] == 0


def text_of(trainer) -> str:
    return Path(trainer.log_file).read_text(encoding="utf-8")


def test_without_maps_the_log_says_how_crops_correspond(make_trainer):
    trainer = make_trainer(AliceTrainer)
    trainer.on_train_start()
    assert "by their place in the box around the body" in text_of(trainer)
    assert "nnssl_stc3d embed CHECKPOINT -d 801 -c 3d_fullres -p nnUNetPlans" in text_of(trainer)


def write_maps(folder: Path, spacing) -> None:
    embedding_folder(folder).mkdir()
    EmbeddingRecord("nnUNetPlans", "3d_fullres", spacing, "some.pth", "ab", "vox2vec", 4).write(
        embedding_folder(folder)
    )
    drawn = np.random.default_rng(0).normal(size=(8, 8, 6, 6))
    for case in range(6):
        # One anatomy for all.
        write_map(embedding_folder(folder), f"case_{case}", drawn / np.linalg.norm(drawn, axis=0), (20, 22, 24))


def test_maps_are_used(make_trainer, nnunet):
    write_maps(nnunet, (1.5, 1.0, 1.0))
    trainer = make_trainer(AliceTrainer)
    trainer.on_train_start()
    assert "by their embeddings (vox2vec, some.pth)" in text_of(trainer)
    assert next(trainer.dataloader_train).batch.targets["matched"].all()


def test_maps_of_another_plan_stop_the_training_before_it_starts(make_trainer, nnunet):
    write_maps(nnunet, (1.5, 1.0, 0.9))
    command = r"nnssl_stc3d embed CHECKPOINT -d 801 -c 3d_fullres -p nnUNetPlans --overwrite"
    with pytest.raises(ValueError, match=rf"(?s)1.5 x 1 x 0.9 mm.*1.5 x 1 x 1 mm.*{command}"):
        make_trainer(AliceTrainer).on_train_start()


def test_a_single_volume_is_refused_before_training(make_trainer, nnunet):
    for case in range(1, 6):
        for file in nnunet.glob(f"case_{case}*"):
            file.unlink()
    with pytest.raises(ValueError, match="looks at 2 cases at once, got 1"):
        make_trainer(AliceTrainer).on_train_start()


def test_two_volumes_are_enough_for_any_batch(make_trainer, nnunet):
    for case in range(2, 6):
        for file in nnunet.glob(f"case_{case}*"):
            file.unlink()
    trainer = make_trainer(AliceTrainer)
    trainer.on_train_start()
    for names in next(trainer.dataloader_train).cases:
        assert set(names) == {"case_0", "case_1"}
    assert np.isfinite(steps(trainer, 1)[0]["loss"])


def test_primus_is_transferred_without_its_segmentation_head(make_trainer, primus_plans, tiny_network):
    trainer = make_trainer(TokensTrainer, primus_plans)
    trainer.on_train_start()
    steps(trainer, 1)
    trainer._save(f"{trainer.output_folder}/checkpoint_final.pth")
    target = tiny_network(primus_plans, classes=5, seed=3)
    head = {k: v.clone() for k, v in target.up_projection.state_dict().items()}
    report = load_pretrained(target, f"{trainer.output_folder}/checkpoint_final.pth", primus_plans, "3d_fullres")
    assert report.parts == ("down_projection", "eva")
    for part in report.parts:
        for key, value in getattr(target, part).state_dict().items():
            assert torch.equal(value, getattr(trainer.method.network, part).state_dict()[key]), key
    assert all(torch.equal(v, head[k]) for k, v in target.up_projection.state_dict().items())
