"""Environments of other packages, seen through the keys of our batches.

Gymnasium's own API stays as it is; what an adapter adds is where in a foreign observation the state and the pictures lie, how
success is told, and what evaluation and data need to know (`Adapted.features`, `Adapted.fingerprint`, `Adapted.control_rate`).
"""

from __future__ import annotations

import importlib.metadata
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from lightning_robot.envs import make_environment
from lightning_robot.envs.checks import ActionOutOfBounds, among
from lightning_robot.features import Feature, Features

Place = str | Sequence[str]
"""Where something lies in an observation: names of nested dictionaries joined by dots (``"pixels.top"``), ``""`` for the
observation itself; several places are joined to one vector."""

TERMINATED = "terminated"


class MissingPackage(ModuleNotFoundError):
    """The package of a foreign environment is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed: pip install "lightning_robot[{extra}]"', name=package)


class Adapted(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """Any Gymnasium environment with a flat Box of actions, offering observations under our keys.

    ``lightning_robot/Adapted-v0`` in a configuration, with the arguments as ``env_kwargs``, needs no code::

        env: lightning_robot/Adapted-v0
        env_kwargs: {env: gym_pusht/PushT-v0, env_kwargs: {obs_type: pixels_agent_pos}, state: agent_pos, images: pixels}

    Actions are passed on as they are: in physical units, neither scaled nor clipped.

    Args:
        env: id of the environment, as for `lightning_robot.envs.make_environment`.
        env_kwargs: its constructor's arguments.
        state: place of ``observation.state``.
        environment_state: place of ``observation.environment_state``.
        images: place of (H, W, 3) uint8 pictures per camera. One place alone is the only camera of data that call it
            ``observation.image``.
        depth: place of (H, W) depth in metres per camera.
        success: key of the environment's info that tells whether the task is solved, or "terminated" where ending means that.
        maxima: keys of the info, or "reward", whose largest value in the episode is reported in its details.
        task: id of the task; the name in the environment's id when None.
        sentence: instruction.
        state_names: of the state's elements, as in the data.
        action_names: of the action's elements, as in the data.
        action_semantics: see `lightning_robot.features.Features`.
        action_bounds: least and greatest action where the declared ones are not what the environment takes: two numbers or
            lists.
        control_rate: control steps per second where the environment's ``render_fps`` is not that.
        max_steps: control steps after which an episode is truncated; the environment's own limit when None.
        render_mode: "rgb_array" or None.

    Raises:
        ModuleNotFoundError: the environment's package is not installed.
        ValueError: a place does not exist, or holds something else.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    skip_observation = False  # set before a step whose observation nobody reads: only the task comes back

    def __init__(
        self,
        env: str,
        env_kwargs: Mapping[str, Any] | None = None,
        state: Place | None = None,
        environment_state: Place | None = None,
        images: str | Mapping[str, str] | None = None,
        depth: Mapping[str, str] | None = None,
        success: str = "is_success",
        maxima: Sequence[str] = (),
        task: str | None = None,
        sentence: str = "",
        state_names: Sequence[str] = (),
        action_names: Sequence[str] = (),
        action_semantics: str = "",
        action_bounds: Any = None,
        control_rate: float | None = None,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        among("render_mode", render_mode, (None, "rgb_array"))
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps: {max_steps}; an episode has at least one step.")
        self.render_mode, self.tasks, self._sentence = render_mode, (task or _name(env),), sentence
        self._success, self._maxima = success, tuple(maxima)
        self._id, self._limit = env, max_steps
        self._open(env_kwargs or {})
        space = self._env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"{env} has the actions {space}; what an adapter passes on is a flat Box.")
        self.max_steps = max_steps or getattr(self._env.spec, "max_episode_steps", None)
        self.control_rate = float(control_rate or self._env.metadata.get("render_fps") or 30)
        self.metadata = {**self.metadata, "render_fps": self.control_rate}
        low, high = (space.low, space.high) if action_bounds is None else action_bounds
        low, high = (np.broadcast_to(np.asarray(bound, np.float32), space.shape) for bound in (low, high))
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self._action = Feature(space.shape, names=tuple(action_names))
        self._action_semantics, self._state_names = action_semantics, tuple(state_names)
        self._largest: dict[str, float] = {}
        self._place(state, environment_state, images, depth)

    def _open(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = dict(arguments)
        named = {"render_mode": self.render_mode, "max_episode_steps": self._limit}
        given = {name: value for name, value in named.items() if value is not None}  # None is not every environment's default
        self._env: Any = make_environment(self._id, **{**given, **self._arguments})

    def _place(
        self,
        state: Place | None = None,
        environment_state: Place | None = None,
        images: str | Mapping[str, str] | None = None,
        depth: Mapping[str, str] | None = None,
    ) -> None:
        """Settles which key lies where, and declares the observation."""
        self._vectors: dict[str, tuple[str, ...]] = {}
        self._pictures: dict[str, str] = {}
        for key, place in (("observation.state", state), ("observation.environment_state", environment_state)):
            if place is not None:
                self._vectors[key] = (place,) if isinstance(place, str) else tuple(place)
        if isinstance(images, str):
            self._pictures["observation.image"] = images
        else:
            self._pictures |= {f"observation.images.{camera}": place for camera, place in (images or {}).items()}
        self._pictures |= {f"observation.depth.{camera}": place for camera, place in (depth or {}).items()}
        if not self._vectors and not self._pictures:
            raise ValueError(f"{self._id}: name at least one of state, environment_state, images and depth.")
        self._declare()

    def _declare(self) -> None:
        offered: dict[str, Feature] = {}
        for key, places in self._vectors.items():
            sizes = [self._box(key, place).shape for place in places]
            names = self._state_names if key == "observation.state" else ()
            offered[key] = Feature((sum(int(np.prod(size)) for size in sizes),), names=names)
        for key, place in self._pictures.items():
            shape, is_depth = self._box(key, place).shape, "depth" in key
            if len(shape) < 2 or (not is_depth and shape[2:] != (3,)):
                raise ValueError(f"{key}: {place!r} of {self._id} has shape {shape}; pictures are (H, W, 3), depth (H, W).")
            size = (1 if is_depth else 3, *shape[:2])
            offered[key] = Feature(size, dtype="float32" if is_depth else "uint8", unit="m" if is_depth else "")
        self._offered = offered
        boxes: dict[str, spaces.Space] = {"task": spaces.Text(1000, min_length=0, charset=string.printable)}
        for key, feature in offered.items():
            low, high = (0, 255) if feature.dtype == "uint8" else (-np.inf, np.inf)
            boxes[key] = spaces.Box(low, high, feature.shape, np.dtype(feature.dtype))
        self.observation_space = spaces.Dict(boxes)

    def _box(self, key: str, place: str) -> spaces.Box:
        space: spaces.Space = self._env.observation_space
        for name in place.split(".") if place else ():
            if not isinstance(space, spaces.Dict) or name not in space.spaces:
                raise ValueError(f"{key}: there is no {place!r} in {self._id}, whose observation is {space}.")
            space = space[name]
        if not isinstance(space, spaces.Box):
            raise ValueError(f"{key}: {place!r} of {self._id} is {space}, not an array.")
        return space

    # --- what is offered ---------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What this environment offers to a policy."""
        return Features(
            observations=dict(self._offered),
            action=self._action,
            action_semantics=self._action_semantics,
            control_rate=self.control_rate,
            source=self.fingerprint,
        )

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside the seed, as plain strings."""
        package = self._id.partition(":")[0] if ":" in self._id else self._id.partition("/")[0]
        try:
            version = importlib.metadata.version(package.partition(".")[0].replace("_", "-"))
        except (importlib.metadata.PackageNotFoundError, ValueError):
            version = "unknown"
        found = {"simulator": self._id, "version": version, "gymnasium": gymnasium.__version__}
        if self._arguments:
            found["arguments"] = json.dumps(self._arguments, sort_keys=True, default=str)
        return found

    @property
    def task(self) -> str:
        """Id of the task."""
        return self.tasks[0]

    def task_sentence(self, task: str) -> str:
        """The instruction, empty if none is known."""
        among("task", task, self.tasks)
        return self._sentence

    # --- episodes ----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode of the environment.

        Args:
            seed: passed on.
            options: passed on, but for ``task``.

        Returns:
            Observation under our keys, and info with ``task``, ``success`` and what the environment tells.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        among("task", options.pop("task", None) or self.task, (*self.tasks, self._sentence))
        observation, info = self._env.reset(seed=seed, options=options or None)
        self._largest = {}
        return self._observe(observation), {**info, "task": self.task, "success": False, "failure": None}

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One step of the environment.

        Returns:
            As the environment, the observation under our keys; info with ``task``, ``success`` and, at the end, ``details``.

        Raises:
            ActionOutOfBounds: an action of another shape, or not finite.
        """
        command = np.array(action, dtype=np.float32)
        if command.shape != self._action.shape or not np.isfinite(command).all():
            raise ActionOutOfBounds(f"An action has {self._action.shape[0]} finite numbers; got {command}.")
        observation, reward, terminated, truncated, info = self._env.step(command)
        numbers = {"reward": reward, **info}
        for name in self._maxima:
            if name in numbers:
                self._largest[name] = max(float(numbers[name]), self._largest.get(name, -np.inf))
        told = {**info, "task": self.task, "failure": None}
        if self._success == TERMINATED or self._success in info:
            told["success"] = bool(terminated if self._success == TERMINATED else info[self._success])
        if terminated or truncated:
            told["details"] = {f"max_{name}": value for name, value in self._largest.items()}
        return self._observe(observation), float(reward), bool(terminated), bool(truncated), told

    def _observe(self, given: Any) -> dict[str, Any]:
        observation: dict[str, Any] = {"task": self._sentence}
        if self.skip_observation:
            return observation
        for key, places in self._vectors.items():
            parts = [np.ravel(_find(given, place)) for place in places]
            observation[key] = np.concatenate(parts).astype(np.float32)
        for key, place in self._pictures.items():
            picture = np.asarray(_find(given, place))
            if "depth" in key:
                observation[key] = np.asarray(picture, dtype=np.float32).reshape(1, *picture.shape[:2])
            else:
                observation[key] = np.ascontiguousarray(picture.transpose(2, 0, 1))
        return observation

    def render(self) -> Any:
        """The environment's own picture."""
        return self._env.render()

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()


def _find(given: Any, place: str) -> Any:
    for name in place.split(".") if place else ():
        given = given[name]
    return given


def _name(env: str) -> str:
    return env.rpartition("/")[2].rpartition(":")[2].rpartition("-v")[0] or env
