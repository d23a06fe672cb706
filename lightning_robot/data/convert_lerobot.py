"""An episode store as a LeRobot dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_robot.console import progress
from lightning_robot.data.frame_sample import REMEDY, FrameSample
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import EpisodeStore, StoreError, partial_folder
from lightning_robot.data.verification import outcome, verify_lerobot
from lightning_robot.data.workers import claimed
from lightning_robot.data.write_lerobot import LeRobotWriter


def convert_to_lerobot(
    store: str | Path, folder: str | Path, *, pictures: str = "av1", rate: int | None = None, robot: str | None = None
) -> tuple[LeRobotFolder, str]:
    """Writes a LeRobot v3.0 dataset with every episode of a store; an interrupted conversion continues.

    Where the store has language segments, every frame gets the sentence of the first segment that it lies in, and frames
    outside of all segments an empty one.

    Args:
        store: an episode store.
        folder: where the dataset will be; must not exist.
        pictures: ``av1``, ``h264`` or ``png``.
        rate: frames per second; the store's own when None.
        robot: name of the robot.

    Returns:
        The dataset, and the outcome of its verification in one sentence.

    Raises:
        StoreError: the store is missing or broken, the folder exists, the rate is not known, or what was written is not read
            back.
        WorkError: another process is writing the same folder.
    """
    source = EpisodeStore.open(store)
    texts = _texts(source)
    folder = Path(folder).expanduser().absolute()
    with claimed(partial_folder(folder)):
        writer = LeRobotWriter(
            folder,
            source.features,
            rate=rate,
            pictures=pictures,
            robot=robot or source.features.source.get("robot"),
            provenance={**source.provenance, "store": source.fingerprint},
            tasks=dict(zip(source.language["texts"], source.language["tasks"])) if source.language else None,
        )
        sample = FrameSample(source.num_frames)
        keys = (*source.features.observations, "action")
        episodes = list(zip(source.episode_starts.tolist(), source.episode_ends.tolist()))
        for start, end in progress(episodes, description="converting", unit="episodes"):
            arrays = {key: source.read(key, slice(start, end)) for key in keys}
            sample.take(arrays)
            writer.append(arrays, texts[start:end])
        compared = ""

        def check(written: Path) -> None:
            nonlocal compared
            compared = _compare(source, sample, LeRobotFolder.open(written), pictures)

        dataset = LeRobotFolder.open(writer.finish(check))
    return dataset, outcome(dataset, compared)


def verify_conversion(store: str | Path, folder: str | Path) -> str:
    """Verifies a LeRobot dataset that was made of a store, however old: counts, order, sentences, checksums, sampled frames.

    Args:
        store: that it was made of; without it no frame is compared.
        folder: the dataset.

    Returns:
        the outcome in one sentence.

    Raises:
        StoreError: says what is wrong with the dataset.
    """
    dataset = LeRobotFolder.open(folder)
    verify_lerobot(dataset)
    if not Path(store).expanduser().exists():
        return outcome(dataset, f"no frame was compared with its source, {store} is not there")
    source = EpisodeStore.open(store)
    if dataset.notes.get("provenance", {}).get("store", source.fingerprint) != source.fingerprint:
        raise StoreError(f"{dataset.path} was made of another store than {source.path}: their fingerprints differ.")
    sample = FrameSample.of(source, (*source.features.observations, "action"))
    video = next((camera.is_video for camera in dataset.cameras.values()), False)
    return outcome(dataset, _compare(source, sample, dataset, "video" if video else "png"))


def _compare(source: EpisodeStore, sample: FrameSample, dataset: LeRobotFolder, pictures: str) -> str:
    compared = sample.compare(dataset, np.diff(source.episode_ends, prepend=0).tolist(), pictures)
    wrong = [row for row, text in enumerate(_texts(source)) if dataset.language["texts"][dataset.frame_texts[row]] != text]
    if wrong:
        raise StoreError(f"{dataset.path}: frame {wrong[0]} has another sentence than in {source.path}. {REMEDY}")
    return compared


def _texts(source: EpisodeStore) -> list[str]:
    """A sentence per frame."""
    rows = np.full(source.num_frames, -1, np.int64)
    if source.segments is None or source.language is None:
        return [""] * source.num_frames
    for start, end, text in source.segments[::-1].tolist():  # the first one wins
        rows[start:end] = text
    return [source.language["texts"][row] if row >= 0 else "" for row in rows.tolist()]
