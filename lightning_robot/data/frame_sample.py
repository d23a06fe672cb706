"""The verification pass at the end of what is written: some frames, kept as they came, compared with what is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_robot.console import counted
from lightning_robot.data.store import StoreError

LOSSY_PICTURE = 24.0
"""Mean difference of a picture, of 255, that lossy video may make; that of another frame's picture is usually larger."""

LOSSY_DEPTH = 0.005
"""Metres: half a step of the 12-bit code at 10 m, and rounding to millimetres."""


class FrameSample:
    """Some frames of everything that is written, evenly spread."""

    def __init__(self, num_frames: int, count: int = 32) -> None:
        self.rows = np.unique(np.linspace(0, num_frames - 1, count).astype(np.int64))
        self._seen = 0
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sees the next frames, in the order in which they are written: per key (T, ...) as stores hold them."""
        length = len(next(iter(arrays.values())))
        for row in self.rows[(self.rows >= self._seen) & (self.rows < self._seen + length)].tolist():
            self._kept[row] = {key: np.array(array[row - self._seen]) for key, array in arrays.items()}
        self._seen += length

    def compare(self, dataset: Any, lengths: Sequence[int], *, lossy: bool = False) -> str:
        """Checks the dataset that was written.

        Args:
            dataset: an open store, or a folder that reads as one.
            lengths: of the episodes, in the order in which they were written.
            lossy: pictures went through video, depth through a code.

        Returns:
            The outcome in one sentence.

        Raises:
            StoreError: number, order or length of episodes, or a frame, is another.
        """
        have = np.diff(dataset.episode_ends, prepend=0)
        if len(have) != len(lengths) or (have != np.asarray(lengths)).any():
            raise StoreError(
                f"{dataset.path} does not hold what was written: {len(have)} episodes of {int(have.sum())} frames for "
                f"{len(lengths)} of {int(np.sum(lengths))}, or in another order. Delete it, and run the same again."
            )
        rows = np.array(sorted(self._kept))
        worst = 0.0
        for key in self._kept[int(rows[0])] if len(rows) else ():
            for row, frame in zip(rows.tolist(), dataset.gather(key, rows)):
                apart = np.abs(frame.astype(np.float64) - self._kept[row][key].astype(np.float64))
                picture, depth = key.startswith("observation.images."), key.startswith("observation.depth.")
                allowed = 0.0
                if depth and lossy:
                    allowed, apart = LOSSY_DEPTH, np.where(np.abs(self._kept[row][key] - 5.005) < 4.995, apart, 0)
                elif picture and lossy:
                    allowed, apart = LOSSY_PICTURE, apart.mean(keepdims=True)
                    worst = max(worst, float(apart.max()))
                if not (apart <= allowed).all():
                    raise StoreError(
                        f"{dataset.path}: {key} of frame {row} is not what was written: it differs by up to {apart.max():.3g}. "
                        "Delete it, and run the same again; check the disk if that does not help."
                    )
        pictures = f", pictures within {worst:.1f} of 255 on average" if worst else ""
        return (
            f"Verified: {counted(len(have), 'episode')} and {counted(int(have.sum()), 'frame')} in order; "
            f"{counted(len(rows), 'frame')} read back as written{pictures}."
        )
