"""`python -m lightning_robot evaluate`: success of a checkpoint, of many, or of two side by side, in simulation."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_robot.commands.checkpoint_paths import checkpoints_of, read_metadata

if TYPE_CHECKING:
    from lightning_robot.evaluation.result import EvaluationResult
    from lightning_robot.evaluation.rollout import Episode

EXAMPLES = """examples:
  python -m lightning_robot evaluate runs/latest
  python -m lightning_robot evaluate runs/latest/checkpoints/last.ckpt --weights raw --tasks open_drawer --episodes 200
  python -m lightning_robot evaluate best.ckpt --env lightning_robot/PlayTable-v0 --env-kwargs '{"scene": "B"}'
  python -m lightning_robot evaluate runs/latest --all --selection-episodes 50 --episodes 100
  python -m lightning_robot evaluate --compare runs/act runs/diffusion --episodes 200
  python -m lightning_robot evaluate runs/latest --postprocess '[{"class_path": "Smooth", "init_args": {"weight": 0.5}}]'

A checkpoint knows the environment that judged it in training; options override that. The same command gives the same table,
whatever --num-envs and --processes are. A run directory means its best checkpoint, else its last. A folder that holds several
checkpoints, several paths, or --all with a run directory make a sweep: every checkpoint plays the same selection episodes,
and the best of them is reported on fresh ones. --compare plays the same episodes with each, or reads the evaluation.json of an
earlier evaluation, and says whether the difference is established."""


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
    result.add_argument("checkpoint", nargs="+", metavar="CKPT", help="checkpoint file, run directory, folder of checkpoints")
    result.add_argument("--env", metavar="ID", help="Gymnasium id (default: the one that judged the policy in training)")
    result.add_argument("--env-kwargs", type=_mapping, default={}, metavar="JSON", help="arguments of the environment")
    result.add_argument("--tasks", type=_names, metavar="A,B", help="task ids (default: as in training)")
    result.add_argument("--episodes", type=int, default=100, help="episodes over all tasks (default %(default)s)")
    result.add_argument("--seed", type=int, default=2_000_000, help="seed of the first episode (default %(default)s)")
    result.add_argument(
        "--weights", choices=("ema", "raw"), help="averaged or raw weights (default: averaged if there are any)"
    )
    result.add_argument("--max-steps", type=int, metavar="N", help="step limit of an episode")
    result.add_argument("--videos", type=int, default=4, metavar="N", help="videos, failures first (default %(default)s)")
    result.add_argument("--output", metavar="DIR", help="where table and videos go (default: evaluations/ of the run)")
    acting = result.add_argument_group("acting (default: as in training, else as the policy says)")
    acting.add_argument("--execution-horizon", type=int, metavar="N", help="actions executed of each chunk")
    acting.add_argument(
        "--ensembling",
        nargs="?",
        const=True,
        type=_ensembling,
        metavar="K[:oldest|newest]",
        help="temporal ensembling (a query at every step); without a value the policy's own, else 0.01:oldest",
    )
    acting.add_argument("--no-ensembling", dest="ensembling", action="store_false", default=None, help="a chunk queue instead")
    acting.add_argument(
        "--postprocess", type=_list, metavar="JSON", help="post-processing of actions instead of the policy's own; [] for none"
    )
    several = result.add_argument_group("several checkpoints")
    several.add_argument("--all", action="store_true", help="sweep over all checkpoints of a run directory")
    several.add_argument(
        "--selection-episodes", type=int, default=50, metavar="N", help="episodes of each in a sweep (default %(default)s)"
    )
    several.add_argument(
        "--selection-seed", type=int, default=1_500_000, metavar="N", help="seed of the first of them (default %(default)s)"
    )
    several.add_argument("--compare", action="store_true", help="compare the first with each other one, on the same episodes")
    several.add_argument(
        "--across", action="store_true", help="compare results of different renderers, simulators or scenes all the same"
    )
    several.add_argument("--unpaired", action="store_true", help="compare evaluations of different episodes (Fisher's test)")
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
    arguments = parser().parse_intermixed_args(argv)
    import gymnasium

    from lightning_robot.evaluation.stepping import EnvironmentFault

    try:
        run(arguments)
    except (EvaluateError, EnvironmentFault, OSError, ImportError, ValueError, gymnasium.error.Error) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate: interrupted; evaluations that were finished are written, this one is not.", file=sys.stderr)
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    """One checkpoint, a sweep over several, or a comparison; see `parser` for the arguments."""
    check_numbers(arguments)
    check_seeds(arguments.seed, arguments.episodes)
    if arguments.compare or arguments.unpaired:
        from lightning_robot.commands.evaluate_comparison import compare_checkpoints

        compare_checkpoints(arguments)
        return
    paths = checkpoints_of(arguments.checkpoint, arguments.all)
    if len(paths) > 1 or arguments.all:
        from lightning_robot.commands.evaluate_sweep import sweep_checkpoints

        sweep_checkpoints(arguments, paths)
        return
    evaluate(arguments, paths[0])


@dataclass
class Trial:
    """A checkpoint that has met its environment.

    Attributes:
        path: of the checkpoint.
        policy: with the weights that are judged.
        settings: see `settle`.
        tasks: to be played.
        averaged: whether the weights are averaged ones.
        step, epoch: of training, None where the checkpoint does not say.
        notes: differences between training and this environment.
        world: fingerprints of the environment.
    """

    path: Path
    policy: Any
    settings: dict[str, Any]
    tasks: list[str]
    averaged: bool
    step: int | None
    epoch: int | None
    notes: list[str]
    world: dict[str, str]

    @classmethod
    def open(cls, arguments: argparse.Namespace, path: Path, saved: dict[str, Any] | None = None) -> Trial:
        """Loads the policy and asks its environment whether it can act there.

        Args:
            arguments: the command line's.
            path: a checkpoint, or a folder with one of LeRobot.
            saved: settings where neither command line nor checkpoint name an environment.
        """
        from lightning_robot.evaluation.demonstrated import weights_notes
        from lightning_robot.evaluation.fingerprints import environment_fingerprints
        from lightning_robot.evaluation.rollout import choose_tasks, environment_maker, inspect_environment
        from lightning_robot.policies.base import load_policy

        checkpoint = read_metadata(path)
        settings = settle(arguments, checkpoint.get("evaluation") or saved or {}, path)
        policy: Any = load_policy(path, weights=arguments.weights, device=choose_device(arguments.device))
        if settings["ensembling"] is True:
            settings["ensembling"] = getattr(policy, "ensembling", None) or True
        make_env = environment_maker(settings["env"], settings["env_kwargs"])
        description, notes = inspect_environment(policy, make_env, settings["tasks"] or ())
        notes += weights_notes(policy)
        return cls(
            path=path,
            policy=policy,
            settings=settings,
            tasks=choose_tasks(policy, description, settings["tasks"]),
            averaged="ema_state_dict" in checkpoint and arguments.weights != "raw",
            step=checkpoint.get("global_step"),
            epoch=checkpoint.get("epoch"),
            notes=notes,
            world=environment_fingerprints(description.fingerprint),
        )

    def play(self, arguments: argparse.Namespace, plan: Sequence[Episode]) -> EvaluationResult:
        from lightning_robot.evaluation.controller import Ensembling
        from lightning_robot.evaluation.rollout import environment_maker, rollout

        settings = self.settings
        result = rollout(
            self.policy,
            environment_maker(settings["env"], settings["env_kwargs"]),
            plan,
            num_envs=arguments.num_envs,
            inference_batch=settings["inference_batch"],
            threads=arguments.threads,
            processes=_cores() if arguments.processes is None else arguments.processes,
            max_steps=settings["max_steps"],
            execution_horizon=settings["execution_horizon"],
            ensembling=Ensembling.from_setting(settings["ensembling"]),
            postprocess=arguments.postprocess,
        )
        result.settings = {
            "environment": settings["env"],
            "environment_arguments": settings["env_kwargs"],
            "weights": "ema" if self.averaged else "raw",
            **result.settings,
        }
        result.notes = [*self.notes, *(note for note in result.notes if note not in self.notes)]
        return result

    def film(self, result: EvaluationResult, folder: Path, count: int) -> None:
        """Writes videos of some of the result's episodes."""
        from lightning_robot.console import say
        from lightning_robot.evaluation.rollout import environment_maker
        from lightning_robot.evaluation.video import record_videos

        make_env = environment_maker(self.settings["env"], self.settings["env_kwargs"])
        for video in record_videos(self.policy, make_env, result, folder, count):
            say(f"Video: {video}")


