"""A dataset at a glance: what it holds, statistics, a few pictures, and what looks wrong."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import counted, progress
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.features import Features

JUMP = 8.0
"""Times the usual step (the 95 % quantile of the changes that are none) from which a change counts as a jump."""

FROZEN = 10
"""Equal pictures in a row from which a camera counts as frozen."""

SAMPLED_FRAMES, SAMPLED_EPISODES = 256, 12
STRIP_EPISODES, STRIP_FRAMES = 3, 8


@dataclass(frozen=True)
class Element:
    """Statistics of one element of a vector, or one channel of pictures.

    Attributes:
        name: its name, or its number.
        min, max, mean, std: over all frames, of pictures over some.
    """

    name: str
    min: float
    max: float
    mean: float
    std: float


@dataclass(frozen=True)
class Key:
    """One array of the dataset.

    Attributes:
        name: batch key.
        shape: of a frame.
        dtype: of what is read.
        unit: as the features say.
        size: decoded bytes of all frames.
        elements: of vectors all of them, of pictures their channels, of clouds and matrices the last axis.
        sampled: whether the statistics are of a part of the frames.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    unit: str
    size: int
    elements: list[Element]
    sampled: bool


@dataclass(frozen=True)
class Defect:
    """Something that looks wrong.

    Attributes:
        what: kind, e.g. ``jump``.
        where: key and element.
        text: what was seen, and where first.
    """

    what: str
    where: str
    text: str


