"""Checks of what is passed to the environments that follow CALVIN's conventions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class ActionOutOfBounds(ValueError):
    """An action that is not finite, has another shape, or is far outside the range that actions have."""


def among(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError with all choices if the value is none of them."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not among {', '.join(str(choice) for choice in choices)}.")


def picture_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels from a pair, or from one number for a square.

    Raises:
        ValueError: neither, or a picture without pixels.
    """
    sides = np.atleast_1d(size).tolist()
    if len(sides) not in (1, 2) or any(isinstance(side, str) for side in sides) or min(sides) < 1:
        raise ValueError(f"camera_sizes: {size}; give pixels of a square, or height and width.")
    return int(sides[0]), int(sides[-1])


CameraSizes = int | Sequence[int] | Mapping[str, int | Sequence[int]]
"""What `camera_sizes` may be: one size for all cameras, or one per camera."""


def picture_sizes(
    sizes: CameraSizes | None, cameras: Collection[str], default: CameraSizes | None = None
) -> dict[str, tuple[int, int]]:
    """(height, width) per camera: of those that are named, or of all `cameras` where one size is given.

    Args:
        sizes: what was asked for.
        cameras: those that the environment shows by itself.
        default: instead of None or an empty mapping.

    Raises:
        ValueError: see `picture_size`.
    """
    if sizes is None or sizes == {}:
        sizes = {} if default is None else default
    if isinstance(sizes, Mapping):
        return {name: picture_size(size) for name, size in sizes.items()}
    return dict.fromkeys(cameras, picture_size(sizes))


def noted_sizes(cameras: str, known: Collection[str]) -> dict[str, tuple[int, int]]:
    """(height, width) per camera from an environment's own note, "overhead 96x96, wrist 40x64"; other cameras are left out."""
    sizes = {}
    for part in cameras.split(", "):
        name, _, size = part.rpartition(" ")
        if name in known and "x" in size:
            height, _, width = size.partition("x")
            sizes[name] = (int(height), int(width))
    return sizes


def finite_vector(name: str, values: ArrayLike, length: int) -> NDArray[np.float64]:
    """A copy of the values, (length,).

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (length,) or not np.isfinite(vector).all():
        raise ValueError(f"{name} has {length} finite numbers; got shape {vector.shape}.")
    return vector
