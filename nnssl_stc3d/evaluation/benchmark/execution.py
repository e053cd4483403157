"""Executes the runs of a benchmark side by side, each as soon as what it starts from is there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from time import time

from tqdm import tqdm

from nnssl_stc3d.evaluation.benchmark import seeded
from nnssl_stc3d.evaluation.benchmark.energy import gpu_joules
from nnssl_stc3d.evaluation.benchmark.runs import PerturbedPrediction, Pretraining, Run, Settings
from nnssl_stc3d.evaluation.benchmark.workspace import UNFINISHED, environment, read_json, write_whole
from nnssl_stc3d.evaluation.commands import end_programs

TAIL_LINES = 15
TRAIN, EVALUATE = "nnUNetv2_train", "nnUNetv2_evaluate_folder"
# "seconds" and "joules" of a command.
Spent = dict[str, float | None]
_COMMANDS_LOCK = threading.Lock()


class Programs:
    """The programs that run now, so that all of them can be ended from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, words: Sequence[str], variables: Mapping[str, str], log: Path) -> int:
        """Runs a program with its output in a log file; returns its exit code.

        Raises:
            RuntimeError: the programs have been ended.
        """
        with open(log, "a", encoding="utf-8") as file:
            with self._lock:
                if self._ended:
                    raise RuntimeError("interrupted")
                # A session of its own, so that ending it ends its workers, and a pipe that ends when this process does.
                process = subprocess.Popen(
                    words, env=dict(variables), stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
                    text=True, start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            # Leaving this closes the pipe, so that an interrupt while waiting ends the program.
            with process:
                code = process.wait()
            with self._lock:
                self._running.discard(process)
            return code

    def end(self) -> None:
        """Ends all programs; no other is started."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        end_programs(running)


def cost_file(run: Run, settings: Settings) -> Path:
    """Where is kept what a run's commands took: command -> {"seconds": ..., "joules": ... or null}.

    Commands after a training stand there with the cases that they are about. What an interrupted command took is kept
    as "COMMAND, unfinished" until it is continued or begins again.
    """
    return settings.workspace.root / "cost" / f"{_file_name(run, settings)}.json"


def command_on_cases(command: str, settings: Settings) -> str:
    """Name in a cost file of a command that predicts or evaluates."""
    return f"{command} {settings.cases}{'' if settings.mirroring else ' without mirroring'}"


def read_cost(run: Run, settings: Settings) -> dict[str, Spent]:
    """What :func:`cost_file` says; nothing of a run that has not begun."""
    file = cost_file(run, settings)
    cost: dict[str, Spent] = read_json(file, {})
    return cost


def _file_name(run: Run, settings: Settings) -> str:
    """Of a run's log and cost; the length of a pretraining is in its name already."""
    if isinstance(run, Pretraining):
        return run.name
    finetuning = run.finetuning if isinstance(run, PerturbedPrediction) else run
    return f"{run.name}-{finetuning.steps(settings)}steps"


def call(
    words: list[str],
    settings: Settings,
    start: str,
    log: Path,
    seed: int,
    threads: int,
    workers: int,
    gpu: str = "",
    programs: Programs | None = None,
) -> None:
    """Runs one command with its output in a log file, and notes it in commands.txt.

    Args:
        words: the command.
        settings: of the benchmark.
        start: whose nnUNet_results it uses.
        log: receives its output.
        seed: of a training's random numbers.
        threads: CPU threads, 0 for nnU-Net's own choice.
        workers: nnUNet_n_proc_DA.
        gpu: CUDA_VISIBLE_DEVICES, "" to leave it alone.
        programs: that may be ended together.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line = shlex.join(words)
    with _COMMANDS_LOCK, open(settings.workspace.root / "commands.txt", "a", encoding="utf-8") as file:
        file.write(f"nnUNet_results={shlex.quote(str(settings.workspace.results(start)))} {line}\n")
    program = [sys.executable, "-m", seeded.__name__, seeded.WITH_PARENT, str(seed), str(threads), *words]
    variables = {**os.environ, **environment(settings.workspace, start, threads, workers)}
    if gpu:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    code = (programs or Programs()).run(program, variables, log)
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{line}\nended with {code}. The end of {log}:\n{tail}")


def execute(
    run: Run, settings: Settings, threads: int, workers: int, gpu: str, alone: bool, programs: Programs
) -> None:
    """Does what is missing of a run.

    Args:
        run: to finish.
        settings: of the benchmark.
        threads: CPU threads.
        workers: nnUNet_n_proc_DA.
        gpu: CUDA_VISIBLE_DEVICES.
        alone: no other run uses that GPU, so that what it uses can be told.
        programs: of all runs.
    """
    log = settings.workspace.root / "logs" / f"{_file_name(run, settings)}.log"
    file, cost = cost_file(run, settings), read_cost(run, settings)
    metered = alone and settings.device == "cuda"
    for words in run.commands(settings):
        command = words[0] if words[0] == TRAIN else command_on_cases(words[0], settings)
        name = unfinished = command + UNFINISHED
        earlier = cost.pop(unfinished, None)
        before, begin = gpu_joules(gpu) if metered else None, time()
        try:
            call(words, settings, run.start, log, run.seed, threads, workers, gpu, programs)
            name = command
        finally:
            seconds, after = time() - begin, gpu_joules(gpu) if metered else None
            joules = None if before is None or after is None else after - before
            cost[name] = _continued(earlier if "--c" in words else None, seconds, joules)
            write_whole(file, json.dumps(cost) + "\n")


def _continued(earlier: Spent | None, seconds: float, joules: float | None) -> Spent:
    """Cost of a command with that of what it continued."""
    first = earlier or {"seconds": 0.0, "joules": 0.0}
    both = None if joules is None or first["joules"] is None else round(first["joules"] + joules, 1)
    return {"seconds": round((first["seconds"] or 0.0) + seconds, 1), "joules": both}


def execute_all(
    runs: Sequence[Run],
    settings: Settings,
    threads: int,
    workers: int,
    jobs: int,
    gpus: Sequence[str] = (),
    on_seed: Callable[[set[int]], None] = lambda left: None,
) -> list[str]:
    """Executes runs under one progress line with the time left; a failure stops only what starts from it.

    Args:
        runs: each after what it waits for.
        settings: of the benchmark.
        threads: CPU threads of each run.
        workers: nnUNet_n_proc_DA of each run.
        jobs: runs side by side, on each GPU where there are several.
        gpus: names for CUDA_VISIBLE_DEVICES.
        on_seed: called with the seeds that are left, whenever all runs of a seed are over and others are left. It is
            called in a thread of its own, so that no run waits for it.

    Returns:
        Messages of the failures.
    """
    waiting = [run for run in runs if _left_to_do(run, settings)]
    slots = [gpu for gpu in gpus or [""] for _ in range(jobs)]
    failures: list[str] = []
    programs = Programs()
    failed: set[Run | None] = set()
    running: dict[Future[None], tuple[Run, str]] = {}
    seeds_over: SimpleQueue[set[int] | None] = SimpleQueue()
    # A daemon, so that an interrupt does not wait for it.
    reporter = threading.Thread(target=_for_each, args=(seeds_over, on_seed), daemon=True)
    reporter.start()
    with (
        ThreadPoolExecutor(len(slots)) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", desc="runs", smoothing=0) as bar,
    ):
        try:
            while waiting or running:
                for orphan in [r for r in waiting if r.after in failed]:
                    waiting.remove(orphan)
                    failed.add(orphan)
                    failures.append(f"{orphan.name}: left out, what it starts from failed")
                    bar.update()
                unfinished = {*waiting, *(run for run, _ in running.values())}
                for run in [r for r in waiting if r.after not in unfinished | failed][: len(slots)]:
                    waiting.remove(run)
                    gpu = slots.pop()
                    running[pool.submit(execute, run, settings, threads, workers, gpu, jobs == 1, programs)] = (
                        run,
                        gpu,
                    )
                if not running:
                    continue
                bar.set_postfix_str(", ".join(run.name for run, _ in running.values()))
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    run, gpu = running.pop(future)
                    slots.append(gpu)
                    error = future.exception()
                    if error is not None:
                        failed.add(run)
                        failures.append(f"{run.name}: {error}")
                    bar.update()
                    left = {r.seed for r in [*waiting, *(r for r, _ in running.values())]}
                    if left and run.seed not in left:
                        seeds_over.put(left)
        except BaseException:
            # An interrupt: the pool waits for its threads, and they for their programs.
            programs.end()
            raise
    seeds_over.put(None)
    reporter.join()
    return failures


def _for_each(items: SimpleQueue[set[int] | None], function: Callable[[set[int]], None]) -> None:
    """Calls a function with what comes, until None comes."""
    while (item := items.get()) is not None:
        function(item)


def _left_to_do(run: Run, settings: Settings) -> bool:
    """Whether a run is not finished. What is kept of a training that was interrupted at its very end becomes whole."""
    commands, cost = run.commands(settings), read_cost(run, settings)
    if TRAIN + UNFINISHED in cost and TRAIN not in (words[0] for words in commands):
        cost[TRAIN] = cost.pop(TRAIN + UNFINISHED)
        write_whole(cost_file(run, settings), json.dumps(cost) + "\n")
    return bool(commands)
