"""Which episodes are attempted, and who attempts them: this process, or worker processes that may die and be replaced."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

import gymnasium

from lightning_robot.console import counted
from lightning_robot.generation.attempts import Attempt, Demonstrator, Recording, attempt_episode, read_attempt

DEATHS_PER_EPISODE = 3


class GenerationError(RuntimeError):
    """Demonstrations cannot be generated as asked; the message says why and what to do."""


# --- which attempts are needed ---------------------------------------------------------------------------------------------


def most_attempts(episodes_per_task: int, demonstrator: str) -> int:
    """Attempts at a task after which a generation is given up: policies may fail more often than experts."""
    return 4 * episodes_per_task + 16 if demonstrator == "expert" else 20 * episodes_per_task + 60


class Jobs:
    """Which episode to attempt next, and what became of the others.

    A task's next attempt is started only if even the success of all running ones would not be enough. So the attempts at
    the end are 0 to m, the last of them being the last success needed, whatever order they came in.

    Attributes:
        tasks: ids.
        episodes_per_task: successes wanted of each.
        demonstrator: who attempts them, ``expert`` or ``policy``.
        attempts: those that ended, by seed.
        deaths: worker processes that died in an episode, by seed.
    """

    def __init__(self, tasks: tuple[str, ...], episodes_per_task: int, seed: int, folder: Path, demonstrator: str):
        self.tasks, self.episodes_per_task, self.demonstrator = tasks, episodes_per_task, demonstrator
        self.attempts: dict[int, Attempt] = {}
        self.deaths: Counter[int] = Counter()
        self._running: set[int] = set()
        self._hopes: Counter[str] = Counter()  # per task: successes and running attempts
        self._first_open = {task: seed + number for number, task in enumerate(tasks)}  # no seed below is unattempted
        for path in sorted(folder.glob("*.npz")):
            if (attempt := read_attempt(path)) is not None:
                self.attempts[attempt.seed] = attempt
                self._hopes[attempt.task] += attempt.success

    @property
    def wanted(self) -> int:
        return len(self.tasks) * self.episodes_per_task

    @property
    def successes(self) -> list[Attempt]:
        """In seed order."""
        return [self.attempts[seed] for seed in sorted(self.attempts) if self.attempts[seed].success]

    @property
    def missing(self) -> int:
        return self.wanted - len(self.successes)

    def next(self) -> tuple[str, int] | None:
        """Task and seed of an episode to attempt now, marked as running; None while enough are running or done."""
        candidates = []
        for task in self.tasks:
            if self._hopes[task] < self.episodes_per_task:
                while self._first_open[task] in self.attempts or self._first_open[task] in self._running:
                    self._first_open[task] += len(self.tasks)
                candidates.append((self._first_open[task], task))
        if not candidates:
            return None
        seed, task = min(candidates)
        self._running.add(seed)
        self._hopes[task] += 1
        return task, seed

    def record(self, attempt: Attempt) -> None:
        self._running.discard(attempt.seed)
        self.attempts[attempt.seed] = attempt
        if attempt.success:
            return
        self._hopes[attempt.task] -= 1
        attempts = [other for other in self.attempts.values() if other.task == attempt.task]
        if len(attempts) >= most_attempts(self.episodes_per_task, self.demonstrator):
            successes = sum(other.success for other in attempts)
            reasons = Counter(other.failure for other in attempts if not other.success)
            raise GenerationError(
                f"{attempt.task}: the {self.demonstrator} solved {successes} of {len(attempts)} attempts, "
                f"{self.episodes_per_task} are wanted. {describe_failures(reasons)}. Lower noise or "
                "episodes_per_task, or leave the task out."
            )

    def died(self, task: str, seed: int, code: int | None) -> None:
        """The worker that attempted this episode is gone; the episode will be attempted again."""
        self._running.discard(seed)
        self._hopes[task] -= 1
        self._first_open[task] = min(seed, self._first_open[task])
        self.deaths[seed] += 1
        if self.deaths[seed] >= DEATHS_PER_EPISODE:
            raise GenerationError(
                f"{task}, seed {seed}: its worker process died {DEATHS_PER_EPISODE} times (exit status {code}; -9 is what "
                "the kernel does when memory runs out). Use fewer processes; what was generated is kept."
            )

    def counts(self) -> dict[str, dict[str, int]]:
        """Per task how many attempts were made and how many were solved."""
        counts = {task: {"attempted": 0, "solved": 0} for task in self.tasks}
        for attempt in self.attempts.values():
            counts[attempt.task]["attempted"] += 1
            counts[attempt.task]["solved"] += attempt.success
        return counts

    def report(self) -> list[str]:
        """A line per task, and one for all of several tasks."""
        lines = []
        for task in self.tasks:
            attempts = [attempt for attempt in self.attempts.values() if attempt.task == task]
            reasons = Counter(attempt.failure for attempt in attempts if not attempt.success)
            steps = [attempt.length for attempt in attempts if attempt.success]
            lines.append(
                f"  {task}: {self.demonstrator} solved {len(steps)} of {len(attempts)} ({len(steps) / len(attempts):.0%}), "
                f"{sum(steps) / len(steps):.0f} steps on average" + (f". {describe_failures(reasons)}." if reasons else "")
            )
        if len(self.tasks) > 1:
            kept, all_of_them = len(self.successes), len(self.attempts)
            lines.append(f"  kept {kept} of {counted(all_of_them, 'attempt')} ({kept / all_of_them:.0%})")
        return lines


def describe_failures(reasons: Counter[str]) -> str:
    return "Failures: " + ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))


# --- who attempts them -----------------------------------------------------------------------------------------------------


def attempt_here(jobs: Jobs, recording: Recording, env: gymnasium.Env, demonstrator: Demonstrator) -> Iterator[Attempt]:
    """Attempts in this process; yields successes."""
    while (job := jobs.next()) is not None:
        attempt = attempt_episode(env, recording, *job, demonstrator)
        jobs.record(attempt)
        if attempt.success:
            yield attempt


class _Worker:
    """A process with an environment of its own.

    It is started as a fresh interpreter and not by `multiprocessing`, which would import the caller's main script again:
    that breaks scripts without a main guard, and programs read from standard input.
    """

    def __init__(self, recording: Recording):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from lightning_robot.generation.attempts import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                },
            )
        self.connection = Connection(ours.detach())
        self.connection.send(asdict(recording))
        self.job: tuple[str, int] | None = None

    def start(self, job: tuple[str, int]) -> None:
        self.job = job
        self.connection.send(job)

    def stop(self) -> int:
        self.connection.close()
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def attempt_in_processes(jobs: Jobs, recording: Recording, count: int) -> Iterator[Attempt]:
    """Attempts in `count` worker processes, replacing those that die; yields successes."""
    workers = [_Worker(recording) for _ in range(count)]
    try:
        while True:
            for index, worker in enumerate(workers):
                if worker.job is None and (job := jobs.next()) is not None:
                    try:
                        worker.start(job)
                    except OSError:  # it died while idle
                        jobs.died(*job, worker.stop())
                        workers[index] = _Worker(recording)
            busy = {worker.connection: index for index, worker in enumerate(workers) if worker.job is not None}
            if not busy:
                if jobs.missing:
                    continue
                return
            for ready in wait(list(busy)):
                worker = workers[busy[ready]]  # type: ignore[index]
                assert worker.job is not None
                try:
                    attempt = worker.connection.recv()
                except (EOFError, OSError):
                    jobs.died(*worker.job, worker.stop())
                    workers[busy[ready]] = _Worker(recording)  # type: ignore[index]
                    continue
                worker.job = None
                if isinstance(attempt, OSError):
                    raise attempt
                jobs.record(attempt)
                if attempt.success:
                    yield attempt
    finally:
        for worker in workers:
            worker.stop()
