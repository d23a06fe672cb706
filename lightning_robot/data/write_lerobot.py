"""Writing a LeRobot dataset (v3.0): episodes in, a folder out that LeRobot's own loader opens.

    <name>/
      meta/info.json, stats.json, tasks.parquet, episodes/chunk-000/file-000.parquet
      meta/lightning_robot.json      what our stores know besides: features with units and kinds, ids of tasks; checksums
      data/chunk-000/file-000.parquet
      videos/<camera>/chunk-000/file-000.mp4

Statistics are of the values themselves: quantiles are quantiles, not means of the episodes' quantiles.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.data.cache import writable_folder
from lightning_robot.data.clips import DEPTH, DEPTH_ENCODING, ENCODINGS, depth_codes, join_clips, try_encoding, write_clip
from lightning_robot.data.lerobot_checksums import changed_parts, column_checksum, noted_checksums
from lightning_robot.data.lerobot_meta import NOTES
from lightning_robot.data.store import StoreError, partial_folder
from lightning_robot.features import Feature, Features

PICTURES = (*ENCODINGS, "png")
FILES_PER_CHUNK = 1000
DATA_FILE_BYTES, VIDEO_FILE_BYTES = 100 << 20, 200 << 20
COUNTERS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


class LeRobotWriter:
    """Writes a dataset into ``<path>.partial`` and renames it when it is whole.

    After a kill, make the writer again with the same arguments and append the same episodes: clips that were encoded are not
    encoded again, and the finished bytes are the same.

    Attributes:
        path: where the finished dataset will be.
        partial: folder that holds the work in progress; callers may keep their own files there, removed by `finish`.
    """

    def __init__(
        self,
        path: str | Path,
        features: Features,
        *,
        rate: int | None = None,
        pictures: str = "av1",
        robot: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        tasks: Mapping[str, str] | None = None,
    ) -> None:
        """Begins a dataset, or continues it.

        Args:
            path: where the dataset will be; must not exist.
            features: of the frames that `append` gets.
            rate: frames per second; the features' control rate when None.
            pictures: ``av1`` or ``h264`` for video, ``png`` for pictures inside the parquet files.
            robot: name of the robot, where LeRobot wants to know it.
            provenance: where the data come from, plain containers without times.
            tasks: of sentences the id of the task, where they have one: LeRobot itself knows sentences alone.

        Raises:
            StoreError: the dataset exists, an unfinished one with other settings does, the rate is no whole number, or the
                encoder does not take pictures of this size.
        """
        self.path = Path(path).expanduser().absolute()
        self.partial = partial_folder(self.path)
        if os.path.lexists(self.path):
            raise StoreError(f"{self.path} exists. Use it, delete it, or write to another place.")
        if pictures not in PICTURES:
            raise StoreError(f"pictures {pictures!r}: use {', '.join(PICTURES)}.")
        check_encoding(features, pictures)
        chosen = rate or features.control_rate
        if chosen <= 0 or chosen != round(chosen):
            raise StoreError(
                f"{self.path}: LeRobot datasets run at a whole number of frames per second; the source "
                + (f"has {chosen:g}." if chosen else "does not say its rate: give it (--rate).")
            )
        self.rate, self.pictures = round(chosen), pictures
        self.features, self.robot = features, robot
        notes = {"features": features.to_dict(), "provenance": dict(provenance or {}), "tasks": dict(tasks or {})}
        self._notes = json.loads(json.dumps(notes))
        self._keys = (*features.observations, "action")
        self._begin()
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []  # of meta/episodes
        self._summaries: dict[str, list[_Summary]] = {name: [] for name in (*self._keys, *COUNTERS)}
        self._checksums: dict[str, int] = {}
        self._frames = 0
        self._data = _DataFiles(self._dataset, self._schema())

    @property
    def num_episodes(self) -> int:
        return len(self._rows)

    def append(self, arrays: Mapping[str, np.ndarray], texts: str | Sequence[str]) -> None:
        """Adds an episode.

        Args:
            arrays: every key of the features, (T, ...) as in a store: pictures (height, width, 3) uint8, depth (height, width)
                in metres.
            texts: the sentence of its task, or one per frame.

        Raises:
            StoreError: keys are missing, lengths differ, or the pictures cannot be encoded.
        """
        lengths = {key: len(arrays[key]) for key in self._keys if key in arrays}
        if set(lengths) != set(self._keys) or len(set(lengths.values())) != 1 or lengths["action"] == 0:
            raise StoreError(f"{self.path}: an episode needs {', '.join(self._keys)}, all of one length; given {lengths}.")
        number, length = len(self._rows), lengths["action"]
        sentences = [texts] * length if isinstance(texts, str) else list(texts)
        if len(sentences) != length:
            raise StoreError(f"{self.path}: {len(sentences)} sentences for {length} frames.")
        tasks = np.array([self._tasks.setdefault(text, len(self._tasks)) for text in sentences], np.int64)
        frame = np.arange(length)
        counters: dict[str, np.ndarray] = {
            "timestamp": (frame / self.rate).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, number),
            "index": self._frames + frame,
            "task_index": tasks,
        }
        columns: dict[str, np.ndarray] = {}
        summaries: dict[str, _Summary] = {}
        for key in self._keys:
            if not _is_picture(key):
                columns[key] = values = np.asarray(arrays[key], np.float32)
                summaries[key] = _Values(values.reshape(length, -1, values.shape[-1] if values.ndim > 1 else 1))
                continue
            stored = self._as_stored(key, arrays[key])
            summaries[key] = _Histogram(stored)
            if self.pictures == "png":
                columns[key] = stored
            elif not (clip := self._clip(key, number)).exists():
                if _is_depth(key):
                    write_clip(clip, depth_codes(stored / 1000), self.rate, DEPTH_ENCODING)
                else:
                    write_clip(clip, stored, self.rate, ENCODINGS[self.pictures])
        summaries |= {name: _Values(values.reshape(length, 1, 1)) for name, values in counters.items()}
        table = self._table(columns | counters)
        for name in table.column_names:
            self._checksums[name] = column_checksum(table.column(name), self._checksums.get(name, 0))
        place = self._data.write(table)
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(sentences)),
            "length": length,
            "data/chunk_index": place // FILES_PER_CHUNK,
            "data/file_index": place % FILES_PER_CHUNK,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + length,
        }
        for key, summary in summaries.items():
            row |= {f"stats/{key}/{name}": value for name, value in summary.statistics().items()}
            self._summaries[key].append(summary)
        self._rows.append(row)
        self._frames += length

    def finish(self, check: Callable[[Path], None] | None = None) -> Path:
        """Completes the dataset, verifies it, renames it to its place and returns that.

        Args:
            check: gets the folder before it is renamed; raises `StoreError` where something in it is wrong.

        Raises:
            StoreError: no episode was appended, or what is read back is not what was written.
        """
        if not self._rows:
            raise StoreError(f"{self.path}: nothing to write (no episode).")
        self._data.close()
        meta = self._dataset / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True, exist_ok=True)
        for key in self._keys if self.pictures != "png" else ():
            if _is_picture(key):
                self._join(key)
        self._write_episodes()
        self._write_tasks(meta / "tasks.parquet")
        statistics = {key: type(parts[0]).merged(parts).statistics() for key, parts in self._summaries.items()}
        (meta / "stats.json").write_text(json.dumps(statistics, indent=1))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))  # last: it makes the folder a dataset
        noted = noted_checksums(self._dataset, self._checksums)
        (self._dataset / NOTES).write_text(json.dumps(self._notes | {"checksums": noted}, indent=1))
        for file in sorted(self._dataset.rglob("*")):
            if file.is_file():
                _sync(file)
        try:
            if changed := changed_parts(self._dataset, noted):
                raise StoreError(
                    f"{self._dataset}: what is read back is not what was written: {', '.join(changed)}. Check disk and memory, "
                    "then run the same again: it is written anew."
                )
            if check is not None:
                check(self._dataset)
        except StoreError:
            shutil.rmtree(self._clips, ignore_errors=True)  # all else is written again anyway
            raise
        finally:
            shutil.rmtree(writable_folder(self._dataset), ignore_errors=True)  # what reading back may have laid down
        os.rename(self._dataset, self.path)
        _sync(self.path.parent)
        shutil.rmtree(self.partial, ignore_errors=True)
        return self.path

    # Below: private.

    def _as_stored(self, key: str, frames: np.ndarray) -> np.ndarray:
        """Colour as it is, depth in whole millimetres; video holds depth up to 10 m, and statistics are of what it holds."""
        if not _is_depth(key):
            return np.asarray(frames, np.uint8)
        frames = np.nan_to_num(frames, nan=0.0, posinf=np.inf)
        if self.pictures != "png":
            frames = np.clip(frames, DEPTH.low, DEPTH.high)
        return np.clip(np.rint(1000 * frames.astype(np.float64)), 0, 65535).astype(np.uint16)

    def _begin(self) -> None:
        """Takes up the clips of an interrupted writer with the same settings; all else is written again, it takes no time."""
        self._dataset, self._clips = self.partial / "dataset", self.partial / "clips"
        settings = {**self._notes, "rate": self.rate, "pictures": self.pictures, "robot": self.robot}
        noted = self.partial / "dataset.json"
        if noted.exists() and (old := json.loads(noted.read_text())) != settings:
            different = [name for name in settings if old.get(name) != settings[name]]
            raise StoreError(
                f"{self.partial} was begun with other settings ({', '.join(different)}). Give the same settings to "
                "continue, or delete it to start afresh."
            )
        shutil.rmtree(self._dataset, ignore_errors=True)
        self._dataset.mkdir(parents=True)
        if not noted.exists():
            shutil.rmtree(self._clips, ignore_errors=True)
            aside = noted.with_suffix(".tmp")
            aside.write_text(json.dumps(settings))
            os.replace(aside, noted)

    def _clip(self, key: str, episode: int) -> Path:
        return self._clips / key / f"episode-{episode:06d}.mp4"

    def _join(self, key: str) -> None:
        """Fills video files with whole episodes, and notes in the rows where each lies."""
        files: list[list[int]] = [[]]
        size = 0
        for number in range(len(self._rows)):
            more = self._clip(key, number).stat().st_size
            if files[-1] and size + more > VIDEO_FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append(number)
            size += more
        for file, episodes in enumerate(files):
            chunk, index = divmod(file, FILES_PER_CHUNK)
            path = self._dataset / VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=index)
            frames = join_clips(path, [self._clip(key, number) for number in episodes], self.rate)
            before = 0
            for number in episodes:
                row = self._rows[number]
                row |= {
                    f"videos/{key}/chunk_index": chunk,
                    f"videos/{key}/file_index": index,
                    f"videos/{key}/from_timestamp": before / self.rate,
                    f"videos/{key}/to_timestamp": (before + row["length"]) / self.rate,
                }
                before += row["length"]
            if frames != before:
                raise StoreError(
                    f"{path} holds {frames} frames, its episodes have {before}. Delete {self.partial}, and repeat."
                )

    def _described(self) -> dict[str, dict[str, Any]]:
        """The features of info.json, in the order of the columns."""
        described: dict[str, dict[str, Any]] = {}
        for key in self._keys:
            feature = self.features.action if key == "action" else self.features.observations[key]
            described[key] = self._picture(key, feature) if _is_picture(key) else _vector(feature)
        return described | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COUNTERS.items()}

    def _picture(self, key: str, feature: Feature) -> dict[str, Any]:
        depth = _is_depth(key)
        (channels, height, width) = feature.shape
        entry: dict[str, Any] = {
            "dtype": "image" if self.pictures == "png" else "video",
            "shape": [height, width, channels],
            "names": ["height", "width", "channels"],
        }
        info: dict[str, Any] = {"is_depth_map": True, "video.is_depth_map": True, "depth_unit": "mm"} if depth else {}
        if self.pictures != "png":
            encoding = DEPTH_ENCODING if depth else ENCODINGS[self.pictures]
            info |= {
                "video.height": height,
                "video.width": width,
                "video.codec": encoding.name,
                "video.pix_fmt": encoding.pixel_format,
                "video.fps": self.rate,
                "video.channels": channels,
                "has_audio": False,
                "is_depth_map": depth,
                "video.is_depth_map": depth,
            }
            if depth:
                info |= {
                    "video.depth_min": DEPTH.low,
                    "video.depth_max": DEPTH.high,
                    "video.shift": DEPTH.shift,
                    "video.use_log": DEPTH.logarithmic,
                }
        return {**entry, "info": info} if info else entry

    def _info(self) -> dict[str, Any]:
        videos = self.pictures != "png" and any(map(_is_picture, self._keys))
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_BYTES >> 20,
            "video_files_size_in_mb": VIDEO_FILE_BYTES >> 20,
            "fps": self.rate,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if videos else None,
            "features": self._described(),
        }

    def _schema(self) -> Any:
        """Of the data files, with the note from which the datasets library knows pictures and matrices."""
        import pyarrow as arrow

        fields: list[tuple[str, Any]] = []
        noted: dict[str, dict[str, Any]] = {}
        for name, entry in self._described().items():
            dtype, shape = entry["dtype"], entry["shape"]
            if dtype == "video":
                continue
            if dtype == "image":
                fields.append((name, arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])))
                noted[name] = {"_type": "Image"}
                continue
            kind = arrow.from_numpy_dtype(np.dtype(dtype))
            if shape == [1]:
                noted[name] = {"dtype": dtype, "_type": "Value"}
            elif len(shape) == 1:
                kind = arrow.list_(kind, shape[0])
                noted[name] = {"feature": {"dtype": dtype, "_type": "Value"}, "length": shape[0], "_type": "List"}
            else:
                for _ in shape:
                    kind = arrow.list_(kind)
                noted[name] = {"shape": shape, "dtype": dtype, "_type": f"Array{len(shape)}D"}
            fields.append((name, kind))
        return arrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": noted}})})

    def _table(self, columns: dict[str, np.ndarray]) -> Any:
        import pyarrow as arrow

        arrays = []
        for field in self._data.schema:
            values = columns[field.name]
            if arrow.types.is_struct(field.type):
                entries = [{"bytes": _png(pixels), "path": f"frame-{number:06d}.png"} for number, pixels in enumerate(values)]
                arrays.append(arrow.array(entries, field.type))
                continue
            nested = arrow.array(np.ascontiguousarray(values).reshape(-1))
            if arrow.types.is_fixed_size_list(field.type):
                nested = arrow.FixedSizeListArray.from_arrays(nested, values.shape[1])
            elif values.ndim > 1 and arrow.types.is_list(field.type):
                for axis in range(values.ndim - 1, 0, -1):
                    offsets = np.arange(0, len(nested) + 1, values.shape[axis], dtype=np.int32)
                    nested = arrow.ListArray.from_arrays(arrow.array(offsets), nested)
            arrays.append(nested.cast(field.type))
        return arrow.Table.from_arrays(arrays, schema=self._data.schema)

    def _write_episodes(self) -> None:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        columns = {}
        for name in self._rows[0]:
            column = [row[name] for row in self._rows]
            columns[name] = arrow.array(column, arrow.list_(arrow.string())) if name == "tasks" else arrow.array(column)
        zeros = arrow.array(np.zeros(len(self._rows), np.int64))
        columns |= {"meta/episodes/chunk_index": zeros, "meta/episodes/file_index": zeros}
        parquet.write_table(arrow.table(columns), self._dataset / EPISODES_PATH)

    def _write_tasks(self, path: Path) -> None:
        """With the note that makes the sentences pandas' index: LeRobot asks for ``tasks.iloc[task_index].name``."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        def column(name: str, kind: str, numpy: str) -> dict[str, Any]:
            return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

        note: dict[str, Any] = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
            "pandas_version": "2.0.0",
        }
        table = arrow.table({"task_index": np.arange(len(self._tasks)), "task": arrow.array(self._tasks, arrow.string())})
        parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), path)


