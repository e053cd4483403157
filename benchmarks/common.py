"""What the benchmarks share: interleaved timing, the table, the machine class."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        name: what is compared with what.
        value: the measured ratio or error.
        target: what ``value`` should reach, None for a figure without a target.
        at_least: whether larger is better.
        note: medians and units behind the value.
    """

    name: str
    value: float
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: on the clock, and of the processor over all threads of this process."""

    wall: float
    cpu: float


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, figures mean little")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the table and the machine class to FILE")
    return result


def timed(function: Callable[[], object], device: torch.device | None = None) -> Timing:
    """Run a function once; on a GPU until its work is done."""
    gpu = device is not None and device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if gpu:
        torch.cuda.synchronize(device)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Timing]]:
    """Run the functions in turn, so that a busy moment of the machine hits all of them; the first round is dropped."""
    timings: dict[str, list[Timing]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            timing = timed(function)
            if round_:
                timings[name].append(timing)
    return timings


def ratio(numerator: list[Timing], denominator: list[Timing], clock: str = "wall") -> float:
    """Median over the rounds of the ratio within a round."""
    return median(getattr(a, clock) / getattr(b, clock) for a, b in zip(numerator, denominator))


def seconds(timings: list[Timing], clock: str = "wall") -> float:
    """Median of the runs."""
    return median(getattr(t, clock) for t in timings)


def machine(device: torch.device | str = "cpu") -> str:
    """The class of machine that figures belong to."""
    device = torch.device(device)
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    return f"{cores}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"{cores}, CPU only"


def report(title: str, rows: list[Row], where: str, options: argparse.Namespace) -> None:
    """Print the table and write it as JSON if asked to."""
    width = max(len(r.name) for r in rows)
    print(f"\n{title}\n{where}{' (quick: figures mean little)' if options.quick else ''}\n")
    for row in rows:
        target = "" if row.target is None else f"{'>=' if row.at_least else '<='} {row.target:g}"
        mark = {None: "", True: "pass", False: "MISS"}[row.passed]
        print(f"{row.name:<{width}}  {row.value:>9.3g}  {target:>9}  {mark:<4}  {row.note}")
    if options.json is not None:
        table: list[dict[str, Any]] = [asdict(r) | {"passed": r.passed} for r in rows]
        options.json.write_text(json.dumps({"title": title, "machine": where, "quick": options.quick, "rows": table}))
