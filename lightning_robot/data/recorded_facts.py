"""What a checkpoint records of its demonstrations, so that an evaluation can tell when it asks something else of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_robot.transforms.picture_summary import summarize_pictures

if TYPE_CHECKING:
    from lightning_robot.data.episodes import EpisodeDataModule

STARTS = 16
"""Demonstrations whose first pictures are looked at: an evaluation sees first pictures too, and training must not wait."""


def recorded_facts(data: EpisodeDataModule) -> dict[str, Any]:
    """Facts about the training demonstrations, tensors and plain containers only.

    Args:
        data: a data module after `setup`, with a window.

    Returns:
        ``data``: fingerprint of the store. ``lengths``: (n,) int64, steps of each episode, or of each language segment where
        windows are cut within those. ``seeds``: (E,) int64, seeds of the scenes of all episodes, held out ones too; None where
        the store does not say. ``simulator``: in which these are seeds, None likewise. ``action_range``: smallest and largest
        command, (2, A) lists in physical units. ``pictures``: per batch key of a camera how its first pictures look
        (`summarize_pictures`).
    """
    store = data.store
    assert store is not None
    spans = data.train_windows.spans
    provenance = store.provenance
    seeds = provenance.get("seeds")
    known = isinstance(seeds, list) and len(seeds) == store.num_episodes
    actions = data.statistics(("action",))["action"]
    starts = spans[np.unique(np.linspace(0, len(spans) - 1, STARTS).astype(np.int64)), 0]
    return {
        "data": data.fingerprint,
        "lengths": torch.from_numpy(np.ascontiguousarray(spans[:, 1] - spans[:, 0], np.int64)),
        "seeds": torch.tensor(seeds, dtype=torch.int64) if known else None,
        "simulator": (provenance.get("simulator") or {}).get("simulator"),
        "action_range": [actions.min.tolist(), actions.max.tolist()],
        "pictures": {
            key: summarize_pictures(_gathered(data.train_windows.arrays[key], starts))
            for key in data.train_windows.arrays
            if key.startswith(("observation.images.", "observation.depth."))
        },
    }


def _gathered(source: Any, rows: np.ndarray) -> np.ndarray:
    return source.gather(rows) if hasattr(source, "gather") else source[rows]
