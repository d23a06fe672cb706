"""Guards: what would cost a night is noticed in the first seconds, or stops the run with its cause."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_robot.callbacks.checkpoints import Checkpoints, NoCheckpointNow
from lightning_robot.console import disk_size, say

IDENTITY = ("episode_index", "segment_index", "frame_index")


class NonFiniteError(FloatingPointError, NoCheckpointNow):
    """The loss or a gradient is not a finite number."""


class DiskFullError(OSError):
    """The file system of the run directory cannot hold the run's checkpoints."""

    def __str__(self) -> str:
        return str(self.strerror)


class Guards(Callback):
    """Stops on numbers that are not finite, refuses a start without disk space or with parameters that are not float32, and
    reports what is (not) trained.

    The loss of every batch is checked; on an accelerator the answer is fetched every `check_every_n_steps` steps and before
    each checkpoint, so that no step waits for it. The identity of the batches (episode, segment, frame) is written to
    ``nonfinite/`` in the run directory. All ranks stop together.

    Args:
        nonfinite: ``stop``, or ``skip`` an update whose gradient is not finite (costs a wait per step); 20 in a row stop.
        check_every_n_steps: micro-steps between two looks at the recorded losses; on one CPU process every loss is looked at.
        check_disk: whether a start is refused when the checkpoints would not fit.
    """

    def __init__(self, nonfinite: Literal["stop", "skip"] = "stop", check_every_n_steps: int = 20, check_disk: bool = True):
        self.nonfinite = nonfinite
        self.check_every_n_steps = check_every_n_steps
        self.check_disk = check_disk
        self.skipped = 0
        self._in_a_row = 0
        self._losses: list[Tensor] = []
        self._identities: list[dict[str, Any]] = []
        self._batch: dict[str, Any] = {}
        self._reported = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_other_than_float32(pl_module)
        if trainer.is_global_zero and self.check_disk and not trainer.fast_dev_run:
            keeper = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)
            if keeper is not None:
                averaging = any(getattr(c, "enabled", False) and hasattr(c, "averaged") for c in trainer.callbacks)
                needed = checkpoint_bytes(pl_module, keeper, averaging, trainer.max_epochs)
                present = sum(file.stat().st_size for file in keeper.directory.glob("*.ckpt"))
                require_space(keeper.directory, max(0, needed - present))
        say(describe_parameters(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses.clear()
        self._identities.clear()
        for number, group in enumerate(group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            count = sum(parameter.numel() for parameter in group["params"])
            rate = group.get("initial_lr", group["lr"])
            say(
                f"Optimizer group {number}: {count:,} parameters, learning rate {rate:g}, weight decay "
                f"{group.get('weight_decay', 0):g}."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        rows = {key: batch[key] for key in IDENTITY if isinstance(batch, dict) and key in batch}
        self._batch = {"epoch": trainer.current_epoch, "batch": batch_idx, "step": trainer.global_step, **rows}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.nonfinite == "skip":
            return  # decided by the gradient, which all ranks share
        self._losses.append(loss.detach())
        self._identities.append(self._batch)
        alone_on_cpu = trainer.world_size == 1 and loss.device.type == "cpu"
        if alone_on_cpu and not torch.isfinite(loss):  # before the weights are touched
            self._stop(trainer, "loss")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self._reported:
            self._reported = True
            unused = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                say(f"WARNING: {len(unused)} trainable parameters take no part in the loss: {', '.join(unused[:8])}.")
        if self.nonfinite != "skip" and (trainer.global_step + 1) % self.check_every_n_steps:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # fp16: the gradient scaler meets overflows on purpose and skips those updates
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = torch.stack([n.to(gradients[0].device) for n in torch._foreach_norm(gradients)]).norm()
        if self.nonfinite == "skip":
            self._skip(trainer, norm, optimizer)
        else:
            self._losses.append(norm)
            self._identities.append(self._batch | {"what": "gradient"})
            if norm.device.type == "cpu" and trainer.world_size == 1 and not torch.isfinite(norm):
                self._stop(trainer, "gradient")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.check_every_n_steps == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def before_checkpoint(self, trainer: Trainer, together: bool) -> None:
        """Called before a checkpoint is written: weights that are not finite must not replace good ones."""
        self._look(trainer, together)

    def _look(self, trainer: Trainer, together: bool = True) -> None:
        """Fetches the recorded losses; raises on every rank when any of them is not finite on any rank."""
        if not self._losses:
            return
        finite = torch.stack([loss.float() for loss in self._losses]).isfinite()
        bad = ~finite.all()
        if together and trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0
        if bool(bad):
            self._stop(trainer, "loss", finite.cpu().tolist())
        self._losses.clear()
        self._identities.clear()

    def _stop(self, trainer: Trainer, what: str, finite: list[bool] | None = None) -> None:
        first = finite.index(False) if finite is not None and False in finite else len(self._identities) - 1
        culprit = self._identities[first]
        what = culprit.get("what", what)
        here = finite is None or False in finite
        record = {
            "what": what,
            "rank": trainer.global_rank,
            "on_this_rank": here,
            "value": float(self._losses[first]),
            "batch": _plain(culprit),
            "batch_before": _plain(self._identities[first - 1]) if first > 0 else None,
        }
        folder = Path(trainer.default_root_dir) / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step{trainer.global_step:07d}_rank{trainer.global_rank}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        place = f"epoch {culprit['epoch']}, batch {culprit['batch']}"
        raise NonFiniteError(
            f"The {what} is {record['value']} at {place}"
            + ("" if here else " (on another rank)")
            + f"; the batch's episodes and frames are in {path}. Look at that data, lower the learning rate, or clip gradients "
            "(trainer.gradient_clip_val: 1.0); guards.nonfinite: skip leaves such updates out."
        )

    def _skip(self, trainer: Trainer, norm: Tensor, optimizer: Any) -> None:
        if torch.isfinite(norm):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        say(f"Skipped the update of epoch {self._batch['epoch']}, batch {self._batch['batch']}: gradient norm {float(norm)}.")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self._in_a_row >= 20:
            self._losses, self._identities = [norm], [self._batch]
            self._stop(trainer, "gradient of 20 updates in a row")


def refuse_other_than_float32(pl_module: LightningModule) -> None:
    """Raises ValueError where a trainable parameter is not float32: in half precision small updates would round to nothing."""
    for name, parameter in pl_module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {kind}, but parameters are trained in float32: half precision loses small updates, and the "
                "normaliser is float32 in any case. Set trainer.precision: bf16-mixed (or 32-true), which keeps them so."
            )


def describe_parameters(pl_module: LightningModule) -> str:
    """One line: how many parameters there are, and which are frozen."""
    trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    frozen = [(name, p.numel()) for name, p in pl_module.named_parameters() if not p.requires_grad]
    line = f"{type(pl_module).__name__}: {trainable:,} trainable parameters"
    if frozen:
        places = sorted({name.split(".")[0] for name, _ in frozen})
        line += f", {sum(count for _, count in frozen):,} frozen ({', '.join(places)})"
    return line + "."


def checkpoint_bytes(
    pl_module: LightningModule, checkpoints: Checkpoints, averaging: bool, max_epochs: int | None = None
) -> int:
    """Bytes that the run's checkpoints need at most: raw, averaged, two moments, and one file more while it is written."""
    weights = sum(t.numel() * t.element_size() for t in [*pl_module.parameters(), *pl_module.buffers()])
    trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
    slim = weights + (trained if averaging else 0)
    full = slim + 2 * trained
    best = full if checkpoints.best_optimizer else slim
    kept = checkpoints.kept_for_good(max_epochs) + checkpoints.initial
    return full + best * (1 + checkpoints.top_k) + slim * kept + full


def require_space(folder: Path, needed: int) -> None:
    """Refuses when the file system of `folder` cannot take `needed` bytes; a quota counts, not only what `df` shows.

    Raises:
        DiskFullError: names the file system, the need and what is free.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free >= needed and _can_reserve(there, needed):
        return
    told = f"{disk_size(free)} free" if free < needed else "a quota forbids more"
    raise DiskFullError(
        errno.ENOSPC,
        f"The checkpoints need up to {disk_size(needed)} at {folder}, {told} there. Free space, choose another disk "
        "(run.root), keep fewer files (checkpoints.top_k, checkpoints.keep_every_n_epochs), or start anyway with "
        "guards.check_disk: false",
    )


def _can_reserve(folder: Path, size: int) -> bool:
    """Tries to reserve the bytes for a moment: the only way to see quotas. True where that cannot be tried."""
    if size == 0 or not hasattr(ctypes, "CDLL") or not os.path.exists("/proc/mounts"):
        return True
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(m), kind) for m, kind in mounts if str(folder.resolve()).startswith(m)]
    if not inside or max(inside)[1] in ("tmpfs", "ramfs"):
        return True  # would take memory
    probe = folder / f".space.{os.getpid()}.partial"
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        with probe.open("wb") as file:
            result = libc.fallocate(file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(size))
            return result == 0 or ctypes.get_errno() not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    except (OSError, AttributeError):
        return True
    finally:
        probe.unlink(missing_ok=True)


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in identity.items()}
