"""What a checkpoint records of its demonstrations, against what an evaluation asks of its policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_robot.console import counted
from lightning_robot.evaluation.stepping import Description
from lightning_robot.features import camera_names

LONGER = 0.05  # share of the demonstrations that may be longer than an episode before it is worth a word


class TrainingSeeds(ValueError):
    """Scenes of the demonstrations were to judge the policy that learnt from them."""


def recorded(policy: Any, fact: str) -> Any:
    """A fact about the policy's demonstrations (`lightning_robot.data.recorded_facts`); None where it is not known."""
    return (getattr(policy, "demonstrations", None) or {}).get(fact)


def refuse_training_seeds(policy: Any, seeds: Iterable[int], description: Description) -> None:
    """Refuses seeds whose scenes were demonstrated, whatever block they are from.

    Raises:
        TrainingSeeds: names them. Seeds of another simulator are other scenes and pass.
    """
    demonstrated, simulator = recorded(policy, "seeds"), recorded(policy, "simulator")
    here = description.fingerprint.get("simulator")
    if demonstrated is None or (simulator and here and simulator != here):
        return
    seeds = list(seeds)
    both = sorted(set(seeds) & set(demonstrated.tolist()))
    if both:
        listed = ", ".join(map(str, both[:5])) + (" …" if len(both) > 5 else "")
        raise TrainingSeeds(
            f"{len(both)} of the {counted(len(seeds), 'seed')} made demonstrations that this policy learnt from or was "
            f"selected by ({listed}): success on their scenes says nothing about new ones. The demonstrations have seeds from "
            f"{int(demonstrated.min())} to {int(demonstrated.max())}; choose others."
        )


def acting_notes(policy: Any, max_steps: int, execution_horizon: int) -> list[str]:
    """Sentences about what is asked of the policy and was not so in its demonstrations.

    Args:
        policy: which.
        max_steps: step limit of an episode.
        execution_horizon: actions executed of each chunk; 1 where predictions are ensembled.
    """
    notes = weights_notes(policy)
    if longer := _longer(policy, max_steps):
        notes.append(f"step limit: {max_steps} steps, but {longer}")
    trained = recorded(policy, "execution_horizon") or getattr(policy, "execution_horizon", execution_horizon)
    if execution_horizon > trained:
        notes.append(
            f"execution horizon: {execution_horizon} actions of each chunk are executed, {trained} in training: the later ones "
            "were predicted from observations older than it ever had to rely on."
        )
    return notes


def weights_notes(policy: Any) -> list[str]:
    """A sentence if raw weights were loaded where there are, or were, averaged ones."""
    said = {
        "left": "the checkpoint also holds averaged ones, by which training judged it.",
        "missing": "training judged averaged ones, which the checkpoint no longer holds.",
    }
    averaged = getattr(policy, "averaged_weights", None)
    return [f"weights: the raw ones are judged; {said[averaged]}"] if averaged in said else []


def cut_note(policy: Any, steps: int, max_steps: int) -> str | None:
    """A sentence if the environment itself ended episodes before the step limit, and demonstrations took longer than that.

    Args:
        policy: which.
        steps: the most that it allowed where it did.
        max_steps: the step limit.
    """
    longer = _longer(policy, steps) if steps < max_steps else None
    return longer and f"step limit: the environment ended episodes after {steps} of {max_steps} steps, but {longer}"


def _longer(policy: Any, steps: int) -> str | None:
    lengths = recorded(policy, "lengths")
    if lengths is None or not len(lengths):
        return None
    lengths = lengths.numpy()
    longer = int((lengths > steps).sum())
    if longer <= LONGER * len(lengths):
        return None
    return (
        f"{longer} of {counted(len(lengths), 'demonstration')} took longer (median {int(np.median(lengths))}, longest "
        f"{int(lengths.max())}): what they show may not be finished in time."
    )


def unchecked_facts(policy: Any) -> list[str]:
    """Facts that the checkpoint does not record, in words: checks against them were left out."""
    facts = {
        "lengths": "how long demonstrations were",
        "seeds": "seeds of their scenes",
        "action_range": "range of their actions",
        "statistics": "fingerprint of the statistics",
    }
    if camera_names(policy.window.keys):
        facts["pictures"] = "how their pictures looked"
    missing = [words for fact, words in facts.items() if recorded(policy, fact) is None]
    return missing + ([] if policy.features.control_rate else ["control rate"])
