"""Milliseconds per step of adapted simulators, as their packages draw and as the adapters do, on one core.

python benchmarks/adapters.py [--steps 20] [--sizes 84 128]

Needs the extras (metaworld, aloha, pusht; one that is absent is left out) and OpenGL. Median of wall time per step; "as the
package does it" is the package's own environment with its own settings, in the same process.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LP_NUM_THREADS"] = "0"  # software OpenGL without helper threads
os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl")

import gymnasium
import mujoco
import numpy as np

from lightning_robot.envs import make_environment
from lightning_robot.points import cloud_from_depth


def median(function: Callable[[], Any], count: int) -> float:
    """Milliseconds; the first call is not counted."""
    function()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def show(name: str, milliseconds: float, reference: float | None = None) -> None:
    ratio = f"{reference / milliseconds:8.1f} times as fast" if reference else ""
    print(f"  {name:<58}{milliseconds:9.2f} ms{ratio}")


def step_time(environment: str, action: np.ndarray, steps: int, skip: bool = False, **arguments: Any) -> float:
    env = make_environment(environment, **arguments)
    env.reset(seed=0)
    env.unwrapped.skip_observation = skip
    result = median(lambda: env.step(action), steps)
    env.close()
    return result


def aloha(steps: int) -> None:
    import gym_aloha  # noqa: F401

    rest = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2, np.float32)
    theirs = gymnasium.make("gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    theirs.reset(seed=0)
    reference = median(lambda: theirs.step(rest), max(3, steps // 5))
    print("gym-aloha, transfer of the cube")
    show("as the package does it (three cameras, 480 x 640)", reference)
    name = "lightning_robot/Aloha-v0"
    show("top, 480 x 640, with shadows", step_time(name, rest, steps, shadows=True), reference)
    show("top, 480 x 640 (default)", step_time(name, rest, steps), reference)
    show("top, 96 x 96", step_time(name, rest, steps, camera_sizes={"top": 96}), reference)
    show("observation not read (default within a chunk)", step_time(name, rest, 5 * steps, skip=True), reference)


def pusht(steps: int) -> None:
    import gym_pusht  # noqa: F401

    target = np.array([100.0, 100.0], np.float32)
    theirs = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", disable_env_checker=True)
    theirs.reset(seed=0)
    reference = median(lambda: theirs.step(target), 5 * steps)
    print("gym-pusht")
    show("as the package does it (96 x 96)", reference)
    show("picture read", step_time("lightning_robot/PushT-v0", target, 5 * steps), reference)
    show("observation not read", step_time("lightning_robot/PushT-v0", target, 5 * steps, skip=True), reference)


def metaworld(task: str, sizes: list[int], steps: int) -> None:
    name, still = "lightning_robot/MetaWorld-v0", np.zeros(4)
    print(f"Meta-World, {task}, camera corner2")
    show("state only", step_time(name, still, 10 * steps, task=task, observations=["state"]))
    for size in sizes:
        _metaworld_pictures(task, size, steps)
        for renderer in ("opengl", "rays"):
            arguments = {"task": task, "renderer": renderer, "camera_sizes": {"corner2": size}}
            show(f"{size} px: whole step with cloud, {renderer}", step_time(name, still, steps, **arguments))


def _metaworld_pictures(task: str, size: int, steps: int) -> None:
    scenes = {}
    for renderer in ("opengl", "rays"):
        env: Any = make_environment("lightning_robot/MetaWorld-v0", task=task, renderer=renderer).unwrapped
        env.reset(seed=0)
        scenes[renderer] = env._scene()
    made = make_environment("Meta-World/MT1", env_name=f"{task}-v3", seed=0)  # the model in its own quality
    made.reset()
    theirs: Any = made.unwrapped
    plain = mujoco.Renderer(theirs.model, size, size)

    def draw() -> None:
        plain.update_scene(theirs.data, "corner2")
        plain.render()

    reference = median(draw, max(3, steps // 4))
    plain.close()
    show(f"{size} px: picture in the model's own quality", reference)
    for renderer, scene in scenes.items():
        look = partial(scene.look, "corner2", size, size)
        show(f"{size} px: picture, {renderer}", median(lambda look=look: look().picture(), steps), reference)
        show(f"{size} px: depth, {renderer}", median(lambda look=look: look().depth(), steps))
    seen = scenes["rays"].look("corner2", size, size)
    parts = ({"corner2": seen.depth()}, {"corner2": seen.camera}, {"corner2": seen.pose}, None)
    show(f"{size} px: crop and farthest points", median(lambda: cloud_from_depth(*parts, env.recipe), steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[84, 128])
    parser.add_argument("--tasks", nargs="+", default=["drawer-open", "pick-place"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for package, run in (("gym_aloha", aloha), ("gym_pusht", pusht)):
        if find_spec(package) is not None:
            run(arguments.steps)
    if find_spec("metaworld") is not None:
        import metaworld as _  # noqa: F401  registers Meta-World/MT1

        for task in arguments.tasks:
            metaworld(task, arguments.sizes, arguments.steps)


if __name__ == "__main__":
    main()
