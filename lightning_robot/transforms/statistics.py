"""Per-element statistics of an array, streamed block by block."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

QUANTILE_ROWS = 1 << 18
"""Rows kept for the quantiles. Up to twice as many are read exactly; of more, every second, fourth, eighth … row."""


@dataclass(frozen=True)
class Statistics:
    """Statistics over every axis but the last; each array has shape (D,) and float64.

    Attributes:
        min: smallest value, exact.
        max: largest value, exact.
        mean: mean.
        std: deviation with N - 1 in the denominator (as the Diffusion Policy family computes it).
        q01: quantile of 1 %; see `QUANTILE_ROWS`.
        q99: quantile of 99 %.
        count: number of rows (N).
    """

    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    count: int

    @property
    def size(self) -> int:
        """Number of elements D."""
        return len(self.min)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, fit for JSON and checkpoints."""
        return {f.name: v.tolist() if isinstance(v := getattr(self, f.name), np.ndarray) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Statistics:
        arrays: dict[str, Any] = {name: np.asarray(value, np.float64) for name, value in values.items() if name != "count"}
        return cls(**arrays, count=int(values["count"]))


class StatisticsAccumulator:
    """Sees an array block by block and forgets it; the order of blocks changes only rounding in `mean` and `std`.

    Moments are combined as in Chan, Golub & LeVeque (1983): no cancellation, whatever the offset of the data.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[np.ndarray] = []  # every `_stride`-th row
        self._kept_rows = 0
        self._stride = 1

    def update(self, block: np.ndarray) -> None:
        """Adds a block of shape (..., D).

        Raises:
            ValueError: the block holds NaN or infinity, or its last axis has another size than earlier blocks.
        """
        rows = np.asarray(block)
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) == 0:
            return
        low, high = _extremes(rows)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            bad = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))).tolist()
            raise ValueError(f"values of element(s) {bad} are not finite (NaN or infinity)")
        mean = rows.mean(axis=0, dtype=np.float64)
        deviation = rows - mean
        squares = np.einsum("nd,nd->d", deviation, deviation)
        self._keep(rows)
        if self.count == 0:
            self._min, self._max, self._mean, self._squares, self.count = low, high, mean, squares, len(rows)
            return
        if len(low) != len(self._min):
            raise ValueError(f"a block of size {len(low)} after blocks of size {len(self._min)}")
        total = self.count + len(rows)
        delta = mean - self._mean
        self._squares += squares + delta**2 * (self.count * len(rows) / total)
        self._mean += delta * (len(rows) / total)
        self._min, self._max = np.minimum(self._min, low), np.maximum(self._max, high)
        self.count = total

    def result(self) -> Statistics:
        """Statistics of everything seen.

        Raises:
            ValueError: nothing was seen.
        """
        if self.count == 0:
            raise ValueError("no rows to compute statistics from")
        q01, q99 = np.quantile(np.concatenate(self._kept).astype(np.float64), (0.01, 0.99), axis=0)
        std = np.sqrt(self._squares / max(self.count - 1, 1))
        return Statistics(self._min, self._max, self._mean.copy(), std, q01, q99, self.count)

    def _keep(self, rows: np.ndarray) -> None:
        """Keeps rows whose position in the whole stream is a multiple of the stride, which doubles when there are too many."""
        self._kept.append(rows[-self.count % self._stride :: self._stride].copy())
        self._kept_rows += len(self._kept[-1])
        while self._kept_rows > 2 * QUANTILE_ROWS:
            self._kept = [np.concatenate(self._kept)[::2].copy()]
            self._kept_rows, self._stride = len(self._kept[0]), self._stride * 2


def _extremes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value per column, float64. Columns are contiguous in the copy: reductions then vectorise."""
    columns = np.ascontiguousarray(rows.T)
    return columns.min(axis=1).astype(np.float64), columns.max(axis=1).astype(np.float64)
