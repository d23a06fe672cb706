"""Notices actions that were left in the network's units: an evaluation of them would only look like a policy that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_robot.console import counted
from lightning_robot.evaluation.demonstrated import recorded

NETWORK_RANGE = 1.5  # a normaliser maps what was demonstrated to about -1 to 1
SMALL = 5.0  # deviations, of a normaliser by mean and deviation: no value of the network's is far above
STILL = 0.01  # of an action's unit: what moves less in demonstrations stood still, but for noise
APART = 0.25  # of the demonstrated range: a policy that misses all of it by as much is not merely a bad one
WIDE = 20.0  # elements whose demonstrated range is wider can hardly stay within the network's by themselves


class NormalizedActions(ValueError):
    """A policy's actions have the network's units, not those of its data."""


def demonstrated_range(policy: Any) -> np.ndarray | None:
    """Smallest and largest demonstrated value of each action element, (2, A): as the checkpoint records, else as the
    policy's normaliser knows them.

    None where that does not either: it leaves actions as they are, or knows them only after transforms of their values.
    """
    if (known := recorded(policy, "action_range")) is not None:
        return np.array(known)
    normalizer: Any = getattr(policy, "normalizer", None)
    mode = "identity" if normalizer is None else normalizer.modes.get("action", "identity")
    if mode == "identity" or getattr(getattr(policy, "transforms", None), "change_vectors", False):
        return None
    end = 2.0 if mode == "mean_std" else 1.0  # nearly everything lies within two deviations
    size = policy.features.action.shape[-1]
    device = next(normalizer.buffers()).device
    ends = torch.tensor([[-end], [end]], device=device).expand(2, size)
    return normalizer.unnormalize("action", ends).cpu().numpy()


def check_predictions(policy: Any, predicted: np.ndarray) -> str | None:
    """Compares what a policy predicts with what was demonstrated.

    Args:
        policy: which.
        predicted: smallest and largest predicted value of each action element, (2, A).

    Returns:
        A sentence if the predictions look normalised and it cannot be told for certain, else None.

    Raises:
        NormalizedActions: they are normalised: where demonstrations move over a wide range, all predictions lie within -1.5 to
            1.5, though not even the demonstrations' middle does; or in two elements no prediction comes near any demonstration,
            and all are small.
    """
    demonstrated = demonstrated_range(policy)
    if demonstrated is None or not np.isfinite(predicted).all():
        return None
    low, high = demonstrated
    apart = np.maximum(low - predicted[1], predicted[0] - high)
    moves = high - low > STILL  # an element that hardly moved is missed by any policy that is not done learning
    far = moves & (apart > APART * (high - low)) & (np.abs(predicted).max(axis=0) < SMALL)
    if far.sum() >= 2:
        element = int(np.argmax(apart * far))
        raise NormalizedActions(
            f"Every action that {type(policy).__name__} predicts lies between {predicted[0, element]:.3g} and "
            f"{predicted[1, element]:.3g} in {_name(policy, element)}, where demonstrations lie between {low[element]:.4g} and "
            f"{high[element]:.4g}, and likewise in {counted(int(far.sum()) - 1, 'other element')}: the actions were left "
            "normalised, or un-normalised by other statistics. `_predict` must return "
            "self.normalizer.unnormalize('action', chunk), with the statistics of the policy's own data."
        )
    wide = high - low > WIDE
    if wide.sum() < 2 or (np.abs(predicted[:, wide]) > NETWORK_RANGE).any():
        return None
    element = int(np.argmax(np.abs(low + high) * wide))
    name = _name(policy, element)
    sentence = (
        f"Every action that {type(policy).__name__} predicts lies within -{NETWORK_RANGE} to {NETWORK_RANGE} in {name}, where "
        f"demonstrations lie between {low[element]:.4g} and {high[element]:.4g}, and so in all elements that move far: the "
        "actions look as if they had been left normalised"
    )
    if abs(low[element] + high[element]) / 2 > 2 * NETWORK_RANGE:
        raise NormalizedActions(
            f"{sentence}. `_predict` must return them un-normalised: self.normalizer.unnormalize('action', chunk)."
        )
    return f"{sentence}, or the policy hardly moves."


def _name(policy: Any, element: int) -> str:
    names = policy.features.action.names
    return names[element] if names else f"element {element}"
