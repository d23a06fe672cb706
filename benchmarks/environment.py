"""Control steps per second of the play table on one core, by what is observed, and where the time goes.

python benchmarks/environment.py [--seconds 2] [--sizes 64 84 96 200] [--opengl]

Steps are those of the scripted expert over many episodes, resets counted, in processor time (what else the machine does matters
little; expect some per cent of difference between runs). The floor of a step with a cloud is its physics, its rays and its
farthest points; "rest" is what Python adds to them.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import mujoco
import numpy as np

from lightning_robot.envs.calvin_tasks import BLOCK_FREE_TASKS
from lightning_robot.envs.play_table import SUBSTEPS, PlayTable
from lightning_robot.geometry import back_project
from lightning_robot.points import build_cloud, farthest_points

AIMS = {"state": 1000.0, "cloud, 84 px": 150.0}


def episodes(table: PlayTable, seconds: float) -> float:
    """Steps per second of processor time of the experts' episodes, without the time that the experts need."""
    steps, spent, seed = 0, 0.0, 0
    while spent < seconds:
        task = BLOCK_FREE_TASKS[seed % len(BLOCK_FREE_TASKS)]
        start = time.process_time()
        table.reset(seed=seed, options={"task": task})
        spent += time.process_time() - start
        expert, done = table.expert(), False
        while not done:
            action = expert.act()
            start = time.process_time()
            *_, success, truncated, _ = table.step(action)
            spent += time.process_time() - start
            steps, done = steps + 1, success or truncated
        seed += 1
    return steps / spent


def best(function: Callable[[], Any], count: int = 20) -> float:
    """Shortest time in milliseconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def stages(size: int) -> dict[str, float]:
    """Milliseconds of the stages of one step with a cloud of two cameras."""
    table = PlayTable(camera_sizes={"static": size, "gripper": size})
    table.reset(seed=0)
    action = np.array([0, 0, 0, 0, 0, 0, 1.0])
    views = {name: table._camera(name) for name in table.recipe.cameras}
    casts = {name: view.cast(table._data)[0] for name, view in views.items()}
    points = {name: back_project(casts[name], views[name].camera, views[name].pose(table._data)) for name in views}
    low, high = table.recipe.crop
    pool = np.concatenate([part[((part >= low) & (part <= high)).all(axis=1)] for part in points.values()])
    result = {
        "whole step": best(lambda: table.step(action)),
        "physics": best(lambda: mujoco.mj_step(table._model, table._data, SUBSTEPS)),
        "rays, static camera": best(lambda: views["static"].cast(table._data)),
        "rays, gripper camera": best(lambda: views["gripper"].cast(table._data)),
        f"farthest points of {len(pool):,}": best(lambda: farthest_points(pool, table.recipe.points)),
        "crop and farthest points": best(lambda: build_cloud(points, None, table.recipe)),
    }
    floor = sum(value for name, value in result.items() if name.startswith(("physics", "rays", "farthest")))
    return result | {"rest": result["whole step"] - floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time per measurement")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 84, 96, 200], help="pixels per camera")
    parser.add_argument("--opengl", action="store_true", help="pictures through OpenGL, too")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, MuJoCo {mujoco.__version__}, one core; aims {AIMS}")
    settings: dict[str, dict[str, Any]] = {"state": {"observations": ("state",)}}
    for size in arguments.sizes:
        sizes = {"static": size, "gripper": size}
        settings[f"cloud, {size} px"] = {"camera_sizes": sizes}
        settings[f"cloud with colours, {size} px"] = {"camera_sizes": sizes, "cloud": {"colors": True}}
    for size in arguments.sizes:
        for renderer in ("rays", "opengl") if arguments.opengl else ("rays",):
            sizes = {"static": size, "gripper": size}
            settings[f"two pictures, {size} px, {renderer}"] = {
                "observations": ("state", "images"),
                "camera_sizes": sizes,
                "renderer": renderer,
            }
    for name, values in settings.items():
        table = PlayTable(**values)
        print(f"{name:32} {episodes(table, arguments.seconds):8.0f} steps/s")
        table.close()
    for size in arguments.sizes:
        print(
            f"one step with a cloud, {size} px (ms): " + ", ".join(f"{key} {value:.2f}" for key, value in stages(size).items())
        )


if __name__ == "__main__":
    main()
