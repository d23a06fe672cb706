"""`python -m lightning_robot evaluate CKPT`: success of a checkpoint in simulation, with interval, failures and videos."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_robot.evaluation.result import EvaluationResult

EXAMPLES = """examples:
  python -m lightning_robot evaluate runs/latest
  python -m lightning_robot evaluate runs/latest/checkpoints/last.ckpt --weights raw --tasks open_drawer --episodes 200
  python -m lightning_robot evaluate best.ckpt --env lightning_robot/PlayTable-v0 --env-kwargs '{"scene": "B"}'

A checkpoint knows the environment that judged it in training; options override that. The same command gives the same table,
whatever --num-envs and --processes are."""


class EvaluateError(Exception):
    """What was asked for cannot be done; the message says why."""


def parser() -> argparse.ArgumentParser:
    """The command's own parser: it needs neither a Trainer nor torch."""
    result = argparse.ArgumentParser(
        "python -m lightning_robot evaluate",
        description="Plays episodes in simulation with a checkpoint's policy and tells how many it solves.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("checkpoint", metavar="CKPT", help="checkpoint file, or a run directory (its best, else its last)")
    result.add_argument("--env", metavar="ID", help="Gymnasium id (default: the one that judged the policy in training)")
    result.add_argument("--env-kwargs", type=_mapping, default={}, metavar="JSON", help="arguments of the environment")
    result.add_argument("--tasks", type=_names, metavar="A,B", help="task ids (default: as in training)")
    result.add_argument("--episodes", type=int, default=100, help="episodes over all tasks (default %(default)s)")
    result.add_argument("--seed", type=int, default=2_000_000, help="seed of the first episode (default %(default)s)")
    result.add_argument(
        "--weights", choices=("ema", "raw"), help="averaged or raw weights (default: averaged if there are any)"
    )
    result.add_argument("--execution-horizon", type=int, metavar="N", help="actions executed of each chunk")
    result.add_argument("--max-steps", type=int, metavar="N", help="step limit of an episode")
    result.add_argument("--videos", type=int, default=4, metavar="N", help="videos, failures first (default %(default)s)")
    result.add_argument("--output", metavar="DIR", help="where table and videos go (default: evaluations/ of the run)")
    speed = result.add_argument_group("speed (only --inference-batch and --threads touch the outcome, in the last digits)")
    speed.add_argument(
        "--num-envs", type=int, default=16, metavar="N", help="environments at the same time (default %(default)s)"
    )
    speed.add_argument("--processes", type=int, metavar="N", help="processes that step them (default: one per core; 0: none)")
    speed.add_argument("--inference-batch", type=int, metavar="N", help="rows of every query (default: as in training, else 8)")
    speed.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads (default %(default)s)")
    speed.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default %(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``evaluate``; those of the process when None.

    Returns:
        0, or 1 after an error, which is printed.
    """
    arguments = parser().parse_args(argv)
    import gymnasium

    from lightning_robot.evaluation.stepping import EnvironmentFault

    try:
        evaluate(arguments)
    except (EvaluateError, EnvironmentFault, OSError, ImportError, ValueError, gymnasium.error.Error) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def evaluate(arguments: argparse.Namespace) -> EvaluationResult:
    """Plays, prints the table and writes it; see `parser` for the arguments."""
    check_numbers(arguments)
    check_seeds(arguments.seed, arguments.episodes)
    path = find_checkpoint(arguments.checkpoint)

    from lightning_robot.callbacks.checkpoints import read_checkpoint
    from lightning_robot.console import counted, say
    from lightning_robot.evaluation.rollout import choose_tasks, environment_maker, inspect_environment, plan_episodes, rollout
    from lightning_robot.evaluation.video import record_videos
    from lightning_robot.policies.base import load_policy

    checkpoint = read_checkpoint(path)
    averaged = "ema_state_dict" in checkpoint and arguments.weights != "raw"
    settings = settle(arguments, checkpoint.get("evaluation") or {}, path)
    policy = load_policy(path, weights=arguments.weights, device=choose_device(arguments.device))
    make_env = environment_maker(settings["env"], settings["env_kwargs"])
    description, notes = inspect_environment(policy, make_env, settings["tasks"] or ())
    for note in notes:
        say(note)
    tasks = choose_tasks(policy, description, settings["tasks"])
    plan = plan_episodes(arguments.episodes, arguments.seed, tasks)
    folder = Path(arguments.output) if arguments.output else default_output(path, arguments)
    folder.mkdir(parents=True, exist_ok=True)  # before the work: its result must not be lost for want of a place
    say(
        f"Evaluating {path} ({'averaged' if averaged else 'raw'} weights, epoch {checkpoint.get('epoch', '?')}) in "
        f"{settings['env']}: {counted(len(plan), 'episode')}, seeds {plan[0].seed} to {plan[-1].seed}."
    )
    result = rollout(
        policy,
        make_env,
        plan,
        num_envs=arguments.num_envs,
        inference_batch=settings["inference_batch"],
        threads=arguments.threads,
        processes=_cores() if arguments.processes is None else arguments.processes,
        max_steps=settings["max_steps"],
        execution_horizon=settings["execution_horizon"],
    )
    result.settings = {
        "environment": settings["env"],
        "environment_arguments": settings["env_kwargs"],
        "weights": "ema" if averaged else "raw",
        **result.settings,
    }
    written = result.save(folder / "evaluation.json")
    report(result)
    say(f"Table: {written}")
    if arguments.videos > 0:
        for video in record_videos(policy, make_env, result, folder, arguments.videos):
            say(f"Video: {video}")
    return result


def report(result: EvaluationResult) -> None:
    """Prints the table, what a reader must know of it, and how fast it went."""
    from rich.console import Console

    from lightning_robot.console import counted

    console = Console()
    Console(width=None if console.is_terminal else 120).print(result.table())
    for sentence in result.warnings():
        print(sentence)
    steps = sum(record.steps for record in result.records)
    workers = counted(result.processes, "worker process")
    print(f"{counted(steps, 'step')} in {result.seconds:.1f} s ({steps / result.seconds:.0f} steps/s, {workers}).")


def settle(arguments: argparse.Namespace, saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of the evaluation: the command line's before the checkpoint's.

    Raises:
        EvaluateError: neither names an environment.
    """
    env = arguments.env or saved.get("env")
    if env is None:
        raise EvaluateError(
            f"{path} does not say where it is to be judged (it was trained without simulation). Give --env, for example "
            "--env lightning_robot/PlayTable-v0."
        )
    if env != saved.get("env"):
        saved = {}  # arguments and tasks of another environment

    def chosen(name: str, default: Any = None) -> Any:
        value = getattr(arguments, name)
        return saved.get(name, default) if value is None else value

    return {
        "env": env,
        "env_kwargs": {**saved.get("env_kwargs", {}), **arguments.env_kwargs},
        "tasks": chosen("tasks"),
        "execution_horizon": chosen("execution_horizon"),
        "max_steps": chosen("max_steps"),
        "inference_batch": chosen("inference_batch", 8),
    }


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuses counts that mean nothing.

    Raises:
        EvaluateError: names the option.
    """
    least = {
        "num_envs": 1,
        "inference_batch": 1,
        "threads": 1,
        "max_steps": 1,
        "execution_horizon": 1,
        "processes": 0,
        "videos": 0,
    }
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise EvaluateError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}.")


def choose_device(name: str) -> str:
    """The device meant by `--device`.

    Raises:
        EvaluateError: it is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EvaluateError(f"--device {name} cannot be used here: {str(error).splitlines()[0].rstrip('.')}.") from error
    return name


def check_seeds(seed: int, episodes: int) -> None:
    """Refuses seeds that made the demonstrations or chose the checkpoint.

    Raises:
        EvaluateError: names the blocks.
    """
    from lightning_robot.evaluation.rollout import REPORTING_SEEDS, SELECTION_SEEDS

    if episodes < 1:
        raise EvaluateError("--episodes must be at least 1.")
    if seed < REPORTING_SEEDS:
        use = "chose the checkpoint during training" if seed >= SELECTION_SEEDS else "made the demonstrations"
        raise EvaluateError(
            f"--seed {seed} is in the block of seeds that {use}: a success rate on them says nothing about new scenes. Use "
            f"{REPORTING_SEEDS} or above."
        )


def find_checkpoint(name: str | Path) -> Path:
    """The file meant by a path: itself, or the best, else the last checkpoint of a run directory.

    Raises:
        FileNotFoundError: says what there is instead.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        for candidate in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt"):
            if (path / candidate).is_file():
                return (path / candidate).resolve()
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    found = sorted(str(file.relative_to(folder)) for pattern in ("*.ckpt", "*/*.ckpt") for file in folder.glob(pattern))
    there = f"In {folder} there is: {', '.join(found)}." if found else f"{folder} holds no checkpoint."
    what = f"No best.ckpt or last.ckpt in {path}." if path.is_dir() else f"No checkpoint at {path}."
    raise FileNotFoundError(f"{what} {there}")


def default_output(path: Path, arguments: argparse.Namespace) -> Path:
    """A folder in the checkpoint's run, or beside a checkpoint that lies alone; one for each set of episodes.

    Options that change what is played stand in the name by a digest, so that no evaluation overwrites another one.
    """
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    weights = f"_{arguments.weights}" if arguments.weights else ""
    tasks = f"_{arguments.tasks[0]}" if arguments.tasks and len(arguments.tasks) == 1 else ""
    names = ("env", "env_kwargs", "tasks", "execution_horizon", "max_steps", "inference_batch")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    if tasks:
        del given["tasks"]
    digest = f"_{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:6]}" if given else ""
    return run / "evaluations" / f"{path.stem}{weights}{tasks}_seed{arguments.seed}_episodes{arguments.episodes}{digest}"


def _cores() -> int:
    """Worker processes worth having: one per core, none where there is a single core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'a JSON object is wanted, such as {{"max_steps": 300}}, not {text}')
    return value
