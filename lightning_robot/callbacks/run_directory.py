"""The run directory: named once, absolute, holding everything a run writes and everything that explains it."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_robot.console import is_first_process, say

HANDED_OVER = "LIGHTNING_ROBOT_RUN_DIRECTORY"
VERSIONED = (
    "lightning_robot",
    "torch",
    "lightning",
    "jsonargparse",
    "diffusers",
    "zarr",
    "mujoco",
    "gymnasium",
    "numpy",
    "timm",
)


class RunDirectory(Callback):
    """Describes the run in ``run.json`` and ``config.yaml`` of ``<root>/<experiment>/<date-time>_seed<seed>``.

    ``<root>/latest`` and ``<root>/<experiment>/latest`` are links to the newest run that trained at least a batch. Everything
    that training writes is inside; nothing depends on the folder it was started from. Epochs count from 0 everywhere: in
    lines, metrics and names.

    Args:
        root: where runs are kept.
        experiment: what the run belongs to; names a folder, ``a/b`` one inside the other.
        tensorboard: whether TensorBoard's event files are written beside ``metrics.csv``.
    """

    def __init__(self, root: str = "runs", experiment: str = "experiment", tensorboard: bool = True) -> None:
        self.root = root
        self.experiment = experiment
        self.tensorboard = tensorboard
        self.path = Path()
        self.config_text = ""
        self.seed = 0
        self.resumed = False
        self.init_from: str | None = None
        self._linked = False

    def begin(self, path: Path, config_text: str, seed: int, resumed: bool, init_from: str | None) -> None:
        """Tells the callback which directory the run has, before the loggers are made."""
        self.path, self.config_text, self.seed = path, config_text, seed
        self.resumed, self.init_from = resumed, init_from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.path == Path():
            return
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        trainer._default_root_dir = str(self.path)  # the same on every rank, also where no launcher handed it over
        if not trainer.is_global_zero:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            _write(self.path / "config.yaml", self.config_text)
        say(f"Run directory: {self.path}")
        self._record(trainer, describe_run(trainer, self.seed, self.init_from))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("The run has no end: set trainer.max_epochs or trainer.max_steps (schedules need the total).")
        batch = batch_statement(trainer)
        left = f", {int(total) - trainer.global_step:,} of them left" if trainer.global_step else ""
        say(
            f"Effective batch size {batch['effective']} = {batch['per_device']} per device x {batch['devices']} devices x "
            f"{batch['nodes']} nodes x {batch['accumulation']} accumulated. {batch['steps_per_epoch']:,} optimizer steps per "
            f"epoch, {int(total):,} in total{left}."
        )
        if left_over := int(trainer.num_training_batches) % trainer.accumulate_grad_batches:
            say(
                f"WARNING: an epoch's last step has {left_over} batches instead of {trainer.accumulate_grad_batches}: its "
                "gradient is too small. Make the number of batches a multiple (the episode data modules do so by themselves)."
            )
        if trainer.is_global_zero and self.path != Path():
            self._record(trainer, {"batch": batch, "total_steps": int(total)})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not before: a run that cannot train must not hide the one before it; nor a trial, which leaves nothing to go on from.
        if self._linked or not trainer.is_global_zero or self.path == Path() or trainer.fast_dev_run:
            return
        self._linked = True
        for folder in self.path.parents[: len(Path(self.experiment).parts) + 1]:
            _link(folder / "latest", self.path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["next_logged_step"] = next_logged_step(trainer)
        checkpoint["unlogged"] = unlogged_row(trainer)
        checkpoint["data_fingerprint"] = getattr(trainer.datamodule, "fingerprint", None)

    def _record(self, trainer: Trainer, content: dict[str, Any]) -> None:
        path = self.path / "run.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if self.resumed and "command" in content:
            taken_up = {key: content[key] for key in ("command", "started", "machine", "versions", "git")}
            record.setdefault("taken_up", []).append(taken_up)
            if record.get("data", {}).get("fingerprint") != content["data"]["fingerprint"]:
                say("WARNING: the data are not those that the run began with (their fingerprints differ).")
        else:
            record.update(content)
        _write(path, json.dumps(record, indent=2, default=str) + "\n")


def name_run(root: str | Path, experiment: str, seed: int) -> Path:
    """Chooses and creates the directory of a new run; other processes of the run get the name from rank 0."""
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", experiment) or ".." in experiment:
        raise ValueError(f"run.experiment is {experiment!r}; use letters, digits, '_', '-' and '.', it names a folder.")
    handed_over = os.environ.get(HANDED_OVER)
    if handed_over and not is_first_process():
        return Path(handed_over)
    base = Path(root).expanduser().absolute() / experiment / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_seed{seed}"
    path, number = base, 1
    while is_first_process():
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        except OSError as error:
            raise ValueError(f"No run directory can be made in {root} ({error}): set run.root.") from error
    os.environ[HANDED_OVER] = str(path)
    return path


def find_run(name: str, root: str | Path = "runs") -> Path:
    """Finds a run to take up: a path, or ``latest``.

    Raises:
        FileNotFoundError: names where was looked and how a fresh run is started.
    """
    path = Path(root).expanduser() / "latest" if name == "latest" else Path(name).expanduser()
    if path.name == "last.ckpt":
        path = path.parent.parent
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(
            f"Nothing to resume: {path.absolute()} is no run directory (no config.yaml). For a fresh start leave --resume out: "
            "fit --config FILE."
        )
    path = path.resolve()
    if not (path / "checkpoints" / "last.ckpt").is_file():
        raise FileNotFoundError(
            f"Nothing to resume: {path} holds no checkpoints/last.ckpt. For a fresh start with its settings: fit --config "
            f"{path / 'config.yaml'}."
        )
    return path


def next_logged_step(trainer: Trainer) -> int:
    """The step under which the first row after this moment will be logged."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    # Lightning counts the step after the batch's last hook and after the validation that follows it.
    counted_later = progress.processed == progress.completed + 1 or trainer.validating
    return loop._batches_that_stepped + int(counted_later and not loop._should_accumulate())


