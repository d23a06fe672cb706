"""What the kill harness kills: a run of seconds with everything in it that a resume could lose.

A Diffusion Policy of a few thousand parameters learns from rendered pictures to move a dot: random crops, dropout, masked
losses, averaged weights, accumulated gradients, gradient clipping, validation (in some runs within the epoch too), simulation.
The callback `Watched` says from inside what the run is doing, so that a kill can be aimed from outside, and writes down every
loss of every rank.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_robot.data.store import StoreWriter
from lightning_robot.features import Feature, Features

SIZE, STEPS, LENGTHS = 16, 12, (19, 22, 17, 24, 14)
PHASES = ("start", "training", "writing", "validation", "evaluation")
TABLE = "LIGHTNING_ROBOT_KILL_TABLE"  # names the file that tells what each rank is doing
RANKS = 2

FEATURES = Features(
    observations={
        "observation.state": Feature((2,), names=("x", "y")),
        "observation.images.top": Feature((3, SIZE, SIZE), "uint8"),
    },
    action=Feature((2,), names=("x", "y")),
    action_semantics="relative; commanded; world; gripper +1 open -1 closed",
    control_rate=10.0,
    source={"simulator": "dot 1"},
)


def picture(place: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8: a dot at a place of the unit square."""
    row, column = np.clip((place * SIZE).astype(int), 1, SIZE - 2)
    image = np.full((SIZE, SIZE, 3), 40, np.uint8)
    image[row - 1 : row + 2, column - 1 : column + 2] = (250, 120, 10)
    return image


class Dot(gymnasium.Env):
    """A dot that should come near the middle of a square."""

    observation_space = gymnasium.spaces.Dict(
        {
            "observation.state": gymnasium.spaces.Box(-1, 2, (2,)),
            "observation.images.top": gymnasium.spaces.Box(0, 255, (3, SIZE, SIZE), np.uint8),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    fingerprint = {"simulator": "dot 1", "renderer": "numpy"}  # noqa: RUF012
    features = FEATURES
    control_rate = FEATURES.control_rate

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.count = self.np_random.uniform(0.1, 0.9, 2), 0
        while np.abs(self.place - 0.5).max() < 0.2:
            self.place = self.np_random.uniform(0.1, 0.9, 2)
        return self._observe(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.place = np.clip(self.place + 0.1 * np.asarray(action, np.float64), 0, 1)
        self.count += 1
        distance = float(np.abs(self.place - 0.5).max())
        return self._observe(), -distance, distance < 0.2, self.count >= STEPS, {"success": distance < 0.2}

    def _observe(self) -> dict[str, np.ndarray]:
        return {
            "observation.state": self.place.astype(np.float32),
            "observation.images.top": picture(self.place).transpose(2, 0, 1),
        }


gymnasium.register("Dot-v0", entry_point="kill_subject:Dot")


def make_store(path: Path) -> Path:
    """A few demonstrations of a hesitant expert."""
    random, frames = np.random.default_rng(3), sum(LENGTHS)
    arrays = {
        "observation.state": ((2,), "float32"),
        "observation.images.top": ((SIZE, SIZE, 3), "uint8"),
        "action": ((2,), "float32"),
    }
    writer = StoreWriter(path, arrays, frames, {"features": FEATURES.to_dict()}, shard_frames=64)
    for length in LENGTHS:
        place, rows = random.uniform(0, 1, 2), []
        for _ in range(length):
            action = np.clip(3 * (0.5 - place), -1, 1) + random.normal(0, 0.2, 2)
            rows.append((place.copy(), picture(place), action))
            place = np.clip(place + 0.1 * action, 0, 1)
        columns = zip(arrays.items(), zip(*rows))
        writer.append({key: np.stack(values).astype(kind) for (key, (_, kind)), values in columns})
    return writer.finish(np.cumsum(LENGTHS)).path


def configuration(store: Path, ranks: int, workers: int, within_epochs: bool, epochs: int = 4) -> dict[str, Any]:
    """Settings of a run: everything on that carries state."""
    return {
        "seed_everything": 11,
        "model": {
            "class_path": "lightning_robot.policies.diffusion_policy.DiffusionPolicy",
            "init_args": {
                "network": "transformer",
                "action_horizon": 8,
                "execution_horizon": 6,
                "layers": 1,
                "heads": 2,
                "width": 16,
                "attention_dropout": 0.1,
                "embedding_dropout": 0.1,
                "backbone": "resnet10t",
                "backbone_width": 0.25,
                "backbone_stages": 1,
                "keypoints": 4,
                "crop": 0.75,
                "random_crop": True,
                "mask_padding": True,
                "sampler": "ddim",
                "denoising_steps": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 4,
            },
        },
        "data": {
            "class_path": "lightning_robot.data.episodes.EpisodeDataModule",
            "init_args": {
                "store": str(store),
                "batch_size": 4,
                "num_workers": workers,
                "validation_episodes": [4],
            },
        },
        "trainer": {
            "max_epochs": epochs * ranks,  # two ranks take half as many steps per epoch
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "val_check_interval": 0.5 if within_epochs else 1.0,
            "callbacks": [{"class_path": "kill_subject.Watched"}],
        },
        "ema": {"power": 0.75},
        "evaluation": {"env": "kill_subject:Dot-v0", "episodes": 4, "num_envs": 2, "inference_batch": 2, "max_steps": STEPS},
        "checkpoints": {"every_n_steps": 1, "top_k": 2, "keep_every_n_epochs": 2, "initial": True},
        "run": {"experiment": "subject"},
    }


class Table:
    """Shared memory in a file: for each rank its process and how often it has entered each phase."""

    def __init__(self, path: str | Path) -> None:
        size = 8 * RANKS * (1 + len(PHASES))
        if not os.path.exists(path):
            Path(path).write_bytes(bytes(size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)
        self._numbers = np.frombuffer(self._memory, np.int64).reshape(RANKS, 1 + len(PHASES))

    def enter(self, rank: int, phase: str) -> None:
        self._numbers[rank, 1 + PHASES.index(phase)] += 1

    def count(self, rank: int, phase: str) -> int:
        return int(self._numbers[rank, 1 + PHASES.index(phase)])

    def set_process(self, rank: int, process: int) -> None:
        self._numbers[rank, 0] = process

    def process(self, rank: int) -> int:
        return int(self._numbers[rank, 0])


class Watched(Callback):
    """Tells the harness what the run is doing, and notes every loss of every rank with all its digits."""

    def __init__(self) -> None:
        self.table: Table | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if TABLE not in os.environ:
            return
        self.table, rank = Table(os.environ[TABLE]), trainer.global_rank
        self.table.set_process(rank, os.getpid())
        writer: Any = trainer.strategy.checkpoint_io
        writer.save_checkpoint = self._announced("writing", rank, writer.save_checkpoint)
        simulation: Any = next(callback for callback in trainer.callbacks if hasattr(callback, "evaluated_this_epoch"))
        simulation._evaluate = self._announced("evaluation", rank, simulation._evaluate)

    def _announced(self, phase: str, rank: int, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            assert self.table is not None
            self.table.enter(rank, phase)
            return function(*arguments, **options)

        return call

    def _enter(self, trainer: Trainer, phase: str) -> None:
        if self.table is not None and not trainer.sanity_checking:
            self.table.enter(trainer.global_rank, phase)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._enter(trainer, "training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, "validation")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = f"{trainer.current_epoch} {batch_idx} {float(outputs['loss']).hex()}\n"
        path = Path(trainer.default_root_dir) / f"losses{trainer.global_rank}.txt"
        with open(path, "a") as file:
            file.write(line)
