"""Milliseconds per control step of the SO-101's pictures, and its expert's success.

python benchmarks/rendering.py [--sizes 64 96 128 224] [--opengl] [--expert 200]

Aims on one core: two cameras' RGB at 96 px in 6 ms, their depth by ray casting in 3 ms. Poses are those of an episode of the
expert, every tenth step; of each the shortest of several times, and of these the mean and the longest. OpenGL in software is
measured with MuJoCo's default quality and with this project's (no shadows, reflections, multisampling, coarse tessellation).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer without threads of its own

import mujoco
import numpy as np

from lightning_robot.envs.opengl import NoOpenGL, make_renderer
from lightning_robot.envs.so101 import SO101PickPlace

CAMERAS = ("overhead", "wrist")
AIMS = {"RGB": 6.0, "depth": 3.0}


def best(function: Callable[[], Any], count: int = 7) -> float:
    """Shortest time in milliseconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def along_an_episode(env: SO101PickPlace, draw: Callable[[], Any]) -> tuple[float, float]:
    """Mean and longest of the shortest times of `draw` at every tenth step of the expert's episode."""
    env.reset(seed=0)
    env.skip_observation = True
    expert, done = env.expert(), False
    times: list[float] = []
    while not done:
        if len(times) * 10 <= env._progress.steps:
            env._update_poses()
            times.append(best(draw))
        *_, solved, truncated, _ = env.step(expert.act())
        done = solved or truncated
    return float(np.mean(times)), max(times)


def rays(size: int) -> None:
    env = SO101PickPlace(camera_sizes=dict.fromkeys(CAMERAS, size))
    views = [env._camera(name) for name in CAMERAS]
    for kind, draw in (
        ("depth", lambda: [view.cast(env._data) for view in views]),
        ("RGB", lambda: [view.shaded(env._data) for view in views]),
        ("RGB and depth", lambda: [view.shaded(env._data, view.cast(env._data)) for view in views]),
    ):
        mean, longest = along_an_episode(env, draw)
        aim = f" (aim {AIMS[kind]:g})" if size == 96 and kind in AIMS else ""
        print(f"rays, {size} px, two cameras, {kind:13} {mean:6.2f} ms, at most {longest:.2f}{aim}")


def opengl(size: int) -> None:
    for name, slow in (("fast settings", False), ("MuJoCo's default quality", True)):
        env = SO101PickPlace(camera_sizes=dict.fromkeys(CAMERAS, size))
        if slow:
            quality = env._model.vis.quality
            quality.shadowsize, quality.offsamples = 4096, 4
            quality.numslices, quality.numstacks, quality.numquads = 28, 16, 4
            env._model.light_castshadow[:] = 1
        renderer = make_renderer(env._model, size, size)
        if slow:
            flags: Any = renderer.scene.flags
            flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 1

        def draw(env: SO101PickPlace = env, renderer: mujoco.Renderer = renderer) -> None:
            for camera in CAMERAS:
                renderer.update_scene(env._data, camera)
                renderer.render()

        mean, longest = along_an_episode(env, draw)
        print(f"OpenGL, {size} px, two cameras, RGB, {name}: {mean:.2f} ms, at most {longest:.2f}")
        renderer.close()


def steps_per_second(observations: tuple[str, ...], seconds: float = 3.0) -> float:
    """Control steps per second of processor time over the expert's episodes, resets counted, the expert not."""
    env = SO101PickPlace(observations=observations)
    steps, spent, seed = 0, 0.0, 0
    while spent < seconds:
        start = time.process_time()
        env.reset(seed=seed)
        spent += time.process_time() - start
        expert, done = env.expert(), False
        while not done:
            action = expert.act()
            start = time.process_time()
            *_, solved, truncated, _ = env.step(action)
            spent += time.process_time() - start
            steps, done = steps + 1, solved or truncated
        seed += 1
    return steps / spent


def expert(episodes: int) -> None:
    env = SO101PickPlace(observations=("state",))
    outcomes, lengths = Counter[str](), []
    for seed in range(episodes):
        env.reset(seed=seed)
        scripted, done = env.expert(), False
        while not done:
            *_, solved, truncated, info = env.step(scripted.act())
            done = solved or truncated
        outcomes[info["details"]["outcome"]] += 1
        lengths.append(env._progress.steps)
    print(
        f"expert, seeds 0 to {episodes - 1}: {dict(outcomes)}, {np.mean(lengths):.0f} steps on average, at most {max(lengths)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 224], help="pixels per camera")
    parser.add_argument("--opengl", action="store_true", help="pictures through OpenGL, too")
    parser.add_argument("--expert", type=int, default=0, metavar="EPISODES", help="play the scripted expert, too")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, MuJoCo {mujoco.__version__}, one core")
    for size in arguments.sizes:
        rays(size)
    for size in arguments.sizes if arguments.opengl else ():
        try:
            opengl(size)
        except NoOpenGL as error:
            print(error)
            break
    for observations in (("state",), ("state", "images"), ("state", "images", "depth"), ("state", "point_cloud")):
        print(f"{' and '.join(observations):26} {steps_per_second(observations):7.0f} control steps/s")
    if arguments.expert:
        expert(arguments.expert)


if __name__ == "__main__":
    main()
