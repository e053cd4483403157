"""Trains every method for two steps on two processes; run by test_ddp.py with torch.distributed.run.

Rank 0 writes what the test asserts to the file that is named first.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_stc3d.data.loader import ViewDataset
from nnssl_stc3d.methods.alice import Alice, AliceConfig
from nnssl_stc3d.methods.pimpic import PiMPiC, PiMPiCConfig
from nnssl_stc3d.methods.stc3d import STC3D, STC3DConfig
from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.methods.vox2vec import Vox2Vec, Vox2VecConfig
from nnssl_stc3d.modules.fpn import VoxelFPN
from nnssl_stc3d.modules.primus import PlansPrimus
from nnssl_stc3d.training.classify_trainer import ClassifyTrainer
from nnssl_stc3d.training.ranks import from_all_ranks
from nnssl_stc3d.views.guide import Guide

PATCH = (16, 16, 16)
STAGES: dict[str, Any] = {
    "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": nn.Conv3d, "kernel_sizes": 3, "strides": [1, 2, 2],
    "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU,
    "num_classes": 2, "n_conv_per_stage_decoder": [1, 1],
}  # fmt: skip
SMALL = {"batch_size": 2, "warmup_steps": 0}
HEADS = {"projector_hidden": 8, "projector_dim": 4}
MEMBERS: dict[str, Any] = {"grid": (1, 2, 2), **HEADS, **SMALL}


def plain() -> nn.Module:
    return PlainConvUNet(1, n_conv_per_stage=[1, 1, 1], **STAGES)


def residual() -> nn.Module:
    return ResidualEncoderUNet(1, n_blocks_per_stage=[1, 1, 1], **STAGES)


def fpn() -> nn.Module:
    return VoxelFPN(1, n_blocks_per_stage=[1, 1, 1], **STAGES)


def primus() -> nn.Module:
    return PlansPrimus(
        1, embed_dim=24, patch_embed_size=(8, 8, 8), num_classes=2, eva_depth=1, eva_numheads=1, input_shape=PATCH,
        deep_supervision=False,
    )  # fmt: skip


ALICE = replace(AliceConfig(), min_score=-1.0, **SMALL)
RUNS = {
    "stc3d": (STC3D, replace(STC3DConfig(), dense_dim=4, dense_points=8, **MEMBERS), plain),
    "stc3d paper": (STC3D, replace(STC3DConfig.paper(), view_shape=None, **MEMBERS), residual),
    "voco": (VoCo, replace(VoCoConfig(), **MEMBERS), residual),
    "voco official": (VoCo, replace(VoCoConfig.official(), view_shape=None, **MEMBERS), plain),
    "voco through the teacher": (VoCo, replace(VoCoConfig(), bases_through="teacher", **MEMBERS), plain),
    "pimpic": (PiMPiC, replace(PiMPiCConfig(), patches=4, projector_dim=8, pim_hidden=8, **SMALL), residual),
    "vox2vec": (Vox2Vec, replace(Vox2VecConfig(), points=8, head_dim=4, **SMALL), plain),
    "vox2vec paper": (Vox2Vec, replace(Vox2VecConfig.paper(), view_shape=None, points=8, **SMALL), fpn),
    "alice": (Alice, ALICE, plain),
    "alice official": (Alice, replace(AliceConfig.official(), min_score=-1.0, view_shape=None, **SMALL), residual),
    "alice primus": (Alice, replace(ALICE, decoder="tokens"), primus),
}


class Noise:
    """Six volumes of noise in memory, in the form of a CaseDataset."""

    identifiers = [f"case_{i}" for i in range(6)]

    def shape(self, identifier: str) -> tuple[int, ...]:
        return (20, 22, 24)

    def read(self, identifier: str, box: Any) -> np.ndarray:
        (z0, y0, x0), (z1, y1, x1) = box
        image = np.random.default_rng(int(identifier[5:])).normal(size=(1, 20, 22, 24)).astype(np.float32)
        return image[:, z0:z1, y0:y1, x0:x1]


def train(method_class: Any, config: Any, network: nn.Module) -> dict[str, Any]:
    """Two steps; the other rank draws other views."""
    config = method_class.resolve(config, network, PATCH)
    method = method_class(network, config)
    method.freeze_untrained()
    sampler = method_class.view_sampler(config, PATCH, (1.0, 1.0, 1.0))
    cases = Noise()
    guides = {name: Guide.everywhere(cases.shape(name)) for name in cases.identifiers} if sampler.guided else None
    dataset = ViewDataset(cases, sampler, config.batch_size // 2, 0.0, (0, dist.get_rank()), guides)
    wrapped = DistributedDataParallel(method)
    trained = [p for p in method.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, 1e-2)
    losses = []
    for step in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss = wrapped(dataset[step].batch)["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(step / 2)
        losses.append(float(loss.detach()))
    parameters = torch.cat([p.detach().double().flatten() for p in method.parameters()])
    everywhere = [torch.zeros_like(parameters) for _ in range(2)]
    dist.all_gather(everywhere, parameters)
    all_losses: list[Any] = [None, None]
    dist.all_gather_object(all_losses, losses)
    return {
        "losses": all_losses,
        "difference": float((everywhere[0] - everywhere[1]).abs().max()),
        "without_gradient": sum(p.grad is None for p in trained),
        "moved": sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)),
    }


class Classifier:
    """What a classification of whole cases needs of its trainer."""

    is_ddp = True
    device = torch.device("cpu")
    preprocessed_dataset_folder = ""
    configuration_manager = SimpleNamespace(patch_size=PATCH)

    def __init__(self) -> None:
        self.local_rank = dist.get_rank()
        # BatchNorm's statistics are what the wrapper would send to the other ranks before each of its passes.
        network = nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.network = DistributedDataParallel(network)
        self.classified: list[str] = []

    def dataset_class(self, folder: str, cases: list[str]) -> Any:
        def load_case(case: str) -> tuple[np.ndarray]:
            self.classified.append(case)
            return (np.full((1, *PATCH), float(case), np.float32),)

        return SimpleNamespace(load_case=load_case)

    def print_to_log_file(self, *_: object) -> None:
        pass


def classify() -> dict[str, Any]:
    """An odd number of cases, of which both ranks know all logits in the end."""
    torch.manual_seed(0)
    trainer = Classifier()
    logits = ClassifyTrainer._classify(trainer, ["1", "2", "3"])
    expected = trainer.network.module.eval()(torch.full((1, 1, *PATCH), 3.0))[0]
    return {
        "cases": from_all_ranks(trainer, [trainer.classified]),
        "logits": from_all_ranks(trainer, [{case: value.tolist() for case, value in logits.items()}]),
        "third": expected.tolist(),
    }


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"classification": classify()}
    for name, (method_class, config, network) in RUNS.items():
        torch.manual_seed(0)
        results[name] = train(method_class, config, network())
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file)
    dist.destroy_process_group()


main()
