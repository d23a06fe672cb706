"""Progress for an output that is no terminal: a plain line every few seconds."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_robot.callbacks.evaluation import SimulationEvaluation
from lightning_robot.console import duration, say


class PlainProgress(ProgressBar):
    """Prints epoch, step, loss, rate and remaining time every `interval` seconds, and each validation's result.

    Args:
        interval: seconds between lines.
    """

    def __init__(self, interval: float = 10.0) -> None:
        super().__init__()
        self.interval = interval
        self._last = 0.0
        self._last_step = 0

    def disable(self) -> None:
        self.interval = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic()
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._last < self.interval or not trainer.is_global_zero:
            return
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        rate = (step - self._last_step) / (now - self._last)
        self._last, self._last_step = now, step
        parts = [f"epoch {trainer.current_epoch}", f"step {step}/{total}"]
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        if rate > 0:
            parts += [f"{rate:.2f} steps/s", f"{duration((total - step) / rate)} left"]
        say(", ".join(parts))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit" or self.interval == float("inf"):
            return
        # Lightning keeps a success of an earlier epoch among the metrics.
        judges = [callback for callback in trainer.callbacks if isinstance(callback, SimulationEvaluation)]
        stale = {"val/success"} if any(judge.enabled and not judge.evaluated_this_epoch for judge in judges) else set()
        values = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val/") and key.count("/") == 1 and key not in stale
        }
        if values:
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            say(f"epoch {trainer.current_epoch}: {shown}")


def silence_tips() -> None:
    """Drops Lightning's advertisements from its log; everything else stays."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_not_a_tip)


def _not_a_tip(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("Tip:" in message or "litlogger" in message or "litmodels" in message)
