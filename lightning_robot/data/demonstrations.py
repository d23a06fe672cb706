"""Demonstrations that are generated at the first use, from any environment with an expert."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_robot import __version__
from lightning_robot.console import say
from lightning_robot.data.cache import cache_folder
from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.transforms.text import HashedTextEncoder

GENERATOR = "lightning_robot.generation.generate:generate"
"""Named, not imported: data modules know no simulator until one is needed."""


def demonstrations_place(name: str, decisive: Mapping[str, Any]) -> Path:
    """``demonstrations/<name>_<hash of what decides the result>.zarr`` below `cache_folder`."""
    text = json.dumps({**decisive, "version": __version__}, sort_keys=True)
    return cache_folder() / "demonstrations" / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.zarr"


def make_demonstrations(path: Path, arguments: Mapping[str, Any]) -> None:
    """Generates demonstrations into a store, continues what was interrupted, or finds the store complete.

    Args:
        path: of the store.
        arguments: keyword arguments of `lightning_robot.generation.generate.generate`.

    Raises:
        StoreError: what the generator found wrong.
    """
    module, _, function = GENERATOR.partition(":")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        getattr(import_module(module), function)(path, **arguments)
    except (ValueError, RuntimeError, OSError, ImportError) as error:  # the last: a simulator that is not installed
        raise StoreError(str(error)) from error


class DemonstrationsDataModule(EpisodeDataModule):
    """Windows of demonstrations by an environment's expert, generated once.

    A store that is named and exists is used as it is, and settings in which it differs are said.
    """

    def __init__(
        self,
        env: str,
        env_kwargs: dict[str, Any] | None = None,
        tasks: list[str] | None = None,
        episodes_per_task: int = 100,
        generation_seed: int = 0,
        noise: float = 0.0,
        noise_correlation: float = 0.0,
        hold: int = 8,
        encoder: str = HashedTextEncoder.name,
        processes: int | None = None,
        store: str | None = None,
        batch_size: int = 128,
        num_workers: int = 2,
        validation_ratio: float | None = None,
        train_episodes: list[int] | None = None,
        validation_episodes: list[int] | None = None,
        max_train_episodes: int | None = None,
        seed: int = 42,
        pad_before: int | None = None,
        pad_after: int | None = None,
        segments: bool | None = None,
        drop_last: bool = False,
        decode: bool = True,
    ) -> None:
        """Describes the data; nothing is opened or generated yet.

        Args:
            env: id of an environment with an expert, e.g. ``lightning_robot/SO101PickPlace-v0``.
            env_kwargs: its constructor's arguments: they decide what is recorded.
            tasks: ids of tasks; the environment's own choice when None.
            episodes_per_task: successful demonstrations of each task.
            generation_seed: seed of the first attempt; the next ones count up.
            noise: standard deviation of noise on executed, not on recorded actions, in the action's units.
            noise_correlation: seconds over which that noise stays correlated; 0 draws it anew at every step.
            hold: steps recorded after success.
            encoder: of the sentences: ours, or the name of a model of sentence-transformers (extra ``calvin``).
            processes: worker processes, one per core when None; changes nothing in the result.
            store: where the demonstrations are, or go; a place below the cache folder (``$LIGHTNING_ROBOT_CACHE``, else
                ``~/.cache/lightning_robot``) when None.
            batch_size: see `EpisodeDataModule`, also for the arguments that follow.
            num_workers: processes that gather batches; 0 gathers in the training process.
            validation_ratio: share of episodes held out.
            train_episodes: numbers of the episodes to train on.
            validation_episodes: numbers of the episodes to hold out.
            max_train_episodes: limit on training episodes.
            seed: of the split, and with the run's seed of the order.
            pad_before: steps that a window may begin before its episode.
            pad_after: steps that a window may end after its episode.
            segments: cut windows within language segments, with their task; None as the policy needs.
            drop_last: leave out an epoch's smaller last batch.
            decode: map large arrays from a decoded copy.
        """
        super().__init__(
            store=store,
            batch_size=batch_size,
            num_workers=num_workers,
            validation_ratio=validation_ratio,
            train_episodes=train_episodes,
            validation_episodes=validation_episodes,
            max_train_episodes=max_train_episodes,
            seed=seed,
            pad_before=pad_before,
            pad_after=pad_after,
            segments=segments,
            drop_last=drop_last,
            decode=decode,
        )
        self.decisive: dict[str, Any] = {
            "env": env,
            "env_kwargs": dict(env_kwargs or {}),
            "tasks": tasks,
            "episodes_per_task": episodes_per_task,
            "seed": generation_seed,
            "noise": noise,
            "hold": hold,
            "encoder": encoder,
        }
        if noise_correlation:
            self.decisive["noise_correlation"] = noise_correlation
        self.processes = processes

    def find_store(self) -> Path:
        """The store that is named, else a place below the cache folder."""
        name = re.sub(r"\W+", "_", re.split("[/:]", self.decisive["env"])[-1]).lower()
        return self.store_path or demonstrations_place(name, self.decisive)

    def prepare_data(self) -> None:
        """Generates what is missing; says how an existing store was made otherwise."""
        path = self.find_store()
        if self.store_path is None:
            say(f"Demonstrations by the expert of {self.decisive['env']}: {path}.")
        elif path.exists():
            self._say_differences(path)
        super().prepare_data()

    def make_store(self, path: Path) -> None:
        """Generates demonstrations; an interrupted generation is continued.

        Raises:
            StoreError: what the generator found wrong.
        """
        make_demonstrations(path, {**self.decisive, "processes": self.processes})

    def _say_differences(self, path: Path) -> None:
        have = EpisodeStore.open(path).provenance.get("settings", {})
        names = {"env": "environment", "env_kwargs": "environment_arguments"}
        asked = json.loads(json.dumps(self.decisive))
        different = [
            f"{name} {have[names.get(name, name)]!r} there, {value!r} here"
            for name, value in asked.items()
            if value is not None and names.get(name, name) in have and have[names.get(name, name)] != value
        ]
        if different:
            say(f"{path} is used as it is; it was generated otherwise than the configuration says: {'; '.join(different)}.")
