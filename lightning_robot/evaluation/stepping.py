"""Environments that step in this process or in worker processes, behind one interface: send commands, receive transitions.

Worker processes import neither torch nor the policy: they hold environments and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from lightning_robot.evaluation.outcomes import plain_details
from lightning_robot.features import Features

MakeEnvironment = Callable[..., Any]


class EnvironmentFault(RuntimeError):
    """An environment could not be created, or does not offer what an evaluation needs."""


@dataclass(frozen=True)
class Description:
    """What an environment says of itself after it has met the policy's features.

    Attributes:
        features: what it offers, None for an environment that does not say.
        fingerprint: simulator, renderer and so on.
        max_steps: its own step limit, None if it names none.
        tasks: task ids it can be asked for, empty if it names none.
        low, high: bounds of the action, each (A,).
        rate: control steps per second, for videos.
        control_rate: the same where the environment says it for certain, else 0.
        rate_of_wrapper: whether a wrapper says it, otherwise than the environment in it.
        start_states: what tells start states apart: ``state_fingerprint`` or ``first observation``.
    """

    features: Features | None
    fingerprint: dict[str, str]
    max_steps: int | None
    tasks: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    rate: float
    control_rate: float = 0.0
    start_states: str = "first observation"
    rate_of_wrapper: bool = False


@dataclass(frozen=True)
class Transition:
    """What came of a reset or a step. With `error` set the rest is meaningless and the environment must be reset."""

    elapsed: int = 0
    observation: dict[str, Any] = field(default_factory=dict)
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None  # None: the environment did not say
    failure: str | None = None
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)  # what the environment says at an episode's end
    state: str = ""  # after a reset: digest of the start state
    inner_steps: int = 1  # steps of the innermost environment: a wrapper may repeat each action


class Host:
    """One environment: made when it is first needed and anew after an exception, so that a broken one is never reused."""

    def __init__(self, make_env: MakeEnvironment, features: Features | None) -> None:
        self.make_env = make_env
        self.features = features
        self.env: Any = None
        self.elapsed = 0
        self.inner_steps = 0

    def open(self) -> Any:
        if self.env is None:
            self.env = self.make_env()
            self._count_inner_steps()
            if self.features is not None and hasattr(self.env.unwrapped, "match"):
                self.env.unwrapped.match(self.features)
        return self.env

    def describe(self) -> Description:
        import gymnasium

        try:
            env = self.open()
        except TypeError as error:  # an argument that the constructor does not have
            raise EnvironmentFault(f"The environment cannot be made: {error}.") from error
        inner = env.unwrapped
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise EnvironmentFault(f"Actions must be a flat gymnasium Box; this environment has {space}.")
        name = env.spec.id if env.spec is not None else type(inner).__name__
        limit = getattr(env.spec, "max_episode_steps", None) or _said(env, "max_steps")
        control_rate = float(_said(env, "control_rate") or 0)
        rate = control_rate or env.metadata.get("render_fps") or 30
        features, own = _said(env, "features"), getattr(inner, "features", None)
        of_wrapper = control_rate != float(getattr(inner, "control_rate", None) or 0)
        if of_wrapper and features is not None and features.control_rate == getattr(own, "control_rate", None):
            features = replace(features, control_rate=control_rate)  # the wrapper told its rate, and did not think of these
        return Description(
            features=features,
            fingerprint=dict(_said(env, "fingerprint") or {"simulator": name}),
            max_steps=int(limit) if limit else None,
            tasks=tuple(_said(env, "tasks") or ()),
            low=np.asarray(space.low, dtype=np.float32),
            high=np.asarray(space.high, dtype=np.float32),
            rate=float(rate),
            control_rate=control_rate,
            start_states="state_fingerprint" if hasattr(inner, "state_fingerprint") else "first observation",
            rate_of_wrapper=of_wrapper,
        )

    def reset(self, seed: int, task: str | None) -> Transition:
        return self._guarded(lambda env: self._reset(env, seed, task))

    def step(self, action: np.ndarray, observe: bool) -> Transition:
        """One step; without `observe` an environment with the attribute ``skip_observation`` may leave the observation out."""
        return self._guarded(lambda env: self._step(env, action, observe))

    def _reset(self, env: Any, seed: int, task: str | None) -> Transition:
        self.elapsed = 0
        self._skip(env, False)
        observation, info = env.reset(seed=seed, options=None if task is None else {"task": task})
        seen, inner = _as_dict(observation), env.unwrapped
        if hasattr(inner, "state_fingerprint"):
            state = hashlib.sha256(f"{task}: {inner.state_fingerprint()}".encode()).hexdigest()[:16]
        else:
            state = hash_observation(seen)
        return Transition(0, seen, success=_success(info), failure=info.get("failure"), state=state)

    def _step(self, env: Any, action: np.ndarray, observe: bool) -> Transition:
        self._skip(env, not observe)
        self.inner_steps = 0
        observation, reward, terminated, truncated, info = env.step(action)
        self.elapsed += 1
        return Transition(
            self.elapsed,
            _as_dict(observation),
            float(reward),
            bool(terminated),
            bool(truncated),
            _success(info),
            info.get("failure"),
            details=plain_details(info.get("details")),
            inner_steps=self.inner_steps,
        )

    def _skip(self, env: Any, skip: bool) -> None:
        if hasattr(env.unwrapped, "skip_observation"):
            env.unwrapped.skip_observation = skip and _reads_no_observation(env)

    def _count_inner_steps(self) -> None:
        inner = self.env.unwrapped
        step = inner.step

        def counted(action: Any) -> Any:
            self.inner_steps += 1
            return step(action)

        inner.step = counted

    def _guarded(self, call: Callable[[Any], Transition]) -> Transition:
        try:
            return call(self.open())
        except Exception as error:  # one episode is lost, not the evaluation
            self.close()
            return Transition(error=f"{type(error).__name__}: {error}".splitlines()[0])

    def close(self) -> None:
        env, self.env = self.env, None
        if env is not None:
            try:
                env.close()
            except Exception:  # a broken environment may not even close
                traceback.print_exc()


def _said(env: Any, name: str) -> Any:
    """What the outermost wrapper that has the attribute says, else the environment itself; None if nobody does."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None


