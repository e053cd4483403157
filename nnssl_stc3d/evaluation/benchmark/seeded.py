"""Runs one of nnU-Net's commands with a random seed and a number of CPU threads, neither of which it has options for.

    python -m nnssl_stc3d.evaluation.benchmark.seeded SEED THREADS nnUNetv2_train 4 3d_fullres 0 -device cpu

On the CPU nnU-Net's commands take every core, whatever OMP_NUM_THREADS says, so that runs side by side slow each other
down; and nnU-Net draws initialisation and batches at random. This lowers the number of cores that Python reports, seeds
the generators and calls the command itself. THREADS 0 leaves the threads alone. The seed fixes the initialisation; with
nnUNet_n_proc_DA=0 and one thread it fixes the batches, too.

With --with-parent as its first argument, the program ends with the one that started it, however that one ended: it has
to be started in a process group of its own, with a pipe as its standard input.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from importlib.metadata import entry_points

WITH_PARENT = "--with-parent"


def main(arguments: list[str]) -> int | None:
    """Calls a command.

    Args:
        arguments: seed, threads, command and what follows it; ``--with-parent`` may come before them.

    Raises:
        ValueError: no such command is installed.
    """
    if arguments[0] == WITH_PARENT:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        arguments = arguments[1:]
    seed, threads, command = int(arguments[0]), int(arguments[1]), arguments[2]
    found = [e for e in entry_points(group="console_scripts") if e.name == command]
    if not found:
        raise ValueError(f"expected an installed command such as nnUNetv2_train, got {command!r}. Install nnunetv2.")
    if threads > 0:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        # multiprocessing.cpu_count(), which nnU-Net hands to torch.set_num_threads, asks this function.
        os.cpu_count = lambda: threads

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    sys.argv = arguments[2:]
    result: int | None = found[0].load()()
    return result


def _end_with_parent() -> None:
    """Waits until nobody holds the other end of standard input, then ends this process and its workers.

    nnU-Net's loader workers do not notice that their process is gone: without this they would run for ever.
    """
    # Not sys.stdin, whose lock no thread may hold when Python ends.
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
