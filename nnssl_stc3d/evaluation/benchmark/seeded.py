"""Runs one of nnU-Net's commands with a random seed and a number of CPU threads, neither of which it has options for.

    python -m nnssl_stc3d.evaluation.benchmark.seeded SEED THREADS nnUNetv2_train 4 3d_fullres 0 -device cpu

On the CPU nnU-Net's commands take every core, whatever OMP_NUM_THREADS says, so that runs side by side slow each other
down; and nnU-Net draws initialisation and batches at random. This lowers the number of cores that Python reports, seeds
the generators and calls the command itself. THREADS 0 leaves the threads alone. The seed fixes the initialisation; with
nnUNet_n_proc_DA=0 and one thread it fixes the batches, too.
"""

from __future__ import annotations

import os
import random
import sys
from importlib.metadata import entry_points


def main(arguments: list[str]) -> int | None:
    """Calls the command ``arguments[2]`` with what follows it.

    Raises:
        ValueError: no such command is installed.
    """
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
