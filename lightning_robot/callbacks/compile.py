"""torch.compile by one switch, the same for every policy."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_robot.console import say


class Compile(Callback):
    """Compiles the policy's `compilable` networks in place: checkpoints keep their keys, no attribute appears.

    Args:
        enabled: the switch. The first step then takes a minute or so.
        mode: torch.compile's mode.
        backend: ``inductor``; ``eager`` only traces, for tests.
    """

    def __init__(
        self,
        enabled: bool = False,
        mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default",
        backend: str = "inductor",
    ) -> None:
        self.enabled = enabled
        self.mode = mode
        self.backend = backend

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        networks = list(getattr(pl_module, "compilable", []))
        if not networks:
            raise ValueError(f"{type(pl_module).__name__} names no network to compile. Set compile.enabled: false.")
        mode = self.mode if self.backend == "inductor" else None
        for network in networks:
            network.compile(backend=self.backend, mode=mode, dynamic=False)
        say(f"Compiling {', '.join(type(network).__name__ for network in networks)} ({self.backend}, {self.mode}).")
