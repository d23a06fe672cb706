"""`evaluate --compare A B …`: is the one better than the other? Checkpoints play the same episodes; tables are read."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lightning_robot.commands.checkpoint_paths import find_checkpoint
from lightning_robot.commands.evaluate import EvaluateError, Trial, default_output, print_tables
from lightning_robot.console import counted, say
from lightning_robot.evaluation.comparison import Comparison, NotPaired, compare, compare_unpaired, holm, refuse_other_worlds
from lightning_robot.evaluation.result import EvaluationResult


def compare_checkpoints(arguments: argparse.Namespace) -> list[Comparison]:
    """Compares the first of the named policies with each other one; prints and, with ``--output``, writes the comparisons.

    Raises:
        EvaluateError: fewer than two are named, or the tables are of different episodes.
    """
    names = short_names(arguments.checkpoint)
    if len(names) < 2:
        raise EvaluateError("--compare needs two or more: checkpoints, run directories, or evaluation.json of evaluations.")
    tables = {name: read_table(Path(path)) for name, path in zip(names, arguments.checkpoint)}
    check_tables(tables, arguments.unpaired, arguments.across)
    paths = {name: find_checkpoint(path) for name, path in zip(names, arguments.checkpoint) if tables[name] is None}
    results = {name: table or _played(arguments, name, paths[name], tables) for name, table in tables.items()}
    first, *others = names
    pairs = [(first, name) for name in others]
    test = compare_unpaired if arguments.unpaired else compare
    try:
        comparisons = [test(results[a], results[b], (a, b), arguments.across) for a, b in pairs]
    except NotPaired as error:
        raise EvaluateError(_remedy(error)) from error
    if len(comparisons) > 1:
        for one, p in zip(comparisons, holm([one.p for one in comparisons])):
            one.p_adjusted = p
    for one in comparisons:
        print_tables(one.table())
        for line in (one.difference_sentence, one.sentence, *one.notes):
            print(line)
    if arguments.output:
        path = Path(arguments.output) / "comparison.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps([one.to_dict() for one in comparisons], indent=2) + "\n")
        os.replace(partial, path)
        say(f"Comparison: {path}")
    return comparisons


def read_table(path: Path) -> EvaluationResult | None:
    """The evaluation in a file, or in a folder with an ``evaluation.json``; None where the path means a checkpoint."""
    path = path.expanduser()
    file = path / "evaluation.json" if path.is_dir() else path
    if file.suffix != ".json" or not file.is_file():
        return None
    try:
        return EvaluationResult.from_json(file.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluateError(f"{file} is no table of an evaluation ({error}).") from error


def check_tables(tables: dict[str, EvaluationResult | None], unpaired: bool, across: bool) -> None:
    """Refuses tables of different episodes, or worlds, before anything is played.

    Raises:
        EvaluateError: says how to compare them all the same.
        NotComparable: likewise.
    """
    known = [(name, table) for name, table in tables.items() if table is not None]
    for name, table in known[1:]:
        if not unpaired:
            try:
                compare(known[0][1], table, (known[0][0], name), across)
            except NotPaired as error:
                raise EvaluateError(_remedy(error)) from error


def _played(
    arguments: argparse.Namespace, name: str, path: Path, tables: dict[str, EvaluationResult | None]
) -> EvaluationResult:
    """Plays with a checkpoint: the episodes of the tables that are there, else those of the command line."""
    from lightning_robot.evaluation.rollout import Episode, plan_episodes

    known, table = next(((other, table) for other, table in tables.items() if table is not None), ("", None))
    saved = None
    if table is not None:
        settings = table.settings
        saved = {"env": settings.get("environment"), "env_kwargs": settings.get("environment_arguments", {})}
    trial = Trial.open(arguments, path, saved)
    for note in trial.notes:
        say(f"{name}: {note}")
    if table is None:
        plan = plan_episodes(arguments.episodes, arguments.seed, trial.tasks)
    else:
        plan = [Episode(row.seed, row.task) for row in table.records]
        where = table.settings.get("environment")
        if trial.settings["env"] != where:
            raise EvaluateError(f"{name} would play in {trial.settings['env']}, the table is of {where}: give --env {where}.")
        if not arguments.across:
            refuse_other_worlds(table, EvaluationResult([], {}, trial.world), (known, name))
    say(f"Evaluating {path}: {counted(len(plan), 'episode')}, seeds {plan[0].seed} to {plan[-1].seed}.")
    result = trial.play(arguments, plan)
    if table is None:
        folder = Path(arguments.output) / name.replace("/", "_") if arguments.output else default_output(path, arguments)
        say(f"Table: {result.save(folder / 'evaluation.json')}")
    elif arguments.output:
        say(f"Table: {result.save(Path(arguments.output) / name.replace('/', '_') / 'evaluation.json')}")
    return result


def short_names(paths: list[str]) -> list[str]:
    """The paths' last parts, as many of them as tell the paths apart; equal paths are numbered."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    parts = [one[:-1] if one[-1] == "evaluation.json" else one for one in parts]
    names = []
    for number, one in enumerate(parts):
        others = [other for other in parts if other != one]
        length = next(count for count in range(1, len(one) + 1) if all(one[-count:] != other[-count:] for other in others))
        again = f" ({parts[: number + 1].count(one)})" if parts.count(one) > 1 else ""
        names.append("/".join(one[-length:]) + again)
    return names


def _remedy(error: NotPaired) -> str:
    return (
        f"{error} Evaluate both on the same seeds (name the checkpoints instead of their tables), or compare different "
        "episodes by --unpaired (Fisher's exact test, which needs more of them)."
    )
