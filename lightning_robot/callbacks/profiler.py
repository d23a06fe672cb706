"""Where a training step's time goes: torch's profiler over a few steps."""

from __future__ import annotations

import torch
from lightning.pytorch.profilers import PyTorchProfiler


class StepProfiler(PyTorchProfiler):
    """Records `active` steps after `wait` and `warmup` ones: a trace in the run directory, a table at the end.

    Args:
        wait: steps that are not looked at.
        warmup: steps during which the profiler runs but forgets.
        active: steps that are recorded.
        rows: lines of the table.
    """

    def __init__(self, wait: int = 10, warmup: int = 5, active: int = 10, rows: int = 25) -> None:
        super().__init__(
            filename="profile",
            row_limit=rows,
            schedule=torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        )