class _DataFiles:
    """Parquet files, one row group per episode; a new file when one is full."""

    def __init__(self, dataset: Path, schema: Any) -> None:
        self.dataset, self.schema = dataset, schema
        self._number, self._largest = -1, 0
        self._file: Any = None
        self._writer: Any = None

    def write(self, table: Any) -> int:
        """Adds an episode; returns the number of its file."""
        import pyarrow.parquet as parquet

        if self._writer is None or self._file.tell() + self._largest > DATA_FILE_BYTES:
            self.close()
            self._number += 1
            chunk, index = divmod(self._number, FILES_PER_CHUNK)
            path = self.dataset / DATA_PATH.format(chunk_index=chunk, file_index=index)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb")  # noqa: SIM115
            self._writer = parquet.ParquetWriter(self._file, self.schema)
        before = self._file.tell()
        self._writer.write_table(table, row_group_size=len(table))
        self._largest = max(self._largest, self._file.tell() - before)
        return self._number

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
        self._writer = None


class _Summary:
    """What is kept of an episode's values of one feature: enough for its statistics, and for those of all episodes."""

    @classmethod
    def merged(cls, parts: Sequence[Any]) -> Any:
        raise NotImplementedError

    def statistics(self) -> dict[str, Any]:
        """LeRobot's names; nested lists in its shape for the feature."""
        raise NotImplementedError


