"""Random numbers that a row owns: from its seed alone, whatever the batch, the device or any generator's state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 (Steele, Lea, Flood 2014): increment and finaliser constants
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@np.errstate(over="ignore")  # arithmetic modulo 2^64
def mix_seeds(*parts: int | Tensor) -> Tensor:
    """Mixes integers into one seed; another order or another number of parts gives another seed.

    Args:
        parts: integers, or int64 tensors whose shapes broadcast (one entry per row).

    Returns:
        Non-negative int64 on the CPU in the broadcast shape, 0-dimensional for plain integers.
    """
    mixed = np.zeros((), np.uint64)
    for part in parts:
        mixed = _finalise(mixed + _INCREMENT + _unsigned(part) * _INCREMENT)
    return torch.from_numpy(np.asarray(mixed >> np.uint64(1)).astype(np.int64))


def seeded_normal(seeds: Tensor, sample: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise on the CPU; a row depends on its own seed, the sample and the draw only.

    Args:
        seeds: (B,) int64.
        sample: number of the sample for the same observation.
        draw: number of the draw within one call of a sampler.
        shape: of one row.

    Returns:
        (B, *shape) float32.
    """
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    bits = _bits(seeds, sample, draw, 2 * pairs)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1): the logarithm is finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:, :pairs])), 2.0 * np.pi * uniform[:, pairs:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)), 1)[:, :count]  # Box and Muller (1958)
    return torch.from_numpy(normal.astype(np.float32)).reshape(len(bits), *shape)


def seeded_integers(seeds: Tensor, sample: int, draw: int, high: int) -> Tensor:
    """(B,) int64 in [0, high) on the CPU, one per row of (B,) int64 `seeds`; see `seeded_normal`."""
    return torch.from_numpy((_bits(seeds, sample, draw, 1)[:, 0] % np.uint64(high)).astype(np.int64))


def _bits(seeds: Tensor, sample: int, draw: int, count: int) -> np.ndarray:
    """(B, count) uint64."""
    keys = _unsigned(mix_seeds(seeds.reshape(-1), sample, draw))
    counters = np.arange(1, count + 1, dtype=np.uint64)
    return _finalise(keys[:, None] + counters * _INCREMENT)


def _unsigned(part: int | Tensor) -> np.ndarray:
    if isinstance(part, Tensor):
        return part.detach().cpu().to(torch.int64).numpy().astype(np.uint64)
    return np.asarray(part % 2**64, np.uint64)


def _finalise(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * _MULTIPLIERS[0]
    value = (value ^ (value >> np.uint64(27))) * _MULTIPLIERS[1]
    return value ^ (value >> np.uint64(31))
