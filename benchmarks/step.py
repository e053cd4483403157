"""A pretraining step against forward and backward of the bare network on the same views: time and peak memory.

The step is the trainer's own: loading with one worker from blosc2 cases as nnU-Net writes them, losses, backward,
clipping, optimiser. What it is compared with is the least that any training of the same network parts has to do on
the same tensors: forward and backward from the mean of the last feature map, without a loss, loader or optimiser.

* "encoder": the encoder on all views.
* "trained parts": the encoder on all views and, where the method trains it, the decoder on the views that it decodes.

And with "nnU-Net": its own training step on a batch of two patches of the plan, loaded already. This is what a user of
the plan knows the time and the memory of.

Steps run in blocks with a loader of their own, whose worker is stopped before the bare network runs, so that no work
of the worker hides behind it. Peak memory is that of a fresh process for each variant, above what it holds before the
network is built.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import blosc2
import numpy as np
import torch
from common import Row, Timing, machine, parser, ratio, report, seconds, timed
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, nn

from nnssl_stc3d.data.dataset import CaseDataset
from nnssl_stc3d.data.loader import LoadedBatch, ViewDataset, batches
from nnssl_stc3d.methods.alice import Alice
from nnssl_stc3d.methods.alice_config import AliceConfig
from nnssl_stc3d.methods.base import PretrainConfig, PretrainMethod
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.modules.feature_pyramid import decoder_features
from nnssl_stc3d.training.pretrain_trainer import PretrainTrainer
from nnssl_stc3d.views.guide import Guide

SIZES = {
    # features of the network, volumes a batch at most, shape of a case, patch of the plan
    "quick": ((8, 16, 32), 2, (40, 64, 64), 32),
    "cpu": ((16, 32, 64, 128), 2, (96, 160, 160), 64),
    "full": ((32, 64, 128, 256, 320, 320), 4, (160, 320, 320), 128),
}
METHODS: dict[str, tuple[type[PretrainMethod], PretrainConfig]] = {
    "stc3d": (STC3D, STC3DConfig()),
    "stc3d-paper": (STC3D, STC3DConfig.paper()),
    "voco": (VoCo, VoCoConfig()),
    "voco-teacher": (VoCo, VoCoConfig(bases_through="teacher")),
    "pimpic": (PiMPiC, PiMPiCConfig()),
    "vox2vec": (Vox2Vec, Vox2VecConfig()),
    "alice": (Alice, AliceConfig()),
}
_WARM_UP = 3
_STOCK_BATCH = 2


def build_network(features: tuple[int, ...]) -> PlainConvUNet:
    """A network as nnU-Net plans it: two convolutions a stage, InstanceNorm, LeakyReLU."""
    n = len(features)
    return PlainConvUNet(
        input_channels=1, n_stages=n, features_per_stage=features, conv_op=nn.Conv3d, kernel_sizes=[[3, 3, 3]] * n,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (n - 1), n_conv_per_stage=[2] * n, num_classes=2,
        n_conv_per_stage_decoder=[2] * (n - 1), conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )  # fmt: skip


def write_cases(folder: Path, shape: tuple[int, int, int], patch: int, count: int = 6) -> None:
    """Smooth random volumes, compressed as nnU-Net does."""
    rng = np.random.default_rng(0)
    block, chunk = comp_blosc2_params((1, *shape), (patch,) * 3)
    for case in range(count):
        coarse = torch.from_numpy(rng.standard_normal((1, 1, *(n // 8 for n in shape)), dtype=np.float32))
        image = nn.functional.interpolate(coarse, shape, mode="trilinear")[0].numpy()
        image = image + rng.standard_normal(image.shape, dtype=np.float32) * 0.1
        parameters = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
        blosc2.asarray(image, urlpath=str(folder / f"case_{case}.b2nd"), chunks=chunk, blocks=block, cparams=parameters)


class Stock:
    """nnU-Net's training step on two patches with deep supervision.

    Args:
        size: key of :data:`SIZES`.
        device: of the network.
    """

    def __init__(self, size: str, device: torch.device) -> None:
        features, _, _, patch = SIZES[size]
        torch.manual_seed(0)
        # The constructor wants plans and makes folders; train_step and configure_optimizers are nnU-Net's own.
        self.trainer: Any = object.__new__(nnUNetTrainer)
        self.trainer.network = build_network(features).to(device)
        self.trainer.device = device
        self.trainer.initial_lr, self.trainer.weight_decay, self.trainer.num_epochs = 1e-2, 3e-5, 1000
        self.trainer.grad_scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        self.trainer.optimizer, _ = self.trainer.configure_optimizers()
        outputs = len(features) - 1
        weights = np.array([*(0.5**i for i in range(outputs - 1)), 0.0])
        loss = DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False}, {})
        self.trainer.loss = DeepSupervisionWrapper(loss, weights / weights.sum())
        sizes = [(patch // 2**i,) * 3 for i in range(outputs)]
        target = [torch.randint(0, 2, (_STOCK_BATCH, 1, *shape)).float() for shape in sizes]
        self.batch = {"data": torch.randn(_STOCK_BATCH, 1, *sizes[0]), "target": target}

    def step(self) -> None:
        """One step."""
        self.trainer.train_step(self.batch)


class Bench:
    """A trainer that has everything a step needs but nnU-Net's folders.

    Args:
        folder: of the cases.
        method: key of :data:`METHODS`.
        size: key of :data:`SIZES`.
        device: of the network.
    """

    def __init__(self, folder: Path, method: str, size: str, device: torch.device) -> None:
        features, most, _, patch = SIZES[size]
        torch.manual_seed(0)
        self.device = device
        # The constructor wants plans and makes folders; train_step and configure_optimizers are the trainer's own.
        trainer: Any = object.__new__(PretrainTrainer)
        method_class, config = METHODS[method]
        network = build_network(features)
        batch_size = min(most, config.batch_size)
        config = replace(config, batch_size=batch_size)
        trainer.config = method_class.resolve(config, network, (patch,) * 3)
        trainer.device, trainer.current_epoch = device, 0
        trainer.num_iterations_per_epoch, trainer.num_epochs = 250, 400
        trainer.network = method_class(network, trainer.config)
        trainer.network.freeze_untrained()
        trainer.network.place(device)
        trainer.grad_scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        self.trainer, self.method = trainer, trainer.network
        cases = CaseDataset(folder, CaseDataset.list_identifiers(folder))
        sampler = method_class.view_sampler(trainer.config, (patch,) * 3, (1.0, 1.0, 1.0))
        guides = {name: Guide.everywhere(cases.shape(name)) for name in cases.identifiers} if sampler.guided else None
        self.dataset = ViewDataset(cases, sampler, batch_size, trainer.config.intensity, (0, 0, 0), guides)

    def loader(self, steps: int) -> Iterator[LoadedBatch]:
        """Batches from one worker, as in training."""
        return iter(batches(self.dataset, 0, steps, 1, self.device.type == "cuda"))

    def step(self, loaded: LoadedBatch) -> None:
        """The trainer's step."""
        self.trainer.train_step(loaded)

    def bare(self, views: Tensor, decoder: bool) -> None:
        """Forward and backward of the bare encoder, or of all trained parts; the bases are not decoded."""
        network, n_bases = self.method.network, getattr(self.dataset.sampler, "n_bases", 0)
        for parameter in network.parameters():
            parameter.grad = None
        with torch.autocast("cuda") if self.device.type == "cuda" else dummy_context():
            if decoder:
                loss = network.encoder(views[:, n_bases:].flatten(0, 1))
                loss = decoder_features(network.decoder, loss)[-1].mean()
                if n_bases:
                    loss = loss + network.encoder(views[:, :n_bases].flatten(0, 1))[-1].mean()
            else:
                loss = network.encoder(views.flatten(0, 1))[-1].mean()
        loss.backward()


