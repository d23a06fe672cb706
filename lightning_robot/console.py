"""What the project prints: plain lines on rank 0, and progress with a rate and the remaining time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def is_first_process() -> bool:
    """True in the process that speaks for the run: rank 0, known from the launcher's environment variables."""
    for name in RANK_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return False
    return True


def say(message: str) -> None:
    """Prints one plain line, once per run however many processes it has."""
    if is_first_process():
        print(message, flush=True)


def duration(seconds: float) -> str:
    """A length of time as people write it: ``8 s``, ``4 min 10 s``, ``2 h 5 min``, ``3 d 4 h``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def disk_size(count: float) -> str:
    """A number of bytes as people write it: ``640 B``, ``12 kB``, ``310 MB``, ``4.1 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 10 * scale else 0}f} {unit}"
    return f"{count:.0f} B"


def counted(count: int, noun: str) -> str:
    """A number and its noun: ``1 episode``, ``2 episodes``, ``3 processes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def progress(
    iterable: Iterable[Item], total: int | None = None, description: str = "", *, unit: str = "", interval: float = 10.0
) -> Iterator[Item]:
    """Yields the items and shows how far the work is.

    A bar on a terminal; one plain line every `interval` seconds otherwise (nothing at all for work that is shorter), so
    that a log file stays readable. Silent in every process but the first.

    Args:
        iterable: the work.
        total: number of items; taken from the iterable where it knows its length.
        description: what is being done, e.g. ``"converting"``.
        unit: what an item is, e.g. ``"frames"``.
        interval: seconds between plain lines.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not is_first_process():
        yield from iterable
    elif sys.stderr.isatty():
        yield from _bar(iterable, total, description)
    else:
        yield from _lines(iterable, total, description, unit, interval)


def _bar(iterable: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            bar.advance(task)


def _lines(iterable: Iterable[Item], total: int | None, description: str, unit: str, interval: float) -> Iterator[Item]:
    started = last = time.monotonic()
    spoke = False
    count = 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - last >= interval:
            last, spoke = now, True
            rate = count / (now - started)
            parts = [f"{description}: {count}" + (f"/{total}" if total else "") + (f" {unit}" if unit else "")]
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if total:
                parts.append(f"{duration((total - count) / rate)} left")
            print(", ".join(parts), file=sys.stderr, flush=True)
    if spoke:
        took = duration(time.monotonic() - started)
        print(f"{description}: {count}" + (f" {unit}" if unit else "") + f" done in {took}", file=sys.stderr, flush=True)