class _Values(_Summary):
    """Vectors: their moments, and the values themselves (of features with many rows per frame a part) for the quantiles."""

    ROWS = 2048

    def __init__(self, values: np.ndarray) -> None:
        """(T, rows per frame, D)"""
        self.frames = len(values)
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        self.count, self.min, self.max = len(flat), flat.min(0), flat.max(0)
        self.mean = flat.mean(0)
        self.squares = ((flat - self.mean) ** 2).sum(0)
        step = math.ceil(len(flat) / max(self.ROWS, self.frames))
        self.kept = flat[::step].astype(values.dtype)

    @classmethod
    def merged(cls, parts: Sequence[_Values]) -> _Values:
        result = cls.__new__(cls)
        counts = np.array([part.count for part in parts], np.float64)[:, None]
        means = np.stack([part.mean for part in parts])
        result.frames, result.count = sum(part.frames for part in parts), int(counts.sum())
        result.min = np.min([part.min for part in parts], axis=0)
        result.max = np.max([part.max for part in parts], axis=0)
        result.mean = (counts * means).sum(0) / result.count
        result.squares = np.sum([part.squares for part in parts], axis=0) + (counts * (means - result.mean) ** 2).sum(0)
        result.kept = np.concatenate([part.kept for part in parts])
        return result

    def statistics(self) -> dict[str, Any]:
        moments = {"min": self.min, "max": self.max, "mean": self.mean, "std": np.sqrt(self.squares / self.count)}
        quantiles = np.quantile(self.kept.astype(np.float64), list(QUANTILES.values()), axis=0)
        named = moments | dict(zip(QUANTILES, quantiles))
        return {name: value.tolist() for name, value in named.items()} | {"count": [self.frames]}


