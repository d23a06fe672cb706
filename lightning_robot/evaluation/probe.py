"""What one environment shows before the first episode: whether it resets, and whether it looks as the demonstrations did."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

from lightning_robot.evaluation.controller import Controller
from lightning_robot.evaluation.demonstrated import recorded
from lightning_robot.evaluation.stepping import Description, EnvironmentFault, Pool, Transition
from lightning_robot.features import IncompatibleFeatures, check_observation, other_rate
from lightning_robot.transforms.picture_summary import picture_grid

PROBE_SEED = 999_999  # of no demonstration and no evaluation: the block of generation is never filled to its end
PROBE_STEPS = 3

COLOURED = 0.02  # difference between channels, of 1, in the mean of the demonstrations' first pictures
CAMERAS = "observation.images."


class NotReset(EnvironmentFault):
    """An environment that does not begin an episode anew."""


class KeepsState(ValueError):
    """A policy that remembers something between calls."""


def probe(pool: Pool, policy: Any, description: Description, task: str | None = None) -> tuple[list[str], Transition]:
    """Resets the first environment, takes a few steps, and does both again with the same seed.

    Args:
        pool: the environments; the first one is used, and left as after a reset.
        policy: whose demonstrations the first observation is compared with.
        description: of the environment.
        task: task id of the resets.

    Returns:
        Sentences about what differs and does not prevent acting; the first start, for `probe_end`.

    Raises:
        NotReset: the second reset gave another start state than the first, or the same steps then led elsewhere.
        IncompatibleFeatures: the observation, or the rate of steps, is not what the policy knows.
    """
    first = command(pool, "reset", PROBE_SEED, task)
    if first.error:
        return [_left_out(first)], first
    check_observation(policy.features, first.observation, policy.window.keys)
    notes = compare_pictures(policy, first.observation)
    step = _steps(pool, description)
    refuse_repeated_actions(policy, description, step)
    again = command(pool, "reset", PROBE_SEED, task)
    if step.error or again.error:
        return [*notes, _left_out(step if step.error else again)], first
    notes += _compare_starts(first, again, f"after {PROBE_STEPS} steps")
    step_again = _steps(pool, description)
    if step_again.error:
        return [*notes, _left_out(step_again)], first
    differing, _ = _gaps(step, step_again)
    if differing:
        raise NotReset(
            f"The environment does not begin an episode anew: after reset(seed={PROBE_SEED}) the same {PROBE_STEPS} actions "
            f"led elsewhere the second time ({'; '.join(differing)}), though both began alike. Something outlives the reset, "
            "such as a queue of actions or a filter in a wrapper, or draws at random: reset must empty it, and draw from the "
            "seed alone."
        )
    return notes, first


def probe_end(pool: Pool, task: str | None, first: Transition) -> None:
    """Resets the first environment once more after the last episode: what a few steps do not move, a whole episode may.

    Args:
        pool: the environments.
        task: task id of the resets.
        first: what the first reset of `probe` gave.

    Raises:
        NotReset: it gives another start state now.
    """
    if first.error or not pool.alive(0):
        return
    again = command(pool, "reset", PROBE_SEED, task)
    if not again.error:
        # No word of small differences: they may grow with the episodes that this one of the environments happened to play.
        _compare_starts(first, again, "after the episodes")


def refuse_repeated_actions(policy: Any, description: Description, step: Transition) -> None:
    """Refuses a wrapper that takes several steps of the environment for each action, where this gives another control rate.

    Raises:
        IncompatibleFeatures: names both rates.
    """
    rate = description.control_rate or (description.features.control_rate if description.features is not None else 0)
    if step.error or step.inner_steps < 2 or description.rate_of_wrapper:
        return
    error = other_rate(policy.features.control_rate, rate / step.inner_steps)
    if error:
        raise IncompatibleFeatures(
            f"The policy does not fit:\n  {error} A wrapper takes {step.inner_steps} steps of the environment for each action."
        )


def _steps(pool: Pool, description: Description) -> Transition:
    """A few steps, always the same ones, no two alike; what came of the last one."""
    for number, action in enumerate(_any_actions(description)):
        step = command(pool, "step", action, number == PROBE_STEPS - 1)
        if step.error or step.terminated or step.truncated:
            break
    return step


def command(pool: Pool, name: str, *arguments: Any) -> Transition:
    """Has the first environment do something, alone, and waits for it."""
    pool.send(0, name, *arguments)
    (answer,) = pool.receive()
    return answer[1]


def refuse_memory(policy: Any, observation: dict[str, Any], inference_batch: int) -> None:
    """Asks the policy twice for the same chunk: one that keeps a queue of its own, or a history, answers otherwise.

    Raises:
        KeepsState: it did.
    """
    chunks: list[np.ndarray] = []
    for _ in range(2):
        controller = Controller(policy, 1, inference_batch=inference_batch)
        controller.reset([0], [PROBE_SEED])
        controller.act([observation], [0])
        assert controller.chunks[0] is not None
        chunks.append(controller.chunks[0])
    largest = max(float(np.abs(chunk).max()) for chunk in chunks)
    if chunks[0].shape != chunks[1].shape or np.abs(chunks[0] - chunks[1]).max() > 1e-3 * largest:
        raise KeepsState(
            f"{type(policy).__name__} answered the same observation with the same noise seed by another chunk the second time: "
            "it keeps something between calls, such as a queue of actions, and an episode would begin with what is left of the "
            "one before. History and queue belong to the controller (execution_horizon); a policy keeps nothing."
        )


def compare_pictures(policy: Any, observation: dict[str, Any]) -> list[str]:
    """Whether each camera's picture looks like that camera's first pictures in the demonstrations.

    Returns:
        A sentence if cameras look exchanged.

    Raises:
        IncompatibleFeatures: a picture is grey where the demonstrations' were coloured.
    """
    known = recorded(policy, "pictures") or {}
    keys = [key for key in policy.window.keys if key.startswith(CAMERAS) and key in known and key in observation]
    for key in keys:
        picture = observation[key]
        mean = np.array(known[key]["mean"]).reshape(-1, 3)
        if np.ptp(mean, axis=1).max() > COLOURED and (picture[0] == picture[1]).all() and (picture[0] == picture[2]).all():
            raise IncompatibleFeatures(
                f"The policy does not fit:\n  {key}: the picture is grey (its three channels are equal), the demonstrations' "
                "are coloured: depth offered where colour is expected? Offer the camera's colours."
            )
    if not 2 <= len(keys) <= 5:
        return []
    grids = {key: picture_grid(observation[key].transpose(1, 2, 0)[None])[0] for key in keys}
    distance = {
        (shown, meant): float(np.sqrt(np.mean((grids[shown] - np.array(known[meant]["mean"])) ** 2)))
        for shown in keys
        for meant in keys
    }
    best = min(permutations(keys), key=lambda order: sum(distance[pair] for pair in zip(keys, order)))
    moved = [(shown, meant) for shown, meant in zip(keys, best) if shown != meant]
    if not moved or any(distance[shown, meant] > distance[shown, shown] / 2 for shown, meant in moved):
        return []
    pairs = ", ".join(
        f"{shown.removeprefix(CAMERAS)} shows what {meant.removeprefix(CAMERAS)} showed" for shown, meant in moved
    )
    return [f"cameras are swapped under their names: {pairs} in the demonstrations (by their pictures)."]


def _any_actions(description: Description) -> np.ndarray:
    """(PROBE_STEPS, A) float32 within the bounds, always the same; 0 where there are none."""
    bounded = np.isfinite(description.low) & np.isfinite(description.high)
    low, high = np.where(bounded, description.low, 0), np.where(bounded, description.high, 0)
    return np.random.default_rng(PROBE_SEED).uniform(low, high, (PROBE_STEPS, len(low))).astype(np.float32)


def _gaps(first: Transition, again: Transition) -> tuple[list[str], list[str]]:
    """How two observations differ: by more than rounding, and by no more than that."""
    differing: list[str] = []
    nearly: list[str] = []
    for key, value in first.observation.items():
        if isinstance(value, str):
            continue
        other = np.asarray(again.observation.get(key, np.nan))
        if other.shape != value.shape:
            differing.append(f"{key} has another shape")
            continue
        if np.array_equal(value, other, equal_nan=value.dtype.kind == "f"):
            continue
        gap = np.abs(value.astype(np.float64) - other)
        if value.dtype == np.uint8:
            far = gap.mean() > 1
        else:
            far = bool((gap > 1e-3 * (1 + np.abs(value))).any())
        (differing if far else nearly).append(f"{key} differs by up to {np.nanmax(gap):.3g}")
    return differing, nearly


def _compare_starts(first: Transition, again: Transition, when: str) -> list[str]:
    differing, nearly = _gaps(first, again)
    if not differing and first.state != again.state and not nearly:
        differing.append("state_fingerprint differs")
    if differing:
        raise NotReset(
            f"The environment does not begin an episode anew: {when} reset(seed={PROBE_SEED}) gave another "
            f"start state than before them ({'; '.join(differing)}). Episodes would begin where others ended, or at random, "
            "and no result would repeat: its reset must restore the whole state, and draw from the seed alone."
        )
    if nearly:
        return [f"reset(seed) repeats a start state only nearly ({'; '.join(nearly)}): results may not repeat exactly."]
    return []


def _left_out(transition: Transition) -> str:
    return f"One environment could not be probed ({transition.error}): whether it resets and looks as in training is not known."