def evaluate(arguments: argparse.Namespace, path: Path) -> EvaluationResult:
    """Plays with one checkpoint, prints the table and writes it."""
    from lightning_robot.console import counted, say
    from lightning_robot.evaluation.rollout import plan_episodes

    trial = Trial.open(arguments, path)
    for note in trial.notes:
        say(note)
    plan = plan_episodes(arguments.episodes, arguments.seed, trial.tasks)
    folder = Path(arguments.output) if arguments.output else default_output(path, arguments)
    folder.mkdir(parents=True, exist_ok=True)  # before the work: its result must not be lost for want of a place
    say(
        f"Evaluating {path} ({'averaged' if trial.averaged else 'raw'} weights, epoch "
        f"{'?' if trial.epoch is None else trial.epoch}) in {trial.settings['env']}: {counted(len(plan), 'episode')}, seeds "
        f"{plan[0].seed} to {plan[-1].seed}."
    )
    result = trial.play(arguments, plan)
    written = result.save(folder / "evaluation.json")
    report(result, trial.notes)
    say(f"Table: {written}")
    if arguments.videos > 0:
        trial.film(result, folder, arguments.videos)
    return result


def report(result: EvaluationResult, said: Sequence[str] = ()) -> None:
    """Prints the tables, what a reader must know of them, and how fast it went; not the notes that were `said` before."""
    from lightning_robot.console import counted
    from lightning_robot.evaluation.outcomes import milestone_sentence

    print_tables(result.table(), result.outcome_table())
    reached = milestone_sentence(result.counted)
    notes = [note for note in result.notes if note not in said]
    for sentence in [*([reached] if reached else []), *described_settings(result), *notes, *result.warnings()]:
        print(sentence)
    if result.unchecked:
        print(f"Not checked, because the checkpoint does not record it: {', '.join(result.unchecked)}.")
    steps = sum(record.steps for record in result.records)
    workers = counted(result.processes, "worker process")
    speed = f"{counted(steps, 'step')} in {result.seconds:.1f} s ({steps / result.seconds:.0f} steps/s, {workers})"
    times = result.inference_ms()
    if times["count"]:
        speed += f"; {times['p50']:.1f} ms per query (95 % below {times['p95']:.1f})"
    print(f"{speed}.")