class _Histogram(_Summary):
    """Pictures: how often each stored number occurs in some of an episode's frames, chosen as LeRobot chooses them."""

    def __init__(self, frames: np.ndarray) -> None:
        """(T, height, width, 3) uint8, or (T, height, width) uint16."""
        length = len(frames)
        wanted = max(min(100, length), min(int(length**0.75), 10_000))
        chosen = frames[np.round(np.linspace(0, length - 1, wanted)).astype(np.int64)]
        if (longer := max(frames.shape[1:3])) >= 300:
            step = longer // 150
            chosen = chosen[:, ::step, ::step]
        self.frames, self.scale = wanted, 1 / 255 if frames.dtype == np.uint8 else 1.0
        bins = np.iinfo(frames.dtype).max + 1
        channels = chosen.reshape(-1, 3).T if frames.ndim == 4 else chosen.reshape(1, -1)
        self.counts = np.stack([np.bincount(channel, minlength=bins) for channel in channels])

    @classmethod
    def merged(cls, parts: Sequence[_Histogram]) -> _Histogram:
        result = cls.__new__(cls)
        result.frames, result.scale = sum(part.frames for part in parts), parts[0].scale
        result.counts = np.sum([part.counts for part in parts], axis=0)
        return result

    def statistics(self) -> dict[str, Any]:
        values = np.arange(self.counts.shape[1], dtype=np.float64)
        total = self.counts.sum(1)
        mean = self.counts @ values / total
        std = np.sqrt((self.counts * (values - mean[:, None]) ** 2).sum(1) / total)
        cumulated = np.cumsum(self.counts, axis=1)
        named = {
            "min": (self.counts > 0).argmax(1),
            "max": self.counts.shape[1] - 1 - (self.counts[:, ::-1] > 0).argmax(1),
            "mean": mean,
            "std": std,
            **{name: (cumulated >= (share * total)[:, None]).argmax(1) for name, share in QUANTILES.items()},
        }
        scaled = {name: (self.scale * np.asarray(value, np.float64))[:, None, None].tolist() for name, value in named.items()}
        return scaled | {"count": [self.frames]}


def _vector(feature: Feature) -> dict[str, Any]:
    shape = list(feature.shape) or [1]
    names = list(feature.names) if len(shape) == 1 and len(feature.names) == shape[0] else None
    return {"dtype": "float32", "shape": shape, "names": names}


def check_encoding(features: Features, pictures: str) -> None:
    """Refuses, before any work, pictures that the encoder does not take.

    Args:
        features: of the frames that will be written.
        pictures: see `LeRobotWriter`.

    Raises:
        StoreError: names the camera, its size and what to do.
    """
    if pictures == "png":
        return
    for key, feature in features.observations.items():
        if not _is_picture(key):
            continue
        height, width = feature.shape[1:]
        try:
            try_encoding(height, width, DEPTH_ENCODING if _is_depth(key) else ENCODINGS[pictures])
        except StoreError as error:
            raise StoreError(f"{key}: {error}") from error


def _is_picture(key: str) -> bool:
    return key.startswith("observation.images.") or _is_depth(key)


def _is_depth(key: str) -> bool:
    return key.startswith("observation.depth.")


def _png(pixels: np.ndarray) -> bytes:
    """(height, width, 3) uint8 or (height, width) uint16 -> a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=6)
    return file.getvalue()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
