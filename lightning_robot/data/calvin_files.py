"""What lies in a folder of CALVIN recordings: splits, play episodes, language, single frames; checked before it is used.

A split folder (``training``, ``validation``) holds one ``episode_NNNNNNN.npz`` per frame of 1/30 s, numbered through;
``ep_start_end_ids.npy`` names first and last frame of every play episode, ``lang_annotations`` short described stretches.
"""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_robot.geometry import CALVIN_GRIPPER, CALVIN_STATIC
from lightning_robot.unpickling import ForbiddenPickle, load_object_array

SPLITS = ("training", "validation")
LANGUAGE = "lang_annotations"
DEFAULT_ENCODER = "paraphrase-MiniLM-L6-v2"  # of the folder above; other folders are called lang_<encoder>
FRAME_SHAPES: dict[str, tuple[int, ...]] = {
    "actions": (7,),
    "rel_actions": (7,),
    "robot_obs": (15,),
    "scene_obs": (24,),
    "rgb_static": (CALVIN_STATIC.height, CALVIN_STATIC.width, 3),
    "rgb_gripper": (CALVIN_GRIPPER.height, CALVIN_GRIPPER.width, 3),
    "depth_static": (CALVIN_STATIC.height, CALVIN_STATIC.width),
    "depth_gripper": (CALVIN_GRIPPER.height, CALVIN_GRIPPER.width),
}
_FRAME_FILE = re.compile(r"episode_(\d+)\.npz")


class CalvinError(ValueError):
    """The recordings cannot be used as they are; the message names file and remedy."""


class DamagedFrame(CalvinError):
    """One frame's file cannot be read or does not hold what it must."""


@dataclass
class Report:
    """Damage found on the way: collected for the end, or fatal at once.

    Attributes:
        strict: the first piece of damage stops.
        damage: (file, what) in the order of discovery.
    """

    strict: bool = False
    damage: list[tuple[str, str]] = field(default_factory=list)

    def add(self, file: str, what: str) -> None:
        if self.strict:
            raise CalvinError(f"{file}: {what} (strict: stopped at the first damage; nothing already written is lost)")
        self.damage.append((file, what))

    def lines(self, most: int = 20) -> list[str]:
        """Sentences for the end of the work, with the count first; empty if all is well."""
        if not self.damage:
            return []
        shown = [f"  {file}: {what}" for file, what in self.damage[:most]]
        if len(self.damage) > most:
            shown.append(f"  ... and {len(self.damage) - most} more")
        return [f"{len(self.damage)} damaged item(s):", *shown]


@dataclass(frozen=True)
class Stretch:
    """Uninterrupted frames of one play episode, first to last, both included; split as in `SPLITS`."""

    split: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Annotation:
    """A described stretch, first to last frame, both included (as the published loaders read it)."""

    split: int
    first: int
    last: int
    text: str
    task: str
    embedding: NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """A split folder.

    Attributes:
        number: position in `SPLITS`.
        folder: where it is.
        digits: width of the frame number in file names.
        frames: sorted numbers of the frames that are there, int64.
    """

    number: int
    folder: Path
    digits: int
    frames: NDArray[np.int64]

    @property
    def name(self) -> str:
        return SPLITS[self.number]

    def file(self, frame: int) -> Path:
        return self.folder / self.file_name(frame)

    def file_name(self, frame: int) -> str:
        return f"episode_{frame:0{self.digits}d}.npz"