def unlogged_row(trainer: Trainer) -> dict[str, float] | None:
    """The row of metrics that the trainer logs once the hooks of the present batch are over, None if there is none.

    A kill between the writing of a checkpoint and the logging of its step would lose it.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.current
    within_hooks = progress.processed == progress.completed + 1
    if not within_hooks or loop._should_accumulate() or not connector.should_update_logs:
        return None
    row = {name: float(value) for name, value in connector.metrics["log"].items()}  # type: ignore[arg-type]
    return {"step": loop._batches_that_stepped, "epoch": trainer.current_epoch, **row}


def batch_statement(trainer: Trainer) -> dict[str, int]:
    """The batch sizes of a run: per device, in all, and optimizer steps per epoch."""
    per_device = int(getattr(trainer.datamodule, "batch_size", 0) or 0)
    accumulation = trainer.accumulate_grad_batches
    return {
        "per_device": per_device,
        "devices": trainer.num_devices,
        "nodes": trainer.num_nodes,
        "accumulation": accumulation,
        "effective": per_device * trainer.world_size * accumulation,
        "steps_per_epoch": -(-int(trainer.num_training_batches) // accumulation),
    }


def describe_run(trainer: Trainer, seed: int, init_from: str | None) -> dict[str, Any]:
    """What made the run: command, versions, commit, machine, data, seeds."""
    data = trainer.datamodule
    features = getattr(data, "features", None)
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": seed,
        "init_from": init_from,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED},
        "git": git_commit(Path(__file__).parent),
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        },
        "data": {
            "class_path": f"{type(data).__module__}.{type(data).__qualname__}" if data is not None else None,
            "fingerprint": getattr(data, "fingerprint", None),
            "source": dict(features.source) if features is not None else {},
            "train_windows": _size(getattr(data, "train_windows", None)),
        },
    }


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the code runs from, and whether it was changed; None outside a checkout."""
    try:
        run = ["git", "-C", str(folder)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if commit.returncode:
            return None
        status = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
    except (OSError, subprocess.TimeoutExpired):
        return None


def _size(value: Any) -> int | None:
    try:
        return int(value) if isinstance(value, int) else len(value)
    except TypeError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)


def _link(link: Path, target: Path) -> None:
    """Points `link` at `target`; a real file or folder of that name is left alone."""
    if link.exists() and not link.is_symlink():
        return
    aside = link.with_name(f".latest.{os.getpid()}")
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(target, link.parent))
        os.replace(aside, link)
    except OSError:
        return  # file systems without links
