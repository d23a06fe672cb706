"""Raw CALVIN recordings -> an episode store, streamed, over several processes, continued after an interruption.

    plan      find frames, episodes, language; cut episodes at gaps
    check     decompress every frame once: what is damaged is known before the work starts
    convert   one task per shard of the store: read, convert, write, sync, note the checksum
    finish    episode ends last
    verify    every shard read back against its checksum, sampled frames converted again from their files; then one rename

The rows of the store are the frames of the training folder, then of the validation folder, in the order of their numbers.
Episodes are CALVIN's play episodes; described stretches are segments of them, so no frame is stored twice.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_robot.console import counted, disk_size, progress, say
from lightning_robot.data.calvin_files import (
    DEFAULT_ENCODER,
    LANGUAGE,
    SPLITS,
    CalvinError,
    DamagedFrame,
    Report,
    Split,
    Stretch,
    check_archive,
    check_statistics,
    cut,
    evaluation_sentences,
    find_splits,
    language_annotations,
    play_episodes,
    read_frame,
    scene_letters,
)
from lightning_robot.data.calvin_frames import CalvinSettings, check_depth, check_frame, convert_frame
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter, partial_folder
from lightning_robot.data.verification import outcome, verify_store
from lightning_robot.data.workers import append_line, claimed, read_lines, run_tasks, usable_cores

CHECK_BLOCK = 512  # frames per task of the check
VERIFIED_FRAMES = 64  # frames converted again at the end, beside first and last of the episodes


@dataclass(frozen=True)
class Conversion:
    """What came of a conversion.

    Attributes:
        store: the finished store.
        damage: (file, what) for everything that was left out.
        verification: its outcome in one sentence; empty where the store was there already.
    """

    store: EpisodeStore
    damage: list[tuple[str, str]]
    verification: str = ""


@dataclass(frozen=True)
class _Plan:
    """Which frame goes where: all that a worker process must know, small enough to travel.

    Attributes:
        splits: without their frame numbers.
        stretches: the episodes, in the order of the rows.
        scenes: per stretch its scene, '' if not known.
        settings: what is kept of a frame.
    """

    splits: tuple[Split, ...]
    stretches: tuple[Stretch, ...]
    scenes: tuple[str, ...]
    settings: CalvinSettings

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(len(stretch) for stretch in self.stretches))

    @cached_property
    def _firsts(self) -> list[tuple[int, int]]:
        return [(stretch.split, stretch.first) for stretch in self.stretches]

    def split(self, number: int) -> Split:
        return next(split for split in self.splits if split.number == number)

    def row(self, split: int, frame: int) -> int | None:
        """Row of a frame; None if it is not stored."""
        episode = bisect_right(self._firsts, (split, frame)) - 1
        if episode < 0 or self.stretches[episode].split != split or frame > self.stretches[episode].last:
            return None
        return self.ends[episode] - 1 - (self.stretches[episode].last - frame)

    def convert(self, row: int) -> dict[str, NDArray[Any]]:
        """Reads and converts the frame of a row."""
        episode = bisect_right(self.ends, row)
        stretch = self.stretches[episode]
        path = self.split(stretch.split).file(stretch.last - (self.ends[episode] - 1 - row))
        try:
            return convert_frame(read_frame(path, self.settings.frame_keys), self.settings, self.scenes[episode])
        except DamagedFrame as error:
            raise CalvinError(f"{path}: {error}. It was whole when it was checked: is something else writing there?") from error


def convert_calvin(
    root: str | Path,
    store: str | Path,
    settings: CalvinSettings | None = None,
    *,
    splits: Sequence[str] = SPLITS,
    language: str = LANGUAGE,
    encoder: str = "",
    scene: str = "",
    processes: int | None = None,
    strict: bool = False,
    shard_frames: int = 256,
) -> Conversion:
    """Converts a folder of CALVIN recordings; run again after an interruption, it continues and ends with the same bytes.

    Args:
        root: folder with ``training`` and/or ``validation``, or one split folder.
        store: where the store will be.
        settings: what is kept of a frame.
        splits: split folders to convert.
        language: name of the annotation folder inside each split, '' for no language.
        encoder: name of the sentence encoder, '' for the one that the folder stands for.
        scene: A, B, C or D for all frames where the recordings do not say (matters for `scene_obs` alone).
        processes: worker processes; all usable cores when None. With 1 the work is done in this process.
        strict: stop at the first damaged item instead of leaving it out and reporting it at the end.
        shard_frames: frames per file of the store and per task; memory is proportional to it.

    Raises:
        CalvinError: the recordings cannot be used, or (strict) something in them is damaged.
        ForbiddenPickle: a language file holds code; nothing of it was run.
        StoreError: the store exists with other settings or of other recordings, or an unfinished one does.
    """
    if processes is not None and processes < 1:
        raise CalvinError(f"processes: {processes}; it must be at least 1.")
    root, target = Path(root).expanduser().absolute(), Path(store).expanduser().absolute()
    settings = settings or CalvinSettings()
    found = find_splits(root, splits)
    report = Report(strict)
    stretches = [stretch for split in found for stretch in play_episodes(split, report)]
    for split in found:
        check_statistics(split, report)
    if language not in ("", LANGUAGE) and not any((split.folder / language).is_dir() for split in found):
        names = sorted({path.name for split in found for path in split.folder.glob("lang_*")})
        raise CalvinError(f"{root}: no split has a folder {language}; there are: {', '.join(names) or 'none'}.")
    table = _Language.read(found, language, encoder, report) if language else None
    if target.exists():
        return _existing(target, settings, root, stretches)
    processes = processes or usable_cores()
    with claimed(partial_folder(target)) as partial:
        _check_samples(found, stretches, settings, report)
        damaged = _check_frames(partial, root, found, stretches, settings, processes, report)
        plan = _plan(found, cut(stretches, damaged), settings, scene, report)
        if not plan.stretches:
            raise CalvinError(f"{root}: no usable frame is left.\n" + "\n".join(report.lines()))
        attributes = {
            "features": settings.features({"recording": "CALVIN", "scene": "".join(sorted(set(plan.scenes)))}).to_dict(),
            "provenance": {
                "converter": "calvin 1",
                "settings": settings.to_dict(),
                "gripper": "recorded values of 0 or less became -1",
                "source_frames": [[SPLITS[part.split], part.first, part.last] for part in plan.stretches],
            },
        }
        described = table.rows(plan, report) if table else {}
        writer = StoreWriter(target, settings.arrays, plan.ends[-1], attributes, shard_frames=shard_frames)
        say(
            f"Converting {counted(plan.ends[-1], 'frame')} in {counted(len(plan.stretches), 'episode')} of {root} with "
            f"{counted(processes, 'process')}, {settings.points} points per cloud."
        )
        _convert(plan, writer, processes)
        compared = 0

        def compare(written: EpisodeStore) -> None:
            nonlocal compared
            compared, faults = _convert_again(plan, written, processes)
            for key, row in faults:
                writer.forget(key, row - row % shard_frames)
            _refuse(written, faults)

        finished = writer.finish(
            np.array(plan.ends, dtype=np.int64),
            np.array([part.split for part in plan.stretches], dtype=np.int8),
            **described,
            check=compare,
            processes=processes,
        )
    for line in report.lines():
        say(line)
    return Conversion(finished, report.damage, outcome(finished, f"{counted(compared, 'frame')} converted again and equal"))


def verify_calvin(root: str | Path, store: str | Path, *, scene: str = "", processes: int | None = None) -> str:
    """Verifies a converted store, however old: counts, order, checksums, sampled frames converted again.

    Args:
        root: the recordings that it was converted from; without them no frame is compared.
        store: that was converted.
        scene: as it was given to the conversion.
        processes: worker processes; all usable cores when None.

    Returns:
        the outcome in one sentence.

    Raises:
        StoreError: says what is wrong with the store.
        CalvinError: the recordings cannot be read.
    """
    root, written = Path(root).expanduser().absolute(), EpisodeStore.open(store)
    processes = processes or usable_cores()
    if "source_frames" not in written.provenance:
        raise StoreError(f"{written.path} was not converted from CALVIN: its provenance names no frames of recordings.")
    stretches = [Stretch(SPLITS.index(split), first, last) for split, first, last in written.provenance["source_frames"]]
    if list(accumulate(map(len, stretches))) != written.episode_ends.tolist():
        raise StoreError(f"{written.path}: its episodes are not as long as the recorded ones that it names. It was changed.")
    verify_store(written, processes)
    if not root.is_dir():
        return outcome(written, f"no frame was compared with its recording, {root} is not there")
    settings = CalvinSettings.from_dict(written.provenance["settings"])
    found = find_splits(root, {SPLITS[stretch.split] for stretch in stretches})
    if missing := {stretch.split for stretch in stretches} - {split.number for split in found}:
        raise StoreError(
            f"{written.path} was not made from {root}, which holds no {' and no '.join(SPLITS[n] for n in missing)}."
        )
    compared, faults = _convert_again(_plan(found, stretches, settings, scene, Report(False)), written, processes)
    _refuse(written, faults)
    return outcome(written, f"{counted(compared, 'frame')} converted again and equal")


def _plan(found: Sequence[Split], stretches: Sequence[Stretch], settings: CalvinSettings, scene: str, report: Report) -> _Plan:
    scenes = [""] * len(stretches)
    for split in found:
        own = [index for index, stretch in enumerate(stretches) if stretch.split == split.number]
        firsts = np.array([stretches[index].first for index in own], dtype=np.int64)
        for index, letter in zip(own, scene_letters(split, firsts, report), strict=True):
            scenes[index] = scene or letter
            if settings.scene_obs and not scenes[index]:
                raise CalvinError(
                    f"{split.folder}: the scene of frame {stretches[index].first} is not known (no scene_info.npy that covers "
                    "it, no .hydra/merged_config.yaml), and the order of the blocks in scene_obs depends on it: give --scene, "
                    "or leave scene_obs out."
                )
    return _Plan(tuple(replace(split, frames=split.frames[:0]) for split in found), tuple(stretches), tuple(scenes), settings)


def _existing(target: Path, settings: CalvinSettings, root: Path, stretches: Sequence[Stretch]) -> Conversion:
    """A store that is there already serves if it was converted from these recordings with the same settings."""
    store = EpisodeStore.open(target)
    remedy = "Use it, delete it, or write to another place."
    if store.provenance.get("settings") != settings.to_dict():
        raise StoreError(f"{target} exists and was made with other settings. {remedy}")
    stored = [(SPLITS.index(split), first, last) for split, first, last in store.provenance["source_frames"]]
    episodes = sorted((stretch.split, stretch.first, stretch.last) for stretch in stretches)
    for split, first, last in stored:
        at = bisect_right(episodes, (split, first, math.inf)) - 1
        if at < 0 or episodes[at][0] != split or last > episodes[at][2]:
            raise StoreError(f"{target} exists and was not made from {root}: no {SPLITS[split]} {first} to {last}. {remedy}")
    if missing := {split for split, *_ in episodes} - {split for split, *_ in stored}:
        raise StoreError(f"{target} exists and holds no {' and no '.join(SPLITS[split] for split in missing)}. {remedy}")
    if partial_folder(target).exists():  # killed between the last rename and tidying up
        shutil.rmtree(partial_folder(target), ignore_errors=True)
    say(f"{target} is there already, converted with the same settings ({store.num_frames} frames).")
    return Conversion(store, [])


@dataclass
class _Language:
    """The table of sentences, and which stretch each one describes."""

    encoder: str
    sentences: dict[tuple[str, str], tuple[int, NDArray[np.float32]]]
    segments: list[tuple[int, int, int, int]]  # split, first, last, row of the sentence

    @classmethod
    def read(cls, splits: Sequence[Split], folder: str, encoder: str, report: Report) -> _Language | None:
        known = DEFAULT_ENCODER if folder == LANGUAGE else folder.removeprefix("lang_")
        table = cls(encoder or known, {}, [])
        for split in splits:
            for item in language_annotations(split, folder, report):
                row = table._row(item.text, item.task, item.embedding, split)
                table.segments.append((split.number, item.first, item.last, row))
        for split in splits:
            for text, task, embedding in evaluation_sentences(split, folder, report):
                table._row(text, task, embedding, split)
        return table if table.sentences else None

    def _row(self, text: str, task: str, embedding: NDArray[np.float32], split: Split) -> int:
        row, known = self.sentences.setdefault((text, task), (len(self.sentences), embedding))
        first = next(iter(self.sentences.values()))[1]
        if known.shape != embedding.shape or first.shape != embedding.shape or np.abs(known - embedding).max() > 1e-3:
            raise CalvinError(
                f"{split.folder}: the vector of {text!r} (size {embedding.size}) is not of the kind of the others (size "
                f"{first.size}): the splits' language folders come from different encoders. Name one folder with --language."
            )
        return row

    def rows(self, plan: _Plan, report: Report) -> dict[str, Any]:
        """Arguments of `StoreWriter.finish`. Stretches that are not whole in the store are reported and left out."""
        segments = []
        lost: dict[int, list[tuple[int, int]]] = {split.number: [] for split in plan.splits}
        for split, first, last, text in self.segments:
            start, end = plan.row(split, first), plan.row(split, last)
            if first > last or start is None or end is None or bisect_right(plan.ends, start) != bisect_right(plan.ends, end):
                lost[split].append((first, last))
            else:
                segments.append((start, end + 1, text))
        for number, ranges in lost.items():
            if ranges:
                report.add(
                    f"{SPLITS[number]}: annotations",
                    f"{len(ranges)} of {sum(split == number for split, *_ in self.segments)} describe frames that are not, or "
                    f"not all, in one stored episode, the first {ranges[0][0]} to {ranges[0][1]}; left out",
                )
        return {
            "segments": np.array(segments, dtype=np.int64).reshape(-1, 3),
            "language": {
                "texts": [text for text, _ in self.sentences],
                "tasks": [task for _, task in self.sentences],
                "encoder": self.encoder,
                "embeddings": np.stack([vector for _, vector in self.sentences.values()]),
            },
        }


def _check_samples(found: Sequence[Split], stretches: Sequence[Stretch], settings: CalvinSettings, report: Report) -> None:
    """Fails at once where every frame lacks an array, or where depth is not in metres."""
    splits = {split.number: split for split in found}
    chosen = [stretches[index] for index in np.unique(np.linspace(0, len(stretches) - 1, 12).astype(int))] if stretches else []
    files = [splits[stretch.split].file(stretch.first + len(stretch) // 2) for stretch in chosen]
    faults = [check_archive(file, settings.frame_keys) for file in files]
    if faults and all(fault.startswith("holds no") and fault == faults[0] for fault in faults):
        raise CalvinError(f"{files[0]} {faults[0]}, nor do others: leave it out (see `convert calvin --help`).")
    if not (settings.points or settings.depth):
        return
    pictures = []
    for file in files:
        with contextlib.suppress(DamagedFrame):
            pictures.append(read_frame(file, ("depth_static",))["depth_static"])
    note, damage = check_depth(pictures, settings)
    if note:
        say(note)
    if damage:
        report.add("depth_static", damage)


def _check_frames(
    partial: Path,
    root: Path,
    found: Sequence[Split],
    stretches: Sequence[Stretch],
    settings: CalvinSettings,
    processes: int,
    report: Report,
) -> set[tuple[int, int]]:
    """Decompresses every frame; what is damaged is reported and returned as (split, frame)."""
    path = partial / "checked.jsonl"
    header = {"root": str(root), "settings": settings.to_dict()}
    noted = read_lines(path)
    if noted and noted[0] != header:
        raise StoreError(
            f"{partial} was begun from other recordings or with other settings. Give the same ones to continue, or delete it."
        )
    if noted:
        say(f"Continuing the conversion that was begun in {partial}.")
    else:
        append_line(path, header)
    # Once frames are being written their places are fixed; before that, files that were damaged may have been mended.
    fixed = (partial / "settings.json").exists()
    known = {tuple(line["block"]): line["damage"] for line in noted[1:] if fixed or not line["damage"]}
    blocks = [
        (stretch.split, first, min(first + CHECK_BLOCK - 1, stretch.last))
        for stretch in stretches
        for first in range(stretch.first, stretch.last + 1, CHECK_BLOCK)
    ]
    splits = {split.number: replace(split, frames=split.frames[:0]) for split in found}
    tasks = [block for block in blocks if block not in known]

    def checked() -> Iterator[None]:
        for block, damage in run_tasks(_check_block, (splits, settings), tasks, processes):
            append_line(path, {"block": block, "damage": damage})
            known[block] = damage
            if report.strict and damage:
                _report_frames(report, splits, damage)
            yield from (None for _ in range(block[2] - block[1] + 1))

    for _ in progress(checked(), sum(last - first + 1 for _, first, last in tasks), "checking", unit="frames"):
        pass
    damage = [item for block in blocks for item in known[block]]
    _report_frames(report, splits, damage)
    return {(split, frame) for split, frame, _ in damage}


def _report_frames(report: Report, splits: dict[int, Split], damage: Sequence[tuple[int, int, str]]) -> None:
    for number, frame, what in damage:
        split = splits[number]
        report.add(f"{split.name}/{split.file_name(frame)}", f"{what}; the episode is cut there")


def _check_block(
    shared: tuple[dict[int, Split], CalvinSettings], block: tuple[int, int, int]
) -> tuple[tuple[int, int, int], list[tuple[int, int, str]]]:
    splits, settings = shared
    number, first, last = block
    damage = []
    for frame in range(first, last + 1):
        try:
            check_frame(read_frame(splits[number].file(frame), settings.frame_keys), settings)
        except DamagedFrame as error:
            damage.append((number, frame, str(error)))
    return block, damage


def _convert(plan: _Plan, writer: StoreWriter, processes: int) -> None:
    tasks = [start for start in writer.shards if not writer.is_written(start)]
    frames = sum(_shard_rows(writer, start) for start in tasks)
    _check_disk(plan, writer, frames)

    def converted() -> Iterator[None]:
        for start in run_tasks(_convert_shard, (plan, writer), tasks, processes):
            yield from (None for _ in range(_shard_rows(writer, start)))

    for _ in progress(converted(), frames, "converting", unit="frames"):
        pass


def _shard_rows(writer: StoreWriter, start: int) -> int:
    return min(writer.shard_frames, writer.num_frames - start)


def _convert_shard(shared: tuple[_Plan, StoreWriter], start: int) -> int:
    plan, writer = shared
    rows = _shard_rows(writer, start)
    blocks = {key: np.empty((rows, *shape), dtype=dtype) for key, (shape, dtype) in plan.settings.arrays.items()}
    for row in range(rows):
        for key, value in plan.convert(start + row).items():
            blocks[key][row] = value
    try:
        for key, block in blocks.items():
            writer.write(key, start, block)
    except OSError as error:
        raise CalvinError(
            f"{writer.partial}: writing failed ({error}). Make room or mend the disk, then run the same command again: "
            "it continues."
        ) from error
    return start


def _convert_again(plan: _Plan, store: EpisodeStore, processes: int) -> tuple[int, list[tuple[str, int]]]:
    """Converts sampled frames again, edges of episodes among them; returns their number, and (key, row) of differences."""
    episodes = np.unique(np.linspace(0, len(plan.ends) - 1, 8).astype(np.int64))
    edges = np.concatenate([store.episode_starts[episodes], store.episode_ends[episodes] - 1])
    rows = np.union1d(edges, np.linspace(0, store.num_frames - 1, VERIFIED_FRAMES).astype(np.int64))
    results = run_tasks(_compare_frames, (plan, store), np.array_split(rows, min(len(rows), 2 * processes)), processes)
    return len(rows), sorted((fault for found in results for fault in found), key=lambda fault: fault[1])


def _compare_frames(shared: tuple[_Plan, EpisodeStore], rows: NDArray[np.int64]) -> list[tuple[str, int]]:
    plan, store = shared
    have = {key: store.gather(key, rows) for key in plan.settings.arrays}
    faults = []
    for index, row in enumerate(rows.tolist()):
        for key, value in plan.convert(row).items():
            stored = np.asarray(value, plan.settings.arrays[key][1]).astype(have[key].dtype)
            if not np.array_equal(have[key][index], stored):
                faults.append((key, row))
    return faults


def _refuse(store: EpisodeStore, faults: list[tuple[str, int]]) -> None:
    if faults:
        key, row = faults[0]
        raise StoreError(
            f"{store.path}: converting the sampled frames again gives other values, first {key} of row {row}. Were the "
            "recordings changed? If not, check disk and memory, and convert again: a conversion that was interrupted "
            "here converts these frames anew."
        )


def _check_disk(plan: _Plan, writer: StoreWriter, frames: int) -> None:
    """Refuses to start where the store will not fit, from the compressed size of a few frames."""
    if not frames:
        return
    from numcodecs import Blosc

    codec = Blosc("zstd", 3, Blosc.SHUFFLE)
    samples = [plan.convert(int(row)) for row in np.unique(np.linspace(0, writer.num_frames - 1, 4).astype(int))]
    sizes = [sum(len(codec.encode(np.ascontiguousarray(value))) for value in sample.values()) for sample in samples]
    needed, free = 1.1 * max(sizes) * frames, shutil.disk_usage(writer.partial).free
    if needed > free:
        raise CalvinError(
            f"{writer.path.parent} has {disk_size(free)} free, {frames} frames need about {disk_size(needed)}. Make room, "
            "write elsewhere, or keep less (--no-rgb, --no-depth, fewer --points)."
        )