def print_tables(*tables: Any) -> None:
    """Prints rich tables, wide enough where the output is no terminal."""
    from rich.console import Console

    console = Console()
    console = Console(width=None if console.is_terminal else 120)
    for table in tables:
        console.print(table)


def described_settings(result: EvaluationResult) -> list[str]:
    """Sentences about what stands between prediction and command."""
    sentences = []
    if result.settings.get("ensembling"):
        coefficient, direction = result.settings["ensembling"]
        sentences.append(f"Actions are ensembled over time: coefficient {coefficient:g}, counted from the {direction}.")
    if steps := result.settings.get("postprocess"):
        described = ", ".join(
            f"{step['class_path'].rpartition('.')[2]} "
            + " ".join(f"{name}={value}" for name, value in (step.get("init_args") or {}).items())
            for step in steps
        )
        sentences.append(f"Actions are post-processed: {described}.")
    return sentences


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

    if arguments.ensembling:  # one of the two asked for here puts the other one of training out of force
        saved = {**saved, "execution_horizon": None}
    elif arguments.execution_horizon not in (None, 1) and arguments.ensembling is None:
        saved = {**saved, "ensembling": False}
    return {
        "env": env,
        "env_kwargs": {**saved.get("env_kwargs", {}), **arguments.env_kwargs},
        "tasks": chosen("tasks"),
        "execution_horizon": chosen("execution_horizon"),
        "ensembling": chosen("ensembling"),
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
        "selection_episodes": 1,
    }
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise EvaluateError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}.")
    if arguments.ensembling and arguments.execution_horizon not in (None, 1):
        raise EvaluateError("--ensembling asks at every step; --execution-horizon does not go with it.")
    if arguments.all and (arguments.compare or arguments.unpaired):
        raise EvaluateError("--all sweeps, --compare compares: one after the other.")


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


def default_output(path: Path, arguments: argparse.Namespace, name: str | None = None) -> Path:
    """A folder in the checkpoint's run, or beside a checkpoint that lies alone; one for each set of episodes.

    Options that change what is played stand in the name by a digest, so that no evaluation overwrites another one.

    Args:
        path: of the checkpoint.
        arguments: the command line's.
        name: the folder's name begins with it; the checkpoint's by default.
    """
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    weights = f"_{arguments.weights}" if arguments.weights else ""
    tasks = f"_{arguments.tasks[0]}" if arguments.tasks and len(arguments.tasks) == 1 else ""
    options = ("env", "env_kwargs", "tasks", "execution_horizon", "ensembling", "postprocess", "max_steps", "inference_batch")
    given = {option: getattr(arguments, option) for option in options}
    given = {option: value for option, value in given.items() if value is not None and value != {}}
    if tasks:
        del given["tasks"]
    digest = f"_{hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:6]}" if given else ""
    name = name or (path.name if path.is_dir() else path.stem)
    return run / "evaluations" / f"{name}{weights}{tasks}_seed{arguments.seed}_episodes{arguments.episodes}{digest}"


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


def _list(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not (isinstance(value, list) and all(isinstance(step, dict) for step in value)):
        raise argparse.ArgumentTypeError(
            f'a JSON list of steps is wanted, such as [{{"class_path": "Offset", "init_args": {{"values": 1}}}}], not {text}'
        )
    return value


def _ensembling(text: str) -> dict[str, Any]:
    coefficient, _, direction = text.partition(":")
    if direction not in ("", "oldest", "newest"):
        raise argparse.ArgumentTypeError(f"{direction!r}: the direction is oldest or newest")
    try:
        return {"coefficient": float(coefficient), "direction": direction or "oldest"}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no coefficient (name checkpoints before --ensembling, or write --ensembling 0.01)"
        ) from error
