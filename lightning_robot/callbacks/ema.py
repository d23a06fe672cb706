"""Exponential moving average of the weights: what validation, simulation and the best checkpoint use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class EMA(Callback):
    """Averages the trainable weights and lets everything that judges the policy see the average.

    The schedule is Diffusion Policy's: the decay grows from 0 as ``1 - (1 + n / inv_gamma) ** -power`` with the number n
    of optimizer steps. Buffers are the live ones; weights are exchanged by pointer, so a swap costs nothing. From the start
    of a validation to its end the module holds the average, whatever the order of callbacks; elsewhere use `averaged`.

    A checkpoint's ``state_dict`` holds the raw weights, ``ema_state_dict`` the averaged ones by the same names, and
    ``ema_updates`` the number of updates: resuming is exact.

    Args:
        enabled: False switches averaging off.
        power: exponent of the warm-up; 0.75 suits runs of 10,000 and more steps.
        inv_gamma: steps by which the warm-up is stretched.
        min_value: smallest decay after the first updates.
        max_value: largest decay.
        update_after_step: updates during which the average is a plain copy.
    """

    def __init__(
        self,
        enabled: bool = True,
        power: float = 0.75,
        inv_gamma: float = 1.0,
        min_value: float = 0.0,
        max_value: float = 0.9999,
        update_after_step: int = 0,
    ) -> None:
        self.enabled = enabled
        self.power = power
        self.inv_gamma = inv_gamma
        self.min_value = min_value
        self.max_value = max_value
        self.update_after_step = update_after_step
        self.updates = 0
        self._names: list[str] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._shadow: list[Tensor] = []  # while swapped: the raw weights
        self._depth = 0
        self._validating = False
        self._loaded: dict[str, Tensor] | None = None
        self._seen_step = 0

    def decay(self, update: int) -> float:
        """Share of the old average that update number `update` (from 0) keeps."""
        step = max(0, update - self.update_after_step - 1)
        if step == 0:
            return 0.0
        return min(self.max_value, max(self.min_value, 1 - (1 + step / self.inv_gamma) ** -self.power))

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[LightningModule]:
        """The module with averaged weights inside the block; may be nested; raw weights are back after an exception too."""
        self._enter(pl_module)
        try:
            yield pl_module
        finally:
            self._leave()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            self._track(pl_module)
            self._seen_step = -1  # the trainer restores its step counter after this hook

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.enabled or trainer.global_step == self._seen_step:
            return  # gradients are being accumulated: no weight has moved
        self._seen_step = trainer.global_step
        with torch.no_grad():
            torch._foreach_lerp_(self._shadow, [p.data for p in self._parameters], 1.0 - self.decay(self.updates))
        self.updates += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and not self._validating:
            self._enter(pl_module)
            self._validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validating:
            self._validating = False
            self._leave()

    on_test_start = on_validation_start
    on_test_end = on_validation_end
    on_predict_start = on_validation_start
    on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._validating = False
        while self._depth:
            self._leave()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.enabled or not self._parameters:
            return
        live = [parameter.data for parameter in self._parameters]
        raw, average = (self._shadow, live) if self._depth else (live, self._shadow)
        state = checkpoint["state_dict"]
        state.update(zip(self._names, raw, strict=True))
        checkpoint["ema_state_dict"] = {**state, **dict(zip(self._names, average, strict=True))}
        checkpoint["ema_updates"] = self.updates

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        average = checkpoint.get("ema_state_dict")
        fitting = trainer.state.fn == "fit"
        if average is not None and not self.enabled and fitting:
            raise ValueError(
                "The checkpoint holds averaged weights but averaging is switched off: training would go on without them. "
                "Set ema.enabled: true, or start a new run with --init_from."
            )
        if average is None and self.enabled and fitting:
            raise ValueError(
                "The checkpoint holds no averaged weights but ema.enabled is true. Set ema.enabled: false, or start a new run "
                "with --init_from."
            )
        if average is not None and self.enabled:
            self._loaded = average  # the module is not on its device yet
            self.updates = int(checkpoint["ema_updates"])

    def _track(self, pl_module: LightningModule) -> None:
        """Starts (or takes up) the average of the module's trainable parameters."""
        trainable = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad and p.is_floating_point()]
        half = [name for name, parameter in trainable if parameter.dtype not in (torch.float32, torch.float64)]
        if half:
            raise ValueError(
                f"Averaging needs float32 weights, but {half[0]} is {dict(trainable)[half[0]].dtype}: small changes would be "
                "lost. Use a mixed precision (trainer.precision: bf16-mixed), or ema.enabled: false."
            )
        if any(type(parameter.data).__name__ == "DTensor" for _, parameter in trainable) or _is_sharded(pl_module):
            raise ValueError("Averaging does not work with sharded weights. Set ema.enabled: false, or use DDP.")
        self._names = [name for name, _ in trainable]
        self._parameters = [parameter for _, parameter in trainable]
        if self._loaded is None:
            self._shadow = [parameter.data.clone() for parameter in self._parameters]
            return
        missing = [name for name in self._names if name not in self._loaded]
        if missing:
            raise ValueError(f"The checkpoint's averaged weights lack {', '.join(missing[:5])}.")
        self._shadow = [
            self._loaded[n].to(device=p.device, dtype=p.dtype, copy=True)
            for n, p in zip(self._names, self._parameters, strict=True)
        ]
        self._loaded = None

    def _enter(self, pl_module: LightningModule) -> None:
        if not self._parameters and self._loaded is not None:
            self._track(pl_module)  # validate, test or predict with a checkpoint
        if self._depth == 0:
            self._exchange()
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._shadow[index] = self._shadow[index], parameter.data


def _is_sharded(pl_module: LightningModule) -> bool:
    trainer = pl_module._trainer
    return trainer is not None and type(trainer.strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy")
