"""Checksums of a LeRobot dataset that we wrote, in ``meta/lightning_robot.json``.

CRC-32, in hexadecimal: of the values of every column, in the order of the frames (of pictures in parquet files the encoded
bytes); and of whole files, videos and ``meta``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_robot.data.checksums import checksum, written
from lightning_robot.data.lerobot_meta import NOTES


def column_checksum(column: Any, before: int = 0) -> int:
    """Of a column of an arrow table, continuing the checksum of the rows before."""
    import pyarrow as arrow

    for chunk in column.chunks:
        if arrow.types.is_struct(chunk.type):
            for picture in chunk.field("bytes"):
                before = zlib.crc32(picture.as_buffer(), before)
            continue
        while arrow.types.is_list(chunk.type) or arrow.types.is_fixed_size_list(chunk.type):
            chunk = chunk.flatten()
        before = checksum(chunk.to_numpy(zero_copy_only=False), before)
    return before


def noted_checksums(folder: Path, columns: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """What is noted of a dataset that lies in a folder: its columns as they were written, its files as they are read back."""
    return {
        "columns": {name: written([value]) for name, value in columns.items()},
        "files": {str(file.relative_to(folder)): written([_file_checksum(file)]) for file in _files(folder)},
    }


def changed_parts(folder: Path, noted: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Reads a whole dataset; returns the columns and files that differ from their checksums, are missing, or were added."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    sums = dict.fromkeys(noted["columns"], 0)
    changed: set[str] = set()
    for file in sorted((folder / "data").rglob("*.parquet")):
        try:
            with parquet.ParquetFile(file) as rows:
                for group in range(rows.num_row_groups):  # an episode at a time: pictures may be many
                    table = rows.read_row_group(group)
                    for name in sums:
                        sums[name] = column_checksum(table.column(name), sums[name])
        except (arrow.ArrowException, OSError, KeyError):
            changed.add(str(file.relative_to(folder)))
    if not changed:
        changed = {f"column {name}" for name, value in sums.items() if written([value]) != noted["columns"][name]}
    have = {str(file.relative_to(folder)): file for file in _files(folder)}
    for name in have.keys() | noted["files"].keys():
        if name not in have or written([_file_checksum(have[name])]) != noted["files"].get(name):
            changed.add(name)
    return sorted(changed)


def _files(folder: Path) -> Iterable[Path]:
    """Videos and tables of ``meta``; our own notes hold the checksums, and parquet's values have theirs by column."""
    found = [file for part in ("meta", "videos") for file in (folder / part).rglob("*") if file.is_file()]
    return sorted(file for file in found if file != folder / NOTES)


def _file_checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
