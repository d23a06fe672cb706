"""The episode store: a Zarr group that holds all frames of all episodes one after another.

Layout (that of the Diffusion Policy family, so that its stores open as they are)::

    <name>.zarr/
      data/<array>                 (frames, ...): state, action, point_cloud, img, depth, ...
      meta/episode_ends            (episodes,) int64: exclusive end of each episode; written last
      meta/episode_split           (episodes,) int8: 0 training, 1 validation                            (optional)
      meta/segments                (segments, 3) int64: first frame, exclusive end, row of the text      (optional)
      meta/language_embeddings     (texts, E) float32                                                   (optional)
      attributes                   features, language {texts, tasks, encoder}, fingerprint, provenance, checksums (optional)

Zarr formats 2 and 3 are read; format 3 is written, with shards of the same number of frames for every array.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.data.checksums import changed_blocks, checksum, written
from lightning_robot.data.workers import append_line, read_lines
from lightning_robot.features import Feature, Features

KEYS = {
    "observation.state": "state",
    "observation.point_cloud": "point_cloud",
    "observation.images.static": "img",
    "observation.depth.static": "depth",
    "observation.images.gripper": "img_gripper",
    "observation.depth.gripper": "depth_gripper",
    "action": "action",
}
"""Batch key to array name, where the Diffusion Policy family has a name; other keys lose their ``observation.`` only."""

_BATCH_KEYS = {name: key for key, name in KEYS.items()}

LARGE_FRAME = 4096
"""Bytes per frame from which an array is written in chunks of a few frames."""

IN_MEMORY_BYTES = 64 << 20
"""Decoded size up to which arrays of large frames are held in memory too."""


class StoreError(ValueError):
    """A store is missing, incomplete or inconsistent."""


def array_name(key: str) -> str:
    """Name of a batch key's array in the store."""
    return KEYS.get(key, key.removeprefix("observation."))


def batch_key(name: str) -> str:
    """The reverse of `array_name`."""
    return _BATCH_KEYS.get(name, f"observation.{name}")