def measure_time(bench: Bench, stock: Stock, rounds: int, steps: int) -> dict[str, list[Timing]]:
    """Seconds of a step, of the bare networks and of preparing a batch; one value for each round."""
    views = bench.dataset[0].batch.views.to(bench.device)
    variants: dict[str, Callable[[], object]] = {"encoder": lambda: bench.bare(views, False)}
    if "decoder" in bench.method.transfers:
        variants["trained parts"] = lambda: bench.bare(views, True)
    variants["nnU-Net"] = stock.step
    timings: dict[str, list[Timing]] = {name: [] for name in ("step", "batch", *variants)}
    for _ in range(rounds):
        loader = bench.loader(_WARM_UP + steps + 2)
        _repeat(_WARM_UP, _next_step, bench, loader)
        # The worker is as far ahead after the block as before it, so the block pays for all the batches it uses.
        timings["step"].append(timed(partial(_repeat, steps, _next_step, bench, loader), bench.device))
        # Stops the worker.
        del loader
        for name, function in variants.items():
            function()
            timings[name].append(timed(partial(_repeat, steps, function), bench.device))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        timings["batch"].append(timed(lambda: [bench.dataset[i] for i in range(steps)]))
        torch.set_num_threads(threads)
    return {name: [Timing(t.wall / steps, t.cpu / steps) for t in values] for name, values in timings.items()}


