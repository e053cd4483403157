"""The same work for many items, in processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import SimpleITK as sitk
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_jobs() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_itk() -> None:
    """One thread for each process, and no warnings of ITK between the lines of the progress bar."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def run_all(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int, title: str, batch: int = 1
) -> Iterator[Result]:
    """Yields the results, in any order.

    Args:
        function: of a module, since it is sent to other processes.
        items: what it is called with.
        jobs: processes; 1 works in this one.
        title: of the progress bar.
        batch: items that are sent at a time, more than one where each takes milliseconds.

    Raises:
        RuntimeError: a process was killed.
    """
    bar = tqdm(total=len(items), desc=title, unit="file" if batch > 1 else "case", disable=not items)
    batches = [items[i : i + batch] for i in range(0, len(items), batch)]
    with bar:
        if jobs <= 1 or len(batches) <= 1:
            quiet_itk()
            for item in items:
                yield function(item)
                bar.update()
            return
        # Forking a process that has threads can hang.
        context = multiprocessing.get_context("spawn")
        workers = min(jobs, len(batches))
        pool = ProcessPoolExecutor(workers, context, initializer=quiet_itk)
        try:
            waiting = iter(batches)
            # Few at a time, so that an error ends the run soon.
            running = {pool.submit(_each, function, b) for _, b in zip(range(2 * workers), waiting)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    results = future.result()
                    running |= {pool.submit(_each, function, b) for b in (next(waiting, None),) if b is not None}
                    bar.update(len(results))
                    yield from results
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"A process was killed, most likely because memory ran out. Pass a smaller --jobs than {jobs}."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]
