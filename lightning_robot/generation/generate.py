"""Demonstrations from an environment's scripted expert, written into an episode store.

    attempts ──▶ one renamed file each in <store>.partial ──▶ packed in seed order ──▶ <store>

Attempt a of task number k has the seed ``seed + a * len(tasks) + k``, and each task keeps its first `episodes_per_task`
successes. So the store depends on the settings alone: not on the number of processes, nor on whether the work was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from lightning_robot.console import counted, progress, say
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter, partial_folder
from lightning_robot.data.workers import claimed, usable_cores
from lightning_robot.generation.attempts import (
    Attempt,
    Recording,
    attempt_episode,
    attempt_file,
    read_arrays,
    read_attempt,
    task_texts,
)
from lightning_robot.transforms.text import HashedTextEncoder, text_encoder

FORMAT = 1  # of what is recorded and how seeds are used; part of a store's settings
DEATHS_PER_EPISODE = 3
ADDED_LATER = {"noise_correlation": 0.0}  # settings that older stores do not name


class GenerationError(RuntimeError):
    """Demonstrations cannot be generated as asked; the message says why and what to do."""


def generate(
    store: str | Path,
    *,
    env: str = "lightning_robot/PlayTable-v0",
    env_kwargs: dict[str, Any] | None = None,
    tasks: tuple[str, ...] | list[str] | None = None,
    episodes_per_task: int = 25,
    seed: int = 0,
    noise: float = 0.0,
    noise_correlation: float = 0.0,
    hold: int = 8,
    encoder: str = HashedTextEncoder.name,
    processes: int | None = None,
) -> Path:
    """Generates demonstrations into an episode store.

    Interrupted at any moment, even by ``kill -9``, the same call continues where it was and ends in the same bytes.

    Args:
        store: folder of the store to write, e.g. ``data/play_table.zarr``.
        env: id of an environment with an expert (see `lightning_robot.generation.attempts`).
        env_kwargs: its constructor's arguments, plain values: they decide what is recorded.
        tasks: ids of tasks; the environment's own choice (``env.unwrapped.tasks``) when None.
        episodes_per_task: successful demonstrations of each task.
        seed: seed of the first attempt; the following ones count up from it. Evaluation uses other blocks of seeds.
        noise: standard deviation of noise on the executed, not on the recorded action, in the action's units.
        noise_correlation: seconds over which that noise stays correlated; 0 draws it anew at every step.
        hold: steps recorded after success, so that a policy learns to carry a motion through instead of stopping short.
        encoder: of the sentences: ours, or the name of a model of sentence-transformers (extra ``calvin``).
        processes: worker processes, each with an environment of its own; one per core when None. 1 works in this process.

    Returns:
        `store` as a path.

    Raises:
        GenerationError: the environment cannot be made or has no expert; the store exists with other settings; an
            unfinished one does; the expert fails too often; one episode keeps killing its worker; the seeds reach those of
            evaluation; the disk is full.
        WorkError: another process is generating the same store.
    """
    store = Path(store).expanduser().absolute()
    if processes is not None and processes < 1:
        raise GenerationError(f"processes is {processes}; it must be at least 1.")
    example: Any = None
    try:
        try:
            example = Recording("", env, dict(env_kwargs or {}), noise, hold, noise_correlation).make()
        except (ValueError, TypeError, gymnasium.error.Error) as error:
            raise GenerationError(f"{env} cannot be made: {error}") from error
        source = example.unwrapped
        if not hasattr(source, "expert"):
            raise GenerationError(
                f"{env} has no scripted expert (a method `expert`, see CONTRIBUTING.md): nobody to demonstrate its tasks."
            )
        chosen = tuple(tasks) if tasks else tuple(source.tasks)
        settings = json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "generator": "expert",
                    "environment": env,
                    "environment_arguments": dict(env_kwargs or {}),
                    "tasks": chosen,
                    "episodes_per_task": episodes_per_task,
                    "seed": seed,
                    "noise": noise,
                    "noise_correlation": noise_correlation,
                    "hold": hold,
                    "encoder": encoder,
                }
            )
        )
        _check(settings)
        text_encoder(encoder).encode([""])  # a model that cannot be loaded is known before the work
        partial = partial_folder(store)
        if store.exists():
            _check_same(store, settings)
            shutil.rmtree(partial, ignore_errors=True)  # a kill between renaming and clearing up leaves it
            of_each = counted(episodes_per_task, "demonstration")
            say(f"{store} is complete: {of_each} of each of {counted(len(chosen), 'task')}.")
            return store
        _check_tasks(example, chosen, seed)
        with claimed(partial):
            folder = _staging(partial, settings, dict(source.fingerprint))
            recording = Recording(str(folder), env, settings["environment_arguments"], noise, hold, noise_correlation)
            jobs = _Jobs(chosen, episodes_per_task, seed, folder)
            count = min(processes or usable_cores(), jobs.missing) or 1
            say(
                f"Generating {counted(jobs.wanted, 'demonstration')} ({counted(len(chosen), 'task')}, {episodes_per_task} "
                f"each) in {env} with its scripted expert, {counted(count, 'process')}, into {store}."
            )
            if jobs.attempts:
                say(
                    f"Continuing: there {'is' if len(jobs.attempts) == 1 else 'are'} {counted(len(jobs.attempts), 'attempt')} "
                    f"already, and {counted(jobs.missing, 'demonstration')} to come."
                )
            deaths = 0
            if jobs.missing:
                collected = _here(jobs, recording, example) if count == 1 else _in_processes(jobs, recording, count)
                try:
                    for _ in progress(collected, total=jobs.missing, description="generating", unit="demonstrations"):
                        pass
                except OSError as error:
                    raise GenerationError(
                        f"Nothing more can be written in {folder} ({error}). Make room there or take another place; what was "
                        "generated is kept, the same call continues."
                    ) from error
                deaths = sum(jobs.deaths.values())
            _pack(store, folder, jobs, settings, example)
            for line in jobs.report():
                say(line)
            if deaths:
                say(f"{counted(deaths, 'worker process')} died on the way; the episodes were attempted again.")
        return store
    finally:
        if example is not None:
            example.close()


# --- what is there already -------------------------------------------------------------------------------------------------


def _check(settings: dict[str, Any]) -> None:
    from lightning_robot.evaluation.rollout import SELECTION_SEEDS

    if not settings["tasks"] or len(set(settings["tasks"])) != len(settings["tasks"]):
        raise GenerationError(f"Tasks to demonstrate: {settings['tasks']}. Name at least one, each once.")
    for name, least in (("episodes_per_task", 1), ("noise", 0), ("noise_correlation", 0), ("hold", 0), ("seed", 0)):
        if settings[name] < least:
            raise GenerationError(f"{name} is {settings[name]}; it must be at least {least}.")
    last = settings["seed"] + _most_attempts(settings["episodes_per_task"]) * len(settings["tasks"])
    if last >= SELECTION_SEEDS:
        raise GenerationError(
            f"Seeds from {SELECTION_SEEDS:,} on belong to evaluation, and this generation could reach {last:,}: lower seed "
            f"({settings['seed']:,}) or episodes_per_task ({settings['episodes_per_task']:,})."
        )


def _check_tasks(env: gymnasium.Env, tasks: tuple[str, ...], seed: int) -> None:
    """Refuses, before any work, tasks that the environment does not know or has no expert for."""
    source: Any = env.unwrapped
    for number, task in enumerate(tasks):
        try:
            task_texts(env, task)
            env.reset(seed=seed + number, options={"task": task})
            source.expert(np.random.default_rng(seed))
        except Exception as error:
            raise GenerationError(
                f"{task!r} cannot be demonstrated: {type(error).__name__}: {error}. By itself the environment chooses "
                f"{', '.join(source.tasks)}."
            ) from error


def _check_same(store: Path, settings: dict[str, Any]) -> None:
    """Refuses a finished store that was made otherwise."""
    try:
        have = EpisodeStore.open(store).provenance.get("settings", {})
    except StoreError:
        have = {}
    if have:
        have = ADDED_LATER | have
    else:
        raise GenerationError(f"{store} exists and is not a store of generated demonstrations. Choose another path.")
    if have != settings:
        raise GenerationError(
            f"{store} was generated with other settings: {_differences(have, settings)}. Use those settings, choose another "
            f"path, or remove it (rm -r {store})."
        )


def _staging(partial: Path, settings: dict[str, Any], fingerprint: dict[str, str]) -> Path:
    """The folder that attempts are staged in, new or left by an interrupted generation with the same settings."""
    folder = partial / "episodes"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {**settings, "simulator": fingerprint}
    file = folder / "settings.json"
    if file.is_file():
        have = json.loads(file.read_text())
        if have != wanted:
            raise GenerationError(
                f"{partial} holds an unfinished generation with other settings: {_differences(have, wanted)}. Repeat the "
                f"call with those settings to finish it, or remove it (rm -r {partial})."
            )
    else:
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps(wanted))
        os.replace(aside, file)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    return folder


def _differences(have: dict[str, Any], asked: dict[str, Any]) -> str:
    names = [name for name in sorted(have.keys() | asked.keys()) if have.get(name) != asked.get(name)]
    return "; ".join(f"{name} {have.get(name)!r} there, {asked.get(name)!r} asked for" for name in names)


# --- from attempts to the store --------------------------------------------------------------------------------------------


def _pack(store: Path, folder: Path, jobs: _Jobs, settings: dict[str, Any], env: gymnasium.Env) -> None:
    """Writes the successful attempts in seed order, one segment and one sentence each."""
    source: Any = env.unwrapped
    episodes = jobs.successes
    texts, tasks = [], []
    for task in jobs.tasks:
        for text in dict.fromkeys((*task_texts(env, task), source.task_sentence(task))):
            texts.append(text)
            tasks.append(task)
    row = {(task, text): index for index, (task, text) in enumerate(zip(tasks, texts))}
    lengths = np.array([episode.length for episode in episodes], np.int64)
    ends = np.cumsum(lengths)
    rows = [row[episode.task, episode.text] for episode in episodes]
    first = _stored(read_arrays(attempt_file(folder, episodes[0].seed)))
    writer = StoreWriter(
        store,
        {key: (array.shape[1:], array.dtype) for key, array in first.items()},
        int(ends[-1]),
        {
            "features": source.features.to_dict(),
            "provenance": {
                "settings": settings,
                "simulator": dict(source.fingerprint),
                "seeds": [episode.seed for episode in episodes],
                "expert": jobs.counts(),
            },
        },
    )
    for episode in progress(episodes, description="packing", unit="demonstrations"):
        writer.append(_stored(read_arrays(attempt_file(folder, episode.seed))))
    encoder = text_encoder(settings["encoder"])
    writer.finish(
        ends,
        segments=np.stack([ends - lengths, ends, np.array(rows, np.int64)], axis=1),
        language={"texts": texts, "tasks": tasks, "encoder": encoder.name, "embeddings": encoder.encode(texts)},
    )


def _stored(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Batch layout to that of stores: pictures with channels last, depth without channel."""
    stored = {}
    for key, array in arrays.items():
        if key.startswith("observation.images."):
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        elif key.startswith("observation.depth."):
            array = array[:, 0]
        stored[key] = array
    return stored


