"""VoCo's bases through the teacher only against bases through both networks: time of a step.

A step is the method's forward pass, its losses, backward, AdamW and the teacher's update on random views; no loader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from common import Row, interleaved, machine, parser, ratio, report, seconds
from step import SIZES, build_network

from nnssl_stc3d.methods.voco import VoCo, VoCoConfig
from nnssl_stc3d.views.batch import ViewBatch
from nnssl_stc3d.views.spec import ViewSpecs

CONFIGS = {"default": VoCoConfig(), "official": VoCoConfig.official()}


def make_step(config: VoCoConfig, features: tuple[int, ...]) -> Callable[[], object]:
    """One training step of a method on a batch that stays the same."""
    torch.manual_seed(0)
    method = VoCo(build_network(features), config)
    method.freeze_untrained()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    count = method.n_bases + config.crops
    views = torch.randn(config.batch_size, count, 1, *(config.view_shape or ()))
    labels = torch.rand(config.batch_size, config.crops, method.n_bases)
    nowhere = ViewSpecs(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, 3), torch.zeros(1, 0, 3, 3))
    batch = ViewBatch(views, nowhere, {"position": labels})

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method(batch)["loss"].backward()
        optimizer.step()
        method.after_step(0.0)

    return step


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    features, _, _, patch = SIZES["quick" if options.quick else "cpu"]
    view = patch // 2
    rows = []
    for name, config in CONFIGS.items():
        shaped = replace(config, view_shape=(view,) * 3, batch_size=2)
        steps = {way: make_step(replace(shaped, bases_through=way), features) for way in ("both", "teacher")}
        timings = interleaved(steps, 2 if options.quick else options.repeats)
        both, teacher = timings["both"], timings["teacher"]
        note = f"{seconds(both, 'cpu'):.2f} s / {seconds(teacher, 'cpu'):.2f} s; wall time {ratio(both, teacher):.2f}"
        title = f"{name}: processor time, bases through both / teacher"
        rows.append(Row(title, ratio(both, teacher, "cpu"), note=note))
    title = f"A step of VoCo, 2 volumes, views of {view}^3, features {features}, {options.threads} threads"
    report(title, rows, machine(), options)


if __name__ == "__main__":
    main()
