"""Demonstrations from an environment's scripted expert or from a trained policy, as an episode store or a LeRobot dataset.

    attempts ──▶ one renamed file each in <store>.partial ──▶ packed in seed order ──▶ <store>

Attempt a of task number k has the seed ``seed + a * len(tasks) + k``, and each task keeps its first `episodes_per_task`
successes. So the result depends on the settings alone: not on the number of processes, nor on whether the work was interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from lightning_robot.console import counted, progress, say
from lightning_robot.data.store import StoreError, partial_folder
from lightning_robot.data.workers import claimed, usable_cores
from lightning_robot.data.write_lerobot import PICTURES, check_encoding
from lightning_robot.generation.attempts import Recording, ScriptedExpert, task_texts
from lightning_robot.generation.jobs import GenerationError, Jobs, attempt_here, attempt_in_processes, most_attempts
from lightning_robot.generation.packing import pack, read_provenance
from lightning_robot.transforms.text import HashedTextEncoder, text_encoder

FORMAT = 1  # of what is recorded and how seeds are used; part of a store's settings
ADDED_LATER = {"noise_correlation": 0.0, "output": "zarr", "policy": None}  # settings that older stores do not name


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
    format: str = "zarr",
    pictures: str = "av1",
    policy: str | Path | None = None,
    weights: str | None = None,
    device: str = "cpu",
) -> Path:
    """Generates demonstrations.

    Interrupted at any moment, even by ``kill -9``, the same call continues where it was and ends in the same bytes.

    Args:
        store: folder to write, e.g. ``data/play_table.zarr``.
        env: id of an environment with an expert (see `lightning_robot.generation.attempts`).
        env_kwargs: its constructor's arguments, plain values: they decide what is recorded.
        tasks: ids of tasks. None takes the environment's own choice (``env.unwrapped.tasks``), of a policy those of them that
            it was trained on.
        episodes_per_task: successful demonstrations of each task.
        seed: seed of the first attempt; the following ones count up from it. Evaluation uses other blocks of seeds.
        noise: standard deviation of noise on the executed, not on the recorded action, in the action's units.
        noise_correlation: seconds over which that noise stays correlated; 0 draws it anew at every step.
        hold: steps recorded after success, so that a policy learns to carry a motion through instead of stopping short.
        encoder: of the sentences: ours, or the name of a model of sentence-transformers (extra ``calvin``).
        processes: worker processes, each with an environment of its own; one per core when None. 1 works in this process.
        format: ``zarr`` for an episode store, ``lerobot`` for a LeRobot dataset.
        pictures: of a LeRobot dataset: ``av1``, ``h264`` or ``png``.
        policy: a checkpoint whose policy acts in place of the expert.
        weights: ``ema`` or ``raw`` weights of the policy; the averaged ones where there are any when None.
        device: where the policy computes.

    Returns:
        `store` as a path.

    Raises:
        GenerationError: the environment cannot be made or has no expert; the policy does not fit it; the video's encoder does
            not take pictures of this size; the store exists with
            other settings; an unfinished one does; the attempts fail too often; one episode keeps killing its worker; the seeds
            reach those of evaluation; the disk is full; what was written is not read back.
        WorkError: another process is generating the same store.
    """
    store = Path(store).expanduser().absolute()
    if processes is not None and processes < 1:
        raise GenerationError(f"processes is {processes}; it must be at least 1.")
    if format not in ("zarr", "lerobot") or pictures not in PICTURES:
        raise GenerationError(f"format {format!r}, pictures {pictures!r}: use zarr or lerobot, and {', '.join(PICTURES)}.")
    acting: dict[str, Any] | None = None if policy is None else {"path": str(policy), "weights": weights, "device": device}
    example: Any = None
    try:
        try:
            example = Recording("", env, dict(env_kwargs or {}), noise, hold).make()
        except (ValueError, TypeError, gymnasium.error.Error) as error:
            raise GenerationError(f"{env} cannot be made: {error}") from error
        source = example.unwrapped
        demonstrator: Any = ScriptedExpert()
        if acting is not None:
            from lightning_robot.generation.by_policy import PolicyDemonstrator  # torch, which experts do without

            try:
                demonstrator = PolicyDemonstrator(**acting)
                tasks = demonstrator.choose_tasks(env, dict(env_kwargs or {}), tasks)
                demonstrator.prepare(example)
            except OSError as error:
                raise GenerationError(str(error)) from error
            except (ValueError, RuntimeError) as error:
                raise GenerationError(f"{policy}: {error}") from error
        elif not hasattr(source, "expert"):
            raise GenerationError(
                f"{env} has no scripted expert (a method `expert`, see CONTRIBUTING.md): nobody to demonstrate its tasks. "
                "Give a trained policy (--policy CHECKPOINT)."
            )
        chosen = tuple(tasks) if tasks else tuple(source.tasks)
        settings = json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "generator": "expert" if policy is None else "policy",
                    "policy": None if policy is None else demonstrator.identity(),
                    "environment": env,
                    "environment_arguments": dict(env_kwargs or {}),
                    "tasks": chosen,
                    "episodes_per_task": episodes_per_task,
                    "seed": seed,
                    "noise": noise,
                    "noise_correlation": noise_correlation,
                    "hold": hold,
                    "encoder": encoder,
                    "output": "zarr" if format == "zarr" else f"lerobot {pictures}",
                }
            )
        )
        _check(settings)
        if format == "lerobot":
            try:
                check_encoding(source.features, pictures)
            except StoreError as error:
                raise GenerationError(str(error)) from error
        text_encoder(encoder).encode([""])  # a model that cannot be loaded is known before the work
        partial = partial_folder(store)
        if store.exists():
            _check_same(store, settings)
            shutil.rmtree(partial, ignore_errors=True)  # a kill between renaming and clearing up leaves it
            of_each = counted(episodes_per_task, "demonstration")
            say(f"{store} is complete: {of_each} of each of {counted(len(chosen), 'task')}.")
            return store
        _check_tasks(example, chosen, seed, with_expert=policy is None)
        with claimed(partial):
            folder = _staging(partial, settings, dict(source.fingerprint))
            recording = Recording(str(folder), env, settings["environment_arguments"], noise, hold, noise_correlation, acting)
            jobs = Jobs(chosen, episodes_per_task, seed, folder, settings["generator"])
            count = min(processes or usable_cores(), jobs.missing) or 1
            by = "its scripted expert" if policy is None else f"the policy {policy}"
            say(
                f"Generating {counted(jobs.wanted, 'demonstration')} ({counted(len(chosen), 'task')}, {episodes_per_task} "
                f"each) in {env} with {by}, {counted(count, 'process')}, into {store}."
            )
            if jobs.attempts:
                say(
                    f"Continuing: there {'is' if len(jobs.attempts) == 1 else 'are'} {counted(len(jobs.attempts), 'attempt')} "
                    f"already, and {counted(jobs.missing, 'demonstration')} to come."
                )
            deaths = 0
            if jobs.missing:
                if count == 1:
                    collected = attempt_here(jobs, recording, example, demonstrator)
                else:
                    collected = attempt_in_processes(jobs, recording, count)
                try:
                    with nullcontext() if policy is None else demonstrator.one_thread():
                        for _ in progress(collected, total=jobs.missing, description="generating", unit="demonstrations"):
                            pass
                except OSError as error:
                    raise _no_room(folder, error) from error
                deaths = sum(jobs.deaths.values())
            try:
                outcome = pack(store, folder, jobs, settings, example)
            except StoreError as error:
                raise GenerationError(str(error)) from error
            for line in jobs.report():
                say(line)
            if deaths:
                say(f"{counted(deaths, 'worker process')} died on the way; the episodes were attempted again.")
            say(outcome)
        return store
    finally:
        if example is not None:
            example.close()


# --- what is there already -------------------------------------------------------------------------------------------------


def _no_room(folder: Path, error: OSError) -> GenerationError:
    return GenerationError(
        f"Nothing more can be written in {folder} ({error}). Make room there or take another place; what was generated is "
        "kept, the same call continues."
    )


def _check(settings: dict[str, Any]) -> None:
    from lightning_robot.evaluation.rollout import SELECTION_SEEDS

    if not settings["tasks"] or len(set(settings["tasks"])) != len(settings["tasks"]):
        raise GenerationError(f"Tasks to demonstrate: {settings['tasks']}. Name at least one, each once.")
    for name, least in (("episodes_per_task", 1), ("noise", 0), ("noise_correlation", 0), ("hold", 0), ("seed", 0)):
        if settings[name] < least:
            raise GenerationError(f"{name} is {settings[name]}; it must be at least {least}.")
    last = settings["seed"] + most_attempts(settings["episodes_per_task"], settings["generator"]) * len(settings["tasks"])
    if last >= SELECTION_SEEDS:
        raise GenerationError(
            f"Seeds from {SELECTION_SEEDS:,} on belong to evaluation, and this generation could reach {last:,}: lower seed "
            f"({settings['seed']:,}) or episodes_per_task ({settings['episodes_per_task']:,})."
        )


def _check_tasks(env: gymnasium.Env, tasks: tuple[str, ...], seed: int, with_expert: bool) -> None:
    """Refuses, before any work, tasks that the environment does not know or has no expert for."""
    source: Any = env.unwrapped
    for number, task in enumerate(tasks):
        try:
            task_texts(env, task)
            env.reset(seed=seed + number, options={"task": task})
            if with_expert:
                source.expert(np.random.default_rng(seed))
        except Exception as error:
            raise GenerationError(
                f"{task!r} cannot be demonstrated: {type(error).__name__}: {error}. By itself the environment chooses "
                f"{', '.join(source.tasks)}."
            ) from error


def _check_same(store: Path, settings: dict[str, Any]) -> None:
    """Refuses a finished store that was made otherwise."""
    have = read_provenance(store).get("settings", {})
    if not have:
        raise GenerationError(f"{store} exists and does not hold generated demonstrations. Choose another path.")
    have = ADDED_LATER | have
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
        have = ADDED_LATER | json.loads(file.read_text())
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
