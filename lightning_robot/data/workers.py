"""Long work in many tasks: over processes, noted line by line, locked, ended with its parent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any


class WorkError(RuntimeError):
    """The work cannot begin, or a worker process was lost."""


def append_line(path: Path, value: Any) -> None:
    """Adds a line of JSON and waits until it is on the disk; short lines arrive whole, also from several processes.

    It begins with a line break: the line before may have been cut by a kill.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(value)}\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[Any]:
    """What `append_line` noted; lines cut by a kill are left out."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[Path]:
    """The work folder, for this process alone: a lock that a kill releases."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkError(f"Another process is at work in {partial}. Wait for it, or write elsewhere.") from error
        yield partial


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: Any = None  # in a worker process: what all tasks have in common


def run_tasks(function: Callable[[Any, Any], Any], shared: Any, tasks: Sequence[Any], processes: int) -> Iterator[Any]:
    """Results of ``function(shared, task)`` as they come, from worker processes, a few tasks ahead at a time."""
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from (function(shared, task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # threads of torch and zarr do not survive a fork
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (shared, os.getpid()))
    try:
        waiting, pending = iter(tasks), set[Future[Any]]()
        while True:
            for task in waiting:
                pending.add(pool.submit(_call, function, task))
                if len(pending) >= 2 * processes:
                    break
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise WorkError(
            "A worker process died: usually for lack of memory (run the same again with fewer processes, it continues), or "
            'because the calling script works outside of `if __name__ == "__main__":`.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(shared: Any, parent: int) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # a worker must not outlive a killed parent: the next run writes the same shards
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    import zarr

    zarr.config.set({"threading.max_workers": 1})


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_shared, task)