def _reads_no_observation(env: Any) -> bool:
    """Whether no wrapper of the user's own stands between, which may read what the environment leaves out."""
    while hasattr(env, "env") and env is not env.unwrapped:
        if not type(env).__module__.startswith("gymnasium.wrappers.common"):
            return False
        env = env.env
    return True


def _as_dict(observation: Any) -> dict[str, Any]:
    """A copy, since an environment may write its next observation into the same arrays; a bare array is the state."""
    if not isinstance(observation, dict):
        observation = {"observation.state": np.asarray(observation, dtype=np.float32)}
    return {key: value if isinstance(value, str) else np.array(value) for key, value in observation.items()}


def _success(info: dict[str, Any]) -> bool | None:
    for key in ("success", "is_success"):
        if key in info:
            return bool(info[key])
    return None


def hash_observation(observation: dict[str, Any]) -> str:
    """16 hexadecimal digits of an observation's values; tells start states apart."""
    digest = hashlib.sha256()
    for key in sorted(observation):
        value = observation[key]
        if isinstance(value, str):
            digest.update(f"{key}={value};".encode())
        else:
            array = np.ascontiguousarray(value)
            digest.update(f"{key}:{array.dtype}:{array.shape};".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class LocalPool:
    """Environments in this process; they step one after the other when `receive` is called."""

    processes = 0

    def __init__(self, make_env: MakeEnvironment, num_envs: int, features: Features | None) -> None:
        self.hosts = [Host(make_env, features) for _ in range(num_envs)]
        self.waiting: list[tuple[int, str, tuple]] = []

    def describe(self) -> Description:
        return self.hosts[0].describe()

    def alive(self, index: int) -> bool:
        return True

    @property
    def busy(self) -> bool:
        """True while a command awaits its transition."""
        return bool(self.waiting)

    def send(self, index: int, command: str, *arguments: Any) -> None:
        self.waiting.append((index, command, arguments))

    def receive(self) -> list[tuple[int, Transition]]:
        waiting, self.waiting = self.waiting, []
        return [(index, getattr(self.hosts[index], command)(*arguments)) for index, command, arguments in waiting]

    def close(self) -> None:
        for host in self.hosts:
            host.close()


class ProcessPool:
    """Environments in worker processes; worker w owns the environments w, w + processes, …

    A worker that dies takes its environments with it: their running episodes end in an error that says so, and the other
    workers play what remains.
    """

    def __init__(self, make_env: MakeEnvironment, num_envs: int, features: Features | None, processes: int) -> None:
        # Forking a process that runs torch's threads, or Lightning's, can hang.
        context = multiprocessing.get_context("spawn")
        self.processes = min(processes, num_envs)
        self.connections: list[Connection] = []
        self.workers = []
        self.pending: list[set[int]] = [set() for _ in range(self.processes)]
        self.dead: dict[int, str] = {}
        self.undelivered: list[tuple[int, Transition]] = []
        try:
            for rank in range(self.processes):
                ours, theirs = context.Pipe()
                arguments = (theirs, make_env, range(rank, num_envs, self.processes), features)
                worker = context.Process(target=_work, args=arguments, daemon=True, name=f"environments-{rank}")
                worker.start()
                theirs.close()
                self.connections.append(ours)
                self.workers.append(worker)
        except BaseException:
            self.close()
            raise

    def describe(self) -> Description:
        self.connections[0].send((0, "describe", ()))
        try:
            answer = self.connections[0].recv()[1]
        except (EOFError, OSError):
            raise EnvironmentFault(f"The process that should hold environments ended ({self._bury(0)}).") from None
        if isinstance(answer, str):
            raise EnvironmentFault(answer)
        return answer

    def alive(self, index: int) -> bool:
        return index % self.processes not in self.dead

    @property
    def busy(self) -> bool:
        return bool(self.undelivered) or any(self.pending)

    def send(self, index: int, command: str, *arguments: Any) -> None:
        rank = index % self.processes
        self.pending[rank].add(index)
        try:
            self.connections[rank].send((index, command, arguments))
        except OSError:
            self._lose(rank)

    def receive(self) -> list[tuple[int, Transition]]:
        """Waits for at least one transition."""
        received, self.undelivered = self.undelivered, []
        if received:
            return received
        open_ranks = {self.connections[rank]: rank for rank in range(self.processes) if self.pending[rank]}
        for connection in wait(list(open_ranks)):
            rank = open_ranks[connection]  # type: ignore[index]
            try:
                while self.pending[rank] and self.connections[rank].poll():
                    index, transition = self.connections[rank].recv()
                    self.pending[rank].discard(index)
                    received.append((index, transition))
            except (EOFError, OSError):
                self._lose(rank)
        received += self.undelivered
        self.undelivered = []
        return received

    def _lose(self, rank: int) -> None:
        reason = self._bury(rank)
        lost = Transition(error=f"the process that ran it ended ({reason})")
        self.undelivered += [(index, lost) for index in sorted(self.pending[rank])]
        self.pending[rank].clear()

    def _bury(self, rank: int) -> str:
        if rank not in self.dead:
            self.workers[rank].join(timeout=5)
            code = self.workers[rank].exitcode
            self.dead[rank] = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return self.dead[rank]

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for worker in self.workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
                worker.join()
        for connection in self.connections:
            connection.close()


Pool = LocalPool | ProcessPool


def open_pool(make_env: MakeEnvironment, num_envs: int, features: Features | None, processes: int) -> Pool:
    """Environments in `processes` workers; 0 keeps them in this process."""
    if processes < 1:
        return LocalPool(make_env, num_envs, features)
    return ProcessPool(make_env, num_envs, features, processes)


def _work(connection: Connection, make_env: MakeEnvironment, indices: Sequence[int], features: Features | None) -> None:
    hosts = {index: Host(make_env, features) for index in indices}
    try:
        while (message := connection.recv()) is not None:
            index, command, arguments = message
            answer: Any
            try:
                answer = getattr(hosts[index], command)(*arguments)
            except Exception as error:  # only `describe` raises
                answer = f"{type(error).__name__}: {error}"
            connection.send((index, answer))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the main process ended or was interrupted
    finally:
        for host in hosts.values():
            host.close()
