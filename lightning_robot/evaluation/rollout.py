"""Plays episodes with a policy and tells what came of them: one function for the callback, the command and generation."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lightning_robot.console import progress as show_progress
from lightning_robot.evaluation.controller import INFERENCE_BATCH, Controller, Ensembling, row_of
from lightning_robot.evaluation.demonstrated import acting_notes, cut_note, refuse_training_seeds, unchecked_facts
from lightning_robot.evaluation.fingerprints import (
    environment_fingerprints,
    fingerprint_configuration,
    fingerprint_policy,
    fingerprint_statistics,
    package_version,
)
from lightning_robot.evaluation.plausibility import check_predictions
from lightning_robot.evaluation.probe import probe, probe_end, refuse_memory
from lightning_robot.evaluation.result import SOLVED_AT_RESET, EpisodeRecord, EpisodeTimes, EvaluationResult
from lightning_robot.evaluation.stepping import (
    Description,
    EnvironmentFault,
    MakeEnvironment,
    Pool,
    Transition,
    open_pool,
)
from lightning_robot.features import IncompatibleFeatures, check_compatible, other_rate
from lightning_robot.transforms.postprocess import build_postprocess

if TYPE_CHECKING:
    from lightning_robot.policies.base import Policy

# Seeds of scenes. A number that was used to choose a checkpoint is no estimate of how good it is, and a scene it was trained
# on is no test: each purpose has a block of its own.
GENERATION_SEEDS = 0
SELECTION_SEEDS = 1_000_000
REPORTING_SEEDS = 2_000_000

PLAUSIBLE_AFTER = 4  # episodes after which predictions are first compared with demonstrations


@dataclass(frozen=True)
class Episode:
    """An episode to play: the seed fixes everything about it but the task."""

    seed: int
    task: str | None = None


def plan_episodes(episodes: int, seed: int, tasks: Sequence[str] | None = None) -> list[Episode]:
    """Spreads episodes evenly over tasks; seeds are consecutive, each task has a block of its own.

    Args:
        episodes: how many in all; the first tasks get one more where the number does not divide.
        seed: the first seed.
        tasks: task ids; None leaves the task to the environment.
    """
    names: list[str | None] = list(tasks) if tasks else [None]
    if episodes < len(names):
        raise ValueError(f"{episodes} episodes for {len(names)} tasks: ask for at least one per task.")
    counts = [episodes // len(names) + (position < episodes % len(names)) for position in range(len(names))]
    order = [name for name, count in zip(names, counts) for _ in range(count)]
    return [Episode(seed + position, name) for position, name in enumerate(order)]


def describe_seeds(episodes: Sequence[Episode]) -> dict[str, Any]:
    """First and last seed, and what seeds of their block are for: generation, selection, reporting, or mixed."""
    seeds = [episode.seed for episode in episodes]
    roles = {
        "reporting" if seed >= REPORTING_SEEDS else "selection" if seed >= SELECTION_SEEDS else "generation" for seed in seeds
    }
    return {"first": min(seeds), "last": max(seeds), "role": roles.pop() if len(roles) == 1 else "mixed"}


def choose_tasks(policy: Policy, description: Description, asked: Sequence[str] | None = None) -> list[str]:
    """Task ids to play: those asked for, else those of the environment that the policy was trained on.

    Args:
        policy: one that reads no task plays every task of the environment.
        description: of the environment.
        asked: task ids, or None (or empty) for the choice described.

    Returns:
        Task ids in the environment's order; empty where the environment names none.

    Raises:
        EnvironmentFault: the policy was trained on none of the environment's tasks.
    """
    if asked:
        return list(asked)
    trained = getattr(policy, "trained_tasks", ())
    if not trained or not description.tasks:
        return list(description.tasks)
    both = [task for task in description.tasks if task in trained]
    if not both:
        raise EnvironmentFault(
            f"The policy was trained on {', '.join(trained)}; the environment plays {', '.join(description.tasks)}. Name the "
            "tasks to play (evaluation.tasks, or --tasks of evaluate)."
        )
    return both


@dataclass
class _Running:
    """An episode in progress."""

    episode: Episode
    started: float
    start_state: str = ""
    steps: int = 0
    total_reward: float = 0.0
    success: bool = False
    success_said: bool = False
    success_at_reset: bool = False
    steps_out_of_bounds: int = 0
    inference_ms: list[float] = field(default_factory=list)
    latest: Transition = field(default_factory=Transition)

    def take(self, transition: Transition) -> None:
        self.latest = transition
        if transition.error:
            return
        self.steps = transition.elapsed
        self.total_reward += transition.reward
        self.success_said |= transition.success is not None
        self.success |= bool(transition.success)
        if transition.elapsed == 0:
            self.start_state = transition.state
            self.success_at_reset = bool(transition.success)

    def over(self, max_steps: int) -> bool:
        """An episode ends with its first success, however long the environment would go on."""
        last = self.latest
        return bool(last.error) or self.success or last.terminated or last.truncated or self.steps >= max_steps

    def record(self) -> tuple[EpisodeRecord, EpisodeTimes]:
        last, episode = self.latest, self.episode
        if last.error:
            self.success, failure = False, f"error: {last.error}"
        elif not self.success_said:
            raise EnvironmentFault(
                "The environment never said whether the task was solved: its info needs the key 'success' (or 'is_success')."
            )
        elif self.success_at_reset:
            self.success, failure = False, SOLVED_AT_RESET  # nobody's success
        elif self.success:
            failure = None
        else:
            failure = last.failure or ("terminated" if last.terminated else "timeout")
        record = EpisodeRecord(
            seed=episode.seed,
            task=episode.task,
            success=self.success,
            failure=failure,
            steps=self.steps,
            total_reward=self.total_reward,
            success_at_reset=self.success_at_reset,
            start_state=self.start_state,
            queries=len(self.inference_ms),
            steps_out_of_bounds=self.steps_out_of_bounds,
            details=last.details,
        )
        times = EpisodeTimes(episode.seed, episode.task, time.perf_counter() - self.started, tuple(self.inference_ms))
        return record, times


def rollout(
    policy: Policy,
    make_env: MakeEnvironment,
    episodes: Sequence[Episode],
    *,
    num_envs: int = 8,
    inference_batch: int = INFERENCE_BATCH,
    threads: int = 1,
    processes: int = 0,
    max_steps: int | None = None,
    execution_horizon: int | None = None,
    ensembling: Ensembling | Literal[False] | None = None,
    postprocess: Sequence[dict[str, Any]] | None = None,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> EvaluationResult:
    """Plays every episode once.

    The table of the result depends on the checkpoint, the episodes and `inference_batch`, `threads`, `max_steps`,
    `execution_horizon`, `ensembling` and `postprocess`; never on `num_envs`, `processes` or `world_size`.

    Args:
        policy: acts; the weights it has now are judged, in evaluation mode.
        make_env: makes one environment with the Gymnasium API. Must be picklable where `processes` > 0.
        episodes: what to play.
        num_envs: environments at the same time; the policy is asked as soon as `inference_batch` of them wait for it.
        inference_batch: rows of every query of the policy.
        threads: torch's threads while playing.
        processes: worker processes that step the environments; 0 steps them here.
        max_steps: step limit; the environment's own when None (the smaller one when both are there).
        execution_horizon: actions executed of each chunk; the policy's own when None.
        ensembling: temporal ensembling instead of a chunk queue; None does as the policy says, False never.
        postprocess: steps applied to every action; the policy's own when None.
        progress: shows how far it is.
        rank: which share of the episodes to play.
        world_size: number of shares, dealt in blocks of `inference_batch`. `EvaluationResult.merge` joins them.

    Returns:
        The table of this share.

    Raises:
        IncompatibleFeatures: the environment does not offer what the policy was trained on.
        EnvironmentFault: no environment can be made, it lacks a step limit, does not report success or does not begin episodes
            anew, or every episode ended by an error.
        TrainingSeeds: scenes of the policy's demonstrations were to be played.
        NormalizedActions: the policy's actions were left in the network's units.
        KeepsState: the policy remembers something between calls.
    """
    block = max(1, min(inference_batch, math.ceil(len(episodes) / world_size)))  # consecutive seeds fill a query
    share = [episode for position, episode in enumerate(episodes) if position // block % world_size == rank]
    if not share:
        return EvaluationResult([])
    seen = {(episode.seed, episode.task) for episode in episodes}
    if len(seen) < len(episodes):
        raise ValueError(f"{len(episodes) - len(seen)} episodes are planned twice: they would only repeat one another.")
    started = time.perf_counter()
    controller = Controller(
        policy,
        min(num_envs, len(share)),
        execution_horizon=execution_horizon,
        ensembling=ensembling,
        postprocess=postprocess,
        inference_batch=inference_batch,
    )
    pool = open_pool(make_env, controller.num_envs, policy.features, processes)
    try:
        description = pool.describe()
        notes = _meet(policy, description)
        limit = _step_limit(description, max_steps)
        refuse_training_seeds(policy, [episode.seed for episode in episodes], description)
        notes += acting_notes(policy, limit, controller.execution_horizon)
        seen_first, start = probe(pool, policy, description, episodes[0].task)
        notes += [note for note in seen_first if not _told(note, notes)]
        cut: list[int] = []

        def notice(_: int, transition: Transition) -> None:
            if transition.truncated and not transition.success and transition.elapsed < limit:
                cut.append(transition.elapsed)

        with acting(policy, threads):
            if not start.error:
                refuse_memory(policy, start.observation, inference_batch)
            played: Iterator = play(pool, controller, share, description, limit, notice)
            if progress and rank == 0:
                played = show_progress(played, total=len(share), description="evaluating", unit="episodes")
            rows = []
            for row in played:
                rows.append(row)
                if len(rows) in (PLAUSIBLE_AFTER, len(share)):
                    doubt = check_predictions(policy, controller.predicted)
            fingerprint = fingerprint_policy(policy)
        probe_end(pool, episodes[0].task, start)
    finally:
        pool.close()
    records = [record for record, _ in rows]
    notes += [note for note in (cut_note(policy, max(cut, default=limit), limit), doubt) if note]
    result = EvaluationResult(
        records=records,
        settings={
            "inference_batch": inference_batch,
            "threads": threads,
            "max_steps": limit,
            "execution_horizon": controller.execution_horizon,
            "ensembling": controller.ensembling and [controller.ensembling.coefficient, controller.ensembling.direction],
            "postprocess": controller.postprocess,
            "policy": type(policy).__name__,
            "device": _device_name(policy),
            "start_states_told_by": description.start_states,
            "seeds": describe_seeds(episodes),
            "versions": {name: package_version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")},
        },
        fingerprints={
            **environment_fingerprints(description.fingerprint),
            "checkpoint": fingerprint,
            "statistics": fingerprint_statistics(policy),
            "configuration": fingerprint_configuration(policy),
        },
        notes=notes,
        times=[times for _, times in rows],
        seconds=time.perf_counter() - started,
        processes=pool.processes,
        unchecked=unchecked_facts(policy),
    )
    if world_size == 1:
        refuse_errors_only(result)
    return result


def play(
    pool: Pool,
    controller: Controller,
    episodes: Sequence[Episode],
    description: Description,
    max_steps: int,
    on_transition: Callable[[int, Transition], None] | None = None,
    observe_all: bool = False,
) -> Iterator[tuple[EpisodeRecord, EpisodeTimes]]:
    """Plays episodes and yields each one's record when it is over, in the order they end.

    Environments run ahead with the actions they have; those that need a new chunk wait until `inference_batch` of them do, or
    until nothing else moves. So a query is nearly always full, and a slow environment holds up nobody.

    Args:
        pool: the environments.
        controller: acts in them; one slot per environment.
        episodes: what to play.
        description: of the environment, for its action bounds.
        max_steps: step limit.
        on_transition: called with (environment, transition) after every reset and step.
        observe_all: whether observations are computed that no query reads.
    """
    left = deque(episodes)
    # A prediction errs a little beyond the bounds, most of all in a dimension that was constant in training; a mistaken unit or
    # a missing un-normalisation goes far beyond them, and that alone is worth reporting.
    tolerance = 0.1 * (description.high - description.low)
    running: dict[int, _Running] = {}
    waiting: list[int] = []
    broken: list[tuple[int, Transition]] = []

    def begin(index: int) -> None:
        if left and pool.alive(index):
            taken = {controller.row(other) for other in running}
            free = (one for one in left if row_of(one.seed, controller.inference_batch) not in taken)
            episode = next(free, left[0])
            left.remove(episode)
            running[index] = _Running(episode, time.perf_counter())
            controller.reset([index], [episode.seed])
            pool.send(index, "reset", episode.seed, episode.task)

    def act(indices: list[int]) -> None:
        latest = [running[index].latest for index in indices]
        asked = len(controller.queries)
        actions = controller.act([one.observation for one in latest], [one.elapsed for one in latest], indices)
        for group, seconds in controller.queries[asked:]:
            for index in group:
                running[index].inference_ms.append(1000 * seconds)
        for index, action in zip(indices, actions):
            if not np.isfinite(action).all():
                broken.append((index, Transition(error="the policy's action is not finite")))
                continue
            beyond = np.maximum(description.low - action, action - description.high)
            running[index].steps_out_of_bounds += int((beyond > tolerance).any())
            pool.send(index, "step", action, observe_all or controller.will_read(index))

    for index in range(controller.num_envs):
        begin(index)
    while running:
        arrived, broken = broken, []
        if pool.busy:
            arrived += pool.receive()
        for index, transition in arrived:
            state = running[index]
            state.take(transition)
            if on_transition is not None:
                on_transition(index, transition)
            if state.over(max_steps):
                yield running.pop(index).record()
                begin(index)
            else:
                waiting.append(index)
        ready = [index for index in waiting if not controller.needs_query(index)]
        waiting = [index for index in waiting if controller.needs_query(index)]
        if ready:
            act(ready)
        batch = controller.choose_batch(waiting)
        while len(batch) == controller.inference_batch or (batch and not pool.busy and not broken):
            waiting = [index for index in waiting if index not in batch]
            act(batch)
            batch = controller.choose_batch(waiting)
    for episode in left:  # no environment is left to play them in
        lost = _Running(episode, time.perf_counter())
        lost.take(Transition(error="every process with environments had ended before"))
        yield lost.record()


def refuse_errors_only(result: EvaluationResult) -> None:
    """Raises `EnvironmentFault` if every episode ended by an error: that is no evaluation."""
    if result.records and len(result.errors) == len(result.records):
        first = result.records[0].failure
        raise EnvironmentFault(f"Every one of {len(result.records)} episodes ended by an error; the first: {first}.")


def environment_maker(env: str, arguments: dict[str, Any] | None = None) -> MakeEnvironment:
    """What `rollout` calls to make environments: picklable, for worker processes too.

    Args:
        env: Gymnasium id.
        arguments: of the environment's constructor.
    """
    # Named by its path: which environments there are is none of this room's business.
    return partial(import_module("lightning_robot.envs").make_environment, env, **(arguments or {}))


def inspect_environment(policy: Policy, make_env: MakeEnvironment, tasks: Sequence[str] = ()) -> tuple[Description, list[str]]:
    """Makes one environment and asks whether the policy can act in it, before the work.

    Args:
        policy: what shall act.
        make_env: makes the environment.
        tasks: task ids that it must know.

    Returns:
        What the environment says of itself, and differences that do not prevent acting.

    Raises:
        IncompatibleFeatures, EnvironmentFault, PostprocessError: as `rollout` would; or the environment refuses a task.
    """
    build_postprocess(getattr(policy, "postprocess", None) or (), policy.features)
    pool = open_pool(make_env, 1, policy.features, 0)
    try:
        description = pool.describe()
        notes = _meet(policy, description)
        for task in tasks:
            pool.send(0, "reset", 0, task)
            ((_, transition),) = pool.receive()
            if transition.error:
                raise EnvironmentFault(f"The environment cannot begin the task {task!r}: {transition.error}.")
        return description, notes
    finally:
        pool.close()


def _meet(policy: Policy, description: Description) -> list[str]:
    if description.features is None:
        action = policy.features.action.shape
        if description.low.shape != tuple(action):
            raise EnvironmentFault(
                f"The policy's actions have shape {tuple(action)}, the environment's {description.low.shape}."
            )
        if error := other_rate(policy.features.control_rate, description.control_rate):
            raise IncompatibleFeatures(f"The policy does not fit:\n  {error}")
        return ["The environment does not say what it offers: units, names and frames were not compared."]
    notes = check_compatible(policy.features, description.features, policy.window.keys)
    trained, offered = policy.features.source, description.features.source
    for name in sorted(set(trained) & set(offered)):
        if trained[name] != offered[name]:
            notes.append(f"{name}: trained with {trained[name]}, evaluated with {offered[name]}.")
    return notes


def _told(note: str, notes: Sequence[str]) -> bool:
    """Cameras that are known to be swapped by their poses are swapped by their pictures too."""
    return any(note.split(":")[0] == other.split(":")[0] for other in notes)


def _step_limit(description: Description, max_steps: int | None) -> int:
    limits = [limit for limit in (description.max_steps, max_steps) if limit]
    if not limits:
        raise EnvironmentFault("The environment names no step limit, so an episode might never end: set max_steps.")
    return min(limits)


@contextmanager
def acting(policy: Any, threads: int) -> Iterator[None]:
    """Evaluation mode and a fixed number of threads, put back afterwards."""
    before = torch.get_num_threads()
    training = [module for module in policy.modules() if module.training] if isinstance(policy, torch.nn.Module) else []
    if before != threads:
        torch.set_num_threads(threads)
    if training:
        policy.eval()
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)
        for module in training:
            module.training = True


def _device_name(policy: Any) -> str:
    parameter = next(policy.parameters(), None) if isinstance(policy, torch.nn.Module) else None
    if parameter is None or parameter.device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else parameter.device.type
