"""`python -m lightning_robot generate STORE`: demonstrations by an expert or a policy, as a store or a LeRobot dataset."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

EXAMPLES = """examples:
  python -m lightning_robot generate data/play_table.zarr
  python -m lightning_robot generate data/doors.zarr --tasks open_drawer,move_slider_left --episodes-per-task 100 --noise 0.1
  python -m lightning_robot generate data/colors.zarr --scene A --points 2048 --colors --observations state,point_cloud,images
  python -m lightning_robot generate data/so101 --format lerobot --env lightning_robot/SO101PickPlace-v0 --episodes-per-task 100
  python -m lightning_robot generate data/more.zarr --env lightning_robot/SO101PickPlace-v0 --policy best.ckpt

Run the same command again to continue after an interruption."""


def parser() -> argparse.ArgumentParser:
    """The command's own parser: it needs neither a Trainer nor torch."""
    result = argparse.ArgumentParser(
        "python -m lightning_robot generate",
        description="Writes successful demonstrations of a scripted expert or of a trained policy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("store", metavar="STORE", help="folder to write, e.g. data/play_table.zarr")
    result.add_argument(
        "--format",
        choices=("zarr", "lerobot"),
        default="zarr",
        help="an episode store, or a LeRobot v3.0 dataset (default zarr)",
    )
    result.add_argument(
        "--pictures", choices=("av1", "h264", "png"), default="av1", help="of a LeRobot dataset: video or PNG (default av1)"
    )
    result.add_argument("--env", default="lightning_robot/PlayTable-v0", help="environment (default %(default)s)")
    result.add_argument("--tasks", type=_names, help="comma-separated task ids (default: those the environment chooses)")
    result.add_argument("--episodes-per-task", type=int, default=25, help="demonstrations of each task (default %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="seed of the first attempt; the next ones count up (default 0)")
    result.add_argument("--noise", type=float, default=0.0, help="noise on executed, not on recorded actions (default 0)")
    result.add_argument(
        "--noise-correlation", type=float, default=0.0, help="seconds over which the noise stays correlated (default 0: none)"
    )
    result.add_argument("--hold", type=int, default=8, help="steps recorded after success (default %(default)s)")
    result.add_argument(
        "--encoder",
        default="hashed_ngrams_384",
        help="of the sentences: ours (default %(default)s), or a model of sentence-transformers (extra calvin)",
    )
    result.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    result.add_argument("--policy", metavar="CHECKPOINT", help="let this policy act instead of the expert")
    result.add_argument("--weights", choices=("ema", "raw"), help="of the policy (default: averaged ones where there are any)")
    result.add_argument("--device", default="cpu", help="where the policy computes (default cpu)")
    result.add_argument(
        "--verify",
        action="store_true",
        help="generate nothing: verify STORE, however old, and attempt two of its episodes again (--policy, --weights and "
        "--device count, what else was set is noted in it)",
    )
    what = result.add_argument_group("the environment's own options (default: the environment's)")
    what.add_argument("--scene", help="scene of the play table: A, B, C or D")
    what.add_argument("--points", type=int, help="points of a cloud")
    what.add_argument("--colors", action="store_true", help="clouds with colours")
    what.add_argument("--observations", type=_names, help="what to record, e.g. state,point_cloud,images,depth")
    what.add_argument("--camera-size", type=int, help="pixels of the cameras' pictures, square")
    what.add_argument("--actions", help="form: relative or absolute (play table), joints or end_effector (SO-101)")
    what.add_argument("--env-kwargs", type=_mapping, default={}, help="further arguments of the environment, as JSON")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``generate``; those of the process when None.

    Returns:
        0; 1 after an error, which is printed; 130 after an interruption from the keyboard.
    """
    arguments = parser().parse_args(argv)
    from lightning_robot.generation.generate import generate

    try:
        if arguments.verify:
            from lightning_robot.generation.verification import verify_generation

            told = verify_generation(
                arguments.store, policy=arguments.policy, weights=arguments.weights, device=arguments.device
            )
            print(f"{arguments.store}: {told}")
            return 0
        generate(
            arguments.store,
            env=arguments.env,
            env_kwargs=environment_arguments(arguments),
            tasks=arguments.tasks,
            episodes_per_task=arguments.episodes_per_task,
            seed=arguments.seed,
            noise=arguments.noise,
            noise_correlation=arguments.noise_correlation,
            hold=arguments.hold,
            encoder=arguments.encoder,
            processes=arguments.processes,
            format=arguments.format,
            pictures=arguments.pictures,
            policy=arguments.policy,
            weights=arguments.weights,
            device=arguments.device,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("generate: interrupted; the same command continues.", file=sys.stderr)
        return 130
    return 0


def environment_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Constructor arguments of the environment: only what was asked for."""
    cloud: dict[str, Any] = {"points": arguments.points} if arguments.points is not None else {}
    if arguments.colors:
        cloud["colors"] = True
    chosen = {
        "scene": arguments.scene,
        "cloud": cloud or None,
        "observations": arguments.observations,
        "camera_sizes": arguments.camera_size,
        "actions": arguments.actions,
    }
    return {**{name: value for name, value in chosen.items() if value is not None}, **arguments.env_kwargs}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'a JSON object is wanted, such as {{"max_steps": 300}}, not {text}')
    return value
