"""Short trainers for the tests; nnU-Net finds them through ``nnUNet_extTrainer`` like those of a user."""

import json
import os
import resource
import signal
from dataclasses import replace
from os.path import join

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.training.finetune_trainer import FinetuneTrainer
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer

SMALL = {"batch_size": 2, "projector_hidden": 16, "projector_dim": 8, "warmup_steps": 2, "learning_rate": 3e-3}


class ShortPretrainTrainer(PretrainTrainer):
    """The default method for 3 epochs of 4 steps; notes its steps and cases, and dies where the environment says.

    ``TEST_DIE_AT`` is ``step:N`` (before the N-th step of the run) or ``write:NAME`` (while that checkpoint is half
    written); ``TEST_FILE_SIZE_LIMIT`` lets files grow to so many bytes, as a disk that is almost full.
    """

    method_class = STC3D
    config = replace(STC3DConfig(), dense_points=16, dense_dim=8, **SMALL)
    epochs = 3
    steps_per_epoch = 4
    validation_steps = 2

    def initialize(self) -> None:
        # Weights come from torch's global generator, which nnU-Net does not seed. More threads than one only wait for
        # each other on networks this small, and make two runs differ in rounding where the machine is busy.
        torch.manual_seed(0)
        torch.set_num_threads(1)
        super().initialize()
        what, _, when = os.environ.get("TEST_DIE_AT", "never").partition(":")
        self.die_at_step = int(when) if what == "step" else None
        if what == "write":
            _die_while_writing(when)
        if limit := os.environ.get("TEST_FILE_SIZE_LIMIT"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

    def train_step(self, loaded):
        step = self.lr_scheduler.iteration
        if step == self.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(join(self.output_folder, "steps.txt"), "a") as file:
            file.write(json.dumps([step, [n for names in loaded.cases for n in names]]) + "\n")
        return super().train_step(loaded)


class ShortPaperPretrainTrainer(ShortPretrainTrainer):
    """The literal variant on views that are larger than the smallest volumes of the tests."""

    config = replace(STC3DConfig.paper(), view_shape=(32, 32, 32), **SMALL)
    epochs = 1
    steps_per_epoch = 2
    validation_steps = 1


class OneStepPretrainTrainer(ShortPretrainTrainer):
    """A single step."""

    epochs = 1
    steps_per_epoch = 1
    validation_steps = 1


class _Short:
    """One epoch on one thread; keeps the weights that it starts from."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        torch.set_num_threads(1)
        return nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def on_train_start(self):
        # Without weights to load, nobody has made the network yet.
        if not self.was_initialized:
            self.initialize()
        torch.save(self.network.state_dict(), join(self.output_folder, "initial_weights.pt"))
        super().on_train_start()


class ShortStockTrainer(_Short, nnUNetTrainer):
    """nnU-Net's own trainer for one short epoch."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = 3
        self.num_val_iterations_per_epoch = 1


class ShortFinetuneTrainer(_Short, FinetuneTrainer):
    """The finetuning trainer for one short epoch."""

    epochs = 1

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = 3
        self.num_val_iterations_per_epoch = 1


def _die_while_writing(name: str) -> None:
    """Let ``torch.save`` write half of a file and die there."""
    original = torch.save

    def save(value, file, *args, **kwargs):
        original(value, file, *args, **kwargs)
        if name in file.name:
            file.flush()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