@dataclass
class Inspection:
    """Everything that is shown.

    Attributes:
        path: of the dataset.
        format: in words.
        bytes: on disk.
        rate: frames per second, 0 where nobody says.
        lengths: (E,) frames of each episode.
        features: what the dataset offers.
        notes: pairs of a heading and a value: provenance and the like.
        keys: the arrays.
        tasks: sentence and number of episodes (or segments) that show it.
        defects: what looks wrong.
        checked: what was looked at, in one sentence.
        strips: per camera, rows of pictures (height, width, 3) uint8 with the episode's number.
        curves: per vector key the values of one episode, (T, D).
        curve_episode: number of that episode.
    """

    path: Path
    format: str
    bytes: int
    rate: float
    lengths: np.ndarray
    features: Features
    notes: list[tuple[str, str]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    tasks: list[tuple[str, int]] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    checked: str = ""
    strips: dict[str, list[tuple[int, list[np.ndarray]]]] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    curve_episode: int = 0


def open_dataset(path: str | Path) -> tuple[Any, list[Defect]]:
    """A store of ours, or a LeRobot folder; timestamps that disagree with the rate are a defect here, not an error.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    path = Path(path).expanduser().absolute()
    if not (path / "meta/info.json").is_file():
        return EpisodeStore.open(path), []
    try:
        return LeRobotFolder.open(path), []
    except StoreError as error:
        try:
            return LeRobotFolder.open(path, tolerance=float("inf")), [Defect("timestamps", "timestamp", str(error))]
        except StoreError:
            raise error from None


def inspect_dataset(path: str | Path, *, thorough: bool = False, jump: float = JUMP) -> Inspection:
    """Looks a dataset through. Pictures that cannot be read are a defect, not an error.

    Args:
        path: an episode store, or a LeRobot folder.
        thorough: look at the pictures of all frames, not of some.
        jump: see `JUMP`.

    Raises:
        StoreError: there is no dataset, or it cannot be read.
    """
    dataset, defects = open_dataset(path)
    lengths = np.diff(dataset.episode_ends, prepend=0)
    features = dataset.features
    result = Inspection(
        path=dataset.path,
        format=f"LeRobot {dataset.info['codebase_version']}" if isinstance(dataset, LeRobotFolder) else "episode store (Zarr)",
        bytes=_size(dataset.path),
        rate=float(features.control_rate),
        lengths=lengths,
        features=features,
        notes=_notes(dataset, features),
        tasks=_tasks(dataset),
        defects=defects,
    )
    chosen = np.arange(len(lengths))
    if not thorough and len(lengths) > SAMPLED_EPISODES:
        chosen = np.unique(np.linspace(0, len(lengths) - 1, SAMPLED_EPISODES).astype(np.int64))
    vectors = [key for key in dataset.keys if not dataset.is_large(key) and not _is_picture(key)]
    unreadable = set()
    for key in progress(dataset.keys, description="inspecting", unit="arrays"):
        if key in vectors:
            result.keys.append(_key(dataset, key, features))
            result.defects += _vector_defects(dataset, key, _names(features, key), jump)
            continue
        try:
            if isinstance(dataset, LeRobotFolder):
                dataset.check_videos((key,), np.arange(len(lengths)))
            entry, found = _key(dataset, key, features), _picture_defects(dataset, key, chosen)
        except StoreError as error:  # a file is missing or damaged: the rest is worth looking at
            unreadable.add(key)
            entry, found = _unread(dataset, key, features), [Defect("unreadable", key, str(error))]
        result.keys.append(entry)
        result.defects += found
    result.defects += _episode_defects(dataset, lengths, vectors)
    pictures = len([key for key in dataset.keys if key not in vectors and key not in unreadable])
    looked = f", and pictures or clouds of {len(chosen)} of {counted(len(lengths), 'episode')}," if pictures else ""
    result.checked = f"Numbers of all frames{looked} were looked at."
    shown = np.unique(np.linspace(0, len(lengths) - 1, STRIP_EPISODES).astype(np.int64))
    for key in dataset.keys:
        if _is_picture(key) and key not in unreadable:
            result.strips[key] = [(episode, _strip(dataset, key, episode)) for episode in shown.tolist()]
    result.curve_episode = int(shown[0])
    rows = slice(int(dataset.episode_starts[shown[0]]), int(dataset.episode_ends[shown[0]]))
    result.curves = {key: dataset.read(key, rows).reshape(lengths[shown[0]], -1) for key in vectors}
    return result


# --- what is there ---------------------------------------------------------------------------------------------------------


def _is_picture(key: str) -> bool:
    return key.startswith(("observation.images.", "observation.depth."))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _notes(dataset: Any, features: Features) -> list[tuple[str, str]]:
    notes = []
    if features.action_semantics:
        notes.append(("actions", features.action_semantics))
    notes += [(name, str(value)) for name, value in features.source.items()]
    provenance = dataset.provenance
    settings = provenance.get("settings") or {}
    for name in ("environment", "generator", "noise", "noise_correlation", "robot_type"):
        value = settings.get(name, provenance.get(name))
        if value:
            notes.append((name.replace("_", " "), str(value)))
    for who in ("expert", "policy"):
        counts = provenance.get(who)
        if isinstance(counts, dict) and counts and all("attempted" in entry for entry in counts.values()):
            attempted, solved = (sum(entry[name] for entry in counts.values()) for name in ("attempted", "solved"))
            notes.append(("kept", f"{solved} of {counted(attempted, 'attempt')} ({solved / max(1, attempted):.0%})"))
    split = dataset.episode_split
    if split is not None:
        notes.append(("split", f"{int((split == 0).sum())} training, {int((split != 0).sum())} validation episodes"))
    return notes


def _tasks(dataset: Any) -> list[tuple[str, int]]:
    """Sentences with the number of segments, or of episodes, that they describe; the most frequent first."""
    language = dataset.language
    if language is None:
        return []
    if dataset.segments is not None:
        rows = dataset.segments[:, 2]
    elif dataset.frame_texts is not None:
        rows = np.concatenate(
            [np.unique(dataset.frame_texts[start:end]) for start, end in zip(dataset.episode_starts, dataset.episode_ends)]
        )
    else:
        return []
    counts = np.bincount(rows[rows >= 0], minlength=len(language["texts"]))
    order = np.argsort(-counts, kind="stable")
    return [(language["texts"][row], int(counts[row])) for row in order.tolist() if counts[row]]


def _names(features: Features, key: str) -> tuple[str, ...]:
    feature = features.action if key == "action" else features.observations.get(key)
    return feature.names if feature is not None else ()


def _key(dataset: Any, key: str, features: Features) -> Key:
    shape = dataset.shape(key)[1:]
    sampled = dataset.is_large(key) or _is_picture(key)
    if sampled:
        rows = np.unique(np.linspace(0, dataset.num_frames - 1, SAMPLED_FRAMES).astype(np.int64))
        values = dataset.gather(key, rows)
    else:
        values = dataset.whole(key)
    last = 1 if key.startswith("observation.depth.") or len(shape) == 0 else shape[-1]
    flat = values.reshape(-1, last).astype(np.float64)
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(flat), flat, np.nan)
        table = np.stack([_quiet(function, finite) for function in (np.nanmin, np.nanmax, np.nanmean, np.nanstd)], axis=1)
    names: tuple[str, ...] = _names(features, key)
    if len(names) != last:
        names = ("red", "green", "blue") if key.startswith("observation.images.") else tuple(str(i) for i in range(last))
    elements = [Element(name, *row) for name, row in zip(names, table.tolist())]
    return replace(_unread(dataset, key, features), elements=elements, sampled=sampled)


def _unread(dataset: Any, key: str, features: Features) -> Key:
    """What is known of an array without a look at its values."""
    feature = features.action if key == "action" else features.observations.get(key)
    shape, size = tuple(dataset.shape(key)[1:]), dataset.num_frames * dataset.frame_bytes(key)
    return Key(key, shape, str(dataset.dtype(key)), feature.unit if feature else "", size, [], sampled=False)


def _quiet(function: Any, values: np.ndarray) -> np.ndarray:
    """`function` along the first axis; nan, without a warning, where nothing is finite."""
    result = np.full(values.shape[1], np.nan)
    some = np.isfinite(values).any(axis=0)
    result[some] = function(values[:, some], axis=0)
    return result


def _strip(dataset: Any, key: str, episode: int) -> list[np.ndarray]:
    start, end = int(dataset.episode_starts[episode]), int(dataset.episode_ends[episode])
    rows = np.unique(np.linspace(start, end - 1, STRIP_FRAMES).astype(np.int64))
    frames = dataset.gather(key, rows)
    if frames.dtype == np.uint8:
        return list(frames)
    finite = frames[np.isfinite(frames)]
    low, high = np.quantile(finite, [0.02, 0.98]) if len(finite) else (0.0, 1.0)
    grey = np.nan_to_num(255 * np.clip((frames - low) / max(1e-9, high - low), 0, 1)).astype(np.uint8)
    return [np.repeat(frame[..., None], 3, axis=2) for frame in grey]


# --- what looks wrong ------------------------------------------------------------------------------------------------------


def _vector_defects(dataset: Any, key: str, names: tuple[str, ...], jump: float) -> list[Defect]:
    """Values that are not finite, constant elements, jumps."""
    values = dataset.whole(key).reshape(dataset.num_frames, -1).astype(np.float64)
    defects = []
    for element, column in enumerate(values.T):
        where = f"{key}[{names[element] if len(names) == values.shape[1] else element}]"
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            defects.append(
                Defect(
                    "not finite", where, f"{counted(len(bad), 'frame')} with nan or infinity, first {_place(dataset, bad[0])}"
                )
            )
            continue
        if dataset.num_frames > 1 and np.ptp(column) == 0:
            defects.append(Defect("constant", where, f"always {column[0]:g}: nothing can be learned of it"))
            continue
        steps = np.abs(np.diff(column))
        steps[dataset.episode_ends[:-1] - 1] = 0  # from one episode to the next is no step
        moved = steps[steps > 0]
        if len(np.unique(column[:10_000])) <= 4 or len(moved) < 20:
            continue  # a switch: it jumps by nature
        usual = float(np.quantile(moved, 0.95))
        jumps = np.flatnonzero(steps > jump * usual)
        if len(jumps):
            worst = int(jumps[np.argmax(steps[jumps])])
            wraps = " (about a full turn: an angle that flips?)" if abs(steps[worst] - 2 * np.pi) < 0.3 else ""
            defects.append(
                Defect(
                    "jump",
                    where,
                    f"{counted(len(jumps), 'step')} above {jump:g} times the usual {usual:.3g}, the largest {steps[worst]:.3g}"
                    f"{wraps} {_place(dataset, worst + 1)}",
                )
            )
    return defects


def _picture_defects(dataset: Any, key: str, episodes: np.ndarray) -> list[Defect]:
    """Pictures that repeat or show nothing, clouds that are not finite."""
    longest, where, empty, bad = 0, 0, [], []
    for episode in episodes.tolist():
        start, end = int(dataset.episode_starts[episode]), int(dataset.episode_ends[episode])
        run, before = 1, None
        for first in range(start, end, 64):
            block = dataset.read(key, slice(first, min(end, first + 64)))
            flat = block.reshape(len(block), -1)
            if flat.dtype.kind == "f":
                bad += (first + np.flatnonzero(~np.isfinite(flat).all(axis=1))).tolist()
            empty += (first + np.flatnonzero(flat.min(axis=1) == flat.max(axis=1))).tolist()
            previous = np.concatenate([flat[:1] if before is None else before[None], flat[:-1]])
            equal = (flat == previous).all(axis=1)
            equal[0] &= before is not None
            for offset, same in enumerate(equal.tolist()):
                run = run + 1 if same else 1
                if run > longest:
                    longest, where = run, first + offset - run + 1
            before = flat[-1]
    defects = []
    if bad:
        text = f"{counted(len(bad), 'frame')} with nan or infinity, first {_place(dataset, bad[0])}"
        defects.append(Defect("not finite", key, text))
    if empty:
        text = f"{counted(len(empty), 'frame')} of one single value, first {_place(dataset, empty[0])}"
        defects.append(Defect("empty", key, text))
    if longest >= FROZEN:
        defects.append(Defect("frozen", key, f"up to {longest} equal frames in a row, {_place(dataset, where)}"))
    return defects


def _episode_defects(dataset: Any, lengths: np.ndarray, vectors: list[str]) -> list[Defect]:
    """Frames that repeat the one before in every number, episodes that occur twice or are very short."""
    if not vectors:
        return []
    defects = []
    rows = np.concatenate([dataset.whole(key).reshape(dataset.num_frames, -1) for key in vectors], axis=1)
    same = (rows[1:] == rows[:-1]).all(axis=1)
    same[dataset.episode_ends[:-1] - 1] = False
    repeated = np.flatnonzero(same) + 1
    if len(repeated):
        share = len(repeated) / dataset.num_frames
        text = f"{counted(len(repeated), 'frame')} ({share:.1%}) equal the one before in every number, first "
        defects.append(Defect("duplicated", "frames", text + _place(dataset, repeated[0])))
    seen: dict[bytes, int] = {}
    for episode, (start, end) in enumerate(zip(dataset.episode_starts, dataset.episode_ends)):
        digest = hashlib.sha256(np.ascontiguousarray(rows[start:end]).tobytes()).digest()
        if digest in seen:
            defects.append(Defect("duplicated", "episodes", f"episode {episode} equals episode {seen[digest]} in every number"))
        seen.setdefault(digest, episode)
    short = np.flatnonzero(lengths < 0.2 * np.median(lengths))
    if len(short):
        listed = ", ".join(f"{episode} ({lengths[episode]})" for episode in short[:8].tolist())
        text = f"{len(short)} below a fifth of the median of {np.median(lengths):g} frames: {listed}"
        defects.append(Defect("short", "episodes", text))
    return defects


def _place(dataset: Any, row: int) -> str:
    episode = int(np.searchsorted(dataset.episode_ends, row, side="right"))
    return f"in episode {episode}, frame {int(row) - int(dataset.episode_starts[episode])}"
