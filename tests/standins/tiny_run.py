"""A policy and a data module small enough for tests of runs: real hooks, a linear network, rows made from their index."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor

from lightning_robot.features import Feature, Features
from lightning_robot.policies.base import ImitationPolicy
from lightning_robot.transforms.statistics import Statistics

FEATURES = Features(
    observations={"observation.state": Feature((3,), names=("a", "b", "c"))},
    action=Feature((2,)),
    action_semantics="relative; commanded; world; gripper +1 open -1 closed",
)


class TinyPolicy(ImitationPolicy):
    """A linear map with dropout (global random numbers) and noise.

    Args:
        width: hidden width.
        learning_rate: step size of AdamW.
        dropout: probability.
        extra: anything, to try what a checkpoint accepts.
        transforms: see `ImitationPolicy`.
        postprocess: see `ImitationPolicy`.
        features: see `ImitationPolicy`.
        language: see `ImitationPolicy`.
    """

    normalization: ClassVar[dict[str, str]] = {"observation.state": "limits", "action": "limits"}

    def __init__(
        self,
        width: int = 8,
        learning_rate: float = 1e-2,
        dropout: float = 0.2,
        extra: Any = None,
        transforms: list[dict[str, Any]] | None = None,
        postprocess: list[dict[str, Any]] | None = None,
        features: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.observation_steps, self.action_horizon, self.execution_horizon = 1, 2, 2
        self.learning_rate = learning_rate

    @property
    def observation_keys(self) -> tuple[str, ...]:
        return ("observation.state",)

    def build(self) -> None:
        torch.manual_seed(0)
        width = self.hparams["width"]
        self.network = torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.Dropout(self.hparams["dropout"]), torch.nn.Linear(width, 4)
        )

    @property
    def compilable(self) -> list[torch.nn.Module]:
        return [self.network]

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.normalizer.normalize("observation.state", batch["observation.state"][:, -1])
        action = self.normalizer.normalize("action", batch["action"])
        error = self.network(state).reshape(-1, 2, 2) - action
        if self.training:
            error = error + 0.01 * torch.randn_like(error)
        return error.pow(2).mean(), {}

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        state = self.normalizer.normalize("observation.state", observation["observation.state"][:, -1])
        action = self.network(state).reshape(-1, 1, 2, 2)
        return self.normalizer.unnormalize("action", action).expand(-1, num_samples, -1, -1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OtherPolicy(TinyPolicy):
    """The same networks under another name: a checkpoint that must be refused."""


class Rows(torch.utils.data.Dataset):
    """Row i holds numbers made from i alone; the rows of `bad` hold nan."""

    def __init__(self, indices: range, bad: tuple[int, ...] = ()) -> None:
        self.indices, self.bad = indices, bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.indices[index]
        values = np.random.default_rng(number).uniform(-1, 1, 7).astype(np.float32)
        if number in self.bad:
            values[:] = np.nan
        return {
            "observation.state": torch.from_numpy(values[None, :3]),
            "action": torch.from_numpy(values[3:].reshape(2, 2)),
            "action_is_pad": torch.zeros(2, dtype=torch.bool),
            "episode_index": torch.tensor(number),
            "segment_index": torch.tensor(-1),
            "frame_index": torch.tensor(10 * number),
        }


class Batches(torch.utils.data.Sampler):
    """A shuffled share of the rows for each rank; can begin within an epoch."""

    def __init__(self, rows: int, batch_size: int, rank: int, ranks: int) -> None:
        self.rows, self.batch_size, self.rank, self.ranks = rows, batch_size, rank, ranks
        self.epoch = self.start = 0
        self.sampler = self  # Lightning calls set_epoch on the batch sampler's sampler

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.ranks // self.batch_size

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.rows)[self.rank :: self.ranks]
        start, self.start = self.start, 0
        for batch in range(start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class TinyData(LightningDataModule):
    """Rows for training and validation.

    Args:
        rows: training rows.
        batch_size: rows per batch and device.
        bad: training rows that hold nan.
        root: unused, as a data module's path.
        validation: whether there is a validation loader.
    """

    def __init__(
        self,
        rows: int = 24,
        batch_size: int = 4,
        bad: tuple[int, ...] = (),
        root: str | None = None,
        validation: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.rows, self.batch_size, self.bad = rows, batch_size, bad
        self.validation = validation
        self.features, self.language, self.fingerprint = FEATURES, None, "tiny"
        self.sampler: Batches | None = None
        self._start = 0

    def statistics(self, keys: tuple[str, ...]) -> dict[str, Statistics]:
        sizes = {"observation.state": 3, "action": 2}
        return {key: Statistics(*(np.full(sizes[key], v, np.float64) for v in (-1, 1, 0, 1, -1, 1)), count=10) for key in keys}

    def train_dataloader(self):
        self.sampler = Batches(self.rows, self.batch_size, self.trainer.global_rank, self.trainer.world_size)
        self.sampler.start, self._start = self._start, 0
        return torch.utils.data.DataLoader(Rows(range(self.rows), tuple(self.bad)), batch_sampler=self.sampler)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Rows(range(1000, 1008)), batch_size=4) if self.validation else []

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        assert self.sampler is not None
        return {"start": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % len(self.sampler)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = state["start"]


class At(Callback):
    """Does something to the run at one optimizer step.

    Args:
        step: after which optimizer step.
        what: ``kill`` (SIGKILL), ``term`` (SIGTERM), ``fail`` (an exception), ``validating`` (SIGTERM in the validation),
            ``kill_validating`` (SIGKILL there), ``unlogged`` (SIGKILL after the callbacks of a step, before its metrics are
            logged), or ``starting`` (SIGTERM to the first process before training, while the others are busy).
    """

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def setup(self, trainer, pl_module, stage) -> None:
        if self.what == "unlogged":  # the module's own hook comes after those of all callbacks

            def after_callbacks(*_: Any) -> None:
                if trainer.global_step == self.step:
                    os.kill(os.getpid(), signal.SIGKILL)

            pl_module.on_train_batch_end = after_callbacks
        if self.what == "starting":
            name = Path(trainer.default_root_dir) / "other_process"
            if trainer.global_rank > 0:
                name.with_suffix(".aside").write_text(str(os.getpid()))
                name.with_suffix(".aside").rename(name)
                time.sleep(100)
            while not name.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step and self.what in ("kill", "term", "fail"):
            if self.what == "fail":
                raise RuntimeError("as asked")
            os.kill(os.getpid(), signal.SIGKILL if self.what == "kill" else signal.SIGTERM)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if trainer.global_step == self.step and self.what in ("validating", "kill_validating"):
            os.kill(os.getpid(), signal.SIGTERM if self.what == "validating" else signal.SIGKILL)


class Fill(Callback):
    """Fills the disk of the run directory at one optimizer step, with a file that is called ``filler``.

    Args:
        step: before which optimizer step.
        left: bytes left free.
    """

    def __init__(self, step: int, left: int) -> None:
        self.step, self.left = step, left

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            folder = Path(trainer.default_root_dir)
            with open(folder / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - self.left)


def tiny_trainer(folder, *callbacks, **settings):
    """A trainer as the command line makes it, quiet, in `folder`."""
    from lightning.pytorch import Trainer

    from lightning_robot.callbacks.checkpoints import AtomicCheckpointIO

    defaults = {
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
    }
    settings = defaults | settings
    if any(type(callback).__name__ == "Checkpoints" for callback in callbacks):
        settings["enable_checkpointing"] = True
    return Trainer(callbacks=list(callbacks), **settings)  # type: ignore[arg-type]
