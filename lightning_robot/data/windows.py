"""Windows: the slices of episodes that a policy trains on, their index, the split of episodes, and their batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_robot.data.sampler import WindowBatch
from lightning_robot.data.workers import usable_cores


def window_index(
    episode_ends: np.ndarray, horizon: int, pad_before: int, pad_after: int, episode_mask: np.ndarray | None = None
) -> np.ndarray:
    """Rows of the published window index (`create_indices` of the Diffusion Policy family).

    Args:
        episode_ends: (E,) exclusive ends.
        horizon: L, steps of a window.
        pad_before: steps that a window may begin before its episode, at most L - 1.
        pad_after: steps that a window may end after its episode, at most L - 1.
        episode_mask: (E,) bool, episodes to use; all when None.

    Returns:
        (K, 4) int64: first row in the store, exclusive end in the store, and the part of the window that they fill (begin,
        exclusive end). Before and after it the first and the last of these rows are repeated.
    """
    ends = np.asarray(episode_ends, np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if episode_mask is not None:
        starts, ends = starts[np.asarray(episode_mask, bool)], ends[np.asarray(episode_mask, bool)]
    begins, spans = window_begins(starts, ends, horizon, pad_before, pad_after)
    low, high = starts[spans], ends[spans]
    first, last = np.maximum(begins, low), np.minimum(begins + horizon, high)
    return np.stack([first, last, first - begins, last - begins], axis=1)


def window_begins(
    starts: np.ndarray, ends: np.ndarray, horizon: int, pad_before: int, pad_after: int
) -> tuple[np.ndarray, np.ndarray]:
    """First step of every window, which may lie before its span (`window_index`, without the clipping).

    Args:
        starts: (S,) first rows of the spans (episodes or segments).
        ends: (S,) exclusive ends.
        horizon: L.
        pad_before: see `window_index`.
        pad_after: see `window_index`.

    Returns:
        (K,) row of each window's first step and (K,) number of its span, ordered by span and step.
    """
    before, after = (int(np.clip(pad, 0, horizon - 1)) for pad in (pad_before, pad_after))
    counts = np.maximum(0, ends - starts - horizon + after + before + 1)
    spans = np.repeat(np.arange(len(starts)), counts)
    step = np.arange(len(spans)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.asarray(starts, np.int64)[spans] - before + step, spans


def split_episodes(
    num_episodes: int, ratio: float, seed: int, max_train_episodes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation episodes, chosen as the Diffusion Policy family chooses them.

    (There, training episodes that the limit drops count as validation; here they are left out.)

    Args:
        num_episodes: n.
        ratio: share of validation episodes: at least one episode unless it is 0, at most n - 1.
        seed: of the choice.
        max_train_episodes: limit on training episodes.

    Returns:
        Sorted episode numbers: training, validation.
    """
    validation = np.zeros(0, np.int64)
    if ratio > 0 and num_episodes > 1:
        count = min(max(1, round(num_episodes * ratio)), num_episodes - 1)
        validation = np.sort(np.random.default_rng(seed).choice(num_episodes, size=count, replace=False))
    training = np.setdiff1d(np.arange(num_episodes), validation)
    return limit_episodes(training, max_train_episodes, seed), validation


