"""Ranks of a run as forked processes: what a launcher starts, without the seconds that an interpreter takes to import."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], ranks: int, folder: Path, *arguments: Any, timeout: float = 100) -> list[Any]:
    """Calls ``function(*arguments)`` in as many forked processes as there are ranks; what they return, in order.

    Lightning finds its rank in the environment, as under torchrun; give the trainer ``devices=ranks, strategy="ddp"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = [_fork(function, arguments, rank, ranks, port, folder) for rank in range(ranks)]
    deadline = time.monotonic() + timeout
    try:
        for rank, child in enumerate(children):
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
                assert time.monotonic() < deadline, f"rank {rank} did not end"
                time.sleep(0.02)
            error = folder / f"error{rank}.txt"
            text = error.read_text() if error.exists() else ""
            assert done[1] == 0, f"rank {rank} ended with status {done[1]}:\n{text}"
    finally:  # those that still run
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            except (ProcessLookupError, ChildProcessError):
                continue
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(ranks)]


def _fork(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, port: int, folder: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if ranks > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
        torch.set_num_threads(1)
        torch.save(function(*arguments), folder / f"result{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)
