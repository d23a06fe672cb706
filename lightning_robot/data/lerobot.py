"""LeRobot datasets, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import say
from lightning_robot.data.cache import cache_folder, decoded_array
from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.lerobot_folder import JOINT_UNITS, MOST_NORMALIZED, LeRobotFolder
from lightning_robot.data.lerobot_meta import STATISTICS, read_json
from lightning_robot.data.store import StoreError
from lightning_robot.data.windows import window_steps
from lightning_robot.transforms.statistics import Statistics

COMMIT = ".commit"
"""File in a downloaded folder that holds the commit it was downloaded at."""


class LeRobotDataModule(EpisodeDataModule):
    """Windows of a LeRobot dataset, v3.0, v2.1 or v2.0, with pictures stored as video or as files.

    Batch keys are LeRobot's names of features; depth cameras are ``observation.depth.<camera>`` in metres. Windows, padding and
    ``action_is_pad`` are those of LeRobot's ``delta_timestamps``. Other than there, statistics are of the training episodes
    alone, and the number of last frames that begin no window follows from the policy's horizons.

    Every batch has ``task``, the sentence of its newest observation, and ``task_embedding``.
    """

    def __init__(
        self,
        root: str | None = None,
        repo_id: str | None = None,
        revision: str = "main",
        backend: str | None = None,
        tolerance: float = 1e-4,
        drop_n_last_frames: int | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        validation_ratio: float | None = None,
        train_episodes: list[int] | None = None,
        validation_episodes: list[int] | None = None,
        max_train_episodes: int | None = None,
        seed: int = 42,
        pad_before: int | None = None,
        drop_last: bool = False,
        decode: bool = False,
        joint_units: str | None = None,
    ) -> None:
        """Describes the data; nothing is opened or downloaded yet.

        Args:
            root: the dataset's folder (it holds ``meta/info.json``); with `repo_id`, where the download goes.
            repo_id: ``organisation/name`` on the hub, downloaded once where the folder does not exist.
            revision: branch, tag or commit to download.
            backend: decoder of videos, ``torchcodec`` or ``pyav``; None takes the first that loads.
            tolerance: seconds by which a recorded time may differ from its frame number.
            drop_n_last_frames: frames at the end of each episode that begin no window. None computes it from the horizons, so
                that the actions that are executed before the next query are never padding.
            batch_size: see `EpisodeDataModule`, also for the arguments that follow.
            num_workers: processes that gather and decode batches; 0 does so in the training process.
            validation_ratio: share of episodes held out; None holds out 0.02.
            train_episodes: numbers of the episodes to train on.
            validation_episodes: numbers of the episodes to hold out.
            max_train_episodes: limit on training episodes.
            seed: of the split, and with the run's seed of the order.
            pad_before: steps that a window may begin before its episode.
            drop_last: leave out an epoch's smaller last batch.
            decode: decode all pictures once into memory-mapped files, whose sizes are said before; batches then cost no
                decoding.
            joint_units: ``degrees`` or ``normalized`` (-100 to 100), of the joints of an SO-100 or SO-101 that somebody else
                recorded: LeRobot does not note it. None reads degrees off where a joint exceeds 100, else says that it is not
                known; environments can then not check it.
        """
        super().__init__(
            root,
            batch_size=batch_size,
            num_workers=num_workers,
            validation_ratio=validation_ratio,
            train_episodes=train_episodes,
            validation_episodes=validation_episodes,
            max_train_episodes=max_train_episodes,
            seed=seed,
            pad_before=pad_before,
            drop_last=drop_last,
            decode=decode,
        )
        if drop_n_last_frames is not None and drop_n_last_frames < 0:
            raise ValueError(f"drop_n_last_frames: {drop_n_last_frames}; it is a number of frames, or null.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: {tolerance}; it is a time in seconds, 0 or more.")
        self.repo_id, self.revision, self.backend, self.tolerance = repo_id, revision, backend, tolerance
        self.drop_n_last_frames = drop_n_last_frames
        if joint_units not in (None, *JOINT_UNITS):
            raise ValueError(f"joint_units: {joint_units!r}; it is {', '.join(JOINT_UNITS)} or null.")
        self.joint_units = joint_units
        self._folder: LeRobotFolder | None = None
        self._compared = False

    def find_store(self) -> Path:
        """The dataset's folder, or where it will be downloaded to."""
        if self.store_path is not None:
            return self.store_path
        if self.repo_id is None:
            raise StoreError("No dataset is named: set data.init_args.root to a LeRobot folder, or data.init_args.repo_id.")
        name = self.repo_id.replace("/", "--") + ("" if self.revision == "main" else f"@{self.revision.replace('/', '--')}")
        return cache_folder() / "lerobot" / name

    def make_store(self, path: Path) -> None:
        """Downloads the dataset: into a folder beside, which is renamed when it is whole.

        Raises:
            StoreError: nothing to download is named, or the hub cannot be reached or does not know it.
        """
        if self.repo_id is None:
            return  # opening it says that it is missing
        from huggingface_hub import HfApi, snapshot_download

        partial = path.with_name(path.name + ".partial")
        say(f"Downloading {self.repo_id} at {self.revision} into {path}.")
        try:
            commit = HfApi().dataset_info(self.repo_id, revision=self.revision).sha
            snapshot_download(self.repo_id, repo_type="dataset", revision=commit, local_dir=str(partial))
        except Exception as error:  # the hub's client, its transport and the file system have exceptions of their own
            raise StoreError(
                f"{self.repo_id} at {self.revision} cannot be downloaded ({type(error).__name__}: {error}). Without a network, "
                "copy the dataset's folder here and set data.init_args.root to it; private data need `hf auth login`. What was "
                f"downloaded stays in {partial} and is continued."
            ) from error
        (partial / COMMIT).write_text(f"{commit}\n")
        os.replace(partial, path)

    def open_store(self, path: Path) -> Any:
        """The folder, read as an episode store is read; once, however often it is asked for."""
        if self._folder is None or self._folder.path != path:
            self._folder = LeRobotFolder.open(path, self.backend, self.tolerance, self.joint_units)
            self._check_joint_units(self._folder)
            if self.repo_id is not None and (path / COMMIT).exists():
                commit = (path / COMMIT).read_text().strip()
                say(f"{self.repo_id} at {self.revision}, commit {commit}, in {path} (delete it to download anew).")
        return self._folder

    def setup(self, stage: str | None = None) -> None:
        """As `EpisodeDataModule.setup`; then looks whether the chosen episodes have whole videos, and values that are numbers.

        Raises:
            StoreError: see `LeRobotFolder`.
        """
        super().setup(stage)
        store: Any = self.store
        episodes = np.concatenate([self.train_episodes, self.validation_episodes])
        store.check_videos(self.window.keys, episodes)
        for key in (*self.window.keys, "action"):
            if key not in store.cameras:
                store.check_numbers(key, episodes)
        if not self._compared:
            self._compared = True
            if doubtful := doubtful_statistics(store, (*self.window.keys, "action")):
                say(
                    f"{store.path / STATISTICS} does not describe the data ({'; '.join(doubtful)}): nothing is taken from it, "
                    "statistics are computed from the training episodes."
                )

    # Below: private.

    def _check_joint_units(self, folder: LeRobotFolder) -> None:
        """Says or refuses what the range of an arm's joints tells of their units."""
        largest, asked = folder.largest_joint, self.joint_units
        if largest is None:
            if asked is not None:
                raise StoreError(
                    f"joint_units: {asked}, but {folder.path} names no joints of an SO-100 or SO-101 (shoulder_pan), or notes "
                    "their units itself. Leave the setting out."
                )
        elif largest > MOST_NORMALIZED:
            if asked == "normalized":
                raise StoreError(f"joint_units: normalized, but a joint reaches {largest:.0f} in {folder.path}: set degrees.")
            if asked is None:
                say(f"{folder.path}: a joint reaches {largest:.0f}, more than normalised ones, so its joints are in degrees.")
        elif asked is None:
            say(
                f"{folder.path}: values within ±{largest:.0f} do not tell whether joints are in degrees or normalised (-100 to "
                "100). A policy acts in the dataset's units; so that environments check them, set data.init_args.joint_units."
            )

    def _array(self, store: Any, key: str, channels: int | None) -> Any:
        if key not in store.cameras:
            return super()._array(store, key, channels)
        if not self.decode:
            return store.frames(key)
        store.check_videos((key,), np.arange(store.num_episodes))  # the copy holds all episodes, whichever are chosen
        return decoded_array(store, key)

    def _pads(self) -> tuple[int, int]:
        before, after = super()._pads()
        most = window_steps(self.window) - self.window.observation_steps  # the newest observation stays within its episode
        after = min(after, most)
        if self.drop_n_last_frames is not None:
            if self.drop_n_last_frames > most:
                raise ValueError(
                    f"drop_n_last_frames: {self.drop_n_last_frames}; with this policy's horizons a window ends at most {most} "
                    "frames after its newest observation: leave it out, or give less."
                )
            after = most - self.drop_n_last_frames
        return before, after

    def _picture_statistics(self, key: str, runs: list[tuple[int, int]]) -> Statistics:
        """Merged from what the writer noted per training episode where that is sound, else computed."""
        store: Any = self.store
        noted = None if store.cameras[key].depth else store.episode_statistics(key, self.train_episodes)
        reason = "the dataset does not note them for every training episode"
        if noted is not None:
            merged = merged_statistics(noted)
            if merged.size == 3 and all(_is_sound(episode) for episode in noted):
                return merged
            mean, std = np.round(merged.mean, 4).tolist(), np.round(merged.std, 4).tolist()
            reason = f"those noted are wrong (mean {mean}, deviation {std})"
        if not store.cameras[key].depth:
            say(f"Computing statistics of {key} from the pictures of training episodes: {reason}.")
        return super()._picture_statistics(key, runs)