def find_splits(root: Path, wanted: Collection[str] = SPLITS) -> list[Split]:
    """The split folders under `root`, or `root` itself if it is one.

    Raises:
        CalvinError: no such folder, or no CALVIN recordings in it; says how to get some.
    """
    remedy = (
        "Give the folder that holds training/ and validation/ (from the scripts of github.com/mees/calvin, folder dataset: "
        "`sh download_data.sh debug` fetches 1.3 GB), or generate demonstrations: `python -m lightning_robot generate`."
    )
    if not root.is_dir():
        raise CalvinError(f"{root}: no such folder. {remedy}")
    folders = {name: root / name for name in SPLITS if name in wanted and (root / name).is_dir()}
    if not folders and (root / "ep_start_end_ids.npy").exists():
        folders = {"validation" if root.name == "validation" else "training": root}
    if not folders:
        raise CalvinError(f"{root} holds no CALVIN recordings: {' and '.join(wanted)} are missing. {remedy}")
    return [_scan(SPLITS.index(name), folder) for name, folder in folders.items()]


def _scan(number: int, folder: Path) -> Split:
    numbers, digits = array("q"), set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := _FRAME_FILE.fullmatch(entry.name):
                numbers.append(int(match[1]))
                digits.add(len(match[1]))
    if not numbers:
        raise CalvinError(f"{folder} holds no episode_*.npz files: the download or unpacking is incomplete.")
    if len(digits) > 1:
        raise CalvinError(f"{folder}: frame numbers in file names have {' and '.join(map(str, sorted(digits)))} digits.")
    return Split(number, folder, digits.pop(), np.sort(np.frombuffer(numbers, dtype=np.int64)))


def play_episodes(split: Split, report: Report) -> list[Stretch]:
    """Play episodes in the order of their frame numbers, cut where frames are missing: never closed over a gap."""
    path = split.folder / "ep_start_end_ids.npy"
    try:
        bounds = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise CalvinError(f"{path} is missing: it names the play episodes. Fetch it again.") from error
    except (ValueError, EOFError, OSError) as error:
        raise CalvinError(f"{path} is damaged: {error}. Fetch it again.") from error
    if bounds.size % 2 or bounds.ndim > 2 or not np.issubdtype(bounds.dtype, np.integer):
        raise CalvinError(
            f"{path}: expected integers (episodes, 2), first and last frame; found {bounds.dtype} {bounds.shape}."
        )
    where = f"{split.name}/{path.name}"
    stretches: list[Stretch] = []
    end = -1
    for first, last in sorted((int(first), int(last)) for first, last in bounds.reshape(-1, 2)):
        if first > last:
            report.add(where, f"episode {first} to {last} ends before it starts; left out")
            continue
        if first <= end:
            report.add(where, f"episode {first} to {last} overlaps the one before, which ends at {end}; its start is left out")
            first = end + 1
        present = split.frames[np.searchsorted(split.frames, first) : np.searchsorted(split.frames, last, side="right")]
        end = max(end, last)
        if not len(present):
            if first <= last:
                report.add(where, f"none of the frames {first} to {last} of this episode is there (partial download?)")
            continue
        for low, high in _gaps(present, first, last):
            report.add(f"{split.name}/{split.file_name(low)}", _gap_sentence(low, high, first, last))
        stretches += [Stretch(split.number, *run) for run in _runs(present)]
    return stretches


def cut(stretches: Iterable[Stretch], damaged: Collection[tuple[int, int]]) -> list[Stretch]:
    """The stretches without the damaged (split, frame) pairs, each cut into the parts before and after."""
    frames: dict[int, list[int]] = {}
    for split, frame in sorted(damaged):
        frames.setdefault(split, []).append(frame)
    parts = []
    for stretch in stretches:
        first = stretch.first
        for frame in frames.get(stretch.split, ()):
            if first <= frame <= stretch.last:
                if frame > first:
                    parts.append(Stretch(stretch.split, first, frame - 1))
                first = frame + 1
        if first <= stretch.last:
            parts.append(Stretch(stretch.split, first, stretch.last))
    return parts


def _runs(numbers: NDArray[np.int64]) -> list[tuple[int, int]]:
    breaks = np.flatnonzero(np.diff(numbers) != 1)
    firsts, lasts = np.append(numbers[:1], numbers[breaks + 1]), np.append(numbers[breaks], numbers[-1:])
    return [(int(first), int(last)) for first, last in zip(firsts, lasts)]


