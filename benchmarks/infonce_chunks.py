"""InfoNCE over many voxels: similarities some rows at a time against all at once.

Both are the same function and give the same loss and gradients; the rows are computed again in the backward pass.
The peak is the memory of this process (on a GPU, of its allocator) above what it held before the step, each measured
in a process of its own, since a process does not give memory back.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from pathlib import Path

import torch
from common import Row, interleaved, machine, parser, ratio, report, seconds, timed
from torch import Tensor

from nnssl_stc3d.losses.info_nce import info_nce

DIMENSION = 128
TEMPERATURE = 0.1
GIB = 2**30


def embeddings(pairs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Corresponding embeddings that are similar, not equal."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(pairs, DIMENSION, generator=generator)
    second = first + 0.5 * torch.randn(pairs, DIMENSION, generator=generator)
    return first.to(device).requires_grad_(), second.to(device).requires_grad_()


def step(pairs: tuple[Tensor, Tensor], rows: int | None) -> tuple[float, Tensor]:
    """Loss and gradient."""
    for z in pairs:
        z.grad = None
    loss = info_nce(*pairs, TEMPERATURE, rows=rows)
    loss.backward()
    gradient = pairs[0].grad
    assert gradient is not None
    return float(loss.detach()), gradient.clone()


class PeakResident:
    """Largest resident memory of this process between two moments, bytes; sampled, so that it can start anew."""

    def __enter__(self) -> PeakResident:
        self.before = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def peak_of_step(pairs: int, rows: int | None, device: torch.device) -> int:
    """Bytes that one step needs above the embeddings."""
    z = embeddings(pairs, device)
    # What the first steps of a process load shall not count.
    step((z[0][:2].detach().requires_grad_(), z[1][:2].detach().requires_grad_()), None if rows is None else 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(z, rows)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakResident() as watched:
        step(z, rows)
    return watched.peak - watched.before


def measured_in_a_process(pairs: int, rows: int | None, options) -> int:
    """:func:`peak_of_step` in a fresh process."""
    words = [sys.executable, __file__, "--peak-of", str(rows or 0), "--pairs", str(pairs)]
    words += ["--device", options.device, "--threads", str(options.threads)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, encoding="utf-8").stdout)


def main() -> None:
    """Measure and report."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--pairs", type=int, default=10240, help="corresponding voxels")
    arguments.add_argument("--rows", type=int, default=1024, help="anchors at once")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--peak-of", type=int, help="only print the peak in bytes with so many rows, 0 for all")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.peak_of is not None:
        print(json.dumps(peak_of_step(options.pairs, options.peak_of or None, device)))
        return
    pairs, repeats = (1024, 2) if options.quick else (options.pairs, options.repeats)
    rows = min(options.rows, pairs // 4)

    z = embeddings(pairs, device)
    (chunked_loss, chunked), (dense_loss, dense) = step(z, rows), step(z, None)
    difference = float((chunked - dense).abs().max() / dense.abs().max())
    peaks = {name: measured_in_a_process(pairs, at_once, options) for name, at_once in (("rows", rows), ("all", None))}
    timings = interleaved(
        {"rows": lambda: timed(lambda: step(z, rows), device), "all": lambda: timed(lambda: step(z, None), device)},
        repeats,
    )
    table = [
        Row("peak memory, rows, GiB", peaks["rows"] / GIB, 3.0),
        Row("peak memory, all at once, GiB", peaks["all"] / GIB),
        Row("memory, all at once / rows", peaks["all"] / max(1, peaks["rows"]), 2.0, True),
        Row(
            "time, rows / all at once",
            ratio(timings["rows"], timings["all"]),
            note=f"{seconds(timings['rows']):.3f} s / {seconds(timings['all']):.3f} s",
        ),
        Row("loss, relative difference", abs(chunked_loss - dense_loss) / dense_loss, 1e-6),
        Row("gradient, largest difference / largest", difference, 1e-5),
    ]
    title = f"InfoNCE of {pairs} pairs, {rows} of {2 * pairs} anchors at once, forward and backward"
    report(title, table, f"{machine(device)}, {options.threads} thread(s)", options)


if __name__ == "__main__":
    main()
