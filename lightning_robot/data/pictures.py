"""Pictures that are stored as encoded files (PNG, JPEG, TIFF) in the columns of parquet files, and statistics of pictures."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import disk_size, progress, say
from lightning_robot.data.cache import file_lock
from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode
from lightning_robot.transforms.statistics import Statistics, StatisticsAccumulator

IN_MEMORY_BYTES = 256 << 20
"""Encoded size of one camera up to which the pictures are held in memory, as they are."""


PNG = b"\x89PNG\r\n\x1a\n"


@cache
def png_decoder() -> Callable[[bytes, tuple[int, ...], str], np.ndarray] | None:
    """kornia_rs' decoder of PNG, about three times as fast as Pillow's; None, and said once, where it is not installed."""
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        say("PNG pictures are decoded by Pillow, about three times slower than by kornia_rs: pip install kornia_rs.")
        return None
    return decode_image_png_u8


class Pictures:
    """All encoded pictures of one camera, each found in one step, decoded when asked for; each call decodes a picture once.

    Can be pickled: memory-mapped bytes travel by name.
    """

    def __init__(
        self, data: np.ndarray, offsets: np.ndarray, frame_shape: tuple[int, ...], where: str, depth: DepthCode | None = None
    ) -> None:
        """Describes the pictures.

        Args:
            data: (bytes,) uint8: all encoded pictures one after another.
            offsets: (frames + 1,) int64: where each begins.
            frame_shape: (height, width, 3), or (height, width) for depth.
            where: for messages.
            depth: metres per stored unit, for depth.
        """
        self.data, self.offsets, self.frame_shape, self.where, self.depth = data, offsets, frame_shape, where, depth

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Pictures in any order, repeats allowed.

        Args:
            rows: (R,)

        Returns:
            (R, height, width, 3) uint8, or (R, height, width) float32 metres.
        """
        unique, first, place = np.unique(rows, return_index=True, return_inverse=True)
        result = np.empty((len(rows), *self.frame_shape), np.float32 if self.depth else np.uint8)
        for row, slot in zip(unique.tolist(), first.tolist()):
            self._decode_into(result[slot], row)
        repeats = np.flatnonzero(first[place] != np.arange(len(rows)))
        result[repeats] = result[first[place[repeats]]]
        return result

    def encoded(self, row: int) -> bytes:
        """The bytes of one picture file."""
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def _decode_into(self, target: np.ndarray, row: int) -> None:
        from PIL import Image

        encoded, fast = self.encoded(row), png_decoder()
        if fast is not None and self.depth is None and encoded.startswith(PNG):
            with suppress(Exception):  # another kind of PNG, or a damaged one, about which Pillow says more
                target[...] = fast(encoded, self.frame_shape[:2], "rgb")
                return
        try:
            with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG", "TIFF")) as picture:
                values = np.asarray(picture if self.depth or picture.mode == "RGB" else picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise StoreError(
                f"{self.where}: the picture of frame {row} cannot be decoded ({error}). Copy or download the file again."
            ) from error
        if values.shape != self.frame_shape:
            raise StoreError(
                f"{self.where}: the picture of frame {row} has the shape {values.shape}, meta/info.json says "
                f"{self.frame_shape}. Correct it there, or write the episode again."
            )
        if self.depth is None:
            target[...] = values
        else:
            np.multiply(values, self.depth.unit, out=target, casting="unsafe")

    def __getstate__(self) -> dict[str, Any]:
        data = str(self.data.filename) if isinstance(self.data, np.memmap) else self.data
        return {**self.__dict__, "data": data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.data, str):
            self.data = np.memmap(self.data, np.uint8, "r")


def read_encoded(root: Path, files: list[Path], key: str, folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All encoded pictures of a column: in memory, or in a memory-mapped file that is made once and said beforehand.

    (A parquet file is compressed in pages: reaching one picture means to decompress its neighbours, every time.)

    Args:
        root: folder of the dataset, where pictures that are named instead of embedded lie.
        files: parquet files in the order of their rows.
        key: the column.
        folder: where the memory-mapped file goes.
        name: its name without ending.

    Returns:
        (bytes,) uint8 and (frames + 1,) int64, see `Pictures`.

    Raises:
        StoreError: a picture is missing.
        OSError: the disk has not enough room.
    """
    import pyarrow.parquet as parquet

    size = 0
    for file in files:
        metadata = parquet.read_metadata(file)
        for group in range(metadata.num_row_groups):
            columns = (metadata.row_group(group).column(number) for number in range(metadata.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".bytes")[0] == key)
    if size <= IN_MEMORY_BYTES:
        blocks = list(_encoded_blocks(root, files, key))
        return np.concatenate([data for data, _ in blocks]), _offsets([sizes for _, sizes in blocks])
    path = folder / f"{name}.bytes"
    index = path.with_suffix(".offsets.npy")
    if not (path.exists() and index.exists()):
        with file_lock(folder / f"{key}.lock"):
            if not (path.exists() and index.exists()):
                _pack(root, files, key, path, index, size)
                for stale in folder.glob(f"{key}-????????????????.*s*"):
                    if stale not in (path, index):
                        stale.unlink()
    return np.memmap(path, np.uint8, "r"), np.load(index)


def _pack(root: Path, files: list[Path], key: str, path: Path, index: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if size > 0.95 * free:
        raise OSError(
            f"{root}: the pictures of {key} need {disk_size(size)} as a file that can be read at random, but {path.parent} has "
            f"{disk_size(free)} left. Make room there, or let the environment variable LIGHTNING_ROBOT_CACHE name a larger "
            "disk."
        )
    say(f"Unpacking the pictures of {key} once into a memory-mapped file of {disk_size(size)}: {path} (may be deleted).")
    partial, sizes = path.with_suffix(".partial"), []
    with open(partial, "wb") as file:
        for data, lengths in progress(_encoded_blocks(root, files, key), description=f"unpacking {key}", unit="blocks"):
            file.write(data.data)
            sizes.append(lengths)
        file.flush()
        os.fsync(file.fileno())
    unfinished = index.with_suffix(".tmp.npy")
    np.save(unfinished, _offsets(sizes))
    os.replace(unfinished, index)
    os.replace(partial, path)


def _encoded_blocks(root: Path, files: list[Path], key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of encoded bytes and the sizes of their pictures."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    for file in files:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=128, columns=[key]):
                column = batch.column(0)
                encoded = column.field("bytes") if arrow.types.is_struct(column.type) else column
                if encoded.null_count or column.null_count:
                    yield _named_files(root, file, key, column)
                    continue
                encoded = encoded.cast(arrow.large_binary())
                bounds = np.frombuffer(encoded.buffers()[1], np.int64)[encoded.offset : encoded.offset + len(encoded) + 1]
                yield np.frombuffer(encoded.buffers()[2], np.uint8)[bounds[0] : bounds[-1]], np.diff(bounds)


def _named_files(root: Path, file: Path, key: str, column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of which the column holds the path only."""
    contents = []
    for row, entry in enumerate(column.to_pylist()):
        if entry is None or (not entry.get("bytes") and not entry.get("path")):
            raise StoreError(f"{file}: {key} has no picture in row {row} of a block. Write the episode again, or remove it.")
        if entry.get("bytes"):
            contents.append(entry["bytes"])
            continue
        path = root / entry["path"]
        if not path.is_file():
            raise StoreError(f"{file}: {key} names the picture {path}, which does not exist. Copy the folder whole.")
        contents.append(path.read_bytes())
    return np.frombuffer(b"".join(contents), np.uint8), np.array([len(content) for content in contents])


def _offsets(sizes: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])


def sampled_rows(start: int, end: int) -> np.ndarray:
    """Rows of an episode that its picture statistics are taken from: as many, and those, that LeRobot takes."""
    length = int(end - start)
    count = max(min(100, length), min(int(length**0.75), 10_000))
    return start + np.round(np.linspace(0, length - 1, count)).astype(np.int64)


def picture_statistics(source: Any, rows: np.ndarray, key: str) -> Statistics:
    """Statistics of pictures, exact over the pixels looked at.

    Args:
        source: an array (frames, height, width, 3) or (frames, height, width), or an object with `gather(rows)`.
        rows: frames to look at; of large pictures only every so many pixels, as LeRobot does.
        key: batch key: colour is given per channel in 0 to 1, depth as one element in metres.
    """
    counts = np.zeros((3, 256), np.int64)
    depth = StatisticsAccumulator()
    for begin in progress(range(0, len(rows), 16), description=f"statistics of {key}", unit="blocks of 16 frames"):
        chosen = rows[begin : begin + 16]
        block = source.gather(chosen) if hasattr(source, "gather") else source[chosen]
        longer = max(block.shape[1:3])
        stride = max(1, longer // 150) if longer >= 300 else 1
        block = block[:, ::stride, ::stride]
        if key.startswith("observation.depth."):
            depth.update(block.reshape(-1, 1))
        else:
            for channel in range(3):
                counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    if key.startswith("observation.depth."):
        return depth.result()
    value, total = np.arange(256) / 255, int(counts[0].sum())
    mean = counts @ value / total
    std = np.sqrt((counts * (value - mean[:, None]) ** 2).sum(axis=1) / max(1, total - 1))
    below = np.cumsum(counts, axis=1)
    q01, q99 = (value[(below > quantile * (total - 1)).argmax(axis=1)] for quantile in (0.01, 0.99))
    present = counts > 0
    low, high = value[present.argmax(axis=1)], value[255 - present[:, ::-1].argmax(axis=1)]
    return Statistics(low, high, mean, std, q01, q99, total)
