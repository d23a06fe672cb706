"""From observations of single steps to actions of single steps: history, chunk queue, ensembling, post-processing, resets."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_robot.transforms.postprocess import build_postprocess, postprocess_action

if TYPE_CHECKING:
    from lightning_robot.policies.base import Policy

INFERENCE_BATCH = 8  # default everywhere: a result depends on the batch size in the 6th to 8th digit


@dataclass(frozen=True)
class Ensembling:
    """Temporal ensembling (Zhao et al. 2023, arXiv 2304.13705): a query at every step, the predictions for it averaged.

    Averages are taken element by element, in physical units: equal to averages of normalised actions.

    Attributes:
        coefficient: k of the weights exp(-k i), normalised; below 0 it turns the direction round.
        direction: what i counts from: ``oldest`` weighs the oldest prediction most, as published; ``newest`` the newest.
    """

    coefficient: float = 0.01
    direction: Literal["oldest", "newest"] = "oldest"

    def __post_init__(self) -> None:
        if self.direction not in ("oldest", "newest"):
            raise ValueError(f"Ensembling counts from the 'oldest' or the 'newest' prediction, not {self.direction!r}.")

    @classmethod
    def from_setting(cls, setting: dict[str, Any] | bool | None) -> Ensembling | Literal[False] | None:
        """What `Controller` takes, of a configuration's setting: coefficient and direction, true, false or null."""
        if not isinstance(setting, dict):
            return cls() if setting else None if setting is None else False
        if unknown := set(setting) - {"coefficient", "direction"}:
            raise ValueError(f"ensembling takes coefficient and direction, not {', '.join(sorted(unknown))}.")
        return cls(**setting)

    def weights(self, count: int) -> np.ndarray:
        """(count,) float64 weights of predictions ordered from the oldest to the newest."""
        weights = np.exp(-self.coefficient * np.arange(count, dtype=np.float64))
        weights = weights if self.direction == "oldest" else weights[::-1]
        return weights / weights.sum()


def chunk_seed(seed: int, chunk: int) -> int:
    """Noise seed of an episode's chunk: 63 well-mixed bits of (episode seed, chunk number), by SplitMix64's finaliser."""
    mask = (1 << 64) - 1
    value = (int(seed) * 0x9E3779B97F4A7C15 + (int(chunk) + 1) * 0xD1B54A32D192ED03) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


def row_of(seed: int, inference_batch: int) -> int:
    """The row of an episode in every query of the policy: consecutive seeds fill a batch."""
    return seed % inference_batch


