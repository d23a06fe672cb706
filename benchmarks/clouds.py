"""Point clouds: farthest points, nearest neighbours, and a whole two-camera cloud.

python benchmarks/clouds.py [--device cpu] [--repeats 8] [--root ../shared/data/calvin_sample]

Best of several on one core. Farthest points are compared with the plain loop that every framework shows (all three columns
at once, new arrays at each step). The floor of the bucket method is one pass over the points: it must see each of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

import lightning_robot  # noqa: F401  (before lightning)
from lightning_robot import points as module
from lightning_robot.geometry import CALVIN_GRIPPER, CALVIN_STATIC, CALVIN_STATIC_POSE, calvin_gripper_pose
from lightning_robot.points import CloudRecipe, cloud_from_depth, farthest_points


def best(function: Callable[[], Any], repeats: int, device: str = "cpu") -> float:
    """Milliseconds, the least of several."""
    taken = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def plain_loop(points: np.ndarray, count: int) -> np.ndarray:
    chosen, distances, current = np.zeros(count, dtype=np.int64), np.full(len(points), np.inf), 0
    for step in range(count):
        chosen[step] = current
        distances = np.minimum(distances, ((points - points[current]) ** 2).sum(axis=1))
        current = int(distances.argmax())
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "calvin_sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats, device = arguments.repeats, arguments.device
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, one thread")
    generator = np.random.default_rng(0)
    if device == "cpu":
        print(f"{'farthest points':>18} {'bucket ms':>10} {'ours numpy':>11} {'plain loop':>11} {'ratio':>7} {'floor ms':>9}")
        for size, count in ((10_000, 1024), (25_600, 1024), (30_000, 2048)):
            cloud = generator.random((size, 3), dtype=np.float32)
            bucket = best(lambda: farthest_points(cloud, count), repeats)  # noqa: B023
            own = best(lambda: module._farthest_points_numpy(cloud, count, 0), 2)  # noqa: B023
            loop = best(lambda: plain_loop(cloud, count), 1)  # noqa: B023
            floor = best(lambda: ((cloud - cloud[0]) ** 2).sum(axis=1), repeats)  # noqa: B023
            print(f"{f'{size} -> {count}':>18} {bucket:10.2f} {own:11.1f} {loop:11.1f} {loop / bucket:7.0f} {floor:9.2f}")
        whole_cloud(arguments.root, repeats)
    clouds = torch.rand(16, 4096, 3, device=device)
    print(f"torch on {device}, 16 clouds of 4096 points:")
    farthest = best(lambda: module.farthest_points_torch(clouds, 1024), max(2, repeats // 4), device)
    neighbours = best(lambda: module.nearest_neighbours(clouds[:, :1024], clouds, 16), max(2, repeats // 4), device)
    print(f"  1024 farthest points {farthest:9.1f} ms   16 nearest neighbours of 1024 queries {neighbours:9.1f} ms")


def whole_cloud(root: Path, repeats: int) -> None:
    path = root / "training" / "episode_0003120.npz"
    if not path.exists():
        print(f"whole cloud: left out, no recording at {root}")
        return
    with np.load(path) as frame:
        depths = {name: frame[f"depth_{name}"] for name in ("static", "gripper")}
        rgbs = {name: frame[f"rgb_{name}"] for name in ("static", "gripper")}
        poses = {"static": CALVIN_STATIC_POSE, "gripper": calvin_gripper_pose(frame["robot_obs"])}
    cameras = {"static": CALVIN_STATIC, "gripper": CALVIN_GRIPPER}
    print("whole cloud of two cameras, 200 x 200 and 84 x 84 pixels, cropped:")
    for points in (1024, 2048):
        for per_camera in (False, True):
            recipe = CloudRecipe(points=points, colors=True, per_camera=per_camera, pixel_offset=(0, 1))
            taken = best(lambda: cloud_from_depth(depths, cameras, poses, rgbs, recipe), repeats)  # noqa: B023
            print(f"  {points} coloured points, {'share per camera' if per_camera else 'pooled':16s} {taken:6.2f} ms")


if __name__ == "__main__":
    main()
