"""nnU-Net's trainer around a pretraining method: all plumbing, once for all methods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os.path import isdir, join
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import autocast, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from nnssl_stc3d.data.body import BodyRule
from nnssl_stc3d.data.dataset import CaseDataset, refuse
from nnssl_stc3d.data.embeddings import embedded_guides
from nnssl_stc3d.data.guides import body_guides
from nnssl_stc3d.data.loader import LoadedBatch, ViewDataset, batches, endless
from nnssl_stc3d.methods.base import EMBEDDINGS, PretrainConfig, PretrainMethod
from nnssl_stc3d.training.figures import plot_views
from nnssl_stc3d.training.logger import PretrainLogger
from nnssl_stc3d.training.monitors import collapse_monitors
from nnssl_stc3d.training.online_probe import online_interval, probe_online
from nnssl_stc3d.training.preflight import check_configuration, check_environment
from nnssl_stc3d.training.ranks import from_all_ranks, rank_and_ranks
from nnssl_stc3d.training.schedule import WarmupSchedule
from nnssl_stc3d.training.state import collect_state, restore_state
from nnssl_stc3d.transfer.checkpoint import load_checkpoint, save_checkpoint_atomically
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.samplers import ViewSampler

_VALIDATION_WORKERS = 4


class PretrainTrainer(nnUNetTrainer):
    """Pretrains the network of a plan with a :class:`PretrainMethod`; ``nnUNetv2_train`` runs it like any trainer.

    A subclass names the method and its configuration. ``self.network`` is the method; the U-Net is inside.

    Attributes:
        method_class: what is trained.
        config: its hyperparameters; ``view_shape`` None is resolved from the plan.
        epochs: of 250 steps (STC3D A.3.2: 100k steps).
        online_probe_every: epochs between two probes of the features, 0 for none; NNSSL_STC3D_ONLINE overrules it.
    """

    method_class: type[PretrainMethod]
    config: PretrainConfig
    # nnU-Net's attributes, which it sets without a type.
    network: Any
    was_initialized: bool
    current_epoch: int
    _best_ema: float | None
    epochs = 400
    steps_per_epoch = 250
    validation_steps = 10
    online_probe_every = 0

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        check_environment()
        check_configuration(plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.logger.local_logger = PretrainLogger()
        self.initial_lr = self.config.learning_rate
        self.weight_decay = self.config.weight_decay
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.steps_per_epoch
        self.num_val_iterations_per_epoch = self.validation_steps
        self.save_every = max(1, self.num_epochs // 40)
        self.enable_deep_supervision = False
        self.online_probe_every = online_interval(self.online_probe_every)

    # ---- set-up -----------------------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Called by ``nnUNetv2_predict`` only: a pretraining cannot segment.

        Raises:
            RuntimeError: with the command that finetunes.
        """
        raise RuntimeError(
            "This folder holds a self-supervised pretraining: its segmentation layers are untrained and cannot predict."
            " Finetune it first, for example\n  nnUNetv2_train DATASET CONFIGURATION FOLD -tr STC3DFinetuneTrainer "
            "-pretrained_weights .../checkpoint_final.pth\nand predict with -tr STC3DFinetuneTrainer."
        )

    def initialize(self) -> None:
        """Build network, method and optimiser."""
        if self.was_initialized:
            raise RuntimeError("initialize() was called on a trainer that is initialised already")
        if not isdir(self.preprocessed_dataset_folder):
            raise FileNotFoundError(
                f"expected preprocessed data in {self.preprocessed_dataset_folder}, which does not exist. Run "
                f"nnUNetv2_preprocess -d {int(self.plans_manager.dataset_name[7:10])} "
                f"-plans_name {self.plans_manager.plans_name} -c {self.configuration_name}"
            )
        self.dataset_class = nnUNetDatasetBlosc2
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        unet = nnUNetTrainer.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            True,
        )
        self.method_class.check_network(unet)
        self.config = self.method_class.resolve(self.config, unet, self.configuration_manager.patch_size)
        self.batch_size = self._share_of_batch()
        method = self.method_class(unet, self.config)
        method.freeze_untrained()
        method.place(self.device)
        self.network = method
        if self._do_i_compile():
            self.print_to_log_file("Using torch.compile...")
            method.compile_network()
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            self.network = DDP(self.network, device_ids=[self.local_rank])
        self.was_initialized = True
        self.logger.update_config({"method": method.name, "hparas": self.config.to_dict()})
        self.print_to_log_file(
            f"Pretraining with {method.name}, trained and transferred: {', '.join(method.transfers)}. Configuration:\n"
            + json.dumps(self.config.to_dict(), indent=2),
            add_timestamp=False,
        )

    @property
    def method(self) -> PretrainMethod:
        """The method without DDP's wrapper."""
        return self.network.module if isinstance(self.network, DDP) else self.network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupSchedule]:
        """The optimiser and schedule that the configuration names."""
        config = self.config
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, config.learning_rate, config.momentum, weight_decay=config.weight_decay,
                nesterov=config.momentum > 0,
            )  # fmt: skip
        else:
            adam = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
            optimizer = adam(
                parameters, config.learning_rate, (config.momentum, config.beta2), weight_decay=config.weight_decay,
                amsgrad=config.amsgrad,
            )  # fmt: skip
        schedule = WarmupSchedule(
            optimizer, config.learning_rate, self.num_iterations_per_epoch, self.num_epochs, config.warmup_steps,
            config.schedule, config.weight_decay_end,
        )  # fmt: skip
        return optimizer, schedule

    def get_dataloaders(self) -> tuple[Iterator[LoadedBatch], Iterator[LoadedBatch]]:
        """Training batches from the current epoch on, and the fixed batches of the validation."""
        training, validation = self._datasets()
        if self.local_rank == 0:
            sample, names = training.preview(0)
            n_bases = getattr(training.sampler, "n_bases", 0)
            plot_views(
                sample, names, n_bases, tuple(self.configuration_manager.spacing), join(self.output_folder, "views.png")
            )
            self.print_to_log_file(f"Views of one case are drawn in {join(self.output_folder, 'views.png')}")
        workers, pin = get_allowed_n_proc_DA(), self.device.type == "cuda"
        steps = self.num_iterations_per_epoch
        train_loader = batches(
            training, self.current_epoch * steps, max(self.current_epoch, self.num_epochs) * steps, workers, pin
        )
        # The GPU waits for them: they begin when training is over.
        val_workers = min(_VALIDATION_WORKERS, workers)
        val_loader = batches(validation, 0, self.num_val_iterations_per_epoch, val_workers, pin, persistent=True)
        return iter(train_loader), endless(val_loader)

    def _datasets(self) -> tuple[ViewDataset, ViewDataset]:
        training_keys, validation_keys = self.do_split()
        self.validation_keys: list[str] = list(validation_keys)
        sampler = self.method_class.view_sampler(
            self.config, self.configuration_manager.patch_size, self.configuration_manager.spacing
        )
        used = sorted({*training_keys, *validation_keys})
        # Each rank its share: one alone would keep the others waiting for longer than collectives may take.
        problems = CaseDataset(self.preprocessed_dataset_folder, used).problems(
            sampler.view_shape, self.local_rank == 0, get_allowed_n_proc_DA(), rank_and_ranks(self)
        )
        refuse(from_all_ranks(self, problems))
        guides = self._guides(sampler, used) if sampler.guided else None
        training, validation = (
            ViewDataset(
                CaseDataset(self.preprocessed_dataset_folder, keys),
                sampler,
                self.batch_size,
                intensity,
                (self.config.seed, split, self.local_rank),
                guides,
            )
            for split, (keys, intensity) in enumerate(((training_keys, self.config.intensity), (validation_keys, 0.0)))
        )
        return training, validation

    def _guides(self, sampler: ViewSampler, identifiers: list[str]) -> Mapping[str, Guide]:
        """What samplers may know of the cases."""
        body = body_guides(
            CaseDataset(self.preprocessed_dataset_folder, identifiers),
            BodyRule.of_plan(self.plans_manager.plans, self.configuration_manager.configuration),
            self.print_to_log_file,
            get_allowed_n_proc_DA(),
            rank_and_ranks(self),
            progress=self.local_rank == 0,
        )
        if not sampler.wants_features:
            return body
        plans, configuration = self.plans_manager.plans_name, self.configuration_name
        dataset = int(self.plans_manager.dataset_name[7:10])
        command = f"nnssl_stc3d embed CHECKPOINT -d {dataset} -c {configuration} -p {plans}"
        return embedded_guides(
            body, self.preprocessed_dataset_folder, command, plans, configuration, self.configuration_manager.spacing,
            self.print_to_log_file,
        )  # fmt: skip

    def _share_of_batch(self) -> int:
        """Volumes of this rank, so that all ranks together have the configured batch size."""
        if not self.is_ddp:
            return self.config.batch_size
        size, world = self.config.batch_size, dist.get_world_size()
        if size % world:
            raise ValueError(
                f"the batch of {size} volumes must be a multiple of the number of GPUs, got {world}. Use fewer GPUs or "
                "a trainer with another batch_size."
            )
        self.config.check_share(size // world)
        return size // world

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: the segmentation layers are not used."""

    def plot_network_architecture(self) -> None:
        """Not drawn; ``views.png`` shows what is trained on instead."""

    def train_step(self, loaded: LoadedBatch) -> dict[str, float]:
        """One optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast("cuda") if self.device.type == "cuda" else dummy_context():
            terms = self.network(self._to_device(loaded.batch))
        loss = terms["loss"]
        if not torch.isfinite(loss):
            values = {k: float(v.detach()) for k, v in terms.items() if v.ndim == 0}
            raise RuntimeError(
                f"the loss is not finite ({values}) in epoch {self.current_epoch}, step {self.lr_scheduler.iteration}, "
                f"for the cases {', '.join(n for names in loaded.cases for n in names)}. Look at these cases; if they "
                "are fine, lower the learning rate, or continue from the last checkpoint with --c."
            )
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            self.optimizer.step()
        self.lr_scheduler.advance()
        self.method.after_step(self.lr_scheduler.progress)
        return {k: float(v.detach()) for k, v in terms.items() if v.ndim == 0}

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """Log the loss and its terms."""
        self._log_terms("train", train_outputs)

    def validation_step(self, loaded: LoadedBatch) -> dict[str, Any]:
        """The same losses on fixed views, in evaluation mode."""
        with autocast("cuda") if self.device.type == "cuda" else dummy_context():
            terms = self.network(self._to_device(loaded.batch))
        return {k: float(v.detach()) if v.ndim == 0 else v.detach().float().cpu() for k, v in terms.items()}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the loss, its terms and the collapse monitors."""
        pairs = [o.pop(EMBEDDINGS) for o in val_outputs if EMBEDDINGS in o]
        self._log_terms("val", val_outputs)
        if not np.isfinite(self.logger.get_value("val_losses", step=-1)):
            # The loss of the last step was finite, its gradients were not: no checkpoint shall hold what they made.
            raise RuntimeError(
                f"the validation loss is not finite after epoch {self.current_epoch}; the last checkpoint is from "
                "before. Lower the learning rate, or continue from that checkpoint with --c."
            )
        if pairs:
            for name, value in collapse_monitors(torch.cat(pairs)).items():
                self.logger.log(name, value, self.current_epoch)
        probe_online(self)

    def _log_terms(self, split: str, outputs: list[dict[str, float]]) -> None:
        outputs = from_all_ranks(self, outputs)
        for name in outputs[0]:
            key = f"{split}_losses" if name == "loss" else f"{split}_{name}"
            self.logger.log(key, float(np.mean([o[name] for o in outputs])), self.current_epoch)

    def on_epoch_end(self) -> None:
        """Report the epoch, save checkpoints and draw ``progress.png``."""
        epoch = self.current_epoch
        self.logger.log("epoch_end_timestamps", time(), epoch)
        log = self.logger.local_logger.my_fantastic_logging
        hidden = ("epoch_start_timestamps", "epoch_end_timestamps", "lrs")
        for key in (k for k in log if k not in hidden and len(log[k]) > epoch):
            self.print_to_log_file(f"{key} {self.logger.get_value(key, step=-1):.4f}")
        seconds = log["epoch_end_timestamps"][-1] - log["epoch_start_timestamps"][-1]
        self.print_to_log_file(f"Epoch time: {seconds:.2f} s")
        # Smoothed like nnU-Net's pseudo Dice, but lower is better.
        smoothed = log["val_losses"][0]
        for value in log["val_losses"][1:]:
            smoothed = 0.9 * smoothed + 0.1 * value
        self.current_epoch += 1
        if self._best_ema is None or smoothed < self._best_ema:
            self._best_ema = smoothed
            self._save(join(self.output_folder, "checkpoint_best.pth"))
        if self.current_epoch % self.save_every == 0 and self.current_epoch != self.num_epochs:
            self._save(join(self.output_folder, "checkpoint_latest.pth"))
        if self.local_rank == 0:
            self.logger.plot_progress_png(self.output_folder)

    def on_train_end(self) -> None:
        """Save the final checkpoint and stop the loader's workers."""
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """A pretraining has nothing to segment: write a summary and say what comes next."""
        del save_probabilities
        if self.local_rank != 0:
            return
        log = self.logger.local_logger.my_fantastic_logging
        summary = {
            "method": self.method.name,
            "transfers": list(self.method.transfers),
            "epochs": self.current_epoch,
            "last": {k: v[-1] for k, v in log.items() if v and not k.endswith("timestamps")},
        }
        with open(join(self.output_folder, "pretraining_summary.json"), "w") as file:
            json.dump(summary, file, indent=2)
        self.print_to_log_file(
            "Pretraining has no segmentation to validate. Finetune with\n"
            f"  nnUNetv2_train DATASET {self.configuration_name} FOLD -tr STC3DFinetuneTrainer "
            f"-p {self.plans_manager.plans_name} -pretrained_weights {join(self.output_folder, 'checkpoint_final.pth')}"
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write everything that continuing, finetuning and sharing need; plain values and CPU tensors only.

        nnU-Net calls this at the end of the training with the epoch counter set back by one.

        Args:
            filename: path of the file; its folder must exist.
        """
        self._save(filename, self.current_epoch + 1)

    def _save(self, filename: str, epoch: int | None = None) -> None:
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        epoch = self.current_epoch if epoch is None else epoch
        save_checkpoint_atomically(collect_state(self, epoch), filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue a pretraining from a file or what :func:`collect_state` returned."""
        if not self.was_initialized:
            self.initialize()
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint, pretraining=True)
        restore_state(self, checkpoint)

    def _to_device(self, batch: ViewBatch) -> ViewBatch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self.device, non_blocking=True)

        return batch._replace(views=move(batch.views), targets={k: move(v) for k, v in batch.targets.items()})
