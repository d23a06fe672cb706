"""A signal ends training between two optimizer steps, with a last checkpoint that resumes exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_robot.console import say


class StopSignals(Callback):
    """Turns SIGTERM, Ctrl-C and, under SLURM, SIGUSR1 into an orderly stop.

    In training, the stop comes after the optimizer step in work, on all ranks together; in validation, and before training, at
    once. The checkpoint callback then writes ``last.ckpt``. Lightning's own handler calls a collective from inside the
    signal handler, which can deadlock, and its SLURM handler writes checkpoints of its own; both are replaced.

    Attributes:
        received: number of the signal, None while there is none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._trainer: Trainer | None = None
        self._training = False
        self._seen_step = 0

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Inside the block SIGTERM stops the run in every phase, its preparation too."""
        self._trainer = trainer
        former = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signal.signal(signal.SIGTERM, self._handle)  # the trainer has just put its own handler there

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._training = True
        self._seen_step = trainer.global_step
        numbers = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)
        for number in numbers:
            signal.signal(number, self._handle)  # the trainer puts the former handlers back when it ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        again = self.received is not None
        self.received = number
        launcher = trainer.strategy.launcher
        if not self._training:
            if again:
                return  # the launcher reports the end of its processes by this signal
            if isinstance(launcher, _SubprocessScriptLauncher):
                for process in launcher.procs:  # they may wait for this one where no handler of theirs runs
                    process.kill()
                    process.wait()
            raise SIGTERMException
        if number == signal.SIGTERM and not again and launcher is not None:
            launcher.kill(number)  # processes that this one started
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not again:
            say(f"{signal.Signals(number).name}: stopping after this step.")
        if trainer.validating:
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            if self.received is not None:
                trainer._signal_connector.received_sigterm = True  # rank 0 tells the others before the next batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.received is not None and trainer.state.fn == "fit":
            raise SIGTERMException