class Controller:
    """Acts in several environments with one policy; each environment has its own history, chunk and noise.

    Environments need not be in step with one another: `act` takes any of them. The policy is always asked in batches of
    `inference_batch` rows, an episode always in the row that its seed says (a row that nobody has holds a copy): so an action
    depends neither on how many environments there are, nor on which others wait (kernels treat the last rows of a batch
    otherwise than the first, in the last digits). Ensembling and post-processing are the policy's own unless something else is
    asked for.

    Attributes:
        ensembling: in use, None for a chunk queue.
        postprocess: in use, as plain dicts.
        chunks: per environment the chunk that is being executed, (H', A) float32, None before the first query.
        position: per environment the row of its chunk that the next action comes from.
        queries: (environments, seconds) of every query so far.
        predicted: smallest and largest value of each action element in all chunks so far, (2, A), before post-processing.
    """

    def __init__(
        self,
        policy: Policy,
        num_envs: int = 1,
        *,
        execution_horizon: int | None = None,
        ensembling: Ensembling | Literal[False] | None = None,
        postprocess: Sequence[dict[str, Any]] | None = None,
        inference_batch: int = INFERENCE_BATCH,
    ) -> None:
        """Creates a controller whose environments all wait for their first `reset`.

        Args:
            policy: what is asked for chunks.
            num_envs: number of environments.
            execution_horizon: actions executed before the next query; the policy's own when None.
            ensembling: average overlapping predictions, asking at every step; None does as the policy says (unless an
                execution horizon above 1 is asked for), False never does.
            postprocess: steps applied to every action (`lightning_robot.transforms.postprocess`), in place of the policy's own;
                None takes those.
            inference_batch: rows of every query.

        Raises:
            ValueError: the policy knows no features (its actions would have no unit), or a number does not fit.
        """
        if getattr(policy, "features", None) is None:
            raise ValueError(
                f"{type(policy).__name__} has no features: nothing says what its actions mean. Fit it, or load it with "
                "lightning_robot.policies.base.load_policy(path)."
            )
        if num_envs < 1 or inference_batch < 1:
            raise ValueError(f"num_envs and inference_batch must be at least 1, not {num_envs} and {inference_batch}.")
        if ensembling and execution_horizon not in (None, 1):
            raise ValueError(f"Ensembling asks at every step: execution_horizon must be 1, not {execution_horizon}.")
        self.policy = policy
        self.num_envs = num_envs
        self.ensembling = choose_ensembling(policy, ensembling, execution_horizon)
        self.inference_batch = inference_batch
        self.execution_horizon = 1 if self.ensembling else execution_horizon or policy.execution_horizon
        available = policy.action_horizon + getattr(policy, "action_offset", 0)
        if not 1 <= self.execution_horizon <= available:
            raise ValueError(
                f"execution_horizon {self.execution_horizon} does not fit: the policy predicts {available} actions from the "
                "newest observation on."
            )
        self.action_size = policy.features.action.shape[-1]
        own = getattr(policy, "postprocess", None)
        self.postprocess = [dict(step) for step in (own if postprocess is None else postprocess) or ()]
        self._steps_of_postprocess = build_postprocess(self.postprocess, policy.features)
        self.predicted = np.tile([[np.inf], [-np.inf]], self.action_size)
        self.chunks: list[np.ndarray | None] = [None] * num_envs
        self.position = [0] * num_envs
        self.queries: list[tuple[tuple[int, ...], float]] = []
        self._seeds = [0] * num_envs
        self._began = [False] * num_envs
        self._steps = [0] * num_envs
        self._counts = [0] * num_envs  # chunks asked so far in the episode
        self._histories: list[deque] = [deque(maxlen=policy.observation_steps) for _ in range(num_envs)]
        self._predictions: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(num_envs)]
        self._outputs: list[list[np.ndarray] | None] = [None] * num_envs  # of each step of the post-processing

    def reset(self, indices: Sequence[int], seeds: Sequence[int]) -> None:
        """Begins an episode in each of the environments `indices`; nothing of the one before remains.

        Args:
            indices: environments.
            seeds: one episode seed for each; it fixes the policy's noise.
        """
        for index, seed in zip(indices, seeds, strict=True):
            self.chunks[index] = None
            self.position[index] = 0
            self._seeds[index] = int(seed)
            self._began[index] = True
            self._steps[index] = 0
            self._counts[index] = 0
            self._histories[index].clear()
            self._predictions[index].clear()
            self._outputs[index] = None

    def row(self, index: int) -> int:
        """The row of an environment's episode in every query."""
        return row_of(self._seeds[index], self.inference_batch)

    def choose_batch(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that can be asked for in one query: the first of each row."""
        first: dict[int, int] = {}
        for index in indices:
            first.setdefault(self.row(index), index)
        return list(first.values())

    def needs_query(self, index: int) -> bool:
        """True if the next action of an environment needs a new chunk."""
        return self.ensembling is not None or self.chunks[index] is None or self.position[index] >= self.execution_horizon

    def will_read(self, index: int) -> bool:
        """False if no query will read the observation that follows the latest action: it need not be computed."""
        return self.ensembling is not None or self.execution_horizon - self.position[index] < self.policy.observation_steps

    def act(
        self, observations: Sequence[dict[str, Any]], elapsed: Sequence[int], indices: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """One action for each environment.

        Args:
            observations: one per environment, keys without batch and time axes (see `Features.observations`), ``task`` a
                string.
            elapsed: control steps that each environment has taken since its reset, as the environment counts them.
            indices: which environments these are; all of them when None.

        Returns:
            (A,) float32 actions in physical units, one per observation.

        Raises:
            RuntimeError: `elapsed` disagrees with the controller's own count (a missing reset, a dropped step), or the policy
                returned chunks of a wrong shape.
        """
        indices = range(self.num_envs) if indices is None else indices
        if not len(observations) == len(elapsed) == len(indices):
            raise ValueError(f"{len(observations)} observations, {len(elapsed)} counts for {len(indices)} environments.")
        for index, observation, steps in zip(indices, observations, elapsed):
            self._check_elapsed(index, int(steps))
            history = self._histories[index]
            history.append(observation)
            while len(history) < self.policy.observation_steps:
                history.append(observation)  # the first observation stands for the time before it
        self._query([index for index in indices if self.needs_query(index)])
        return [self._next_action(index) for index in indices]

    def _check_elapsed(self, index: int, steps: int) -> None:
        own = self._steps[index]
        if not self._began[index]:
            raise RuntimeError(f"Environment {index} was never reset: call controller.reset([{index}], [seed]) first.")
        if steps == own:
            return
        if steps < own:
            raise RuntimeError(
                f"Environment {index} is at step {steps}, the controller at step {own}: a new episode began without "
                f"controller.reset([{index}], [seed]), and actions of the one before would be executed in it."
            )
        raise RuntimeError(
            f"Environment {index} is at step {steps}, the controller at step {own}: observations of {steps - own} steps never "
            "reached the controller."
        )

    def _query(self, indices: list[int]) -> None:
        while indices:
            group = self.choose_batch(indices)
            indices = [index for index in indices if index not in group]
            places = [self.row(index) for index in group]
            rows = [group[0]] * self.inference_batch
            for place, index in zip(places, group):
                rows[place] = index
            seeds = torch.tensor([chunk_seed(self._seeds[row], self._counts[row]) for row in rows], dtype=torch.int64)
            before = time.perf_counter()
            with torch.no_grad():
                samples = self.policy.predict_action_chunk(self._stack(rows), noise_seeds=seeds)
            chunks = samples[:, 0].detach().float().cpu().numpy()
            self.queries.append((tuple(group), time.perf_counter() - before))
            if chunks.ndim != 3 or len(chunks) != len(rows) or chunks.shape[2] != self.action_size:
                raise RuntimeError(
                    f"{type(self.policy).__name__} returned chunks of shape {tuple(samples.shape)} for {len(rows)} rows and "
                    f"actions of size {self.action_size}."
                )
            if chunks.shape[1] < self.execution_horizon:
                raise RuntimeError(f"{chunks.shape[1]} actions predicted, {self.execution_horizon} to be executed.")
            ours = chunks[places]
            self.predicted[0] = np.minimum(self.predicted[0], ours.min(axis=(0, 1)))
            self.predicted[1] = np.maximum(self.predicted[1], ours.max(axis=(0, 1)))
            for index, chunk in zip(group, ours):
                self.chunks[index] = chunk
                self.position[index] = 0
                self._counts[index] += 1
                if self.ensembling is not None:
                    self._predictions[index].append((self._steps[index], chunk))

    def _stack(self, rows: list[int]) -> dict[str, Any]:
        """Batch of the environments' histories: (B, T, ...) tensors on the policy's device, ``task`` a list of B strings."""
        device = _device(self.policy)
        batch: dict[str, Any] = {}
        for key in self.policy.window.keys:
            try:
                values = np.stack([np.stack([observation[key] for observation in self._histories[row]]) for row in rows])
            except KeyError:
                offered = ", ".join(self._histories[rows[0]][-1])
                raise KeyError(f"{key}: the policy reads it, the environment's observation has only {offered}.") from None
            if values.dtype == np.float64:
                values = values.astype(np.float32)
            batch[key] = torch.from_numpy(values).to(device)
        if "task" in self._histories[rows[0]][-1]:
            batch["task"] = [self._histories[row][-1]["task"] for row in rows]
        return batch

    def _next_action(self, index: int) -> np.ndarray:
        if self.ensembling is not None:
            action = self._ensemble(index, self.ensembling)
        else:
            chunk = self.chunks[index]
            assert chunk is not None  # `needs_query` saw to it
            action = chunk[self.position[index]]
        self.position[index] += 1
        self._steps[index] += 1
        if not self._steps_of_postprocess:
            return action.copy()
        action, self._outputs[index] = postprocess_action(self._steps_of_postprocess, action, self._outputs[index])
        return action.copy()

    def _ensemble(self, index: int, ensembling: Ensembling) -> np.ndarray:
        now = self._steps[index]
        alive = [(start, chunk) for start, chunk in self._predictions[index] if now - start < len(chunk)]
        self._predictions[index] = alive
        predictions = np.stack([chunk[now - start] for start, chunk in alive]).astype(np.float64)
        return (ensembling.weights(len(alive)) @ predictions).astype(np.float32)


def choose_ensembling(
    policy: Any, asked: Ensembling | Literal[False] | None, execution_horizon: int | None = None
) -> Ensembling | None:
    """The ensembling in use; see `Controller`."""
    own = getattr(policy, "ensembling", None)
    if asked is None and own and execution_horizon in (None, 1):
        return Ensembling(**own)
    return asked or None


def _device(policy: Any) -> torch.device:
    if isinstance(policy, torch.nn.Module):
        for tensor in (*policy.parameters(), *policy.buffers()):
            return tensor.device
    return torch.device("cpu")
