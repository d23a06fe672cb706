"""From staged attempts to a dataset: the successful ones in seed order, one sentence each, verified at the end."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from lightning_robot.console import progress
from lightning_robot.data.frame_sample import FrameSample
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.lerobot_meta import NOTES
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter
from lightning_robot.data.verification import outcome
from lightning_robot.data.write_lerobot import LeRobotWriter
from lightning_robot.generation.attempts import Attempt, attempt_file, read_arrays, task_texts
from lightning_robot.generation.jobs import Jobs
from lightning_robot.transforms.text import text_encoder


def pack(path: Path, folder: Path, jobs: Jobs, settings: dict[str, Any], env: gymnasium.Env) -> str:
    """Writes the dataset, and reads back what was written.

    Args:
        path: of the dataset.
        folder: that attempts are staged in.
        jobs: what was attempted.
        settings: of the generation; ``output`` says in what format.
        env: the environment that was recorded.

    Returns:
        The outcome of the verification in one sentence.

    Raises:
        StoreError: something cannot be written, or is not read back as it was written.
    """
    source: Any = env.unwrapped
    episodes = jobs.successes
    provenance = {
        "settings": settings,
        "simulator": dict(source.fingerprint),
        "seeds": [episode.seed for episode in episodes],
        jobs.demonstrator: jobs.counts(),
    }
    sample = FrameSample(sum(episode.length for episode in episodes))
    if settings["output"] == "zarr":
        return outcome(*_pack_zarr(path, folder, episodes, jobs.tasks, env, provenance, sample))
    return outcome(*_pack_lerobot(path, folder, episodes, env, provenance, sample))


def read_provenance(path: Path) -> dict[str, Any]:
    """What `pack` noted in a finished dataset; empty for a dataset that somebody else wrote, or for none."""
    try:
        if (path / "meta/info.json").is_file():
            return json.loads((path / NOTES).read_text())["provenance"]
        return EpisodeStore.open(path).provenance
    except (StoreError, OSError, KeyError, ValueError):
        return {}


def _pack_zarr(
    path: Path,
    folder: Path,
    episodes: list[Attempt],
    tasks: tuple[str, ...],
    env: gymnasium.Env,
    provenance: dict[str, Any],
    sample: FrameSample,
) -> tuple[EpisodeStore, str]:
    """As a store, one segment per episode; and what was compared."""
    source: Any = env.unwrapped
    texts, task_of_text = [], []
    for task in tasks:
        for text in task_texts(env, task):
            texts.append(text)
            task_of_text.append(task)
    row = {(task, text): index for index, (task, text) in enumerate(zip(task_of_text, texts))}
    lengths = np.array([episode.length for episode in episodes], np.int64)
    ends = np.cumsum(lengths)
    rows = [row[episode.task, episode.text] for episode in episodes]
    first = stored_layout(read_arrays(attempt_file(folder, episodes[0].seed)))
    writer = StoreWriter(
        path,
        {key: (array.shape[1:], array.dtype) for key, array in first.items()},
        int(ends[-1]),
        {"features": source.features.to_dict(), "provenance": provenance},
    )
    for episode in progress(episodes, description="packing", unit="demonstrations"):
        arrays = stored_layout(read_arrays(attempt_file(folder, episode.seed)))
        sample.take(arrays)
        writer.append(arrays)
    encoder = text_encoder(provenance["settings"]["encoder"])
    compared = ""

    def check(store: EpisodeStore) -> None:
        nonlocal compared
        try:
            compared = sample.compare(store, lengths.tolist())
        except StoreError:
            for key, start in product(writer.keys, writer.shards):
                writer.forget(key, start)
            raise

    store = writer.finish(
        ends,
        segments=np.stack([ends - lengths, ends, np.array(rows, np.int64)], axis=1),
        language={"texts": texts, "tasks": task_of_text, "encoder": encoder.name, "embeddings": encoder.encode(texts)},
        check=check,
    )
    return store, compared


def _pack_lerobot(
    path: Path,
    folder: Path,
    episodes: list[Attempt],
    env: gymnasium.Env,
    provenance: dict[str, Any],
    sample: FrameSample,
) -> tuple[LeRobotFolder, str]:
    """As a LeRobot dataset; and what was compared."""
    source: Any = env.unwrapped
    pictures = provenance["settings"]["output"].removeprefix("lerobot ")
    writer = LeRobotWriter(
        path,
        source.features,
        pictures=pictures,
        robot=source.features.source.get("robot"),
        provenance=provenance,
        tasks={episode.text: episode.task for episode in episodes},
    )
    for episode in progress(episodes, description="encoding", unit="demonstrations"):
        arrays = stored_layout(read_arrays(attempt_file(folder, episode.seed)))
        sample.take(arrays)
        writer.append(arrays, episode.text)
    compared = ""

    def check(written: Path) -> None:
        nonlocal compared
        compared = sample.compare(LeRobotFolder.open(written), [episode.length for episode in episodes], pictures)

    return LeRobotFolder.open(writer.finish(check)), compared


def stored_layout(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Batch layout to that of stores: pictures with channels last, depth without channel."""
    stored = {}
    for key, array in arrays.items():
        if key.startswith("observation.images."):
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        elif key.startswith("observation.depth."):
            array = array[:, 0]
        stored[key] = array
    return stored