# --- which attempts are needed ---------------------------------------------------------------------------------------------


def _most_attempts(episodes_per_task: int) -> int:
    return 4 * episodes_per_task + 16


class _Jobs:
    """Which episode to attempt next, and what became of the others.

    A task's next attempt is started only if even the success of all running ones would not be enough. So the attempts at
    the end are 0 to m, the last of them being the last success needed, whatever order they came in.
    """

    def __init__(self, tasks: tuple[str, ...], episodes_per_task: int, seed: int, folder: Path):
        self.tasks, self.episodes_per_task, self.seed = tasks, episodes_per_task, seed
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
        if len(attempts) >= _most_attempts(self.episodes_per_task):
            successes = sum(other.success for other in attempts)
            reasons = Counter(other.failure for other in attempts if not other.success)
            raise GenerationError(
                f"{attempt.task}: the expert solved {successes} of {len(attempts)} attempts, {self.episodes_per_task} are "
                f"wanted. {_reasons(reasons)}. Lower noise or episodes_per_task, or leave the task out."
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
        """Per task how many attempts the expert made and how many it solved."""
        counts = {task: {"attempted": 0, "solved": 0} for task in self.tasks}
        for attempt in self.attempts.values():
            counts[attempt.task]["attempted"] += 1
            counts[attempt.task]["solved"] += attempt.success
        return counts

    def report(self) -> list[str]:
        lines = []
        for task in self.tasks:
            attempts = [attempt for attempt in self.attempts.values() if attempt.task == task]
            reasons = Counter(attempt.failure for attempt in attempts if not attempt.success)
            steps = [attempt.length for attempt in attempts if attempt.success]
            lines.append(
                f"  {task}: expert solved {len(steps)} of {len(attempts)}, {sum(steps) / len(steps):.0f} steps on average"
                + (f". {_reasons(reasons)}." if reasons else "")
            )
        return lines


def _reasons(reasons: Counter[str]) -> str:
    return "Failures: " + ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))


# --- who attempts them -----------------------------------------------------------------------------------------------------


def _here(jobs: _Jobs, recording: Recording, env: gymnasium.Env) -> Iterator[Attempt]:
    """Attempts in this process; yields successes."""
    while (job := jobs.next()) is not None:
        attempt = attempt_episode(env, recording, *job)
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


def _in_processes(jobs: _Jobs, recording: Recording, count: int) -> Iterator[Attempt]:
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
