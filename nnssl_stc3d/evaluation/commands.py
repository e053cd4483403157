"""Runs command line programs with a progress bar, a log, and a message that helps when one fails."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

TAIL_LINES = 25
# That a program gets to end by itself, once it is asked to.
SECONDS_TO_END = 10.0
# Seconds between two drawings of a bar, in a terminal and in a file that keeps every drawing.
REDRAW_TERMINAL, REDRAW_FILE = 0.2, 15.0
# Reads one line of output; returns (finished steps, all steps or None where unknown), or None if the line says
# nothing about progress.
ProgressReader = Callable[[str], "tuple[int, int | None] | None"]


def find_program(name: str) -> list[str]:
    """Finds a program that belongs to the running Python, not to another one on the PATH.

    Args:
        name: console command, such as "nnUNetv2_train".

    Returns:
        The first words of a command line.

    Raises:
        RuntimeError: it is not installed beside this Python.
    """
    # The executable is not resolved: in a virtual environment it is a link, and the programs lie beside the link.
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    for folder in folders:
        found = shutil.which(name, path=folder)
        if found:
            return [found]
    if name == "nnssl_stc3d":
        return [sys.executable, "-m", "nnssl_stc3d"]
    raise RuntimeError(
        f"Expected the program {name} in {' or '.join(dict.fromkeys(folders))}, but it is not there. Install "
        f"nnU-Net for this Python: "
        f"{sys.executable} -m pip install nnunetv2"
    )


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        title: what it does, for the progress bar.
        words: program name and arguments, as the user would type them.
        environment: variables for this command only.
        unit: what the progress bar counts.
        progress: reads the progress from the output; None shows the elapsed time only.
        total: steps if they are known beforehand.
    """

    title: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    unit: str = "step"
    progress: ProgressReader | None = None
    total: int | None = None

    def shown(self) -> str:
        """The line that a user can paste into a shell."""
        return " ".join(
            [*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), *map(shlex.quote, self.words)]
        )


@dataclass(frozen=True)
class Finished:
    """A command that ran.

    Attributes:
        command: what ran.
        seconds: how long.
    """

    command: Command
    seconds: float


class CommandRunner:
    """Runs commands one after the other, prints each, and keeps their output.

    Args:
        environment: variables that all commands need, besides those of this process.
        log: file that receives the whole output.
        script: file that receives the exports and commands, to be repeated with `sh`.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, script: Path) -> None:
        self.environment = dict(environment)
        self.log = log
        self.script = script
        self.finished: list[Finished] = []
        script.write_text("#!/bin/sh\nset -e\n" + self.exports(), encoding="utf-8")
        log.write_text("", encoding="utf-8")

    def exports(self) -> str:
        """The lines that set the variables in a shell."""
        return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.environment.items())

    def run(self, command: Command) -> None:
        """Runs one command.

        Raises:
            RuntimeError: it failed; the message has the command and the end of its output.
        """
        print(f"\n$ {command.shown()}", flush=True)
        with self.script.open("a", encoding="utf-8") as script:
            script.write(f"{command.shown()}\n")
        environment = {**os.environ, **self.environment, **command.environment, "PYTHONUNBUFFERED": "1"}
        start = perf_counter()
        # A session of its own, so that an interrupt ends the program and all of its workers.
        process = subprocess.Popen(
            [*find_program(command.words[0]), *command.words[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            tail = self._follow(process, command)
            code = process.wait()
        finally:
            end_programs([process])
        if code != 0:
            raise RuntimeError(
                f"This command failed with exit code {code}:\n  {command.shown()}\nThe end of its output:\n"
                + "".join(f"  | {line}\n" for line in tail)
                + f"All of its output is in {self.log}; the environment variables are in {self.script}."
            )
        self.finished.append(Finished(command, perf_counter() - start))

    def _follow(self, process: subprocess.Popen[str], command: Command) -> list[str]:
        """Shows progress until the output ends; returns its last lines."""
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        pause = REDRAW_TERMINAL if sys.stderr.isatty() else REDRAW_FILE
        drawn = perf_counter()
        output = process.stdout
        if output is None:
            raise RuntimeError(f"No output can be read from {command.words[0]}.")
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"
        bar_format = layout if command.total else "{desc} [{elapsed}] {postfix}"
        with (
            self.log.open("a", encoding="utf-8", buffering=1) as log,
            tqdm(total=command.total, desc=command.title, unit=command.unit, bar_format=bar_format) as bar,
        ):
            log.write(f"\n$ {command.shown()}\n")
            # Text mode ends a line at a carriage return too, so the bars of the program arrive piece by piece.
            for line in output:
                text = line.rstrip()
                if not text:
                    continue
                log.write(f"{text}\n")
                tail.append(text)
                state = command.progress(text) if command.progress else None
                if state is not None:
                    steps, total = state
                    if total and total != bar.total:
                        bar.total = total
                        bar.bar_format = layout
                    bar.n = max(bar.n, min(steps, bar.total) if bar.total else steps)
                if perf_counter() - drawn > pause:
                    bar.refresh()
                    drawn = perf_counter()
        return list(tail)


def end_programs(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Ends programs that still run, with the workers that they started; those that do not end in time are killed.

    An interrupt while they are waited for kills them at once.
    """
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _send(process, "SIGTERM")
    latest = perf_counter() + SECONDS_TO_END
    try:
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, latest - perf_counter()))
    finally:
        left = [process for process in running if process.poll() is None]
        for process in left:
            _send(process, "SIGKILL")
        for process in left:
            process.wait()


def _send(process: subprocess.Popen[str], name: str) -> None:
    """Sends a signal to a program and its workers, which have a session of their own."""
    if not hasattr(os, "killpg"):
        process.terminate()
        return
    # It may have ended since it was looked at.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, getattr(signal, name))


def epochs_done() -> ProgressReader:
    """Counts the finished epochs of `nnUNetv2_train`."""
    done = 0

    def read(line: str) -> tuple[int, int | None] | None:
        nonlocal done
        if "Epoch time:" not in line:
            return None
        done += 1
        return done, None

    return read


def cases_predicted() -> ProgressReader:
    """Counts the cases that `nnUNetv2_predict` has finished."""
    done = 0

    def read(line: str) -> tuple[int, int | None] | None:
        nonlocal done
        if not line.startswith("done with "):
            return None
        done += 1
        return done, None

    return read


def bar_named(name: str) -> ProgressReader:
    """Follows a tqdm bar that a program shows.

    Args:
        name: the bar's description.
    """
    pattern = re.compile(re.escape(name) + r":.*?(\d+)/(\d+) \[")

    def read(line: str) -> tuple[int, int | None] | None:
        match = pattern.search(line)
        return (int(match.group(1)), int(match.group(2))) if match else None

    return read