class EpisodeStore:
    """Read access to a store; made by `open`.

    Small arrays, and those of small frames (state, action), are read whole at the first use and kept; of others only what is
    asked for.
    Floating-point arrays come as float32 whatever the store holds. Images come as they are stored, (height, width, 3).

    Attributes:
        path: absolute path.
        keys: batch keys.
        episode_ends: (E,) int64, exclusive.
        episode_starts: (E,) int64.
        num_frames: frames of all episodes.
        num_episodes: E.
        frame_texts: None; sources whose frames have a text each have (frames,) rows of `language`'s texts here.
    """

    frame_texts: np.ndarray | None = None

    def __init__(self, path: Path, group: Any) -> None:
        self.path = path
        self.episode_ends = np.asarray(group["meta"]["episode_ends"][:], np.int64)
        self.episode_starts = np.concatenate([[0], self.episode_ends[:-1]]).astype(np.int64)
        self.num_frames, self.num_episodes = int(self.episode_ends[-1]), len(self.episode_ends)
        self._group = group
        self._arrays = {batch_key(name): array for name, array in sorted(group["data"].arrays())}
        self.keys = tuple(self._arrays)
        self._in_memory: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """Opens a store and checks that it is whole.

        Args:
            path: folder, or ``.zip`` file of one.

        Raises:
            StoreError: there is none; it is empty; its writer was interrupted; its arrays differ in length.
        """
        path = Path(path).expanduser().absolute()
        _refuse_missing(path)
        import zarr

        try:
            source: Any = zarr.storage.ZipStore(path, mode="r") if path.is_file() else str(path)
            group: Any = zarr.open_group(source, mode="r", use_consolidated=False)
        except Exception as error:
            raise StoreError(f"{path} is not a Zarr group ({type(error).__name__}: {error}). {_HOW}") from error
        groups = dict(group.groups())
        if "data" not in groups or not dict(groups["data"].arrays()):
            raise StoreError(f"{path} is empty: it holds no array data/<key>. {_HOW}")
        if "meta" not in groups or "episode_ends" not in dict(groups["meta"].arrays()):
            raise StoreError(
                f"{path} is incomplete: it has no meta/episode_ends, which is written last, so its writer was interrupted. Run "
                "the command that wrote it again (convert and generate continue where they were), or delete it."
            )
        _check_lengths(path, groups["data"], np.asarray(groups["meta"]["episode_ends"][:]))
        if group.attrs.get("complete") and path.is_dir():
            _check_shards(path, groups["data"], group.attrs.get("shards_of_zeros", {}))
        return cls(path, group)

    def shape(self, key: str) -> tuple[int, ...]:
        """(frames, ...) as stored."""
        return tuple(self._array(key).shape)

    def dtype(self, key: str) -> np.dtype:
        """Type of what `read` and `gather` return."""
        dtype = self._array(key).dtype
        return np.dtype(np.float32) if dtype.kind == "f" else np.dtype(dtype)

    def frame_bytes(self, key: str) -> int:
        """Decoded bytes of one frame."""
        return math.prod(self.shape(key)[1:]) * self.dtype(key).itemsize

    def is_large(self, key: str) -> bool:
        """True for arrays that are not held in memory."""
        return self.frame_bytes(key) >= max(LARGE_FRAME, IN_MEMORY_BYTES // self.num_frames)

    def aligned_rows(self, key: str, max_bytes: int) -> int:
        """A number of rows of about `max_bytes` whose blocks do not cut a shard or chunk."""
        array = self._array(key)
        unit = (array.shards or array.chunks)[0]
        return unit * max(1, max_bytes // max(1, unit * self.frame_bytes(key)))

    def read(self, key: str, rows: slice) -> np.ndarray:
        """Consecutive frames.

        Args:
            key: batch key.
            rows: frames, step 1.

        Returns:
            (rows, ...)
        """
        if key in self._in_memory:
            return self._in_memory[key][rows].copy()
        return self._decoded(key, lambda array: array[rows])

    def gather(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Frames in any order, repeats allowed; each stored frame is decoded once.

        Large arrays are read through zarr, about 0.4 ms per frame: `lightning_robot.data.cache.decoded_array` serves training.

        Args:
            key: batch key.
            rows: (R,) int64.

        Returns:
            (R, ...)
        """
        if not self.is_large(key):
            return self.whole(key)[rows]
        unique, inverse = np.unique(rows, return_inverse=True)
        return self._decoded(key, lambda array: array.get_orthogonal_selection((unique,)))[inverse]

    def whole(self, key: str) -> np.ndarray:
        """(frames, ...): all frames, read once and kept in memory."""
        if key not in self._in_memory:
            self._in_memory[key] = self._decoded(key, lambda array: array[:])
        return self._in_memory[key]

    @cached_property
    def features(self) -> Features:
        """What the store offers: as its writer said, else derived from the arrays.

        Raises:
            StoreError: the writer's words and the arrays disagree.
        """
        derived = self._derived_features()
        if "features" not in self._group.attrs:
            return derived
        features = Features.from_dict(self._group.attrs["features"])
        for key, feature in {**features.observations, "action": features.action}.items():
            if key not in self.keys:
                raise StoreError(f"{self.path}: its features name {key}, but data/ holds only {', '.join(self.keys)}.")
            actual = derived.action if key == "action" else derived.observations[key]
            if feature.shape != actual.shape:
                raise StoreError(f"{self.path}: its features give {key} the shape {feature.shape}, data/ has {actual.shape}.")
        return features

    @cached_property
    def fingerprint(self) -> str:
        """Hash of decoded values, shapes and meaning (hexadecimal): equal however the bytes are packed.

        It covers arrays of small frames whole, sixteen frames of others, episode ends and features.
        """
        return self._group.attrs.get("fingerprint") or self.compute_fingerprint()

    @cached_property
    def episode_split(self) -> np.ndarray | None:
        """(E,) int8: 0 training, 1 validation; None where the store does not say."""
        return self._meta("episode_split")

    @cached_property
    def segments(self) -> np.ndarray | None:
        """(K, 3) int64: first frame, exclusive end, row of `language`'s texts; None where there are none."""
        return self._meta("segments")

    @cached_property
    def language(self) -> dict[str, Any] | None:
        """``texts``, ``tasks`` (lists of n), ``encoder`` (name or None) and ``embeddings`` ((n, E) float32 or None)."""
        table = self._group.attrs.get("language")
        if table is None:
            return None
        return {
            "texts": list(table["texts"]),
            "tasks": list(table["tasks"]),
            "encoder": table.get("encoder"),
            "embeddings": self._meta("language_embeddings"),
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """What the writer noted."""
        return dict(self._group.attrs.get("provenance", {}))

    @property
    def checksums(self) -> dict[str, Any] | None:
        """See `lightning_robot.data.checksums`; None in stores that others wrote, or we did before there were any."""
        return self._group.attrs.get("checksums")

    def __reduce__(self) -> Any:
        return EpisodeStore.open, (self.path,)

    def _array(self, key: str) -> Any:
        if key not in self._arrays:
            raise StoreError(f"{self.path} holds no {key}; it holds {', '.join(self.keys)}.")
        return self._arrays[key]

    def _decoded(self, key: str, take: Callable[[Any], np.ndarray]) -> np.ndarray:
        """What `take` reads of an array, in the type that `dtype` tells."""
        array = self._array(key)
        try:
            return take(array).astype(self.dtype(key), copy=False)
        except (IndexError, MemoryError):  # the caller's fault, or the machine's
            raise
        except Exception as error:  # every codec has exceptions of its own
            raise StoreError(
                f"{self.path}: data/{array_name(key)} cannot be read ({type(error).__name__}: {error}): a file is damaged; "
                "copy the store again, or delete it and convert or generate it anew."
            ) from error

    def _meta(self, name: str) -> np.ndarray | None:
        meta = self._group["meta"]
        return np.asarray(meta[name][:]) if name in meta else None

    def _derived_features(self) -> Features:
        observations = {}
        for key in self.keys:
            shape = self.shape(key)[1:]
            if key.startswith("observation.images."):
                shape = (shape[-1], *shape[:-1])
            elif key.startswith("observation.depth."):
                shape = (1, *shape)
            observations[key] = Feature(shape, str(self.dtype(key)))
        if "action" not in observations:
            raise StoreError(f"{self.path} holds no action; it holds {', '.join(self.keys)}.")
        action = observations.pop("action")
        return Features(observations, action)

    def compute_fingerprint(self) -> str:
        """`fingerprint`, from the values."""
        digest = hashlib.sha256(np.ascontiguousarray(self.episode_ends).tobytes())
        features = self._group.attrs.get("features")
        digest.update(json.dumps(features, sort_keys=True).encode())
        for key in self.keys:
            digest.update(f"{key} {self.shape(key)} {self.dtype(key)}".encode())
            if self.frame_bytes(key) >= LARGE_FRAME:
                rows = np.unique(np.linspace(0, self.num_frames - 1, 16).astype(np.int64))
                values = self.gather(key, rows)
            else:
                values = self.read(key, slice(None))
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


class StoreWriter:
    """Writes a store into ``<path>.partial`` and renames it when it is whole; an interrupted writer continues.

    Arrays are pre-sized. `write` takes whole shards and may be called from several processes (the writer can be pickled), one
    per shard: two writers in one shard lose frames. Each shard is synced to disk, then noted in a journal with its checksum.
    `append` serves a single process that has episodes of any length. After a kill, make the writer again with the same
    arguments: shards in the journal are skipped, and the finished bytes are the same. Before it is renamed, the whole store is
    read back and compared with the checksums of what was given to write.

    Attributes:
        path: where the finished store will be.
        partial: folder that holds the work in progress; callers may keep their own files there, removed by `finish`.
        shard_frames: frames per shard, the same for every array.
    """

    def __init__(
        self,
        path: str | Path,
        arrays: Mapping[str, tuple[tuple[int, ...], Any]],
        num_frames: int,
        attrs: Mapping[str, Any] | None = None,
        *,
        shard_frames: int = 256,
        cloud_chunk: int = 4,
    ) -> None:
        """Begins a store, or continues it.

        Args:
            path: where the store will be; must not exist.
            arrays: per batch key the shape of one frame and its dtype.
            num_frames: frames of all episodes.
            attrs: attributes, plain containers without times: ``features``, ``provenance``.
            shard_frames: frames per shard file.
            cloud_chunk: frames per compressed chunk of arrays with large frames (clouds, images); 1 to 4, a divisor of
                `shard_frames`. A random window decompresses whole chunks.

        Raises:
            StoreError: the store exists, or an unfinished one with other settings does.
        """
        self.path = Path(path).expanduser().absolute()
        self.partial = partial_folder(self.path)
        if not 1 <= cloud_chunk <= 4 or shard_frames % cloud_chunk:
            raise StoreError(f"cloud_chunk is from 1 to 4 and divides shard_frames ({shard_frames}); it is {cloud_chunk}.")
        if os.path.lexists(self.path):  # a link to nothing, too, could not be renamed over
            raise StoreError(f"{self.path} exists. Use it, delete it, or write to another place.")
        if num_frames < 1:
            raise StoreError(f"{self.path}: nothing to write (0 frames).")
        self.num_frames, self.shard_frames = num_frames, shard_frames
        self.keys = tuple(arrays)
        settings = {
            "arrays": {key: [list(shape), np.dtype(dtype).name] for key, (shape, dtype) in arrays.items()},
            "num_frames": num_frames,
            "shard_frames": shard_frames,
            "cloud_chunk": cloud_chunk,
            "attrs": dict(attrs or {}),
        }
        self._store = self.partial / "store"
        self._journal = self.partial / "journal.jsonl"
        self._begin(json.loads(json.dumps(settings)))
        self._written = self._read_journal()
        self._opened: dict[str, Any] = {}
        self._pending: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        self._appended = self._flushed = 0

    @property
    def shards(self) -> range:
        """First rows of all shards."""
        return range(0, self.num_frames, self.shard_frames)

    def is_written(self, start_row: int, keys: Iterable[str] | None = None) -> bool:
        """True if the shard that begins at this row is safely on disk, for all keys (or those named)."""
        return all((key, start_row) in self._written for key in (self.keys if keys is None else keys))

    def forget(self, key: str, start_row: int) -> None:
        """Declares a shard not written, because what is on the disk is wrong: the next writer writes it anew."""
        append_line(self._journal, [key, start_row, None])
        self._written.pop((key, start_row), None)

    def write(self, key: str, start_row: int, block: np.ndarray) -> None:
        """Writes one shard of one array.

        Args:
            key: batch key.
            start_row: first row, a multiple of `shard_frames`.
            block: (shard_frames, ...), or what is left in the last shard.

        Raises:
            StoreError: the block is not exactly one shard, or of another shape than announced.
        """
        array = self._open(key)
        rows = min(self.shard_frames, self.num_frames - start_row)
        if start_row % self.shard_frames or len(block) != rows:
            raise StoreError(
                f"{self.path}: {key} is written shard by shard: {rows} rows at a multiple of {self.shard_frames}, not "
                f"{len(block)} rows at {start_row}."
            )
        if block.shape[1:] != array.shape[1:]:
            raise StoreError(f"{self.path}: {key} has frames of shape {array.shape[1:]}, given {block.shape[1:]}.")
        block = np.ascontiguousarray(block, array.dtype)
        array[start_row : start_row + rows] = block
        _sync(
            self._store
            / "data"
            / array_name(key)
            / array.metadata.encode_chunk_key((start_row // self.shard_frames, *(0,) * (block.ndim - 1)))
        )
        self._written[key, start_row] = checksum(block)
        append_line(self._journal, [key, start_row, self._written[key, start_row]])

    def append(self, blocks: Mapping[str, np.ndarray]) -> None:
        """Adds the next frames of every array, any number of them; whole shards go to disk as they fill up.

        Raises:
            StoreError: keys are missing, lengths differ, or there are more frames than announced.
        """
        if set(blocks) != set(self.keys):
            raise StoreError(f"{self.path}: needs {', '.join(self.keys)}; given {', '.join(blocks)}.")
        lengths = {key: len(block) for key, block in blocks.items()}
        if len(set(lengths.values())) != 1:
            raise StoreError(f"{self.path}: arrays of different lengths: {lengths}.")
        self._appended += next(iter(lengths.values()))
        if self._appended > self.num_frames:
            raise StoreError(f"{self.path}: {self._appended} frames given, {self.num_frames} announced.")
        for key, block in blocks.items():
            self._pending[key].append(np.asarray(block))
        while self._flushed < self._appended:
            rows = min(self.shard_frames, self.num_frames - self._flushed)
            if self._appended - self._flushed < rows:
                break
            for key in self.keys:
                block = np.concatenate(self._pending[key])
                self._pending[key] = [block[rows:]]
                if not self.is_written(self._flushed, (key,)):
                    self.write(key, self._flushed, block[:rows])
            self._flushed += rows

    def finish(
        self,
        episode_ends: np.ndarray,
        split: np.ndarray | None = None,
        segments: np.ndarray | None = None,
        language: Mapping[str, Any] | None = None,
        *,
        check: Callable[[EpisodeStore], None] | None = None,
        processes: int = 1,
    ) -> EpisodeStore:
        """Completes the store, verifies it, renames it to its place and opens it.

        Args:
            episode_ends: (E,) exclusive ends.
            split: (E,) 0 training, 1 validation.
            segments: (K, 3) first row, exclusive end, row of the text.
            language: ``texts``, ``tasks``, ``encoder`` and optionally ``embeddings`` (n, E).
            check: gets the store before it is renamed; raises `StoreError` where something in it is wrong.
            processes: worker processes that read the store back.

        Raises:
            StoreError: frames are missing, the episodes do not cover them, or what is read back is not what was written; the
                next writer then writes anew what differs.
        """
        import zarr

        self._written = self._read_journal()
        missing = [start for start in self.shards if not self.is_written(start)]
        if missing:
            raise StoreError(
                f"{self.path}: {len(missing)} of {len(self.shards)} shards are not written, the first at row {missing[0]}."
            )
        ends = np.asarray(episode_ends, np.int64)
        _check_episode_ends(self.path, ends, self.num_frames)
        if split is not None and len(split) != len(ends):
            raise StoreError(f"{self.path}: a split of {len(split)} episodes for {len(ends)} episodes.")
        texts = list(language["texts"]) if language else []
        if segments is not None:
            _check_segments(self.path, np.asarray(segments), ends, len(texts))
        meta: dict[str, np.ndarray] = {}
        if split is not None:
            meta["episode_split"] = np.asarray(split, np.int8)
        if segments is not None:
            meta["segments"] = np.asarray(segments, np.int64).reshape(-1, 3)
        root = zarr.open_group(str(self._store), mode="r+", use_consolidated=False)
        if language:
            root.attrs["language"] = {"texts": texts, "tasks": list(language["tasks"]), "encoder": language.get("encoder")}
            if language.get("embeddings") is not None:
                meta["language_embeddings"] = np.asarray(language["embeddings"], np.float32)
        meta["episode_ends"] = ends  # last: a store without it is refused
        group = root.require_group("meta")
        for name, values in meta.items():
            array = group.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, n) for n in values.shape), overwrite=True
            )
            array[...] = values
        zeros = {
            name: wanted - len(files) for name, wanted, files in _shard_files(self._store, root["data"]) if len(files) < wanted
        }
        if zeros:  # Zarr writes no file for a shard of zeros: what is missing later is a loss, these are not
            root.attrs["shards_of_zeros"] = zeros
        root.attrs["checksums"] = {
            "rows": self.shard_frames,
            "data": {array_name(key): written([self._written[key, start] for start in self.shards]) for key in self.keys},
            "meta": {name: written([checksum(values)]) for name, values in meta.items()},
        }
        root.attrs["fingerprint"] = EpisodeStore(self._store, zarr.open_group(str(self._store), mode="r")).compute_fingerprint()
        root.attrs["complete"] = True
        for leftover in self._store.rglob(f"*.{'[0-9a-f]' * 32}.partial"):  # what a killed process was writing
            leftover.unlink()
        for folder, _, files in os.walk(self._store):
            for file in files if "data" not in Path(folder).relative_to(self._store).parts[:1] else ():
                _sync(Path(folder) / file)
        self._verify(processes, check)
        os.rename(self._store, self.path)
        _sync(self.path.parent)
        shutil.rmtree(self.partial, ignore_errors=True)
        return EpisodeStore.open(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def _verify(self, processes: int, check: Callable[[EpisodeStore], None] | None) -> None:
        store = EpisodeStore.open(self._store)
        assert store.checksums is not None
        changed = changed_blocks(self._store, store.checksums, processes)
        for name, start in changed:
            if name.startswith("data/"):
                self.forget(batch_key(name.removeprefix("data/")), start)
        if changed:
            name, start = changed[0]
            raise StoreError(
                f"{self.partial}: what is read back is not what was written: {name}, rows from {start}"
                + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
                + ". Check disk and memory, then run the same again: what differs is written anew."
            )
        if check is not None:
            check(store)

    def _begin(self, settings: dict[str, Any]) -> None:
        """Creates the arrays, or takes up those of an interrupted writer with the same settings."""
        import zarr
        from zarr.codecs import BloscCodec

        noted = self.partial / "settings.json"
        if noted.exists() and self._store.exists():  # without the latter: finished, and killed before tidying up
            old = json.loads(noted.read_text())
            different = [name for name in settings if old.get(name) != settings[name]]
            if different:
                raise StoreError(
                    f"{self.partial} was begun with other settings ({', '.join(different)}). Give the same settings to "
                    "continue, or delete it to start afresh."
                )
            return
        for path in (self._store, self._journal):  # begun, but not far enough to have written anything
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._store.parent.mkdir(parents=True, exist_ok=True)
        root = zarr.open_group(str(self._store), mode="w", zarr_format=3)
        root.attrs.update(settings["attrs"])
        data = root.create_group("data")
        for key, (shape, dtype) in settings["arrays"].items():
            large = math.prod(shape) * np.dtype(dtype).itemsize >= LARGE_FRAME
            data.create_array(
                array_name(key),
                shape=(self.num_frames, *shape),
                dtype=dtype,
                chunks=(settings["cloud_chunk"] if large else self.shard_frames, *shape),
                shards=(self.shard_frames, *shape),
                compressors=BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
            )
        partial = noted.with_suffix(".tmp")
        partial.write_text(json.dumps(settings))
        _sync(partial)
        os.replace(partial, noted)

    def _open(self, key: str) -> Any:
        import zarr

        if key not in self.keys:
            raise StoreError(f"{self.path} has no array {key}; it has {', '.join(self.keys)}.")
        if key not in self._opened:
            self._opened[key] = zarr.open_array(str(self._store / "data" / array_name(key)), mode="r+")
        return self._opened[key]

    def _read_journal(self) -> dict[tuple[str, int], int]:
        """Checksums of the shards that are safely on disk, by key and first row."""
        noted = {(line[0], line[1]): line[2] for line in read_lines(self._journal) if len(line) == 3}
        return {place: value for place, value in noted.items() if value is not None}


def partial_folder(path: Path) -> Path:
    """Where an unfinished store lies."""
    return path.with_name(path.name + ".partial")


_HOW = (
    "Make a store with `python -m lightning_robot convert calvin ROOT STORE` (from a CALVIN download) or "
    "`python -m lightning_robot generate STORE` (in the simulator)."
)


def _refuse_missing(path: Path) -> None:
    if path.exists():
        return
    if partial_folder(path).exists():
        raise StoreError(
            f"{path} is not finished: its writer was interrupted and left {partial_folder(path).name}. Run the same command "
            "again to continue."
        )
    raise StoreError(f"There is no store at {path}. {_HOW}")


def _shard_files(path: Path, data: Any) -> Iterator[tuple[str, int, list[Path]]]:
    """Of every array its name, the number of its shards, and their files."""
    for name, array in data.arrays():
        wanted = math.prod(math.ceil(size / shard) for size, shard in zip(array.shape, array.shards or array.chunks))
        yield name, wanted, [file for file in (path / "data" / name / "c").rglob("*") if file.is_file()]


def _check_shards(path: Path, data: Any, zeros: Mapping[str, int]) -> None:
    """Refuses a store of ours that lost files, in a copy for example: Zarr reads what is missing as zeros."""
    for name, shards, files in _shard_files(path, data):
        wanted = shards - zeros.get(name, 0)
        empty = [str(file.relative_to(path)) for file in files if file.stat().st_size == 0]
        if len(files) < wanted or empty:
            what = f"{empty[0]} is empty" if empty else f"{wanted - len(files)} of {wanted} files of data/{name} are missing"
            raise StoreError(f"{path} is damaged: {what}. Copy it again, or delete it and write it anew.")


def _check_lengths(path: Path, data: Any, ends: np.ndarray) -> None:
    lengths = {f"data/{name}": array.shape[0] if array.shape else 0 for name, array in sorted(data.arrays())}
    if len(ends) == 0 or not any(lengths.values()):
        raise StoreError(f"{path} is empty: it holds no episode. {_HOW}")
    if len(set(lengths.values()) | {int(ends[-1])}) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise StoreError(
            f"{path}: arrays of different lengths: {listed}; meta/episode_ends ends at {int(ends[-1])}. The store is damaged, "
            "or was changed by hand: convert or generate it again."
        )
    _check_episode_ends(path, ends, int(ends[-1]))


def _check_episode_ends(path: Path, ends: np.ndarray, num_frames: int) -> None:
    if ends.ndim != 1 or len(ends) == 0 or (np.diff(ends, prepend=0) <= 0).any() or ends[-1] != num_frames:
        raise StoreError(f"{path}: episode_ends must increase from above 0 to {num_frames}; given {ends.tolist()[:10]} …")


def _check_segments(path: Path, segments: np.ndarray, ends: np.ndarray, num_texts: int) -> None:
    for row, (start, end, text) in enumerate(segments.reshape(-1, 3).tolist()):
        episode = int(np.searchsorted(ends, start, side="right"))
        if not (0 <= start < end and episode < len(ends) and end <= ends[episode] and 0 <= text < num_texts):
            raise StoreError(
                f"{path}: segment {row} (frames {start} to {end}, text {text}) does not lie within one episode, or there is no "
                f"such text among {num_texts}."
            )


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk. Shards of nothing but zeros have no file."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
