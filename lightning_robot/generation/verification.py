"""The verification of demonstrations that were generated at some time: some episodes are attempted again."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from lightning_robot.console import counted
from lightning_robot.data.frame_sample import difference
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.data.verification import outcome, verify_lerobot, verify_store
from lightning_robot.generation.attempts import Recording, run_episode
from lightning_robot.generation.generate import ADDED_LATER
from lightning_robot.generation.jobs import GenerationError
from lightning_robot.generation.packing import read_provenance, stored_layout


def verify_generation(
    path: str | Path, *, policy: str | Path | None = None, weights: str | None = None, device: str = "cpu"
) -> str:
    """Verifies generated demonstrations, however old: counts, order, checksums; the first and the last episode anew.

    Frames of another machine or other libraries may differ in the last digits, which contact enlarges: where checksums hold,
    this is told in the outcome and is no fault.

    Args:
        path: of the store or the LeRobot dataset.
        policy: the checkpoint whose policy acted; without it none of its episodes is attempted again.
        weights: ``ema`` or ``raw``, as in the generation.
        device: where the policy computes.

    Returns:
        the outcome in one sentence.

    Raises:
        StoreError: says what is wrong with the data.
        GenerationError: they were not generated, or the simulator cannot be made.
    """
    path = Path(path).expanduser().absolute()
    dataset: Any = LeRobotFolder.open(path) if (path / "meta/info.json").is_file() else EpisodeStore.open(path)
    provenance = read_provenance(path)
    if "settings" not in provenance or "seeds" not in provenance:
        raise GenerationError(f"{path} does not hold generated demonstrations: it names no settings and seeds.")
    settings = ADDED_LATER | provenance["settings"]
    seeds, tasks = provenance["seeds"], settings["tasks"]
    task_of = [tasks[(seed - settings["seed"]) % len(tasks)] for seed in seeds]
    of_each = Counter(task_of)
    if len(seeds) != dataset.num_episodes or seeds != sorted(set(seeds)) or set(of_each.values()) != {len(seeds) // len(tasks)}:
        raise StoreError(
            f"{path}: {counted(dataset.num_episodes, 'episode')} with the seeds {seeds[:5]} … are not "
            f"{settings['episodes_per_task']} of each of {counted(len(tasks), 'task')} in the order of seeds. It was changed."
        )
    if isinstance(dataset, EpisodeStore):
        verify_store(dataset)
    else:
        verify_lerobot(dataset)
    try:
        env = Recording("", settings["environment"], settings["environment_arguments"], 0, 0).make()
    except (ValueError, TypeError, ImportError, gymnasium.error.Error) as error:
        return outcome(dataset, f"no episode was attempted again, {settings['environment']} cannot be made ({error})")
    try:
        return outcome(dataset, _attempt_again(dataset, env, settings, provenance, task_of, policy, weights, device))
    finally:
        env.close()


def _attempt_again(
    dataset: Any,
    env: gymnasium.Env,
    settings: dict[str, Any],
    provenance: dict[str, Any],
    task_of: list[str],
    policy: str | Path | None,
    weights: str | None,
    device: str,
) -> str:
    """Attempts the first and the last episode; returns what came of it."""
    have, then = dict(env.unwrapped.fingerprint), provenance["simulator"]  # type: ignore[attr-defined]
    if have != then:
        names = ", ".join(
            f"{name} {then.get(name)} then, {have.get(name)} now" for name in then if then[name] != have.get(name)
        )
        return f"no episode was attempted again, the simulator is another one ({names})"
    demonstrator: Any = None
    if settings["generator"] == "policy":
        if policy is None:
            return "no episode was attempted again, name the policy that acted (--policy)"
        from lightning_robot.generation.by_policy import PolicyDemonstrator

        demonstrator = PolicyDemonstrator(str(policy), weights, device)
        if demonstrator.identity() != settings["policy"]:
            raise GenerationError(f"{policy} is not the policy that acted: its class or its weights are others.")
        demonstrator.prepare(env)
    pictures = None if settings["output"] == "zarr" else settings["output"].removeprefix("lerobot ")
    chosen = sorted({0, dataset.num_episodes - 1})
    for episode in chosen:
        seed = provenance["seeds"][episode]
        with nullcontext() if demonstrator is None else demonstrator.one_thread():
            attempt, arrays = run_episode(
                env,
                task_of[episode],
                seed,
                noise=settings["noise"],
                hold=settings["hold"],
                noise_correlation=settings["noise_correlation"],
                demonstrator=demonstrator,
            )
        text = _sentence(dataset, episode)
        if attempt.text != text:
            raise StoreError(f"{dataset.path}: episode {episode} is labelled {text!r}; its seed {seed} gives {attempt.text!r}.")
        apart = _difference(dataset, episode, stored_layout(arrays), pictures)
        if apart and dataset.checksums is None:
            raise StoreError(f"{dataset.path}: attempted again, {apart} (seed {seed}); no checksums say which is right.")
        if apart:
            return f"attempted again, {apart} (seed {seed}): this machine or its libraries compute otherwise"
    return f"{counted(len(chosen), 'episode')} attempted again and equal"


def _difference(dataset: Any, episode: int, arrays: dict[str, np.ndarray], pictures: str | None) -> str:
    """In what an episode differs from the arrays, in words; empty where it does not."""
    start, end = int(dataset.episode_starts[episode]), int(dataset.episode_ends[episode])
    length = len(arrays["action"])
    if length != end - start:
        return f"episode {episode} has {length} frames for {end - start}"
    for key, values in arrays.items():
        for step, (source, frame) in enumerate(zip(values, dataset.read(key, slice(start, end)))):
            apart, allowed = difference(key, source, frame, pictures)
            if not (apart <= allowed).all():
                return f"episode {episode} differs in {key} from step {step} on, there by {apart.max():.2g}"
    return ""


def _sentence(dataset: Any, episode: int) -> str:
    if dataset.frame_texts is not None:
        return dataset.language["texts"][dataset.frame_texts[dataset.episode_starts[episode]]]
    return dataset.language["texts"][dataset.segments[episode, 2]]
