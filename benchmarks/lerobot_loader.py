"""Samples per second from LeRobot folders, beside LeRobot's own loader: same folder, same windows, same order.

    python benchmarks/lerobot_environment.py FOLDER                  # once: an environment with LeRobot 0.6.1
    python benchmarks/lerobot_loader.py DATA --lerobot FOLDER/venv/bin/python [--size 96 480x640] [--storage image video]

LeRobot writes the folders DATA/<storage>_<size> where they are missing (two cameras, 20 episodes of 200 frames; 480x640 takes
minutes and 5 GB). Both loaders then give batches of the same windows in the same order, and the first ones are compared value
by value. Timed are, alternately, several repeats of each: LeRobot in its environment (with its default, spawned workers, and
with forked ones), this project here. Throughput counts from the third batch on, the first batch from `iter(loader)`; on a busy
machine the processor time of a sample says more than the rate. Nothing is cached decoded; with ``--decode`` this project's
decoded cache is measured too, and named so.

Windows: ``act`` is one observation and 100 actions, ``diffusion`` two observations and 16 actions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

CAMERAS = ("observation.images.front", "observation.images.wrist")
WINDOWS = {  # observation steps, first action, number of actions
    "act": (1, 0, 100),
    "diffusion": (2, -1, 16),
}
FPS, EPISODES, LENGTH = 30, 20, 200
COMPARED = 3


# Run by LeRobot's interpreter.


def write(folder: Path, storage: str, height: int, width: int) -> None:
    """A dataset written by LeRobot: textured, moving pictures with the noise of a camera."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = [f"joint_{number}.pos" for number in range(6)]
    vector = {"dtype": "float32", "shape": (6,), "names": names}
    picture = {"dtype": storage, "shape": (height, width, 3), "names": ["height", "width", "channels"]}
    features = {"observation.state": vector, "action": vector} | dict.fromkeys(CAMERAS, picture)
    dataset = LeRobotDataset.create(
        "benchmark/benchmark", FPS, features, root=folder, use_videos=storage == "video", image_writer_threads=2
    )
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 215, (2, height // 8 + 40, width // 8 + 40, 3))
    scenes = coarse.repeat(8, 1).repeat(8, 2)
    scenes = (scenes + np.roll(scenes, 3, 1) + np.roll(scenes, 3, 2) + np.roll(scenes, 5, (1, 2))) / 4
    noise = rng.normal(0, 2, (8, height, width, 3))
    for episode in range(EPISODES):
        for step in range(LENGTH):
            state = np.sin(0.05 * step * np.arange(1, 7) + episode).astype(np.float32)
            frame: dict[str, Any] = {"observation.state": state, "action": state + 0.01, "task": "move"}
            for number, camera in enumerate(CAMERAS):
                top, left = (step + 7 * episode) % 160, (2 * step + 11 * episode) % 160
                view = scenes[number, top : top + height, left : left + width] + noise[rng.integers(8)]
                frame[camera] = view.clip(0, 255).astype(np.uint8)
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()


class _Order:
    """The sampler that both programs are given."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def peer(settings: dict[str, Any]) -> dict[str, Any]:
    """Times LeRobot's loader, and saves its first batches."""
    import lerobot
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    torch.set_num_threads(1)
    steps, first, actions = WINDOWS[settings["window"]]
    delta = {"action": [(first + number) / FPS for number in range(actions)]}
    if steps > 1:
        delta |= {key: [(number - steps + 1) / FPS for number in range(steps)] for key in ("observation.state", *CAMERAS)}
    dataset = LeRobotDataset("benchmark/benchmark", root=settings["folder"], delta_timestamps=delta, return_uint8=True)
    workers: dict[str, Any] = {}
    if settings["workers"]:
        workers = {"prefetch_factor": 4, "persistent_workers": True, "multiprocessing_context": settings["start"]}
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=settings["batch"],
        sampler=_Order(settings["order"]),
        num_workers=settings["workers"],
        **workers,
    )
    return _timed(loader, settings, f"LeRobot {lerobot.__version__}")


# Run by either.


def _timed(loader: Any, settings: dict[str, Any], name: str) -> dict[str, Any]:
    import torch

    started = time.perf_counter()
    iterator = iter(loader)
    kept = [next(iterator)]
    first_batch = time.perf_counter() - started
    kept += [next(iterator) for _ in range(min(COMPARED, settings["batches"]) - 1)]
    if settings.get("keep"):
        wanted = ("observation.state", "action", "action_is_pad", *CAMERAS)
        torch.save([{key: batch[key].contiguous() for key in wanted} for batch in kept], settings["keep"])
    done = begun = time.perf_counter()
    processor = time.process_time()
    samples = 0
    for batch in iterator:
        samples += len(batch["action"])
        done = time.perf_counter()
        if done - begun > settings["seconds"]:
            break
    used = (time.process_time() - processor) / samples if settings["workers"] == 0 else None
    return {"name": name, "first_batch": first_batch, "rate": samples / (done - begun), "processor": used}


# Run here.


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Times this project's loader."""
    import torch

    import lightning_robot
    from lightning_robot.data.lerobot import LeRobotDataModule

    torch.set_num_threads(1)
    steps, first, actions = WINDOWS[settings["window"]]
    data = LeRobotDataModule(
        settings["folder"],
        batch_size=settings["batch"],
        num_workers=settings["workers"],
        validation_ratio=0,
        drop_n_last_frames=0,
        decode=settings["decode"],
    )
    data.window = SimpleNamespace(
        keys=("observation.state", *CAMERAS),
        observation_steps=steps,
        action_horizon=actions,
        action_offset=first,
        pad_before=steps - 1,
        pad_after=0,
    )
    data.prepare_data()
    data.setup()
    order, batch = settings["order"], settings["batch"]
    sampler: Any = _Order([order[begin : begin + batch] for begin in range(0, len(order), batch)])  # type: ignore[misc]
    loader = data._loader(data.train_windows, sampler)
    if settings["workers"]:
        loader.prefetch_factor = 4  # as LeRobot's
    return _timed(loader, settings, f"lightning_robot {lightning_robot.__version__}")


