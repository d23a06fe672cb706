"""How a camera's pictures look, in a few numbers: enough to tell an overhead camera from one on the wrist."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

GRID = 4  # cells along each side


def picture_grid(pictures: np.ndarray) -> np.ndarray:
    """Mean colours of a coarse grid.

    Args:
        pictures: (n, H, W, C) or (n, H, W); uint8 counts, or depth in metres.

    Returns:
        (n, GRID * GRID * C) float64, counts scaled to 0 to 1; smaller pictures repeat pixels.
    """
    pictures = pictures[..., None] if pictures.ndim == 3 else pictures
    rows, columns = (np.linspace(0, size, GRID + 1).astype(int) for size in pictures.shape[1:3])
    cells = [
        pictures[:, top : max(bottom, top + 1), left : max(right, left + 1)].mean(axis=(1, 2), dtype=np.float64)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
    grid = np.concatenate(cells, axis=1)
    return grid / 255 if pictures.dtype == np.uint8 else grid


def summarize_pictures(pictures: np.ndarray) -> dict[str, Any]:
    """Mean and deviation over pictures of `picture_grid`, as plain lists, with the number of pictures.

    Args:
        pictures: see `picture_grid`.
    """
    grid = picture_grid(pictures)
    return {"mean": grid.mean(axis=0).tolist(), "std": grid.std(axis=0).tolist(), "pictures": len(pictures)}
