"""Frames per second and memory of `convert calvin`, on a recording enlarged by renumbered copies of its frames.

python benchmarks/conversion.py [--root ../shared/data/calvin_sample] [--frames 424 1696] [--processes 1 2] [--points 2048]

Each conversion runs in a process of its own; memory is the largest resident size of that process and of its largest worker,
above what the imports alone take; sizes four times apart show whether it grows with the dataset. "Per CPU s" counts the time
that cores worked, whatever else the machine was doing. The stages are timed one by one in this process. The floor is what no
converter can leave out, decompressing each frame and choosing its points, once; the check of all files before the work, the
second decompression, compressing, syncing and reading back stand above it. Small datasets show the verification's fixed share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

AIM = 80.0  # frames per second and core


def enlarge(root: Path, target: Path, frames: int) -> None:
    """A split folder of one episode whose frames are links to those of `root`, over and over."""
    files = sorted((root / "training").glob("episode_*.npz"))
    folder = target / "training"
    folder.mkdir(parents=True)
    for number in range(frames):
        (folder / f"episode_{number:07d}.npz").symlink_to(files[number % len(files)].resolve())
    np.save(folder / "ep_start_end_ids.npy", np.array([[0, frames - 1]]))


def convert(root: Path, store: Path, points: int, processes: int) -> dict[str, Any]:
    """One conversion in a fresh process."""
    command = [sys.executable, __file__, "--child", str(root), str(store), str(points), str(processes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(root: str, store: str, points: str, processes: str) -> None:
    from lightning_robot.data.convert_calvin import CalvinSettings, convert_calvin

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    settings = CalvinSettings(points=int(points), pixel_offset=(0, 1))
    frames = convert_calvin(root, store, settings, processes=int(processes)).store.num_frames
    seconds, own = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own + workers.ru_utime + workers.ru_stime
    memory = {"imports": before / 1024, "peak": peak / 1024, "worker": workers.ru_maxrss / 1024}
    print(json.dumps({"rate": frames / seconds, "cpu_rate": frames / cpu, **memory}))


def best(function: Callable[[], Any], times: int = 10) -> float:
    """Milliseconds, the least of several."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken) * 1e3


def stages(root: Path, points: int) -> tuple[float, float]:
    """Prints what one frame costs, part by part; returns milliseconds of all parts and of the floor."""
    from numcodecs import Blosc

    from lightning_robot.data.calvin_files import read_frame
    from lightning_robot.data.calvin_frames import CAMERAS, CalvinSettings, check_frame, convert_frame
    from lightning_robot.geometry import CALVIN_STATIC_POSE, back_project, calvin_gripper_pose
    from lightning_robot.points import farthest_points, inside

    path = sorted((root / "training").glob("episode_*.npz"))[0]
    settings = CalvinSettings(points=points, pixel_offset=(0, 1))
    frame = read_frame(path, settings.frame_keys)
    poses = {"static": CALVIN_STATIC_POSE, "gripper": calvin_gripper_pose(frame["robot_obs"])}

    def cropped() -> np.ndarray:
        world = [back_project(frame[f"depth_{name}"], CAMERAS[name], poses[name], (0, 1)) for name in CAMERAS]
        return np.concatenate([part[inside(part, settings.crop)] for part in world])

    cloud = cropped()
    rows = convert_frame(frame, settings)
    codec = Blosc("zstd", 3, Blosc.SHUFFLE)
    parts = {
        "decompress and check checksums": best(lambda: read_frame(path, settings.frame_keys)),
        f"farthest points, {len(cloud)} -> {points}": best(lambda: farthest_points(cloud, points)),
        "back-project and crop": best(cropped),
        "compress the rows": best(lambda: [codec.encode(np.ascontiguousarray(row)) for row in rows.values()]),
        "decompress once more, before the work": best(lambda: check_frame(read_frame(path, settings.frame_keys), settings)),
    }
    floor = sum(list(parts.values())[:2])
    for name, taken in parts.items():
        print(f"  {name:42s} {taken:6.2f} ms")
    print(f"  {'whole conversion of a frame in memory':42s} {best(lambda: convert_frame(frame, settings)):6.2f} ms")
    return sum(parts.values()), floor


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sample = Path(__file__).parents[2] / "shared" / "data" / "calvin_sample"
    parser.add_argument("--root", type=Path, default=sample)
    parser.add_argument("--frames", type=int, nargs="+", default=[424, 1696])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", type=int, default=2048)
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        parser.error(f"{arguments.root} is missing: give a CALVIN recording with --root")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("One frame, one core:")
    total, floor = stages(arguments.root, arguments.points)
    print(f"  sum {total:.2f} ms = {1e3 / total:.0f} frames/s; floor {floor:.2f} ms = {1e3 / floor:.0f} frames/s")
    columns = (("frames", 8), ("processes", 9), ("frames/s", 9), ("per CPU s", 9), ("of aim", 7), ("of floor", 9))
    print(*(f"{name:>{width}}" for name, width in (*columns, ("own MiB", 8), ("worker MiB", 10))))
    with tempfile.TemporaryDirectory() as folder:
        for frames in arguments.frames:
            root = Path(folder) / f"root{frames}"
            enlarge(arguments.root, root, frames)
            for processes in arguments.processes:
                result = convert(root, Path(folder) / f"store{frames}_{processes}", arguments.points, processes)
                core = result["cpu_rate"]
                worker = result["worker"] - result["imports"] if processes > 1 else 0.0
                print(
                    f"{frames:8d} {processes:9d} {result['rate']:9.1f} {core:9.1f} {core / AIM:7.2f} {core * floor / 1e3:9.2f} "
                    f"{result['peak'] - result['imports']:8.0f} {worker:10.0f}"
                )


if __name__ == "__main__":
    main()
