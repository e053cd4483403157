"""What the tests of all methods share; functions come as fixtures, because test files cannot import each other."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl_stc3d.methods.base import PretrainMethod, config_from_dict
from nnssl_stc3d.modules.primus import PlansPrimus
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.guide import Guide
from nnssl_stc3d.views.render import render_views
from nnssl_stc3d.views.spec import ViewSpecs, stack_specs

# ---- configurations, trainers and pages -----------------------------------------------------------------------------


@pytest.fixture
def page(repository: Path) -> Callable[[str], str]:
    """Function ``(name) -> text`` of a page of the documentation."""

    def read(name: str) -> str:
        return (repository / "documentation" / f"{name}.md").read_text(encoding="utf-8")

    return read


@pytest.fixture
def run_examples(page: Callable[[str], str]) -> Callable[[str], tuple[dict[str, Any], int]]:
    """Function ``(name) -> (names, blocks)``: runs the Python of a page, one block after the other."""

    def run(name: str) -> tuple[dict[str, Any], int]:
        names: dict[str, Any] = {"__name__": "example"}
        blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
        for code in blocks:
            exec(compile(code, f"{name}.md", "exec"), names)
        return names, len(blocks)

    return run


@pytest.fixture
def from_checkpoint() -> Callable[[Any], Any]:
    """Function ``(config) -> config`` as it comes back from a checkpoint."""
    return lambda config: config_from_dict(type(config), json.loads(json.dumps(config.to_dict())))


@pytest.fixture
def check_trainers(repository: Path) -> Callable[..., None]:
    """Function ``(file, {prefix: (config, steps)})``: trainers of a file and their variants are what they are called.

    The first prefix is that of the default, which has a quickstart.
    """

    def check(file: str, expected: dict[str, tuple[Any, int]]) -> None:
        spec = importlib.util.spec_from_file_location(f"{file}_trainers", repository / "trainers" / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for prefix, (config, steps) in expected.items():
            trainer = getattr(module, f"{prefix}PretrainTrainer")
            assert trainer.config == config and trainer.epochs * trainer.steps_per_epoch == steps
            for epochs in (1, 5, 10, 50, 100):
                variant = getattr(module, f"{prefix}PretrainTrainer_{epochs}epoch{'' if epochs == 1 else 's'}")
                assert variant.epochs == epochs and variant.config == config
        default, (config, _) = next(iter(expected.items()))
        assert getattr(module, f"{default}PretrainTrainer_quickstart").config == config

    return check


# ---- networks, methods and batches ----------------------------------------------------------------------------------

PATCH = (16, 16, 16)


@pytest.fixture
def network_of(tiny_plans, tiny_network) -> Callable[..., nn.Module]:
    """Function ``(architecture, channels=1, **arch_kwargs) -> network``: a U-Net, "VoxelFPN" or "Primus"."""

    def make(architecture: str, channels: int = 1, **changes: Any) -> nn.Module:
        if architecture == "Primus":
            torch.manual_seed(0)
            return PlansPrimus(
                channels, 3, embed_dim=24, patch_embed_size=(4, 4, 4), eva_depth=1, eva_numheads=1, input_shape=PATCH
            )
        plans = tiny_plans("ResidualEncoderUNet" if architecture == "VoxelFPN" else architecture, channels, **changes)
        if architecture == "VoxelFPN":
            fpn = "nnssl_stc3d.modules.fpn.VoxelFPN"
            plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = fpn
        return tiny_network(plans, channels)

    return make


@pytest.fixture
def method_class() -> type[PretrainMethod]:
    """The method that a file tests; the file says which."""
    raise NotImplementedError("a file that builds methods has to define the fixture method_class")


@pytest.fixture
def build(method_class, network_of) -> Callable[..., PretrainMethod]:
    """Function ``(config, architecture, channels=1, **arch_kwargs) -> method`` with frozen parts frozen."""

    def make(config: Any, architecture: str = "PlainConvUNet", channels: int = 1, **changes: Any) -> PretrainMethod:
        network = network_of(architecture, channels, **changes)
        torch.manual_seed(0)
        method = method_class(network, method_class.resolve(config, network, PATCH))
        method.freeze_untrained()
        return method

    return make


@pytest.fixture
def anatomy() -> Callable[..., Tensor]:
    """Function ``(seed, shape, channels=1, grain=4) -> volume``: smooth, with structure of ``grain`` voxels."""

    def make(seed: int, shape: tuple[int, ...] = (20, 24, 18), channels: int = 1, grain: int = 4) -> Tensor:
        noise = torch.randn(1, channels, *[n // grain for n in shape], generator=torch.Generator().manual_seed(seed))
        return F.interpolate(noise, size=shape, mode="trilinear")[0]

    return make


@pytest.fixture
def coordinates() -> Callable[..., Tensor]:
    """Function ``(shape, offset=0) -> volume``, ``(3, Z, Y, X)``: an image of positions."""

    def make(shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
        return torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij")) + offset

    return make


@pytest.fixture
def make_batch(method_class, anatomy) -> Callable[..., ViewBatch]:
    """Function ``(config, samples=2, shape=None, channels=1, guide=None) -> batch``: what the loader makes of volumes.

    ``samples`` is how many there are, of ``anatomy``, or a list of volumes ``(C, Z, Y, X)``, one for each sample.
    """

    def make(
        config: Any,
        samples: int | list[Tensor] = 2,
        shape: tuple[int, ...] | None = None,
        channels: int = 1,
        guide: Guide | None = None,
    ) -> ViewBatch:
        sampler = method_class.view_sampler(config, PATCH, (1.5, 1.0, 1.0))
        rng, sources = np.random.default_rng(0), sampler.n_sources
        volumes = samples
        if isinstance(samples, int):
            shaped = {} if shape is None else {"shape": shape}
            volumes = [anatomy(seed, channels=channels, **shaped) for seed in range(samples * sources)]
        drawn, views = [], []
        for first in range(0, len(volumes), sources):
            mine = volumes[first : first + sources]
            sampled = sampler.sample([v.shape[1:] for v in mine], rng, [guide] * sources if guide else ())
            shown = torch.empty(sampler.n_views, len(mine[0]), *config.view_shape)
            for index, (volume, box) in enumerate(zip(mine, sampled.boxes)):
                crop = volume[(slice(None), *(slice(a, b) for a, b in zip(*box)))]
                of_it = (sampled.specs.source == index).nonzero()[:, 0]
                # Every source is rendered on its own and is source 0 of that call.
                alone = sampled.specs._replace(source=torch.zeros_like(sampled.specs.source))
                alone = ViewSpecs(*(field[None, of_it] for field in alone))
                shown[of_it] = render_views(crop[None, None], alone, config.view_shape)[0]
            drawn.append(sampled)
            views.append(shown)
        specs = stack_specs([sampled.specs for sampled in drawn])
        targets = {name: torch.stack([sampled.targets[name] for sampled in drawn]) for name in drawn[0].targets}
        return ViewBatch(torch.stack(views), specs, targets | sampler.targets(specs, rng))

    return make


@pytest.fixture
def reordered() -> Callable[[ViewBatch, list[int]], ViewBatch]:
    """Function ``(batch, order) -> batch`` with its samples in another order."""

    def reorder(batch: ViewBatch, order: list[int]) -> ViewBatch:
        targets = {name: target[order] for name, target in batch.targets.items()}
        return ViewBatch(batch.views[order], ViewSpecs(*(field[order] for field in batch.specs)), targets)

    return reorder


@pytest.fixture
def wave() -> Callable[..., Tensor]:
    """The input of the reference values: ``scale * sin(a k + b + 0.003 (k^2 mod 1009))`` for element ``k``."""

    def make(shape: tuple[int, ...], a: float, b: float = 0.0, scale: float = 1.0) -> Tensor:
        k = torch.arange(math.prod(shape), dtype=torch.float64)
        return (scale * torch.sin(a * k + b + 0.003 * ((k * k) % 1009))).reshape(shape)

    return make


class SeesPositions(nn.Module):
    """A U-Net of stride 2 whose features are what a view shows."""

    class Encoder(nn.Module):
        output_channels = [3, 3]
        strides = [[1, 1, 1], [2, 2, 2]]

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, F.avg_pool3d(x, 2)]

    class KeepSkip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 3:]

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.decoder = nn.Module()
        self.decoder.stages = nn.ModuleList([self.KeepSkip()])
        self.decoder.transpconvs = nn.ModuleList([nn.Upsample(scale_factor=2)])
        self.decoder.seg_layers = nn.ModuleList([nn.Identity()])


@pytest.fixture
def sees_positions() -> nn.Module:
    """A U-Net of stride 2 whose features are, on views of ``coordinates``, the positions that they show."""
    return SeesPositions()


# ---- what every method has to do ------------------------------------------------------------------------------------


@pytest.fixture
def check_step() -> Callable[..., dict[str, Tensor]]:
    """Function ``(method, batch, weights=None) -> result`` of one step.

    It is finite, the loss a sum of its terms with these weights, and there is a gradient for all that is trained and
    none for the rest. A term of weight 0 is not computed.
    """

    def check(method: PretrainMethod, batch: ViewBatch, weights: dict[str, float] | None = None) -> dict[str, Tensor]:
        result = method(batch)
        if weights is not None:
            used = {name: weight for name, weight in weights.items() if weight > 0}
            assert {name for name in weights if name in result} == set(used)
            total = sum(weight * result[name].item() for name, weight in used.items())
            assert result["loss"].item() == pytest.approx(total, rel=1e-5)
        assert all(value.isfinite().all() for value in result.values())
        assert all(not value.requires_grad for name, value in result.items() if name != "loss")
        result["loss"].backward()
        for name, parameter in method.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            else:
                assert parameter.grad is None, name
        return result

    return check


@pytest.fixture
def check_transfers() -> Callable[[PretrainMethod, bool], None]:
    """Function ``(method, decoder)``: a U-Net's decoder is trained and transferred or not, its last layers never."""

    def check(method: PretrainMethod, decoder: bool) -> None:
        assert method.transfers == (("encoder", "decoder") if decoder else ("encoder",))
        parts = [getattr(method.network.decoder, part) for part in ("stages", "transpconvs")]
        assert all(p.requires_grad == decoder for part in parts for p in part.parameters())
        assert not any(p.requires_grad for p in method.network.decoder.seg_layers.parameters())

    return check


@pytest.fixture
def check_autocast() -> Callable[..., None]:
    """Function ``(method, batch, rel, term="loss")``: autocast gives a finite float32 loss and about the same term."""

    def check(method: PretrainMethod, batch: ViewBatch, rel: float, term: str = "loss") -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = method(batch)
        assert result["loss"].dtype == torch.float32 and result["loss"].isfinite()
        assert result[term].item() == pytest.approx(method(batch)[term].item(), rel=rel)

    return check


@pytest.fixture
def overfit() -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Function ``(method, batch, steps, rate=5e-3) -> results`` before and after training on one batch."""

    def train(method: PretrainMethod, batch: ViewBatch, steps: int, rate: float = 5e-3):
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=rate)
        before = {name: value.detach() for name, value in method(batch).items()}
        for step in range(steps):
            optimizer.zero_grad()
            method(batch)["loss"].backward()
            optimizer.step()
            method.after_step(step / steps)
        return before, {name: value.detach() for name, value in method(batch).items()}

    return train
