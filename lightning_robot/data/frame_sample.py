"""A sample of frames as they came from their source, compared with what is read back of the dataset they went into."""

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

MILLIMETRES = 0.000501
"""Metres: depth as PNG is in whole millimetres, up to 65 m."""

REMEDY = "Check disk and memory, and make it anew."


class FrameSample:
    """Some frames of everything that is written, evenly spread."""

    def __init__(self, num_frames: int, count: int = 32) -> None:
        self.rows = np.unique(np.linspace(0, num_frames - 1, count).astype(np.int64))
        self._seen = 0
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    @classmethod
    def of(cls, source: Any, keys: Sequence[str]) -> FrameSample:
        """The sample of a source that lies there as a whole: an open store, or what reads as one."""
        sample = cls(source.num_frames)
        found = {key: source.gather(key, sample.rows) for key in keys}
        sample._kept = {row: {key: found[key][index] for key in keys} for index, row in enumerate(sample.rows.tolist())}
        return sample

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sees the next frames, in the order in which they are written: per key (T, ...) as stores hold them."""
        length = len(next(iter(arrays.values())))
        for row in self.rows[(self.rows >= self._seen) & (self.rows < self._seen + length)].tolist():
            self._kept[row] = {key: np.array(array[row - self._seen]) for key, array in arrays.items()}
        self._seen += length

    def compare(self, dataset: Any, lengths: Sequence[int], pictures: str | None = None) -> str:
        """Checks the dataset that was written.

        Args:
            dataset: an open store, or a folder that reads as one.
            lengths: of the episodes, in the order in which they were written.
            pictures: how a LeRobot dataset holds pictures: ``png``, else through lossy video. None for a store.

        Returns:
            What was compared, for the sentence of the outcome.

        Raises:
            StoreError: number, order or length of episodes, or a frame, is another.
        """
        have = np.diff(dataset.episode_ends, prepend=0)
        if len(have) != len(lengths) or (have != np.asarray(lengths)).any():
            raise StoreError(
                f"{dataset.path} does not hold what was written: {len(have)} episodes of {int(have.sum())} frames for "
                f"{len(lengths)} of {int(np.sum(lengths))}, or in another order. {REMEDY}"
            )
        rows = np.array(sorted(self._kept))
        worst = 0.0
        for key in self._kept[int(rows[0])] if len(rows) else ():
            for row, frame in zip(rows.tolist(), dataset.gather(key, rows)):
                apart, allowed = difference(key, self._kept[row][key], frame, pictures)
                if not (apart <= allowed).all():
                    raise StoreError(
                        f"{dataset.path}: {key} of frame {row} is not what was written: it differs by up to {apart.max():.3g}. "
                        f"{REMEDY}"
                    )
                if allowed == LOSSY_PICTURE:
                    worst = max(worst, float(apart.max()))
        video = f", pictures within {worst:.1f} of 255 on average" if worst else ""
        return f"{counted(len(rows), 'frame')} read back as written{video}"


def difference(key: str, source: np.ndarray, frame: np.ndarray, pictures: str | None) -> tuple[np.ndarray, float]:
    """How far a frame that was read is from its source, and how far it may be.

    Args:
        key: batch key.
        source: (...) as it was written.
        frame: of the same shape, as it is read.
        pictures: see `FrameSample.compare`.
    """
    apart = np.abs(frame.astype(np.float64) - source.astype(np.float64))
    if pictures is not None and key.startswith("observation.depth."):
        if pictures == "png":
            return np.where((source >= 0) & (source < 65.5), apart, 0), MILLIMETRES
        return np.where(np.abs(source - 5.005) < 4.995, apart, 0), LOSSY_DEPTH  # 1 cm to 10 m
    if pictures not in (None, "png") and key.startswith("observation.images."):
        return apart.mean(keepdims=True), LOSSY_PICTURE
    return np.where(np.isnan(source) & np.isnan(frame), 0, apart) if source.dtype.kind == "f" else apart, 0.0
