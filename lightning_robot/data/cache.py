"""Files that the project keeps for itself: where they lie, one process at a time, and decoded copies of large arrays."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_robot.console import disk_size, progress, say

if TYPE_CHECKING:
    from lightning_robot.data.store import EpisodeStore

BLOCK_BYTES = 64 << 20


def cache_folder() -> Path:
    """``$LIGHTNING_ROBOT_CACHE``, else ``lightning_robot`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; always absolute."""
    if folder := os.environ.get("LIGHTNING_ROBOT_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "lightning_robot"


def is_writable(folder: Path) -> bool:
    """True if files may be made there; a folder that nobody may write to is left alone by the superuser too."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds a lock file: one process at a time per storage, freed by the system when its holder dies.

    The empty file stays behind: removing it would let two processes hold "the" lock.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise OSError(
            f"Cannot write in {path.parent} ({error.strerror}). Let the environment variable LIGHTNING_ROBOT_CACHE name a "
            "folder that can be written, or data.init_args.store a place for the store."
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another process that holds {path}.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def decoded_array(store: EpisodeStore, key: str, channels: int | None = None) -> np.ndarray:
    """A memory-mapped, uncompressed copy of one array of a store: made once, said beforehand, shared by all processes.

    Random windows then cost a memory copy. (Reading 256 compressed clouds of 2048 points through zarr takes about 100 ms
    on one core, through the map about 1 ms; see ``benchmarks/loader.py``.) The copy lies in ``<store>.decoded/`` beside the
    store, or below `cache_folder` where that place cannot be written or ``$LIGHTNING_ROBOT_CACHE`` is set. It may be deleted
    at any time.

    Args:
        store: the store.
        key: batch key.
        channels: keep the first so many elements of the last axis (3 of a coloured cloud's 6); all when None.

    Returns:
        (frames, ...) read-only, float32 where the store holds floating-point numbers.

    Raises:
        OSError: the disk has not enough room.
    """
    shape = list(store.shape(key))
    if channels is not None:
        shape[-1] = channels
    dtype = store.dtype(key)
    name = f"{key}-{shape[-1]}" if channels is not None else key
    folder = writable_folder(store.path)
    path = folder / f"{name}-{store.fingerprint[:16]}.npy"
    if not path.exists():
        with file_lock(folder / f"{name}.lock"):
            if not path.exists():
                _decode(store, key, path, tuple(shape), dtype)
                for stale in folder.glob(f"{name}-????????????????.npy"):
                    if stale != path:
                        stale.unlink()
    return np.load(path, mmap_mode="r")


def writable_folder(path: Path) -> Path:
    """Where files derived from the store or dataset at `path` go: ``<path>.decoded``, or a folder below `cache_folder`."""
    beside = path.with_name(path.name + ".decoded")
    if "LIGHTNING_ROBOT_CACHE" not in os.environ and is_writable(beside if beside.exists() else beside.parent):
        return beside
    return cache_folder() / "decoded" / f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def _decode(store: EpisodeStore, key: str, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    needed = int(np.prod(shape)) * dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > 0.95 * free:
        raise OSError(
            f"{store.path}: a decoded copy of {key} needs {disk_size(needed)}, but {path.parent} has {disk_size(free)} left. "
            "Make room there, let the environment variable LIGHTNING_ROBOT_CACHE name a larger disk, or set "
            "data.init_args.decode: false (every window is then read from the compressed store, slowly)."
        )
    say(f"Decoding {key} once into a memory-mapped file of {disk_size(needed)}: {path} (may be deleted at any time).")
    partial = path.with_suffix(".partial")
    rows = store.aligned_rows(key, BLOCK_BYTES)
    with open(partial, "wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        for start in progress(range(0, shape[0], rows), description=f"decoding {key}", unit="blocks"):
            block = store.read(key, slice(start, start + rows))
            file.write(np.ascontiguousarray(block[..., : shape[-1]], dtype).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