def limit_episodes(training: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most `limit` of the training episodes, chosen as the Diffusion Policy family chooses them."""
    if limit is None or len(training) <= limit:
        return training
    return training[np.sort(np.random.default_rng(seed).choice(len(training), size=limit, replace=False))]


class WindowDataset(Dataset):
    """Batches of windows, gathered whole: one indexing operation per array, no per-sample work and no collation.

    Observations are gathered for the T observation steps only, actions for the H steps of the chunk. Outside its span
    (episode or segment) a window repeats the span's first or last frame, as published.
    """

    def __init__(
        self,
        arrays: dict[str, Any],
        spans: np.ndarray,
        episode_starts: np.ndarray,
        window: Any,
        pads: tuple[int, int],
        language: dict[str, Any] | None = None,
        frame_texts: np.ndarray | None = None,
    ) -> None:
        """Indexes the windows of some spans.

        Args:
            arrays: per batch key all frames, (frames, ...) in memory or memory-mapped, or an object with `gather(rows)`.
            spans: (S, 5) int64: first row, exclusive end, episode, segment (-1 if none), text (-1 if none).
            episode_starts: (E,) first row of every episode.
            window: `observation_steps`, `action_horizon`, `action_offset` and `keys`, see `policies.base.Window`.
            pads: steps that a window may begin before and end after its span.
            language: ``texts`` and ``embeddings``, for spans or frames that have a text.
            frame_texts: (frames,) text of each frame, for spans that have none; the window's newest observation decides.

        Raises:
            ValueError: the chunk would begin before the window.
        """
        if window.action_offset < 1 - window.observation_steps:
            raise ValueError(
                f"action_offset {window.action_offset}: the action chunk cannot begin before the window's first observation "
                f"({1 - window.observation_steps})."
            )
        self.arrays = arrays
        self.spans = spans
        self.begins, self.span = window_begins(spans[:, 0], spans[:, 1], window_steps(window), *pads)
        self.episode_starts = episode_starts
        self.keys = tuple(window.keys)
        self.observation_steps = np.arange(window.observation_steps)
        self.action_steps = np.arange(window.action_horizon) + window.observation_steps - 1 + window.action_offset
        by_span = bool(len(spans)) and spans[0, 4] >= 0
        self.frame_texts = None if by_span else frame_texts
        self.language = language if by_span or frame_texts is not None else None

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """The batch of these windows: see CONTRIBUTING.md for its keys and shapes."""
        chosen = np.asarray(indices, np.int64)
        begins = self.begins[chosen][:, None]
        low, high, episode, segment, text = (column[:, None] for column in self.spans[self.span[chosen]].T)
        rows = np.clip(begins + self.observation_steps, low, high - 1)
        slow = [key for key in self.keys if getattr(self.arrays[key], "in_threads", False)]
        frames = dict(zip(slow, _in_threads([partial(self.arrays[key].gather, rows.ravel()) for key in slow])))
        batch: dict[str, Any] = {key: self._shaped(key, rows, frames.get(key)) for key in self.keys}
        steps = begins + self.action_steps
        batch["action"] = self._shaped("action", np.clip(steps, low, high - 1))
        batch["action_is_pad"] = torch.from_numpy((steps < low) | (steps >= high))
        batch["episode_index"] = torch.from_numpy(episode[:, 0])
        batch["segment_index"] = torch.from_numpy(segment[:, 0])
        batch["frame_index"] = torch.from_numpy((begins - self.episode_starts[episode])[:, 0])
        if isinstance(indices, WindowBatch):
            batch["mean_rows"], batch["mean_steps"] = indices.mean_rows, indices.mean_steps
        if self.language is not None:
            chosen_texts = text[:, 0] if self.frame_texts is None else self.frame_texts[rows[:, -1]]
            batch["task"] = [self.language["texts"][row] for row in chosen_texts]
            batch["task_embedding"] = self.language["embeddings"][torch.from_numpy(chosen_texts)]
        return batch

    def valid_steps(self) -> np.ndarray:
        """(K,) action steps of each window that lie within its span: the false entries of its ``action_is_pad``."""
        low, high = self.spans[self.span, 0], self.spans[self.span, 1]
        begin, end = self.begins + self.action_steps[0], self.begins + self.action_steps[-1] + 1
        return np.maximum(0, np.minimum(end, high) - np.maximum(begin, low))

    def used_texts(self) -> list[int]:
        """Numbers of the texts that the spans' frames have, sorted."""
        if self.frame_texts is None:
            return np.unique(self.spans[:, 4]).tolist()
        return np.unique(np.concatenate([self.frame_texts[start:end] for start, end in self.spans[:, :2]])).tolist()

    def _shaped(self, key: str, rows: np.ndarray, flat: np.ndarray | None = None) -> torch.Tensor:
        """(B, steps) rows to (B, steps, ...); images become (3, height, width), depth (1, height, width)."""
        if flat is None:
            array = self.arrays[key]
            flat = array.gather(rows.ravel()) if hasattr(array, "gather") else np.take(array, rows.ravel(), axis=0)
        values = torch.from_numpy(flat).reshape(*rows.shape, *flat.shape[1:])
        if key.startswith("observation.images."):
            return values.movedim(-1, -3)  # a view: the memory is what GPUs call channels last
        return values.unsqueeze(-3) if key.startswith("observation.depth.") else values

    def __getstate__(self) -> dict[str, Any]:
        """Memory-mapped arrays travel to spawned workers by name, not by content."""
        arrays = {k: _Mapped(str(a.filename)) if isinstance(a, np.memmap) else a for k, a in self.arrays.items()}
        return {**self.__dict__, "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = {k: np.load(a.path, mmap_mode="r") if isinstance(a, _Mapped) else a for k, a in self.arrays.items()}


_threads: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    global _threads
    _threads = None  # a forked process has none of its parent's


os.register_at_fork(after_in_child=_forget_threads)


def _in_threads(calls: list[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    """Results of the calls, made at the same time."""
    global _threads
    if len(calls) < 2 or usable_cores() < 2:
        return [call() for call in calls]
    if _threads is None:
        _threads = ThreadPoolExecutor(usable_cores(), "cameras")
    return [future.result() for future in [_threads.submit(call) for call in calls]]


class _Mapped:
    """Name of a memory-mapped file."""

    def __init__(self, path: str) -> None:
        self.path = path


def window_steps(window: Any) -> int:
    """L, steps from a window's first observation to its last observation or action, whichever is later."""
    return max(window.observation_steps, window.observation_steps - 1 + window.action_offset + window.action_horizon)