def _gaps(present: NDArray[np.int64], first: int, last: int) -> list[tuple[int, int]]:
    edges = [first - 1, *(edge for run in _runs(present) for edge in run), last + 1]
    return [(low + 1, high - 1) for low, high in zip(edges[::2], edges[1::2]) if high - low > 1]


def _gap_sentence(low: int, high: int, first: int, last: int) -> str:
    missing = f"frame {low} is" if low == high else f"frames {low} to {high} are"
    return f"gap in frame numbers: {missing} missing inside the episode {first} to {last}; the episode is cut there"


def read_frame(path: Path, keys: Collection[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of one frame, decompressed, their checksums, shapes and values checked.

    Raises:
        DamagedFrame: names what is wrong, without the path.
    """
    frame = {}
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            for key in keys:
                frame[key] = _decode(archive.read(f"{key}.npy"))  # read whole: at its end the checksum is compared
    except FileNotFoundError as error:
        raise DamagedFrame("the file is missing") from error
    except KeyError as error:
        raise DamagedFrame(f"{error.args[0]}") from error
    except MemoryError:  # trouble of the machine, not of the file
        raise
    except Exception as error:  # a damaged archive raises nearly anything: BadZipFile, zlib.error, EOFError, struct.error ...
        empty = path.stat().st_size == 0
        what = "the file is empty" if empty else f"cannot be read ({type(error).__name__}: {error})"
        raise DamagedFrame(f"{what}; fetch it again") from error
    for key, value in frame.items():
        if value.shape != FRAME_SHAPES[key]:
            raise DamagedFrame(f"{key} has shape {value.shape}, expected {FRAME_SHAPES[key]}")
        if key.startswith("rgb"):
            if value.dtype != np.uint8:
                raise DamagedFrame(f"{key} is {value.dtype}, expected uint8")
        elif value.dtype.kind != "f" or not np.isfinite(value).all():
            raise DamagedFrame(f"{key} holds values that are not finite numbers")
    return frame


def _decode(content: bytes) -> NDArray[Any]:
    """The array of an ``.npy`` file, read-only. Equal headers are parsed once: it takes longer than reading a small array."""
    if content[:6] != np.lib.format.MAGIC_PREFIX:
        raise ValueError("no .npy array")
    size = 10 + int.from_bytes(content[8:10], "little") if content[6] == 1 else 12 + int.from_bytes(content[8:12], "little")
    shape, fortran, dtype = _header(content[:size])
    if dtype.hasobject:
        raise ValueError("an array of objects")
    array = np.frombuffer(content, dtype, count=math.prod(shape), offset=size)
    return array.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=64)
def _header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(content)
    read = (
        np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file) == (1, 0) else np.lib.format.read_array_header_2_0
    )
    return read(file)


def check_archive(path: Path, keys: Collection[str]) -> str:
    """What is plainly wrong with a frame's file (empty, truncated, arrays missing) from its table of contents, or ''."""
    try:
        with zipfile.ZipFile(path) as archive:
            missing = [key for key in keys if f"{key}.npy" not in archive.NameToInfo]
    except (zipfile.BadZipFile, OSError) as error:
        return "the file is empty" if path.stat().st_size == 0 else f"truncated or no .npz file ({error})"
    return f"holds no {', '.join(missing)}" if missing else ""


def language_annotations(split: Split, folder_name: str, report: Report) -> list[Annotation]:
    """The described stretches of a split; none if it has no such file.

    Raises:
        ForbiddenPickle: the file holds code; it was not run.
    """
    path = _language_file(split, folder_name, "auto_lang_ann.npy")
    if path is None:
        return []
    where = f"{split.name}/{path.relative_to(split.folder)}"
    try:
        content = load_object_array(path)
        language = content["language"]
        texts, tasks, bounds = list(language["ann"]), list(language["task"]), list(content["info"]["indx"])
        vectors = np.asarray(language["emb"], dtype=np.float32)
        vectors = vectors.reshape(len(texts), -1)
        if not len(texts) == len(tasks) == len(bounds):
            raise ValueError(f"{len(texts)} sentences, {len(tasks)} tasks and {len(bounds)} frame ranges")
        return [
            Annotation(split.number, int(first), int(last), str(text), str(task), vector)
            for text, task, (first, last), vector in zip(texts, tasks, bounds, vectors, strict=True)
        ]
    except ForbiddenPickle:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        report.add(where, f"not usable as annotations ({type(error).__name__}: {error}); left out: fetch it again")
        return []


def evaluation_sentences(split: Split, folder_name: str, report: Report) -> list[tuple[str, str, NDArray[np.float32]]]:
    """(sentence, task, vector) that rollouts use, one per task; empty if the split has no such file (training has none)."""
    path = _language_file(split, folder_name, "embeddings.npy")
    if path is None:
        return []
    try:
        content = load_object_array(path)
        found = []
        for task, entry in content.items():
            sentences = [entry["ann"]] if isinstance(entry["ann"], str) else list(entry["ann"])
            vectors = np.asarray(entry["emb"], dtype=np.float32).reshape(len(sentences), -1)
            found += [(str(sentence), str(task), vector) for sentence, vector in zip(sentences, vectors, strict=True)]
        return found
    except ForbiddenPickle:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{split.name}/{path.relative_to(split.folder)}"
        report.add(where, f"not usable as sentence vectors ({type(error).__name__}: {error}); left out: fetch it again")
        return []


def _language_file(split: Split, folder_name: str, file_name: str) -> Path | None:
    """In the language folder, or directly in the split folder as in old copies."""
    for path in (split.folder / folder_name / file_name, split.folder / file_name):
        if path.exists():
            return path
    return None


def check_statistics(split: Split, report: Report) -> None:
    """Reports a ``statistics.yaml`` that does not fit the data. It is not used: statistics come from the stored frames."""
    path = split.folder / "statistics.yaml"
    if not path.exists():
        return
    import yaml

    where = f"{split.name}/statistics.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        lengths = {
            f"{key} {name}": (len(content[key][0][name]), size)
            for key, size in (("robot_obs", 15), ("scene_obs", 24))
            if key in content
            for name in ("mean", "std")
        }
        lengths |= {key: (len(content[key]), 7) for key in ("act_max_bound", "act_min_bound") if key in content}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, IndexError) as error:
        report.add(where, f"not readable ({type(error).__name__}); not needed: statistics come from the stored frames")
        return
    for name, (have, want) in lengths.items():
        if have != want:
            report.add(where, f"{name}: statistics of size {have}, data of size {want}; not used")


def scene_letters(split: Split, frames: NDArray[np.int64], report: Report) -> list[str]:
    """The scene (A, B, C or D) of every frame, '' where the recordings do not say.

    From ``scene_info.npy``, else from the configuration that the frames were rendered with; CALVIN's own validation folders,
    which may lack both, are of scene D.
    """
    letters = np.full(len(frames), "")
    path = split.folder / "scene_info.npy"
    if path.exists():
        try:
            for name, (first, last) in load_object_array(path).items():
                letters[(frames >= first) & (frames <= last)] = str(name)[-1].upper()
        except ForbiddenPickle:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            report.add(f"{split.name}/{path.name}", f"not usable ({type(error).__name__}: {error}); scenes not taken from it")
    letters[letters == ""] = _configured_scene(split) or ("D" if split.name == "validation" else "")
    return [letter if letter in "ABCD" else "" for letter in letters.tolist()]


def _configured_scene(split: Split) -> str:
    path = split.folder / ".hydra" / "merged_config.yaml"
    if not path.exists():
        return ""
    match = re.search(r"calvin_table_([A-D])\b", path.read_text(encoding="utf-8", errors="replace"))
    return match[1] if match else ""
