"""One attempted demonstration: somebody acts in an environment, and what was seen and commanded becomes one file.

An environment from which demonstrations are generated offers, beside Gymnasium's API, on ``env.unwrapped``:

    features       `Features` of its observations and its action
    fingerprint    dict of strings: simulator, version, scene, ...
    task_sentence(task) -> str              the sentence that the task is evaluated with
    task_paraphrases(task) -> tuple[str]    more sentences to train with; optional
    expert(rng) -> object with act() -> action    a scripted expert for the task of the last reset; not needed for a policy

``reset(seed=..., options={"task": ...})`` starts an episode, and ``info`` tells ``success`` and, at the end, ``failure``.
"""

from __future__ import annotations

import json
import os
import signal
import zipfile
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Protocol

import gymnasium
import numpy as np

from lightning_robot.envs import make_environment
from lightning_robot.features import Features

_EXPERT, _NOISE, _TEXT = 1, 2, 3  # streams of random numbers of an episode, beside the environment's own


@dataclass(frozen=True)
class Attempt:
    """What is known of an attempted episode beside its arrays.

    Attributes:
        seed: fixes scene, demonstrator, noise and sentence.
        task: id of the task.
        text: sentence that the demonstration is labelled with.
        length: recorded steps.
        success: whether the task was solved.
        failure: why not; empty after a success.
    """

    seed: int
    task: str
    text: str
    length: int
    success: bool
    failure: str


@dataclass(frozen=True)
class Recording:
    """What every attempt of a generation has in common, in plain values (it travels to worker processes).

    Attributes:
        folder: where attempts are staged.
        environment: id.
        arguments: of its constructor.
        noise, hold, noise_correlation: see `run_episode`.
        policy: None for the environment's expert, else arguments of `lightning_robot.generation.by_policy.PolicyDemonstrator`.
    """

    folder: str
    environment: str
    arguments: dict[str, Any]
    noise: float
    hold: int
    noise_correlation: float = 0.0
    policy: dict[str, Any] | None = None

    def make(self) -> gymnasium.Env:
        """An environment as the demonstrator needs it."""
        return make_environment(self.environment, **self.arguments)

    def demonstrator(self) -> Demonstrator:
        """Who acts."""
        if self.policy is None:
            return ScriptedExpert()
        from lightning_robot.generation.by_policy import PolicyDemonstrator  # torch, which experts do without

        return PolicyDemonstrator(**self.policy)


class Demonstrator(Protocol):
    """Who acts in the environments of a generation."""

    def prepare(self, env: gymnasium.Env) -> None:
        """Called once for every environment."""

    def begin(self, env: gymnasium.Env, seed: int) -> None:
        """Called after a reset."""

    def act(self, observation: dict[str, Any], elapsed: int) -> np.ndarray:
        """(A,) the command for an observation, `elapsed` steps after the reset."""


class ScriptedExpert:
    """The environment's own expert."""

    def prepare(self, env: gymnasium.Env) -> None:
        pass

    def begin(self, env: gymnasium.Env, seed: int) -> None:
        source: Any = env.unwrapped
        self._expert = source.expert(np.random.default_rng((seed, _EXPERT)))

    def act(self, observation: dict[str, Any], elapsed: int) -> np.ndarray:
        return self._expert.act()


def run_episode(
    env: gymnasium.Env,
    task: str,
    seed: int,
    *,
    noise: float = 0.0,
    hold: int = 0,
    noise_correlation: float = 0.0,
    demonstrator: Demonstrator | None = None,
) -> tuple[Attempt, dict[str, np.ndarray]]:
    """Lets an expert or a policy attempt a task once.

    Step t holds the observation and the command for it. With `noise` the command is executed with Gaussian noise
    and recorded without it, so that demonstrations show how to come back to the path (DART: Laskey et al., "DART: Noise
    Injection for Robust Imitation Learning", 2017).

    Args:
        env: an environment as described at the top of this file.
        task: id of the task.
        seed: of the episode.
        noise: standard deviation in the units of the action; grippers are left alone.
        hold: steps recorded after success, for which the motion is carried through.
        noise_correlation: seconds over which the noise stays correlated; 0 draws it anew at every step.
        demonstrator: who acts; the environment's expert when None.

    Returns:
        The attempt, and per batch key an array (length, ...) of the dtype that the environment's features name.
    """
    source: Any = env.unwrapped
    features = source.features
    observation, info = env.reset(seed=seed, options={"task": task})
    demonstrator = demonstrator or ScriptedExpert()
    demonstrator.begin(env, seed)
    disturbance = Disturbance(features, noise, noise_correlation, np.random.default_rng((seed, _NOISE)))
    steps: list[tuple[dict[str, Any], np.ndarray]] = []
    success, remaining = False, hold
    while True:
        # a copy: an environment may write its next observation into the same arrays
        seen = {key: value if isinstance(value, str) else np.array(value) for key, value in observation.items()}
        command = np.array(demonstrator.act(seen, len(steps)), dtype=features.action.dtype)
        if not np.isfinite(command).all():
            raise ValueError("an action is not finite")
        steps.append(({key: seen[key] for key in features.observations}, command))
        executed = command
        if noise > 0:
            executed = command + disturbance.next().astype(command.dtype)
            space = env.action_space
            if isinstance(space, gymnasium.spaces.Box):
                executed = np.clip(executed, space.low, space.high)
        observation, _, terminated, truncated, info = env.step(executed)
        if success or info["success"]:
            success, remaining = True, remaining - 1
            if remaining < 0 or truncated:
                break
        elif terminated or truncated:
            break
    failure = "" if success else str(info.get("failure") or "not solved")
    arrays = {
        key: np.stack([step[0][key] for step in steps]).astype(feature.dtype, copy=False)
        for key, feature in features.observations.items()
    }
    arrays["action"] = np.stack([step[1] for step in steps])
    texts = task_texts(env, task)
    text = texts[int(np.random.default_rng((seed, _TEXT)).integers(len(texts)))]
    return Attempt(seed, task, text, len(steps), success, failure), arrays


