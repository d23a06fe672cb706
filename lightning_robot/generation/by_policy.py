"""A trained policy as demonstrator: the controller of evaluation, one environment, one row per query."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np

from lightning_robot.console import say
from lightning_robot.evaluation.controller import Controller
from lightning_robot.evaluation.rollout import (
    acting,
    choose_tasks,
    environment_maker,
    fingerprint_policy,
    inspect_environment,
)


class PolicyDemonstrator:
    """Acts as `evaluate --inference-batch 1` would, post-processing and ensembling included.

    Run it with one thread (`one_thread`; worker processes have no more): then an episode depends on its seed alone.
    """

    def __init__(self, path: str, weights: str | None = None, device: str = "cpu") -> None:
        """Loads the policy.

        Args:
            path: of a checkpoint.
            weights: ``ema`` or ``raw``; the averaged ones where there are any when None.
            device: where it computes.
        """
        # Named, not imported: this room knows policies by what they can do alone.
        self.policy = import_module("lightning_robot.policies.base").load_policy(path, weights=weights, device=device)
        self.controller = Controller(self.policy, inference_batch=1)

    def prepare(self, env: gymnasium.Env) -> None:
        source: Any = env.unwrapped
        if hasattr(source, "match"):  # it adopts the observation recipe that the policy was trained on
            source.match(self.policy.features)

    def begin(self, env: gymnasium.Env, seed: int) -> None:
        self.controller.reset([0], [seed])

    def act(self, observation: dict[str, Any], elapsed: int) -> np.ndarray:
        return self.controller.act([observation], [elapsed])[0]

    def identity(self) -> dict[str, str]:
        """What decides its actions, without a path: its class and a hash of its weights."""
        return {"class": type(self.policy).__name__, "fingerprint": fingerprint_policy(self.policy)}

    def one_thread(self) -> AbstractContextManager[None]:
        """Torch with one thread, and put back afterwards."""
        return acting(self.policy, 1)

    def choose_tasks(self, env: str, arguments: dict[str, Any], asked: Sequence[str] | None) -> list[str]:
        """Tasks to play in an environment, after the policy has met it; says in what the two differ.

        Raises:
            IncompatibleFeatures, EnvironmentFault: as an evaluation would.
        """
        description, notes = inspect_environment(self.policy, environment_maker(env, arguments))
        for note in notes:
            say(note)
        return choose_tasks(self.policy, description, asked)