def call(python: str, role: str, settings: dict[str, Any]) -> Any:
    """Runs a role of this file in a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(settings))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, __file__, "--role", role, "--request", str(request), "--answer", str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(answer.read_text())


def compare(one: Path, other: Path) -> str:
    """Whether the first batches of both hold the same values."""
    import torch

    worst = 0.0
    for theirs, mine in zip(torch.load(one), torch.load(other)):
        for key, value in theirs.items():
            if value.is_floating_point() and key in CAMERAS:
                value = (value * 255).round().to(torch.uint8)  # LeRobot gives stored pictures as floats whatever it is asked
            have = mine[key].reshape(value.shape)
            worst = max(worst, (have.double() - value.double()).abs().max().item())
    return f"largest difference of the first {COMPARED} batches: {worst:g}"


def summary(results: list[dict[str, Any]], name: str) -> str:
    rates = sorted(result["rate"] for result in results)
    first = statistics.median(result["first_batch"] for result in results)
    used = [result["processor"] for result in results]
    cost = "" if None in used else f", {statistics.median(used) * 1e3:.1f} ms of processor time each"
    return f"{statistics.median(rates):9.1f} {name}/s ({rates[0]:.1f} to {rates[-1]:.1f}), first batch {first:.2f} s{cost}"


def measure(folder: Path, window: str, workers: int, arguments: argparse.Namespace) -> None:
    total = EPISODES * LENGTH
    order = np.random.default_rng(1).permutation(total).tolist()
    settings = {
        "folder": str(folder),
        "window": window,
        "workers": workers,
        "order": order,
        "seconds": arguments.seconds,
        "batch": arguments.batch,
        "batches": COMPARED,
        "decode": False,
    }
    starts = ("spawn", "fork") if workers else ("",)
    mine: list[dict[str, Any]] = []
    cached: list[dict[str, Any]] = []
    theirs: dict[str, list[dict[str, Any]]] = {start: [] for start in starts}
    with tempfile.TemporaryDirectory() as scratch:
        one, other = Path(scratch) / "theirs.pt", Path(scratch) / "ours.pt"
        for repeat in range(arguments.repeats):
            keep = {"keep": str(one)} if repeat == 0 else {}
            for start in starts:
                theirs[start].append(call(arguments.lerobot, "peer", settings | {"start": start} | keep))
            keep = {"keep": str(other)} if repeat == 0 else {}
            # As many samples as fit the time, with the order repeated: ours would run out of windows.
            mine.append(call(sys.executable, "ours", settings | {"order": order * 20} | keep))
            if arguments.decode:
                cached.append(call(sys.executable, "ours", settings | {"order": order * 20, "decode": True}))
        print(f"{folder.name}, {window}, batch {arguments.batch}, {workers} workers: {compare(one, other)}")
    print(f"    {mine[0]['name']:24s} {summary(mine, 'samples')}")
    middle = statistics.median(result["rate"] for result in mine)
    for start, results in theirs.items():
        ratios = sorted(have["rate"] / result["rate"] for have, result in zip(mine, results))
        ratio = middle / statistics.median(result["rate"] for result in results)
        spread = f"ours {ratio:.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        print(f"    {results[0]['name']:15s} {start:8s} {summary(results, 'samples')}; {spread}")
    if cached:
        print(f"    ours, decoded cache      {summary(cached, 'samples')}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="where the datasets are, or will be written")
    parser.add_argument("--lerobot", help="the interpreter of LeRobot's environment")
    parser.add_argument("--size", nargs="*", default=["96", "480x640"])
    parser.add_argument("--storage", nargs="*", default=["image", "video"])
    parser.add_argument("--window", nargs="*", default=list(WINDOWS))
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", action="store_true", help="measure the decoded cache too")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        settings = json.loads(arguments.request.read_text())
        if arguments.role == "write":
            settings["folder"] = Path(settings["folder"])
        answer = {"write": lambda: write(**settings), "peer": lambda: peer(settings), "ours": lambda: ours(settings)}
        arguments.answer.write_text(json.dumps(answer[arguments.role]()))
        return
    if arguments.data is None or arguments.lerobot is None:
        parser.error("DATA and --lerobot are needed")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for size in arguments.size:
        height, width = (int(number) for number in (size.split("x") * 2)[:2])
        for storage in arguments.storage:
            folder = arguments.data.absolute() / f"{storage}_{size}"
            if not (folder / "meta/info.json").exists():
                print(f"LeRobot writes {folder}", flush=True)
                started = time.perf_counter()
                call(arguments.lerobot, "write", {"folder": str(folder), "storage": storage, "height": height, "width": width})
                print(f"    in {time.perf_counter() - started:.0f} s")
            for file in folder.rglob("*.*"):  # warm the page cache for both
                if file.is_file():
                    with open(file, "rb") as opened:
                        while opened.read(1 << 24):
                            pass
            for window in arguments.window:
                for workers in arguments.workers:
                    measure(folder, window, workers, arguments)


if __name__ == "__main__":
    main()