class Disturbance:
    """Noise on executed actions: Gaussian, grippers left alone; stationary and correlated in time where that is asked for.

    The correlated kind is an Ornstein-Uhlenbeck process sampled at the control rate: ``n' = a n + sqrt(1 - a^2) sigma w`` with
    ``a = exp(-1 / (rate * correlation))``. White noise at 30 Hz is filtered away by a position-controlled joint.
    """

    def __init__(self, features: Features, deviation: float, correlation: float, rng: np.random.Generator):
        """Describes the process.

        Args:
            features: of the environment: which elements of the action are grippers, and the control rate.
            deviation: standard deviation in the action's units, the same with and without correlation.
            correlation: time constant in seconds.
            rng: source of random numbers.
        """
        size = features.action.shape[-1]
        self._scale = deviation * np.array([kind != "gripper" for kind in features.action.kinds] or [True] * size)
        self._keep = float(np.exp(-1 / (features.control_rate * correlation))) if correlation > 0 else 0.0
        self._rng = rng
        self._state: np.ndarray | None = None

    def next(self) -> np.ndarray:
        """(A,) float64: the noise of the next step."""
        drawn = self._rng.standard_normal(len(self._scale))
        if self._state is None or self._keep == 0:
            self._state = drawn
        else:
            self._state = self._keep * self._state + np.sqrt(1 - self._keep**2) * drawn
        return self._scale * self._state


def task_texts(env: gymnasium.Env, task: str) -> tuple[str, ...]:
    """Sentences that demonstrations of the task are labelled with: the one it is evaluated with, and its paraphrases.

    The evaluation's own sentence is among them because vectors of hashed n-grams tell wordings apart better than meanings:
    "left" and "right" in a sentence never seen are too near each other.
    """
    source: Any = env.unwrapped
    paraphrases = source.task_paraphrases(task) if hasattr(source, "task_paraphrases") else ()
    sentence = source.task_sentence(task) if hasattr(source, "task_sentence") else task.replace("_", " ")
    return (sentence, *(text for text in paraphrases if text != sentence))


# --- files -----------------------------------------------------------------------------------------------------------------


def attempt_file(folder: Path, seed: int) -> Path:
    return folder / f"{seed:09d}.npz"


def write_attempt(path: Path, attempt: Attempt, arrays: dict[str, np.ndarray]) -> None:
    """Writes an attempt aside and renames it; the arrays of a failure are not kept."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("attempt.json", json.dumps(asdict(attempt)))
            for key, array in arrays.items() if attempt.success else ():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_attempt(path: Path) -> Attempt | None:
    """The attempt without its arrays; None for a file that is not whole (it will be recorded again)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return Attempt(**json.loads(archive.read("attempt.json")))
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError):
        return None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a successful attempt by batch key."""
    with zipfile.ZipFile(path) as archive:
        return {name[:-4]: _read_array(archive.open(name)) for name in archive.namelist() if name.endswith(".npy")}


def _read_array(file: IO[bytes]) -> np.ndarray:
    with file:
        return np.lib.format.read_array(file, allow_pickle=False)


# --- the work, here or in a worker process ---------------------------------------------------------------------------------


def attempt_episode(
    env: gymnasium.Env, recording: Recording, task: str, seed: int, demonstrator: Demonstrator | None = None
) -> Attempt:
    """Runs and stages one episode. An exception inside it makes a failed attempt, named after the exception."""
    try:
        attempt, arrays = run_episode(
            env,
            task,
            seed,
            noise=recording.noise,
            hold=recording.hold,
            noise_correlation=recording.noise_correlation,
            demonstrator=demonstrator,
        )
    except (MemoryError, OSError):  # trouble of the machine, not of the episode: another time it may go well
        raise
    except Exception as error:
        attempt, arrays = Attempt(seed, task, "", 0, False, f"{type(error).__name__}: {error}"), {}
    write_attempt(attempt_file(Path(recording.folder), seed), attempt, arrays)
    return attempt


def serve(descriptor: int) -> None:
    """What a worker process does: receives a `Recording`, then (task, seed) pairs; answers each with its `Attempt`,
    or with the error that kept it from writing one.

    Ends when the other side closes the connection, also because that process was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection = Connection(descriptor)
    try:
        recording = Recording(**connection.recv())
        demonstrator = recording.demonstrator()
        env = recording.make()
        demonstrator.prepare(env)
        while True:
            task, seed = connection.recv()
            try:
                answer: Attempt | OSError = attempt_episode(env, recording, task, seed, demonstrator)
            except FileNotFoundError:
                raise
            except OSError as error:  # a full disk: another worker would meet it too
                answer = error
            connection.send(answer)
    except (EOFError, ConnectionError, FileNotFoundError):  # a killed parent; its successor may have packed the folder away
        return
