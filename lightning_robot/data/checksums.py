"""Checksums of what a store holds: CRC-32 of decoded values, shard by shard, whatever codec packed them.

In a store's attributes::

    checksums: {rows: 256, data: {state: "5f0c9a1e…", …}, meta: {episode_ends: "…"}}

eight hexadecimal digits for every `rows` frames of an array of ``data``, and for each array of ``meta`` as a whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import progress
from lightning_robot.data.workers import run_tasks


def checksum(values: np.ndarray, before: int = 0) -> int:
    """CRC-32 of an array's values in C order; of what was summed up in `before`, continued by them."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)


def written(checksums: Sequence[int]) -> str:
    """Eight hexadecimal digits for each."""
    return "".join(f"{value:08x}" for value in checksums)


def changed_blocks(path: Path, noted: Mapping[str, Any], processes: int = 1) -> list[tuple[str, int]]:
    """Reads a whole store and compares it with its checksums.

    Args:
        path: of the store, a folder or a zip file.
        noted: the attribute ``checksums``.
        processes: worker processes that read; 1 reads in this one.

    Returns:
        (``data/<name>`` or ``meta/<name>``, first row) of what differs or cannot be read, in the order of rows.
    """
    rows = int(noted["rows"])
    tasks = [
        (f"data/{name}", start * rows, rows, digits[8 * start : 8 * start + 8])
        for name, digits in noted["data"].items()
        for start in range(math.ceil(len(digits) / 8))
    ]
    tasks += [(f"meta/{name}", 0, -1, digits) for name, digits in noted["meta"].items()]
    results = run_tasks(_changed, path, tasks, processes)
    found = [task for task in progress(results, len(tasks), "verifying", unit="blocks") if task is not None]
    return sorted(found, key=lambda item: (item[1], item[0]))


def _changed(path: Path, task: tuple[str, int, int, str]) -> tuple[str, int] | None:
    import zarr

    name, start, rows, digits = task
    try:
        source: Any = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
        array: Any = zarr.open_array(source, path=name, mode="r")
        same = written([checksum(array[:] if rows < 0 else array[start : start + rows])]) == digits
    except MemoryError:
        raise
    except Exception:  # every codec has exceptions of its own; a file that cannot be decoded holds other values
        same = False
    return None if same else (name, start)
