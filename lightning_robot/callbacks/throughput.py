"""Samples per second, the share of time spent waiting for data, device memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``throughput/samples_per_second``, ``throughput/data_wait_share`` and ``throughput/memory_gb``.

    Waiting is the time from the end of a batch to the start of the next, transfer to the device included. Validation and
    checkpoint writing are left out. Values are means since the former logged step.

    Args:
        enabled: False switches it off.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.samples_per_second = 0.0
        self.data_wait_share = 0.0
        self._ended: float | None = None  # when the former batch ended; None after a pause
        self._busy = 0.0
        self._waited = 0.0
        self._samples = 0
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled:
            return
        now = time.perf_counter()
        if self._ended is not None:  # the first batch after a pause waits for things that are no batches
            self._busy += now - self._started
            self._samples += len(batch["action"]) if isinstance(batch, dict) and "action" in batch else 0
        self._ended = now
        total = self._busy + self._waited
        if trainer._logger_connector.should_update_logs and total > 0:
            self.samples_per_second = self._samples * trainer.world_size / total
            self.data_wait_share = self._waited / total
            values = {
                "throughput/samples_per_second": self.samples_per_second,
                "throughput/data_wait_share": self.data_wait_share,
            }
            if pl_module.device.type == "cuda":
                values["throughput/memory_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / 1e9
            pl_module.log_dict(values, batch_size=1)
            self._busy = self._waited = 0.0
            self._samples = 0

    def _pause(self) -> None:
        self._ended = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()
