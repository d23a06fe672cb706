"""``convert``: recordings of others -> an episode store; a store or a checkpoint -> LeRobot's form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``convert``; returns the exit status: 0 done, 1 refused or failed with a message on stderr, 130 interrupted."""
    arguments = vars(_parser().parse_args(argv))
    return arguments.pop("run")(**arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_robot convert",
        description="Converts recordings to an episode store, or a store or a checkpoint to LeRobot's form.",
        allow_abbrev=False,
    )
    formats = parser.add_subparsers(title="formats", required=True, metavar="FORMAT")
    calvin = formats.add_parser(
        "calvin",
        help="a folder of CALVIN recordings",
        description="Converts CALVIN recordings. An interrupted conversion continues when the same command is run again. "
        "Damaged items are left out, never closed over, and listed at the end.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    calvin.set_defaults(run=_calvin)
    add = calvin.add_argument
    add("root", metavar="ROOT", help="folder with training/ and validation/, or one of the two")
    add("store", metavar="STORE", help="where the store will be, e.g. calvin.zarr")
    add("--points", type=int, default=2048, help="points per cloud, 0 for no clouds")
    off: dict[str, Any] = {"action": "store_false", "default": argparse.SUPPRESS}
    add("--no-colors", **off, dest="colors", help="clouds without red, green, blue")
    add("--per-camera", action="store_true", help="half of the points from each camera instead of both pooled")
    add(
        "--crop",
        type=float,
        nargs=6,
        default=(-0.5, -0.6, 0.25, 0.5, 0.25, 0.80),
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="lower and upper corner of the workspace in metres",
    )
    add(
        "--pixel-offset",
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        metavar=("COLUMN", "ROW"),
        help="sampled place inside a pixel: 0.5 0.5 for the official data (OpenGL), 0 1 for PyBullet's software renderer",
    )
    add("--no-rgb", **off, dest="rgb", help="no colour pictures of the static camera")
    add("--no-depth", **off, dest="depth", help="no depth pictures of the static camera")
    add("--size", type=int, default=160, help="central rows and columns of the static camera's 200 that are kept")
    add("--gripper-rgb", action="store_true", help="colour pictures of the gripper camera too")
    add("--gripper-depth", action="store_true", help="depth pictures of the gripper camera too")
    add("--scene-obs", action="store_true", help="the scene's state too, blocks in the order red, blue, pink")
    add("--actions", choices=("relative", "absolute"), default="relative", help="form of the action")
    add("--absolute-actions", action="store_true", help="absolute actions too, as an array of their own")
    add("--depth-scale", type=float, default=1.0, help="factor on recorded depth; some old copies need 2")
    add(
        "--splits", nargs="+", choices=("training", "validation"), default=("training", "validation"), help="folders to convert"
    )
    add("--language", default="lang_annotations", metavar="FOLDER", help="annotation folder inside each split, '' for none")
    add("--encoder", default="", metavar="NAME", help="sentence encoder of these annotations, if it is not the folder's")
    add("--scene", choices=("A", "B", "C", "D", ""), default="", help="scene, where the recordings do not say")
    add("--processes", type=int, default=None, help="worker processes; all usable cores if not given")
    add("--strict", action="store_true", help="stop at the first damaged item")
    add(
        "--verify",
        action="store_true",
        help="convert nothing: verify STORE, however old, with the settings noted in it, against ROOT where it is there",
    )
    policy = formats.add_parser(
        "lerobot-policy",
        help="a checkpoint of ACT or Diffusion Policy, for LeRobot",
        description="Writes a checkpoint of ACT or Diffusion Policy as a folder that LeRobot loads. The other way needs no "
        "conversion: wherever a checkpoint is asked for, give LeRobot's folder.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    policy.set_defaults(run=_lerobot_policy)
    policy.add_argument("checkpoint", metavar="CHECKPOINT", help="e.g. runs/latest/checkpoints/best.ckpt")
    policy.add_argument("folder", metavar="FOLDER", help="where LeRobot's checkpoint will be")
    policy.add_argument("--weights", choices=("ema", "raw"), default=None, help="averaged if there are any, if not given")
    lerobot = formats.add_parser(
        "lerobot",
        help="an episode store, to a LeRobot v3.0 dataset",
        description="Writes a LeRobot dataset with every episode of a store. An interrupted conversion continues when the same "
        "command is run again. At the end some frames are read back.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lerobot.set_defaults(run=_lerobot)
    lerobot.add_argument("store", metavar="STORE", help="an episode store, e.g. data/so101.zarr")
    lerobot.add_argument("folder", metavar="FOLDER", help="where the dataset will be")
    lerobot.add_argument("--pictures", choices=("av1", "h264", "png"), default="av1", help="video, or PNG in the parquet files")
    lerobot.add_argument("--rate", type=int, help="frames per second, where the store does not say")
    lerobot.add_argument("--robot", help="name of the robot")
    lerobot.add_argument(
        "--verify", action="store_true", help="convert nothing: verify FOLDER, however old, against STORE where it is there"
    )
    return parser


def _lerobot(store: str, folder: str, pictures: str, rate: int | None, robot: str | None, verify: bool) -> int:
    from lightning_robot.console import counted, say
    from lightning_robot.data.convert_lerobot import convert_to_lerobot, verify_conversion

    try:
        if verify:
            say(f"{folder}: {verify_conversion(store, folder)}")
            return 0
        dataset, outcome = convert_to_lerobot(store, folder, pictures=pictures, rate=rate, robot=robot)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"convert lerobot: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert lerobot: interrupted; the same command continues.", file=sys.stderr)
        return 130
    say(f"{dataset.path}: {counted(dataset.num_frames, 'frame')}, {counted(dataset.num_episodes, 'episode')}. {outcome}")
    return 0


def _lerobot_policy(checkpoint: str, folder: str, weights: Any) -> int:
    from lightning_robot.console import say
    from lightning_robot.policies.base import load_policy
    from lightning_robot.policies.lerobot_checkpoints import export_lerobot_policy

    try:
        export_lerobot_policy(load_policy(checkpoint, weights), folder)
    except (ValueError, OSError) as error:
        print(f"convert lerobot-policy: {error}", file=sys.stderr)
        return 1
    say(f"{folder}: {checkpoint} for LeRobot.")
    return 0


def _calvin(root: str, store: str, crop: Sequence[float], pixel_offset: Sequence[float], verify: bool, **values) -> int:
    from dataclasses import fields

    from lightning_robot.console import counted, say
    from lightning_robot.data.calvin_frames import CalvinSettings
    from lightning_robot.data.convert_calvin import convert_calvin, verify_calvin

    names = {field.name for field in fields(CalvinSettings)}
    kept = {name: value for name, value in values.items() if name in names}
    rest = {name: value for name, value in values.items() if name not in names}
    try:
        if verify:
            say(f"{store}: {verify_calvin(root, store, scene=values['scene'], processes=values['processes'])}")
            return 0
        x0, y0, z0, x1, y1, z1 = crop
        column, row = pixel_offset
        settings = CalvinSettings(crop=((x0, y0, z0), (x1, y1, z1)), pixel_offset=(column, row), **kept)
        done = convert_calvin(root, store, settings, **rest)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"convert calvin: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert calvin: interrupted; the same command continues.", file=sys.stderr)
        return 130
    segments = 0 if done.store.segments is None else len(done.store.segments)
    say(
        f"{done.store.path}: {counted(done.store.num_frames, 'frame')}, {counted(done.store.num_episodes, 'episode')}, "
        f"{counted(segments, 'described segment')}. {done.verification}".rstrip()
    )
    return 0
