"""Checkpoints of a run: `last` is the last, `best` is the best, and nothing piles up."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_robot.console import disk_size, say


class NoCheckpointNow(Exception):
    """Base of errors after which the weights are not to be saved."""


class CheckpointNotWritten(OSError, NoCheckpointNow):
    """The last checkpoint of a run could not be written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes aside, flushes to the disk, then renames: an interrupted or failed save leaves the former file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=True)


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``, optionally the k best, in the run directory.

    `last` is written every `every_n_epochs` epochs, at the end, at a signal and at an error that left the weights sound; it
    resumes exactly. `best` holds raw and averaged weights of the best validation so far. ``checkpoint.json`` beside it
    says epoch, step and score. Files hold tensors and plain containers only: the first one is read back as such.

    For a sweep by ``evaluate RUN --all`` checkpoints of the whole run can be kept (`keep_every_n_epochs`).

    Args:
        monitor: metric that ranks; None takes ``val/success`` where simulation is on, else ``val/loss``.
        mode: whether the metric is better when larger; None: larger for success, smaller otherwise.
        tie_break: metric (smaller is better) that decides between equal scores.
        top_k: how many of the best to keep besides ``best.ckpt``, as ``epoch0012_success0.850.ckpt``.
        best_optimizer: whether the best files also hold the optimizer's state, two thirds of a file, needed only to train
            on from there exactly.
        initial: whether the untrained weights are kept as ``initial.ckpt``.
        every_n_epochs: epochs between two writes of `last`.
        every_n_steps: optimizer steps between further writes of `last` within an epoch; 0 for none.
        keep_every_n_epochs: epochs between checkpoints that are kept for good, as ``epoch0099.ckpt``, without the optimizer's
            state; 0 for none.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        tie_break: str = "val/loss",
        top_k: int = 0,
        best_optimizer: bool = False,
        initial: bool = False,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        keep_every_n_epochs: int = 0,
    ) -> None:
        if every_n_epochs < 1 or every_n_steps < 0 or top_k < 0 or keep_every_n_epochs < 0:
            raise ValueError("every_n_epochs must be at least 1, every_n_steps, keep_every_n_epochs and top_k at least 0.")
        self.monitor = monitor
        self.mode = mode
        self.tie_break = tie_break
        self.top_k = top_k
        self.best_optimizer = best_optimizer
        self.initial = initial
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.keep_every_n_epochs = keep_every_n_epochs
        self.directory = Path()
        self.best: dict[str, Any] | None = None
        self.top: list[dict[str, Any]] = []
        self._evaluation: Any = None
        self._saved_step = -1  # optimizer step that `last` holds
        self._seen_step = 0
        self._updating = False
        self._waiting = False  # for the end of a validation, to write `last`
        self._checked = False
        self._ending = False
        self._failure: str | None = None  # why the latest file could not be written

    @property
    def best_model_path(self) -> str:
        return str(self.directory / "best.ckpt") if self.best else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"
        if stage != "fit" or not trainer.is_global_zero:
            return
        for leftover in self.directory.glob(".*.partial"):
            leftover.unlink(missing_ok=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = next((c for c in trainer.callbacks if hasattr(c, "evaluated_this_epoch")), None)
        simulated = self._evaluation is not None and self._evaluation.enabled
        if self.monitor is None:
            self.monitor = "val/success" if simulated else "val/loss"
        elif self.monitor.startswith("val/success") and not simulated:
            raise ValueError(
                f"checkpoints.monitor is {self.monitor}, but no simulation runs (evaluation.episodes is 0). Switch it on, or "
                "set checkpoints.monitor: val/loss."
            )
        elif self.monitor.startswith("val/success/") and self.monitor[12:] not in self._evaluation.played_tasks:
            played = ", ".join(self._evaluation.played_tasks)
            raise ValueError(f"checkpoints.monitor is {self.monitor}, a task that simulation does not play; it plays {played}.")
        if self.mode is None:
            self.mode = "max" if "success" in self.monitor else "min"

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.monitor is not None
        if self.monitor.startswith("val/") and not self.monitor.startswith("val/success"):
            self._require_metric(trainer)

    def _require_metric(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"checkpoints.monitor is {self.monitor!r}, which nothing logs. Logged are: {', '.join(sorted(metrics))}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step
        if not trainer.enable_validation or sum(trainer.num_val_batches) == 0:
            say("No validation: checkpoints/last.ckpt is written, checkpoints/best.ckpt is not.")
        if self.initial and trainer.global_step == 0:
            self._save(trainer, "initial.ckpt", optimizer=False)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._updating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._updating = False
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        # Resuming from here would skip a validation that follows: the file is then written after it, at the epoch's last
        # batch after the epoch.
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every_n_steps and step % self.every_n_steps == 0 and not last_batch:
            if _validation_follows(trainer):
                self._waiting = True
            else:
                self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._save_best(trainer)
        if self._waiting:
            self._waiting = False
            self._save_last(trainer)

    def _save_best(self, trainer: Trainer) -> None:
        assert self.monitor is not None
        if (
            self._evaluation is not None
            and self.monitor.startswith("val/success")
            and not self._evaluation.evaluated_this_epoch
        ):
            return  # the logged value is of an earlier epoch
        self._require_metric(trainer)
        metrics = trainer.callback_metrics
        score = float(metrics[self.monitor])
        tie = float(metrics[self.tie_break]) if self.tie_break in metrics else math.inf
        entry: dict[str, Any] = {
            "file": "best.ckpt",
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "monitor": self.monitor,
            "score": score,
            "tie": tie,
        }
        entry = trainer.strategy.broadcast(entry)
        if math.isnan(entry["score"]):
            return
        if self._rank(entry) < self._rank(self.best):
            former, self.best = self.best, entry
            if not self._save(trainer, "best.ckpt", optimizer=self.best_optimizer):
                self.best = former
            elif trainer.is_global_zero:
                _write_json(self.directory / "checkpoint.json", entry)
        if self.top_k:
            self._keep_top(trainer, entry)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.keep_every_n_epochs and epochs % self.keep_every_n_epochs == 0:
            self._save(trainer, f"epoch{trainer.current_epoch:04d}.ckpt", optimizer=False)
        if epochs % self.every_n_epochs == 0 or epochs == trainer.max_epochs:
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ending = True
        if self._saved_step != trainer.global_step or self._failure is not None:
            self._save_last(trainer)
        if self._failure is not None:
            raise CheckpointNotWritten(f"The last checkpoint could not be written: {self._failure}")
        if self.best is not None:
            best = self.best
            say(f"Best {best['monitor']} {best['score']:.4g} in epoch {best['epoch']}: {self.best_model_path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.optimizers or trainer.fast_dev_run:
            return
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        accumulating = (
            progress.completed % trainer.accumulate_grad_batches and progress.completed < trainer.num_training_batches
        )
        between = progress.processed == progress.completed  # else the step's last hooks failed
        sound = between and not self._updating and not accumulating
        if trainer.global_step == 0:
            return
        if isinstance(exception, SIGTERMException | KeyboardInterrupt) or trainer.world_size == 1:
            if isinstance(exception, NoCheckpointNow):
                say(self._kept())
            elif sound:
                try:
                    self._save_last(trainer, interrupted=True)
                except NoCheckpointNow as error:
                    say(f"Not saved: {error} {self._kept()}")
            else:
                say(f"Not saved: the interruption came within an optimizer step. {self._kept()}")
        else:
            say(self._kept())  # the ranks may be at different places

    def kept_for_good(self, max_epochs: int | None) -> int:
        """How many files `keep_every_n_epochs` makes in so many epochs; 1 where their number is not limited."""
        if not self.keep_every_n_epochs:
            return 0
        return max_epochs // self.keep_every_n_epochs if max_epochs is not None and max_epochs > 0 else 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "top": self.top}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.top = list(state_dict["top"])

    def _rank(self, entry: dict[str, Any] | None) -> tuple[float, float]:
        """Sort key: the smaller, the better."""
        if entry is None:
            return (math.inf, math.inf)
        tie = math.inf if math.isnan(entry["tie"]) else entry["tie"]
        return (-entry["score"] if self.mode == "max" else entry["score"], tie)

    def _keep_top(self, trainer: Trainer, entry: dict[str, Any]) -> None:
        assert self.monitor is not None
        entry = entry | {"file": f"epoch{entry['epoch']:04d}_{self.monitor.split('/')[-1]}{entry['score']:.3f}.ckpt"}
        kept = [other for other in self.top if other["file"] != entry["file"]]
        ranked = sorted([*kept, entry], key=self._rank)
        if entry in ranked[: self.top_k] and self._save(trainer, entry["file"], optimizer=self.best_optimizer):
            self.top = ranked[: self.top_k]
            if trainer.is_global_zero:
                for other in ranked[self.top_k :]:
                    (self.directory / other["file"]).unlink(missing_ok=True)

    def _save_last(self, trainer: Trainer, interrupted: bool = False) -> None:
        step = trainer.global_step
        if self._save(trainer, "last.ckpt", optimizer=True, interrupted=interrupted):
            self._saved_step = step

    def _save(self, trainer: Trainer, name: str, *, optimizer: bool, interrupted: bool = False) -> bool:
        """Writes one file; returns False, and says so, when the disk refuses. The former file then stays."""
        if trainer.fast_dev_run:
            return False
        for callback in trainer.callbacks:
            if hasattr(callback, "before_checkpoint"):
                callback.before_checkpoint(trainer, together=not interrupted)  # a guard refuses weights that are not finite
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if interrupted:
            settle(checkpoint["loops"]["fit_loop"], trainer)
        if not optimizer:
            for key in ("optimizer_states", "lr_schedulers"):
                checkpoint.pop(key, None)
        if not self._checked and (offender := foreign_object(checkpoint)):
            raise TypeError(
                f"The checkpoint would not load again: {offender}. Checkpoints hold tensors and plain containers only; convert "
                "it where it is made (paths and numpy numbers to str and float)."
            )
        path = self.directory / name
        self._failure = None
        try:
            trainer.strategy.save_checkpoint(checkpoint, path)
        except (OSError, RuntimeError) as failure:
            self._failure = why_not_written(failure, checkpoint, path)
            goes_on = "" if interrupted or self._ending else "Training goes on; "
            say(f"WARNING: {path.name} could not be written: {self._failure} {goes_on}{self._kept()}")
        if not interrupted and trainer.world_size > 1:  # only the first rank writes; the ranking goes on alike on all
            self._failure = trainer.strategy.broadcast(self._failure)
        if self._failure is not None:
            return False
        if not self._checked and trainer.is_global_zero:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self._checked = True
        return True

    def _kept(self) -> str:
        path = self.directory / "last.ckpt"
        if not path.exists():
            return "There is no checkpoint of this run yet."
        return f"{path} is whole, of step {self._saved_step if self._saved_step >= 0 else 'the run taken up'}."


def _validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes after the batch that has just ended."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher) and sum(trainer.num_val_batches) > 0


def settle(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Turns the loop state of an interrupted run into one that Lightning resumes between two batches, or before a validation.

    An interruption leaves counters that Lightning's restart does not foresee: a batch that began and did not end, a validation
    half done. The batch is done again on resuming, and the whole validation.

    Args:
        fit_loop: the checkpoint's state of the fit loop, changed in place.
        trainer: the interrupted trainer.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    for counters in (batches["total"], batches["current"]):
        counters.update(dict.fromkeys(("ready", "started", "processed"), counters["completed"]))
    epoch_done = batches["current"]["completed"] >= trainer.num_training_batches
    batches["is_last_batch"] = epoch_done
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    zeros = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    validation["current"].update(zeros)
    # "ready and started, not processed" is how Lightning knows a validation that must be run again.
    validation["total"].update(zeros | ({"ready": 1, "started": 1} if trainer.validating else {}))
    validation["is_last_batch"] = False


def foreign_object(value: Any, where: str = "checkpoint") -> str | None:
    """Names the first thing that `torch.load(weights_only=True)` would refuse, None if there is none."""
    if value is None or isinstance(value, (bool, str, bytes, torch.Size, torch.device, torch.dtype)):
        return None
    if type(value) in (int, float, complex) or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, dict):
        if type(value).__name__ not in ("dict", "OrderedDict", "Counter"):
            return f"{where} is a {type(value).__module__}.{type(value).__qualname__}"
        for key, item in value.items():
            found = foreign_object(key, f"{where} (a key)") or foreign_object(item, f"{where}[{key!r}]")
            if found:
                return found
        return None
    if type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            if found := foreign_object(item, f"{where}[{index}]"):
                return found
        return None
    return f"{where} is a {type(value).__module__}.{type(value).__qualname__}"


def why_not_written(failure: OSError | RuntimeError, checkpoint: dict[str, Any], path: Path) -> str:
    """Says what kept a checkpoint from being written; of a disk without space how much it lacks.

    Args:
        failure: what was raised.
        checkpoint: that was to be written.
        path: of the file.
    """
    first: BaseException | None = failure
    while first is not None and not isinstance(first, OSError):  # torch's writer raises an error of its own over the disk's
        first = first.__cause__ or first.__context__
    number = first.errno if isinstance(first, OSError) else None
    cause = (first.strerror if isinstance(first, OSError) else None) or str(first or failure).strip().splitlines()[0]
    need, free = tensor_bytes(checkpoint), shutil.disk_usage(path.parent).free
    if number == errno.EDQUOT:
        return f"{cause}. It needs about {disk_size(need)}, which a quota forbids at {path.parent}. Free space there."
    if number == errno.ENOSPC or free < need:
        return f"{cause}. It needs about {disk_size(need)}, {disk_size(free)} are free at {path.parent}. Free space there."
    return f"{cause} ({path})."


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return sum(map(tensor_bytes, items))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Opens a checkpoint without reading its tensors into memory.

    Raises:
        FileNotFoundError: there is none; names what lies beside.
        ValueError: the file is damaged or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(item.name for item in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"No checkpoint at {path}." + (f" There is: {', '.join(beside)}." if beside else ""))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")  # torch goes on for lines
        raise ValueError(f"{path} is no checkpoint that can be read safely ({first}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # not every file system lets a folder be opened
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
