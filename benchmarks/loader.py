"""Windows per second of the data path, against the floor: copying the same bytes within memory.

    python benchmarks/loader.py [--frames 6000] [--points 2048] [--batch 128]

A store with coloured clouds is written to a temporary folder; the policy reads XYZ and state of two steps and 16 actions, as
DP3 does. Measured are the floor (`numpy.take` of the same rows from an array in memory), the data path with 0 and 2 workers,
and zarr's own random reading, which the decoded copy replaces. With ``--step-ms`` a training step of that length is imitated
(it keeps one core busy), and the share of time spent waiting for data is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import lightning_robot  # noqa: F401
from lightning_robot.data import store as store_module
from lightning_robot.data.episodes import EpisodeDataModule
from lightning_robot.data.store import EpisodeStore, StoreWriter

WINDOW = SimpleNamespace(
    keys=("observation.state", "observation.point_cloud"),
    observation_steps=2,
    action_horizon=16,
    action_offset=-1,
    pad_before=1,
    pad_after=7,
)


class Reader:
    """Stands for a policy that reads positions of a coloured cloud."""

    window, uses_task = WINDOW, False

    def __init__(self, points: int) -> None:
        self.points = points

    def select_features(self, offered):  # type: ignore[no-untyped-def]
        cloud = SimpleNamespace(shape=(self.points, 3))
        return SimpleNamespace(observations={**offered.observations, "observation.point_cloud": cloud})


def make_store(path: Path, frames: int, points: int) -> EpisodeStore:
    arrays = {
        "observation.state": ((15,), "float32"),
        "observation.point_cloud": ((points, 6), "float32"),
        "action": ((7,), "float32"),
    }
    writer = StoreWriter(path, arrays, frames)
    rng = np.random.default_rng(0)
    scene = rng.uniform(-0.5, 0.5, (points, 6)).astype(np.float32)
    for start in range(0, frames, 256):
        rows = min(256, frames - start)
        cloud = scene + rng.normal(0, 1e-3, (rows, points, 6)).astype(np.float32)
        cloud[..., 3:] = np.round(np.clip(cloud[..., 3:] + 0.5, 0, 1) * 255) / 255
        state, action = rng.normal(size=(rows, 15)), rng.normal(size=(rows, 7))
        writer.append({"observation.state": state, "observation.point_cloud": cloud, "action": action})
    return writer.finish(np.unique([*range(60, frames, 60), frames]))


def rate(seconds: list[float], windows: int) -> str:
    per_second = sorted(windows / s for s in seconds)
    middle = statistics.median(per_second)
    return f"{middle:10,.0f} windows/s  (median of {len(seconds)}; {per_second[0]:,.0f} to {per_second[-1]:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=6000)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--step-ms", type=float, nargs="*", default=[50, 100, 500])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}, torch {torch.__version__}"
    )
    os.environ.pop("LIGHTNING_ROBOT_CACHE", None)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    store = make_store(folder / "bench.zarr", arguments.frames, arguments.points)
    store_module.IN_MEMORY_BYTES = 0  # the path of large datasets, whatever the size here
    batch = arguments.batch
    rng = np.random.default_rng(0)
    cloud = np.ascontiguousarray(store.read("observation.point_cloud", slice(None))[..., :3])
    choices = [(rng.integers(0, arguments.frames - 1, batch)[:, None] + np.arange(2)).ravel() for _ in range(arguments.batches)]
    print(f"batch {batch}: 2 x {arguments.points} x 3 float32 per window, {cloud[0].nbytes * 2 * batch / 1e6:.1f} MB per batch")

    floor = [timed(np.take, cloud, rows, 0) for rows in choices]
    floor_median = statistics.median(floor)
    print(f"floor, memory copy     {rate(floor, batch)}")
    del cloud
    compressed = [timed(store.gather, "observation.point_cloud", rows) for rows in choices[:3]]
    print(f"zarr, random reading   {rate(compressed, batch)}")

    for workers in (0, 2):
        data = EpisodeDataModule(str(store.path), batch_size=batch, num_workers=workers, validation_ratio=0)
        data.trainer = None
        started = time.perf_counter()
        data._module = lambda: Reader(arguments.points)  # type: ignore[method-assign]
        data.prepare_data()
        if workers == 0:
            print(f"decoded copy made in {time.perf_counter() - started:.1f} s")
        data.setup()
        loader = data.train_dataloader()
        list(loader)  # pages and workers are warm
        taken = []
        started = time.perf_counter()
        for _ in loader:
            now = time.perf_counter()
            taken.append(now - started)
            started = now
        mean = sum(taken[2:-1]) / len(taken[2:-1])  # with workers, single times say little
        of_floor = f"{floor_median / mean:.0%} of the floor, {mean * 1e3:.1f} ms a batch"
        print(f"data path, {workers} workers  {batch / mean:10,.0f} windows/s  {of_floor}")
        for step in arguments.step_ms:
            print(f"    step of {step:g} ms: {waiting(loader, step / 1e3):.1%} of the time waiting for data")


def waiting(loader, step: float) -> float:  # type: ignore[no-untyped-def]
    """Share of time between the end of a step and the next batch, with a step that keeps this process's core busy."""
    waited = total = 0.0
    matrix = torch.rand(200, 200)
    iterator = iter(loader)
    next(iterator)
    started = time.perf_counter()
    for number in range(min(len(loader) - 2, max(5, int(5 / step)))):
        before = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - before if number else 0.0
        until = time.perf_counter() + step
        while time.perf_counter() < until:
            matrix @ matrix
    total = time.perf_counter() - started
    return waited / total


def timed(call, *values) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    call(*values)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
