"""Success rates as torchmetrics: counts are summed over processes before anything is divided."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robot.evaluation.result import wilson


class SuccessRate(Metric):
    """Share of successful episodes.

    Example:
        >>> rate = SuccessRate()
        >>> rate.update(torch.tensor([True, False, True, True]))
        >>> rate.compute()
        tensor(0.7500)
    """

    full_state_update = False
    higher_is_better = True
    successes: Tensor
    episodes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("successes", default=torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("episodes", default=torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, success: Tensor | bool) -> None:
        """Counts outcomes: one boolean, or a tensor of any shape with one boolean per episode."""
        success = torch.as_tensor(success, dtype=torch.bool)
        self.successes += success.sum().to(self.successes.device)
        self.episodes += success.numel()

    def compute(self) -> Tensor:
        """() float32: the rate over all processes, NaN without an episode."""
        return self.successes.float() / self.episodes.float()

    def wilson(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval over all processes; see `lightning_robot.evaluation.result.wilson`.

        Every process must call it, since the counts are exchanged.
        """
        with self.sync_context(should_sync=not self._is_synced, should_unsync=not self._is_synced):
            return wilson(int(self.successes), int(self.episodes), confidence)
