"""What `predict` leaves: the action chunk of every window, beside the window's identity."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_robot.callbacks.guards import IDENTITY
from lightning_robot.console import say


class Predictions(Callback):
    """Writes ``predictions.npz``, or ``predictions_rank<r>.npz`` for each of several processes.

    It holds ``action`` (K, S, H', A) float32 in physical units, the first step acting on the window's newest observation, and
    for each of the K windows ``episode_index``, ``segment_index`` and ``frame_index`` (K,) int64.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {}

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows: dict[str, Tensor] = {"action": outputs} | {key: batch[key] for key in IDENTITY if key in batch}
        for key, value in rows.items():
            self._columns.setdefault(key, []).append(value.detach().cpu().numpy())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._columns:
            say("Nothing was predicted: the data has no validation part.")
            return
        name = "predictions.npz" if trainer.world_size == 1 else f"predictions_rank{trainer.global_rank}.npz"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{name}.partial")
        with aside.open("wb") as file:
            np.savez(file, **{key: np.concatenate(parts) for key, parts in self._columns.items()})  # type: ignore[arg-type]
        os.replace(aside, path)
        say(f"Predictions: {path}")
