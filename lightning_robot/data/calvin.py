"""CALVIN: its recordings, a store made of them, or demonstrations from the project's own play table."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_robot.console import say
from lightning_robot.data.cache import cache_folder, is_writable
from lightning_robot.data.calvin_frames import CalvinSettings
from lightning_robot.data.demonstrations import demonstrations_place, make_demonstrations
from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.transforms.text import HashedTextEncoder


@dataclass
class Demonstrations:
    """What is generated where no dataset is named; passed to `lightning_robot.generation.generate.generate`.

    Attributes:
        tasks: ids of tasks; the eight that move no block when None.
        episodes_per_task: successful demonstrations of each.
        seed: of the first attempt.
        noise: standard deviation of noise on executed, not on recorded actions.
        hold: steps recorded after success.
        encoder: of the sentences: ours, or the name of a model of sentence-transformers (extra ``calvin``).
        scene: A, B, C or D.
        points: points per cloud.
        colors: clouds with colours.
        processes: worker processes, one per core when None; changes nothing in the result.
    """

    tasks: list[str] | None = None
    episodes_per_task: int = 25
    seed: int = 0
    noise: float = 0.0
    hold: int = 8
    encoder: str = HashedTextEncoder.name
    scene: str = "D"
    points: int = 1024
    colors: bool = False
    processes: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the generator."""
        return {
            "env": "lightning_robot/PlayTable-v0",
            "env_kwargs": {"scene": self.scene, "cloud": {"points": self.points, "colors": self.colors}},
            "tasks": self.tasks,
            "episodes_per_task": self.episodes_per_task,
            "seed": self.seed,
            "noise": self.noise,
            "hold": self.hold,
            "encoder": self.encoder,
            "processes": self.processes,
        }

    @property
    def place(self) -> Path:
        """``demonstrations/play_table_<hash of what decides the result>.zarr`` below `cache_folder`."""
        return demonstrations_place("play_table", {name: value for name, value in asdict(self).items() if name != "processes"})


class CalvinDataModule(EpisodeDataModule):
    """Windows of CALVIN's play episodes or language segments.

    | `root` | `store` | data |
    | --- | --- | --- |
    | a store | | that store |
    | a CALVIN folder | where its conversion goes (None: ``<root>.zarr`` beside it) | converted at the first use |
    | None | an existing store | that store |
    | None | None or a new place | demonstrations, generated at the first use; without a place below the cache folder \
(``$LIGHTNING_ROBOT_CACHE``, else ``~/.cache/lightning_robot``) |

    CALVIN's validation folder is the validation split unless `validation_ratio` or `validation_episodes` says otherwise.
    """

    def __init__(
        self,
        root: str | None = None,
        store: str | None = None,
        convert: CalvinSettings | None = None,
        generate: Demonstrations | None = None,
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
        """Describes the data; nothing is opened, converted or generated yet.

        Args:
            root: a CALVIN folder (it holds ``training/`` and ``validation/``), or an episode store.
            store: see the table above.
            convert: what a conversion keeps of every frame.
            generate: what is generated where no dataset is named.
            batch_size: see `EpisodeDataModule`, also for the arguments that follow.
            num_workers: processes that gather batches; 0 gathers in the training process.
            validation_ratio: share of episodes held out; None uses the store's own split, else 0.02.
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
            store,
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
        self.root = None if root is None else Path(root).expanduser().absolute()
        self.convert = convert
        self.generate = Demonstrations(**generate) if isinstance(generate, dict) else generate

    def find_store(self) -> Path:
        """Where the store is, or will be.

        Raises:
            StoreError: `root` does not exist or holds nothing usable; says how to get data.
        """
        if self.root is None:
            return self.store_path or (self.generate or Demonstrations()).place
        if not self.root.exists():
            raise StoreError(f"data.init_args.root: there is nothing at {self.root}. {_HOW_TO_GET}")
        if _is_store(self.root):
            if self.store_path is not None:
                raise StoreError(f"root ({self.root}) is a store already: leave out data.init_args.store ({self.store_path}).")
            return self.root
        if not _is_calvin(self.root):
            raise StoreError(
                f"data.init_args.root: {self.root} is neither a CALVIN folder (training/ with ep_start_end_ids.npy) nor an "
                f"episode store (zarr.json or .zgroup). {_HOW_TO_GET}"
            )
        if self.store_path is not None:
            return self.store_path
        beside = self.root.with_name(self.root.name + ".zarr")
        if beside.exists() or is_writable(beside.parent):
            return beside
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]
        return cache_folder() / "calvin" / f"{self.root.name}-{digest}.zarr"

    def prepare_data(self) -> None:
        """Converts or generates what is missing; refuses a store that was made with other settings than those given."""
        path = self.find_store()
        if self.root is None and self.store_path is None:
            say(f"No dataset is named (data.init_args.root): using demonstrations generated in the play table, {path}.")
        if path.exists() and path != self.root:
            self._check_settings(path)
        super().prepare_data()

    def make_store(self, path: Path) -> None:
        """Converts `root`, or generates demonstrations; an interrupted one is continued.

        Raises:
            StoreError: what the converter or the generator found wrong.
        """
        if self.root is None:
            make_demonstrations(path, (self.generate or Demonstrations()).arguments())
            return
        from lightning_robot.data.convert_calvin import convert_calvin

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            convert_calvin(self.root, path, self.convert)
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(str(error)) from error

    def _check_settings(self, path: Path) -> None:
        """An existing store serves; one that was made with other settings of the same kind than those given is refused."""
        if self.root is not None and self.convert is not None:
            made_with = EpisodeStore.open(path).provenance.get("settings")
            if made_with is not None and made_with != self.convert.to_dict():
                raise StoreError(
                    f"{path} was converted with other settings than data.init_args.convert gives. Leave them out to use it, or "
                    "give data.init_args.store another place."
                )
        generated = "generator" in EpisodeStore.open(path).provenance.get("settings", {})
        if self.root is None and self.store_path is not None and self.generate is not None and generated:
            try:
                self.make_store(path)  # the generator compares settings and finds the store complete
            except StoreError as error:
                raise StoreError(f"{error} To train on it as it is, name it as data.init_args.root.") from error


_HOW_TO_GET = (
    "Either download CALVIN (github.com/mees/calvin, folder dataset: `sh download_data.sh debug` fetches 1.3 GB, `D` 166 GB) "
    "and give that folder, or convert it first with `python -m lightning_robot convert calvin ROOT STORE`; or make "
    "demonstrations in the simulator with `python -m lightning_robot generate STORE` (leave out data.init_args.root and fit "
    "does it by itself)."
)


def _is_store(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in ("zarr.json", ".zgroup", "data/.zgroup", "data/zarr.json"))


def _is_calvin(path: Path) -> bool:
    return any((path / part / "ep_start_end_ids.npy").exists() for part in ("training", "validation", "."))