def merged_statistics(episodes: list[dict[str, np.ndarray]]) -> Statistics:
    """Statistics of several episodes from those of each, exact but for quantiles, in whose place stand the extremes.

    Args:
        episodes: ``min``, ``max``, ``mean``, ``std`` (population) of shape (D,) and ``count`` (1,) of each.
    """
    count = np.stack([episode["count"] for episode in episodes])
    mean, std = (np.stack([episode[name] for episode in episodes]) for name in ("mean", "std"))
    low = np.min([episode["min"] for episode in episodes], axis=0)
    high = np.max([episode["max"] for episode in episodes], axis=0)
    total = count.sum()
    middle = (count * mean).sum(axis=0) / total
    variance = (count * (std**2 + (mean - middle) ** 2)).sum(axis=0) / total
    return Statistics(low, high, middle, np.sqrt(variance), low, high, int(total))


def doubtful_statistics(folder: LeRobotFolder, keys: tuple[str, ...]) -> list[str]:
    """What meta/stats.json says otherwise than the data of all episodes, or leaves out, in words; v2.1 has no such file.

    Pictures are compared with what the writer noted of each episode, where it did; they are not decoded for this.

    Args:
        folder: the dataset.
        keys: batch keys to look at.
    """
    file = folder.path / STATISTICS
    if not file.exists():
        return [] if str(folder.info["codebase_version"]) == "v2.1" else ["the file is missing"]
    try:
        noted = read_json(file)
        return [line for key in keys if (line := _doubt(folder, key, noted)) is not None]
    except (StoreError, AttributeError, TypeError, ValueError) as error:
        return [f"the file is damaged: {error}"]


