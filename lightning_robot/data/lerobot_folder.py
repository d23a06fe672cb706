"""A LeRobot dataset folder (v3.0, v2.1 or v2.0), read as an episode store is read.

What is not a picture is held in memory as arrays; pictures are decoded when a batch asks for them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import progress, say
from lightning_robot.data.cache import writable_folder
from lightning_robot.data.lerobot_meta import INFO, NOTES, Table, read_meta, read_notes
from lightning_robot.data.pictures import Pictures, png_decoder, read_encoded
from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode, VideoFrames, frame_count, video_backend
from lightning_robot.features import Feature, Features

JOINT_UNITS = {"degrees": "degrees, %", "normalized": "%"}
"""Units in which LeRobot drives an SO-100 or SO-101, and how `Feature` calls them; the gripper is always in per cent."""
MOST_NORMALIZED = 101.0
"""What LeRobot clips normalised joints to, with room for rounding."""
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that every LeRobot dataset has."""


@dataclass
class Camera:
    """A picture feature.

    Attributes:
        column: LeRobot's name of the feature.
        frame_shape: (height, width, 3), or (height, width) for depth.
        is_video: stored in video files, else as encoded pictures in parquet.
        depth: for depth, how stored values become metres.
        files: video files.
        file_of_episode: (E,) index of its video file.
        first_frame: (E,) number of the episode's first frame in that file.
    """

    column: str
    frame_shape: tuple[int, ...]
    is_video: bool
    depth: DepthCode | None
    files: list[Path] = field(default_factory=list)
    file_of_episode: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    first_frame: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class LeRobotFolder:
    """Read access to a LeRobot dataset with the interface of `lightning_robot.data.store.EpisodeStore`.

    Keys are LeRobot's names of features, except that depth cameras are ``observation.depth.<camera>``, in metres, and that a
    colour camera outside of ``observation.images.`` is offered below it.

    Attributes:
        path: absolute path.
        info: content of meta/info.json.
        fps: frames per second.
        keys: batch keys.
        cameras: of the keys that are pictures.
        episode_ends: (E,) int64, exclusive.
        episode_starts: (E,) int64.
        num_frames: frames of all episodes.
        num_episodes: E.
        frame_texts: (frames,) int64: row of `language`'s texts for each frame.
    """

    episode_split = None
    segments = None

    def __init__(
        self,
        path: Path,
        info: dict[str, Any],
        table: Table,
        backend: str | None,
        tolerance: float,
        joint_units: str | None = None,
    ) -> None:
        self.path, self.info, self.backend, self.tolerance = path, info, backend, tolerance
        self.asked_units = joint_units
        self.fps = float(info["fps"])
        self.episode_ends = np.cumsum(table.lengths)
        self.episode_starts = self.episode_ends - table.lengths
        self.num_frames, self.num_episodes = int(self.episode_ends[-1]), len(table.lengths)
        self._table = table
        self.cameras = {key: camera for column in info["features"] for key, camera in [self._camera(column)] if camera}
        names = [n for n, f in info["features"].items() if _is_vector(n, f)]
        self._arrays = self._read_vectors(names)
        if "action" not in self._arrays:
            raise StoreError(f"{path / INFO} names no feature 'action'; it names {', '.join(info['features'])}.")
        self.keys = (*self._arrays, *self.cameras)
        self._lazy: dict[str, VideoFrames | Pictures] = {}

    @classmethod
    def open(
        cls, path: str | Path, backend: str | None = None, tolerance: float = 1e-4, joint_units: str | None = None
    ) -> LeRobotFolder:
        """Opens a dataset and checks that its tables agree with each other.

        Args:
            path: the folder that holds meta, data and videos.
            backend: ``"torchcodec"`` or ``"pyav"``; None takes the first that loads.
            tolerance: seconds by which a recorded time may differ from its frame number.
            joint_units: ``degrees`` or ``normalized``, of an SO-100's or SO-101's joints, where the dataset does not say.

        Raises:
            StoreError: there is none; another version; files, rows or entries are missing or contradict each other.
        """
        path = Path(path).expanduser().absolute()
        return cls(path, *read_meta(path), backend, tolerance, joint_units)

    def shape(self, key: str) -> tuple[int, ...]:
        """(frames, ...); pictures are (height, width, 3), depth is (height, width)."""
        if key in self.cameras:
            return (self.num_frames, *self.cameras[key].frame_shape)
        return self._vector(key).shape

    def dtype(self, key: str) -> np.dtype:
        """uint8 for colour pictures, float32 for all else."""
        camera = self.cameras.get(key)
        return np.dtype(np.uint8 if camera and not camera.depth else np.float32)

    def frame_bytes(self, key: str) -> int:
        """Decoded bytes of one frame."""
        return int(np.prod(self.shape(key)[1:], dtype=np.int64)) * self.dtype(key).itemsize

    def is_large(self, key: str) -> bool:
        """True for pictures: they are decoded when they are needed."""
        return key in self.cameras

    def aligned_rows(self, key: str, max_bytes: int) -> int:
        """A number of rows of about `max_bytes`."""
        return max(1, max_bytes // max(1, self.frame_bytes(key)))

    def read(self, key: str, rows: slice) -> np.ndarray:
        """Consecutive frames, (rows, ...)."""
        if key in self.cameras:
            return self.frames(key).gather(np.arange(*rows.indices(self.num_frames)))
        return self._vector(key)[rows].copy()

    def gather(self, key: str, rows: np.ndarray) -> np.ndarray:
        """Frames in any order, repeats allowed, (R, ...)."""
        return self.frames(key).gather(rows) if key in self.cameras else self._vector(key)[rows]

    def whole(self, key: str) -> np.ndarray:
        """(frames, ...) float32, all frames of a key that is no picture."""
        return self._vector(key)

    def frames(self, key: str) -> VideoFrames | Pictures:
        """The pictures of a camera: an object with `gather(rows)`, which is cheap to hand to other processes."""
        if key not in self._lazy:
            camera = self.cameras[key]
            if camera.is_video:
                episode = np.repeat(np.arange(self.num_episodes), self._table.lengths)
                number = np.arange(self.num_frames) - self.episode_starts[episode] + camera.first_frame[episode]
                backend = "pyav" if camera.depth else video_backend(self.backend)
                self._lazy[key] = VideoFrames(
                    camera.files, camera.file_of_episode[episode], number, camera.frame_shape, self.fps, backend, camera.depth
                )
            else:
                png_decoder()  # here, where it is said once, rather than in every worker
                name = f"{camera.column}-{self.fingerprint[:16]}"
                data, offsets = read_encoded(self.path, self._table.data_files, camera.column, writable_folder(self.path), name)
                where = f"{self.path}: {camera.column}"
                self._lazy[key] = Pictures(data, offsets, camera.frame_shape, where, camera.depth)
        return self._lazy[key]

    def check_videos(self, keys: tuple[str, ...], episodes: np.ndarray) -> None:
        """Makes sure that the video files of some cameras and episodes exist and hold the frames that they should.

        Raises:
            StoreError: names the file, the episodes and the camera.
        """
        for key in keys:
            camera = self.cameras.get(key)
            if camera is None or not camera.is_video:
                continue
            used = np.unique(camera.file_of_episode[episodes])
            for file in progress(used.tolist(), description=f"checking videos of {key}", unit="files"):
                self._check_video(camera, file, episodes)

    def check_numbers(self, key: str, episodes: np.ndarray) -> None:
        """Makes sure that the values of some episodes are numbers.

        Raises:
            StoreError: names the key, the episode and the frame.
        """
        values = self._vector(key).reshape(self.num_frames, -1)
        chosen = np.repeat(np.isin(np.arange(self.num_episodes), episodes), self._table.lengths)
        wrong = np.flatnonzero(chosen & ~np.isfinite(values).all(1))
        if len(wrong):
            episode = int(np.searchsorted(self.episode_ends, wrong[0], side="right"))
            raise StoreError(
                f"{self.path}: {key} of episode {episode}, frame {wrong[0] - self.episode_starts[episode]} holds a value that "
                f"is no number ({len(wrong)} such frames). Record it again, or leave such episodes out with "
                "data.init_args.train_episodes and validation_episodes."
            )

    def episode_statistics(self, key: str, episodes: np.ndarray) -> list[dict[str, np.ndarray]] | None:
        """What the writer noted of a feature, per episode; None unless every one of these episodes has it.

        Returns:
            per episode ``min``, ``max``, ``mean``, ``std`` (D,) and ``count`` (1,), float64.
        """
        column = self.cameras[key].column if key in self.cameras else key
        found = []
        for episode in episodes.tolist():
            noted = self._table.statistics[episode].get(column, {}) if episode < len(self._table.statistics) else {}
            if any(noted.get(name) is None for name in ("min", "max", "mean", "std", "count")):
                return None
            names = ("min", "max", "mean", "std", "count")
            found.append({name: np.asarray(noted[name], np.float64).reshape(-1) for name in names})
        return found

    @cached_property
    def features(self) -> Features:
        """What the dataset offers, from meta/info.json; with units, kinds and the meaning of actions where we wrote it."""
        described, noted = self.info["features"], self._noted
        known = {} if noted is None else {**noted.observations, "action": noted.action}
        observations = {}
        for key in self.keys:
            shape = self.shape(key)[1:]
            if key not in self.cameras:
                observations[key] = Feature(shape, names=_names(described[key], shape), unit=self._joint_unit(key))
            elif self.cameras[key].depth:
                observations[key] = Feature((1, *shape), unit="m")
            else:
                observations[key] = Feature((shape[-1], *shape[:-1]), "uint8")
            described_here = observations[key]
            if key in known and (known[key].shape, known[key].names) == (described_here.shape, described_here.names):
                observations[key] = known[key]
        action = observations.pop("action")
        source = {"recording": f"LeRobot {self.info['codebase_version']}"}
        if self.info.get("robot_type"):
            source["robot"] = str(self.info["robot_type"])
        if noted is None or action != noted.action:
            return Features(observations, action, control_rate=self.fps, source=source)
        cloud = noted.cloud if "observation.point_cloud" in observations else None
        return Features(observations, action, noted.action_semantics, self.fps, cloud, {**noted.source, **source})

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hexadecimal) of episodes, features, tasks, all values that are no pictures, and the sizes of picture files."""
        digest = hashlib.sha256(np.ascontiguousarray(self.episode_ends).tobytes())
        digest.update(json.dumps([self.info["features"], self.fps, self._table.texts], sort_keys=True).encode())
        for key in sorted(self._arrays):
            digest.update(key.encode() + self._arrays[key].tobytes())
        files = {file for camera in self.cameras.values() for file in camera.files}
        if any(not camera.is_video for camera in self.cameras.values()):
            files |= set(self._table.data_files)
        for file in sorted(files):
            size = file.stat().st_size if file.exists() else -1
            digest.update(f"{file.relative_to(self.path)} {size}".encode())
        return digest.hexdigest()

    @property
    def language(self) -> dict[str, Any]:
        """``texts``, ``tasks`` (their ids where we wrote the dataset, else the sentences), ``encoder``, ``embeddings`` None."""
        texts, ids = self._table.texts, self.notes.get("tasks") or {}
        return {"texts": texts, "tasks": [ids.get(text, text) for text in texts], "encoder": None, "embeddings": None}

    @property
    def notes(self) -> dict[str, Any]:
        """What our own writer noted besides: ``features``, ``provenance``, ``tasks``, ``checksums``; else empty."""
        return read_notes(self.path)

    @property
    def checksums(self) -> dict[str, Any] | None:
        """See `lightning_robot.data.lerobot_checksums`; None where there are none."""
        return self.notes.get("checksums")

    @property
    def provenance(self) -> dict[str, Any]:
        """Version and robot."""
        return {"codebase_version": self.info["codebase_version"], "robot_type": self.info.get("robot_type")}

    def __reduce__(self) -> Any:
        return LeRobotFolder.open, (self.path, self.backend, self.tolerance, self.asked_units)

    @cached_property
    def largest_joint(self) -> float | None:
        """The largest absolute value of an SO arm's joints, grippers left out, where nobody noted their unit; else None."""
        columns = [self._vector(key)[:, joints] for key in self._arrays if len(joints := self._joints(key))]
        return max(float(np.nanmax(np.abs(values))) for values in columns) if columns and self._noted is None else None

    # Below: private.

    def _joints(self, key: str) -> list[int]:
        """Which elements of a vector are joints of an SO-100 or SO-101 that turn; empty where it is no such arm's."""
        values = self._vector(key)
        names = _names(self.info["features"][key], values.shape[1:])
        if not any("shoulder_pan" in name for name in names) or any(name.endswith(".vel") for name in names):
            return []
        return [number for number, name in enumerate(names) if "gripper" not in name]

    def _joint_unit(self, key: str) -> str:
        """The unit asked for, else degrees where a joint exceeds what a normalised one reaches, else none."""
        largest = self.largest_joint
        if largest is None or not self._joints(key):
            return ""
        return JOINT_UNITS.get(self.asked_units or ("degrees" if largest > MOST_NORMALIZED else ""), "")

    @cached_property
    def _noted(self) -> Features | None:
        """The features that our writer was given; None for a dataset that somebody else wrote."""
        notes = self.notes
        try:
            return Features.from_dict(notes["features"]) if "features" in notes else None
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.path / NOTES} is damaged ({error}). Copy it again; without the file the dataset is read as one "
                "that does not say its units."
            ) from error

    def _vector(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            raise StoreError(f"{self.path} holds no {key}; it holds {', '.join(self.keys)}.")
        return self._arrays[key]

    def _camera(self, column: str) -> tuple[str, Camera | None]:
        """Batch key and description of a picture feature."""
        feature = self.info["features"][column]
        if feature["dtype"] not in ("image", "video"):
            return column, None
        shape = [int(size) for size in feature["shape"]]
        names = feature.get("names") or ["height", "width", "channels"]
        if names[-1] not in ("channel", "channels"):
            shape = [*shape[1:], shape[0]]
        height, width, channels = shape
        noted = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
        is_depth = bool(noted.get("is_depth_map") or noted.get("video.is_depth_map"))
        if channels != (1 if is_depth else 3):
            what = "depth has 1 channel" if is_depth else "colour has 3 channels (is_depth_map marks depth)"
            raise StoreError(f"{self.path / INFO}: {column} has the shape {feature['shape']}; {what}.")
        depth = None
        if is_depth:
            depth = DepthCode(
                low=noted.get("video.depth_min", DepthCode.low),
                high=noted.get("video.depth_max", DepthCode.high),
                shift=noted.get("video.shift", DepthCode.shift),
                logarithmic=noted.get("video.use_log", DepthCode.logarithmic),
                unit=1.0 if noted.get("depth_unit") == "m" else 0.001,
            )
        name = column.removeprefix("observation.").removeprefix("images.").removeprefix("depth.")
        key = f"observation.depth.{name}" if is_depth else f"observation.images.{name}"
        frame_shape = (height, width) if is_depth else (height, width, 3)
        camera = Camera(column, frame_shape, feature["dtype"] == "video", depth)
        if camera.is_video:
            paths, seconds = self._table.videos[column]
            camera.files = sorted(set(paths))
            number = {file: index for index, file in enumerate(camera.files)}
            camera.file_of_episode = np.array([number[file] for file in paths])
            camera.first_frame = self._frame_numbers(column, paths, seconds)
        return key, camera

    def _frame_numbers(self, column: str, paths: list[Path], seconds: np.ndarray) -> np.ndarray:
        exact = seconds * self.fps
        numbers = np.rint(exact).astype(np.int64)
        # The writer adds up durations of files, each rounded to its time base.
        wrong = np.flatnonzero(np.abs(exact - numbers) / self.fps > self.tolerance + 1e-3 / self.fps)
        if len(wrong):
            episode = int(wrong[0])
            raise StoreError(
                f"{self.path}: {column} of episode {episode} begins at {seconds[episode]:.6f} s of {paths[episode]}, which is "
                f"{np.abs(exact - numbers)[episode] / self.fps:.6f} s off a frame at {self.fps:g} frames per second. "
                f"{_TOLERANCE}"
            )
        return numbers

    def _read_vectors(self, names: list[str]) -> dict[str, np.ndarray]:
        """All columns that are no pictures: {key: (frames, ...) float32}; checks the counters and sets `frame_texts`."""
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        tables = []
        for file in self._table.data_files:
            if not file.is_file():
                raise StoreError(f"{file} is missing: {self.path} was not copied or downloaded whole.")
            try:
                schema = parquet.read_schema(file)
                absent = [name for name in (*names, *COUNTERS) if name not in schema.names]
                if absent:
                    raise StoreError(f"{file} has no column {', '.join(absent)}, which {self.path / INFO} names.")
                tables.append(parquet.read_table(file, columns=[*names, *COUNTERS], partitioning=None))
            except (arrow.ArrowInvalid, OSError) as error:
                raise StoreError(f"{file} cannot be read ({error}). Copy or download it again.") from error
        rows = [len(table) for table in tables]
        if sum(rows) != self.num_frames:
            listed = ", ".join(f"{file.name} {count}" for file, count in zip(self._table.data_files[:8], rows))
            raise StoreError(
                f"{self.path}: meta/ tells of {self.num_frames} frames in {self.num_episodes} episodes, but the parquet files "
                f"hold {sum(rows)} rows ({listed}{' …' if len(rows) > 8 else ''}). The recording was interrupted or files are "
                "missing: copy or download the folder again, or record anew."
            )
        columns = {
            name: np.concatenate([_values(table, name, file) for table, file in zip(tables, self._table.data_files)])
            for name in (*names, *COUNTERS)
        }
        self._check_counters({name: columns.pop(name) for name in COUNTERS})
        arrays = {}
        for name, values in columns.items():
            shape = tuple(int(size) for size in self.info["features"][name]["shape"])
            if values.size != self.num_frames * int(np.prod(shape, dtype=np.int64)):
                raise StoreError(
                    f"{self.path}: {name} has {values.size} values in {self.num_frames} frames, but {INFO} gives it the shape "
                    f"{shape}. Write the dataset again, or correct the shape there."
                )
            arrays[name] = values.reshape(self.num_frames, *shape).astype(np.float32, copy=False)
        return arrays

    def _check_counters(self, columns: dict[str, np.ndarray]) -> None:
        episode = np.repeat(np.arange(self.num_episodes), self._table.lengths)
        frame = np.arange(self.num_frames) - self.episode_starts[episode]
        for name, expected in (("index", np.arange(self.num_frames)), ("episode_index", episode), ("frame_index", frame)):
            wrong = np.flatnonzero(columns[name] != expected)
            if len(wrong):
                row = int(wrong[0])
                raise StoreError(
                    f"{self.path}: column {name} of the parquet files is {columns[name][row]} in row {row}, where episode "
                    f"{episode[row]}, frame {frame[row]} of meta/ lies ({expected[row]} expected). Files are missing or in "
                    "another order: copy or download the folder again."
                )
        expected = frame / self.fps
        apart = np.abs(columns["timestamp"].astype(np.float64) - expected)
        wrong = np.flatnonzero(~(apart <= self.tolerance + np.spacing(expected.astype(np.float32))))  # no number is wrong, too
        if len(wrong):
            row = int(wrong[0])
            raise StoreError(
                f"{self.path}: timestamp of episode {episode[row]}, frame {frame[row]} is {columns['timestamp'][row]:.6f} s, "
                f"{apart[row]:.6f} s away from frame / fps = {expected[row]:.6f} s ({len(wrong)} such frames; the furthest "
                f"{np.nanmax(apart):.6f} s). {_TOLERANCE}"
            )
        self.frame_texts = columns["task_index"].astype(np.int64)
        wrong = np.flatnonzero((self.frame_texts < 0) | (self.frame_texts >= len(self._table.texts)))
        if len(wrong):
            row = int(wrong[0])
            raise StoreError(
                f"{self.path}: task_index {self.frame_texts[row]} of episode {episode[row]}, frame {frame[row]} is not in "
                f"meta/tasks, which holds {len(self._table.texts)} tasks. Add the sentence there, or remove the episode."
            )

    def _check_video(self, camera: Camera, file: int, episodes: np.ndarray) -> None:
        path = camera.files[file]
        here = episodes[camera.file_of_episode[episodes] == file]
        if not path.is_file():
            raise StoreError(
                f"{path} is missing: it holds {camera.column} of episode {_listed(here)}. Copy or download it, or {_LEAVE_OUT}."
            )
        held = frame_count(path)
        needed = camera.first_frame[here] + self._table.lengths[here]
        if held < needed.max():
            short = here[needed > held]
            raise StoreError(
                f"{path} holds {held} frames, but {camera.column} of episode {_listed(short)} needs {needed.max()} "
                "(meta/ and parquet count so many). The recording was interrupted or the file is cut: copy or download it "
                f"again, or {_LEAVE_OUT}."
            )
        everyone = np.flatnonzero(camera.file_of_episode == file)
        expected = int((camera.first_frame[everyone] + self._table.lengths[everyone]).max())
        if held > expected:
            say(f"{path} holds {held} frames, {held - expected} more than its episodes have; the last ones are not used.")


_TOLERANCE = (
    "Frames would be matched with the wrong pictures. Record or convert with timestamps of frame / fps, or, if the order of "
    "frames is right nevertheless, raise data.init_args.tolerance."
)
_LEAVE_OUT = (
    "leave these episodes out with data.init_args.train_episodes and validation_episodes (and decode: false, since a decoded "
    "copy holds all episodes)"
)


def _listed(numbers: np.ndarray) -> str:
    return ", ".join(str(number) for number in np.sort(numbers)[:6].tolist()) + (" …" if len(numbers) > 6 else "")


def _is_vector(name: str, feature: dict[str, Any]) -> bool:
    """Numbers that a policy may read or act with."""
    if not (name == "action" or name.startswith("observation.")):
        return False
    return feature["dtype"] not in ("image", "video", "string", "language")


def _names(feature: dict[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the elements, where there is one for each."""
    names = feature.get("names") or ()
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return tuple(str(name) for name in names) if len(shape) == 1 and len(names) == shape[0] else ()


def _values(table: Any, name: str, file: Path) -> np.ndarray:
    """A column as a flat array."""
    import pyarrow as arrow

    column = table.column(name).combine_chunks()
    if isinstance(column, arrow.ChunkedArray):
        column = arrow.concat_arrays(column.chunks)
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    while not arrow.types.is_primitive(column.type):
        if column.null_count or not hasattr(column, "flatten"):
            raise StoreError(f"{file}: column {name} has empty rows, or is of the type {column.type}. Write it again.")
        column = column.flatten()
    if column.null_count:
        raise StoreError(f"{file}: column {name} has {column.null_count} empty values. Write it again, or remove the episode.")
    return column.to_numpy(zero_copy_only=False)
