"""`evaluate` over many checkpoints: every one on the same selection seeds, the best of them on fresh reporting seeds."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_robot.commands.checkpoint_paths import read_metadata
from lightning_robot.commands.evaluate import EvaluateError, Trial, default_output, print_tables, report, settle
from lightning_robot.console import counted, say
from lightning_robot.evaluation.sweep import Candidate, Sweep

ALIKE = ("env", "env_kwargs", "max_steps", "inference_batch")  # settings in which the candidates must agree


def sweep_checkpoints(arguments: argparse.Namespace, paths: Sequence[Path]) -> Sweep:
    """Judges every checkpoint, selects one, reports on it; prints and writes tables, curve and videos."""
    from lightning_robot.evaluation.rollout import REPORTING_SEEDS, SELECTION_SEEDS, plan_episodes

    first, count = arguments.selection_seed, arguments.selection_episodes
    if not SELECTION_SEEDS <= first <= REPORTING_SEEDS - count:
        raise EvaluateError(
            f"--selection-seed {first} with {counted(count, 'episode')} leaves the seeds {SELECTION_SEEDS} to "
            f"{REPORTING_SEEDS - 1}, which choose checkpoints: demonstrations and final results have seeds of their own."
        )
    check_settings(arguments, paths)
    paths = sorted(paths, key=lambda path: (read_metadata(path).get("global_step") or 0, path))
    folder = Path(arguments.output) if arguments.output else sweep_output(arguments, paths)
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(zip(paths, names_of(paths)))
    say(
        f"Sweeping {counted(len(paths), 'checkpoint')}: {counted(count, 'episode')} each, seeds {first} to "
        f"{first + count - 1}; then the best on {arguments.episodes} fresh ones from {arguments.seed} on. Tables: {folder}."
    )
    candidates: dict[str, Candidate] = {}
    files: dict[str, Path] = {}
    plan = None
    told: set[str] = set()
    for path in paths:
        trial = Trial.open(arguments, path)
        for note in trial.notes:
            if note not in told:
                say(note)
        told.update(trial.notes)
        own = plan_episodes(count, first, trial.tasks)
        plan = plan or own
        if own != plan:
            raise EvaluateError(f"{path} would play other tasks than the checkpoints before it: name the tasks (--tasks).")
        found = _same(candidates, trial.policy)
        if found is not None:
            found.name += f" = {named[path]}"
            say(f"{named[path]} holds the same weights as {found.name.split(' = ')[0]}.")
            continue
        result = trial.play(arguments, plan)
        result.save(folder / "selection" / (re.sub(r"[^\w.-]+", "-", named[path]) + ".json"))
        one = Candidate(named[path], trial.step, trial.epoch, result)
        candidates[result.fingerprints["checkpoint"]] = one
        files[result.fingerprints["checkpoint"]] = path
        low, high = result.interval()
        say(
            f"{one.name}: {result.successes} of {result.episodes} episodes solved, {100 * result.success_rate:.0f} % "
            f"(95 % interval {100 * low:.0f} to {100 * high:.0f})."
        )
    sweep = Sweep(list(candidates.values()))
    sweep.save(folder)  # the report may still be interrupted
    selected = sweep.selected
    trial = Trial.open(arguments, files[selected.result.fingerprints["checkpoint"]])
    say(f"Selected {selected.name}; reporting on fresh seeds.")
    sweep.report = trial.play(arguments, plan_episodes(arguments.episodes, arguments.seed, trial.tasks))
    sweep.report.save(folder / "evaluation.json")
    written = sweep.save(folder)
    print_tables(sweep.table())
    print("Selected, on fresh seeds:")
    report(sweep.report, trial.notes)
    for sentence in sweep.sentences():
        print(sentence)
    say(f"Written to {folder}: {', '.join(path.name for path in [*written, folder / 'evaluation.json'])}.")
    if arguments.videos > 0:
        trial.film(sweep.report, folder, arguments.videos)
    return sweep


def check_settings(arguments: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Refuses checkpoints that would be judged differently, before any of them plays.

    Raises:
        EvaluateError: names the first difference.
    """
    reference: dict[str, Any] = {}
    for path in paths:
        settings = settle(arguments, read_metadata(path).get("evaluation") or {}, path)
        for name in ALIKE:
            if settings[name] != reference.setdefault(name, settings[name]):
                raise EvaluateError(
                    f"The checkpoints would not be judged alike: {name} is {reference[name]} for {paths[0]} and "
                    f"{settings[name]} for {path}. Give --{name.replace('_', '-')}, or name checkpoints that belong together."
                )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names: relative to the folder that holds them all."""
    folder = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(folder)).removesuffix("/pretrained_model") for path in paths]


def sweep_output(arguments: argparse.Namespace, paths: Sequence[Path]) -> Path:
    """`evaluations` of the run, or of the folder that holds all the checkpoints."""
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    name = f"sweep{len(paths)}x{arguments.selection_episodes}_from{arguments.selection_seed}"
    return default_output(folder / "sweep", arguments, name)


def _same(candidates: dict[str, Candidate], policy: Any) -> Candidate | None:
    from lightning_robot.evaluation.rollout import fingerprint_policy

    return candidates.get(fingerprint_policy(policy))