def _doubt(folder: LeRobotFolder, key: str, noted: dict[str, Any]) -> str | None:
    column = folder.cameras[key].column if key in folder.cameras else key
    if column not in noted:
        return f"{column} is missing"
    if key in folder.cameras:
        episodes = folder.episode_statistics(key, np.arange(folder.num_episodes))
        if episodes is None:
            return None
        merged = merged_statistics(episodes)
        found = {"min": merged.min, "max": merged.max, "mean": merged.mean, "std": merged.std}
    else:
        values = folder.whole(key).reshape(folder.num_frames, -1).astype(np.float64)
        values = values[np.isfinite(values).all(1)]  # those of episodes that are left out may be anything
        found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    # Writers sample, and add up in single precision.
    allowed = 0.02 * (found["max"] - found["min"]) + 1e-3 * np.maximum(np.abs(found["max"]), np.abs(found["min"])) + 1e-6
    wrong = []
    for name, value in found.items():
        said = np.asarray(noted[column].get(name, np.nan), np.float64).reshape(-1)
        if said.shape != value.shape or not (np.abs(said - value) <= allowed).all():
            wrong.append(name)
    return f"{column}: {', '.join(wrong)}" if wrong else None


def _is_sound(episode: dict[str, np.ndarray]) -> bool:
    """Deviations of pictures in 0 to 1 below 0.01, or means outside, come from broken writers."""
    mean, std = episode["mean"], episode["std"]
    return bool(np.isfinite(mean).all() and np.isfinite(std).all() and ((mean >= 0) & (mean <= 1) & (std >= 0.01)).all())