def _repeat(times: int, function: Callable[..., object], *arguments: object) -> None:
    for _ in range(times):
        function(*arguments)


def _next_step(bench: Bench, loader: Iterator[LoadedBatch]) -> None:
    bench.step(next(loader))


def peak_memory(bench_arguments: tuple[Path, str, str, torch.device], variant: str) -> int:
    """Bytes that this process needed at most for two steps of a variant, above what it held before."""
    device = bench_arguments[-1]
    # Load every library first.
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    before = _resident()
    if variant == "nnU-Net":
        _repeat(2, Stock(*bench_arguments[2:]).step)
    elif variant == "step":
        bench = Bench(*bench_arguments)
        for _, loaded in zip(range(2), bench.loader(2)):
            bench.step(loaded)
    else:
        bench = Bench(*bench_arguments)
        views = next(bench.loader(1)).batch.views.to(device)
        for _ in range(2):
            bench.bare(views, variant == "trained parts")
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident() - before


def _resident() -> int:
    """Largest resident size of this process so far, bytes (the ru_maxrss of a child starts at that of its parent)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def memory_of(folder: Path, method: str, variant: str, options: argparse.Namespace, repeats: int) -> float:
    """Median of :func:`peak_memory` over fresh processes."""
    command = [sys.executable, __file__, "--size", options.size, "--device", options.device]
    command += ["--child", str(folder), method, variant]
    values = []
    for _ in range(repeats):
        output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
        values.append(json.loads(output.splitlines()[-1]))
    return median(values)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--size", choices=SIZES, default="cpu", help="of network, views and batch")
    arguments.add_argument(
        "--full", action="store_true", help="nnU-Net's 32..320 features, patches of 128^3, 4 volumes or fewer"
    )
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=4, help="in a round")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=["stc3d", "stc3d-paper"])
    arguments.add_argument("--skip-memory", action="store_true")
    arguments.add_argument("--child", nargs=3, metavar=("FOLDER", "METHOD", "VARIANT"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    options.size = "full" if options.full else "quick" if options.quick else options.size
    device = torch.device(options.device)
    if options.child is not None:
        folder, method, variant = options.child
        print(json.dumps(peak_memory((Path(folder), method, options.size, device), variant)))
        return
    rounds, steps = (1, 2) if options.quick else (options.rounds, options.steps)
    features, most, shape, patch = SIZES[options.size]
    target = 1.10 if device.type == "cuda" else 1.15

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder, shape, patch)
        for method in options.methods:
            bench = Bench(folder, method, options.size, device)
            timings = measure_time(bench, Stock(options.size, device), rounds, steps)
            variants = [v for v in ("encoder", "trained parts", "nnU-Net") if v in timings]
            # Goals were set for STC3D; the other methods are measured only.
            judged = variants[-2] if method.startswith("stc3d") else None
            worker = seconds(timings["batch"], "cpu")
            for variant in variants:
                processor = median(
                    (s.cpu + b.cpu) / v.cpu for s, b, v in zip(timings["step"], timings["batch"], timings[variant])
                )
                note = (
                    f"{seconds(timings['step']):.3f} s / {seconds(timings[variant]):.3f} s; processor time, "
                    f"worker included, {processor:.2f}"
                )
                value = ratio(timings["step"], timings[variant])
                rows.append(
                    Row(f"{method}: time, step / {variant}", value, target if variant == judged else None, note=note)
                )
            config = bench.method.config
            views = f"{bench.dataset.sampler.n_views * config.batch_size} views of {config.resolved_view_shape[0]}^3"
            note = f"{worker:.3f} s of processor time for a batch of {views}"
            rows.append(
                Row(f"{method}: worker's batch / step", ratio(timings["batch"], timings["step"]), 1.0, note=note)
            )
            if options.skip_memory:
                continue
            peaks = {v: memory_of(folder, method, v, options, 1 if options.quick else 3) for v in ("step", *variants)}
            for variant in variants:
                note = f"{peaks['step'] / 2**20:.0f} / {peaks[variant] / 2**20:.0f} MiB"
                value = peaks["step"] / peaks[variant]
                rows.append(
                    Row(f"{method}: memory, step / {variant}", value, 1.25 if variant == judged else None, note=note)
                )
    title = (
        f"A step with {most} volumes or fewer, patch {patch}^3, features {features}, {torch.get_num_threads()} threads"
    )
    report(title, rows, machine(device), options)


if __name__ == "__main__":
    main()
