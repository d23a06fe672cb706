"""Kills conversion and generation at random moments and takes them up again: are the bytes those of undisturbed work?

    python benchmarks/kill_writers.py [--root ../shared/data/calvin_sample] [--lineages 4] [--only NAME] [--log FILE] [--seed 0]

Three pieces of work: ``convert calvin`` of a small recording, ``generate`` into an episode store, ``generate --format lerobot``
with videos. A lineage is one such piece, killed five times by SIGKILL and repeated each time. Half of the lineages work in one
process, half in two worker processes; of the latter, two kills of five hit one worker alone: a conversion must then end by
itself and say so, a generation must go on without it. The first lineage of each generation is started by the real command
line, the others by processes forked after the imports. Conversions write shards of 8 frames, so that there is something to
take up.

A moment is either a time after the start, or a random time after so many files have appeared in the work folder. In the end
the folder must hold the same files with the same bytes as that of undisturbed work in one process, and no work folder may be
left. Everything waits for a limited time, as in `kill_harness`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import lightning_robot  # noqa: F401  (before lightning: see its docstring)

sys.path.append(str(Path(__file__).parent))  # where a test imports this file

from kill_harness import KILLS, PATIENCE, Attempt, Different, Kind, Late

from lightning_robot.data.store import partial_folder

PLAIN = Kind(1, 0, False)
SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "calvin_sample"
WORK = {
    "convert calvin": ["convert", "calvin", "ROOT", "TARGET", "--points", "64", "--size", "32"],
    "generate zarr": ["generate", "TARGET", "--tasks", "open_drawer", "--observations", "state", "--episodes-per-task", "30"],
    "generate lerobot": [
        *["generate", "TARGET", "--format", "lerobot", "--tasks", "open_drawer"],
        *["--observations", "state,images", "--camera-size", "64", "--episodes-per-task", "16"],
    ],
}


def preload() -> None:
    """Imports once what every forked process needs, and makes conversions write many small shards."""
    for name in ("commands.convert", "commands.generate", "generation.generate", "generation.packing", "envs.play_table"):
        import_module(f"lightning_robot.{name}")
    for name in ("av", "numcodecs", "pyarrow.parquet"):
        import_module(name)
    conversion = import_module("lightning_robot.data.convert_calvin")
    conversion.CHECK_BLOCK = 8
    conversion.convert_calvin.__kwdefaults__["shard_frames"] = 8


def contents(folder: Path) -> dict[str, str]:
    """Every file and a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass
class Piece:
    """A piece of work in a folder, done once or in several starts."""

    name: str
    root: Path
    folder: Path
    processes: int = 1
    command_line: bool = False
    attempts: int = 0
    seen: set[str] = field(default_factory=set)  # every file that was ever in the work folder

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.target = self.folder / "result"
        self.partial = partial_folder(self.target)

    def start(self) -> Attempt:
        self.attempts += 1
        places = {"ROOT": str(self.root), "TARGET": str(self.target)}
        arguments = [places.get(item, item) for item in WORK[self.name]] + ["--processes", str(self.processes)]
        return Attempt(PLAIN, arguments, self.folder / f"attempt{self.attempts}", self.command_line)

    def look(self) -> int:
        """How many files have been seen in the work folder."""
        for folder, _, names in os.walk(self.partial):
            self.seen.update(os.path.join(folder, name) for name in names if not name.endswith(".tmp"))
        return len(self.seen)


def workers(process: int) -> list[int]:
    """Numbers of the worker processes below a process."""
    found, waiting = [], [process]
    while waiting:
        parent = waiting.pop()
        try:
            children = [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
            waiting += children
            lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        except OSError:
            continue  # gone meanwhile
        found += [child for child, line in lines.items() if b"spawn_main" in line or b"serve(" in line]
    return found


def reach(piece: Piece, attempt: Attempt, files: int, delay: float, worker: bool) -> int | None:
    """Waits for the moment; the process to be killed (0 for all), None where the work ended before."""
    while worker and not workers(attempt.ids[0]):
        if not attempt.running():
            return None
        time.sleep(0.005)
    began = time.monotonic() if worker or files else attempt.began
    while piece.look() < files:
        if not attempt.running():
            return None
        began = time.monotonic()
        time.sleep(0.0005)
    while time.monotonic() < began + delay:
        if not attempt.running():
            return None
        time.sleep(0.001)
    if not attempt.running():
        return None
    hit = workers(attempt.ids[0]) if worker else [0]
    return random.choice(hit) if hit else None


def undisturbed(name: str, root: Path, folder: Path) -> tuple[dict[str, str], float, int]:
    """What work gives that nothing disturbs, how long it takes, and how many files pass through the work folder."""
    piece = Piece(name, root, folder)
    with piece.start() as attempt:
        while attempt.running():
            piece.look()
            time.sleep(0.001)
        seconds = time.monotonic() - attempt.began
        attempt.finish()
    return contents(piece.target), seconds, len(piece.seen)


def kill_and_repeat(piece: Piece, chance: random.Random, seconds: float, files: int, lines: list[str]) -> None:
    """Kills a piece of work five times, repeating it, then lets it end.

    Args:
        piece: of work, not begun.
        chance: random numbers.
        seconds: that undisturbed work takes.
        files: that pass through its work folder.
        lines: of the log, added to.

    Raises:
        Different: a start failed, or what was hit did not behave as it must.
    """
    alone = set(chance.sample(range(KILLS - 2), 2)) if piece.processes > 1 else set()  # while there is work for workers
    with ExitStack() as starts:
        attempt: Attempt | None = None
        for kill in range(KILLS):
            if attempt is None:
                attempt = starts.enter_context(piece.start())
            seen = piece.look()
            after, delay = 0, chance.uniform(0.0, 0.4 * seconds)
            if chance.random() < 0.6:
                after, delay = seen + 1 + int(chance.uniform(0.0, 0.3) * max(0, files - seen)), chance.uniform(0.0, 0.02)
            hit = reach(piece, attempt, after, delay, kill in alone)
            if hit is None:
                if any(attempt.codes.values()):
                    raise Different(f"failed before kill {kill + 1}: {attempt.said()}")
                raise Late(f"kill {kill + 1} came too late")
            moment = f"{f'file {after} of {files}' if after else 'start'} + {1000 * delay:.0f} ms"
            lines.append(f"  kill {kill + 1}: {moment}, {'one worker' if hit else 'all'}")
            if not hit:
                attempt.kill(None)
                attempt.end()
            else:
                os.kill(hit, signal.SIGKILL)
                if piece.name.startswith("generate"):
                    lines[-1] += "; goes on without it"
                    continue
                if not attempt.wait(PATIENCE):
                    raise Different(f"still ran {PATIENCE:.0f} s after a worker was killed: {attempt.said()}")
                said = attempt.log.read_text()
                if list(attempt.codes.values()) != [1] or "A worker process died" not in said or "Traceback" in said:
                    raise Different(f"after the death of a worker: {attempt.said()}")
                lines[-1] += "; ended by itself"
            lines[-1] += f"; {piece.look()} files had appeared"
            attempt = None
        (attempt or starts.enter_context(piece.start())).finish()


def follow(name: str, number: int, root: Path, folder: Path, whole: tuple[dict[str, str], float, int], seed: int) -> list[str]:
    """Runs one lineage; its lines for the log, the last of which says ``equal`` or ``FAILED``."""
    expected, seconds, files = whole
    chance = random.Random(f"{seed} {name} {number}")
    processes, command_line = 1 + number % 2, number == 0 and name.startswith("generate")
    for late in range(6):
        how = "command line" if command_line else "forked"
        lines = [f"{name}, lineage {number + 1}: {processes} process{'es' * (processes > 1)}, {how}"]
        piece = Piece(name, root, folder / f"lineage{number + 1}", processes, command_line)
        try:
            kill_and_repeat(piece, chance, seconds + 5 * command_line, files, lines)
            found = contents(piece.target)
            if different := sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)):
                raise Different(f"other bytes in {', '.join(different[:5])}")
            if piece.partial.exists():
                raise Different("the work folder was left")
        except Late:
            continue  # begun again with other moments
        except Different as difference:
            return [*lines, f"  FAILED: {difference}"]
        shutil.rmtree(piece.folder)
        again = f" (moments drawn {late + 1} times: the work had ended before a kill)" if late else ""
        return [*lines, f"  equal byte for byte: {len(found)} files{again}"]
    return [*lines, "  FAILED: kills came too late six times"]


def summary(outcomes: list[list[str]]) -> str:
    kills = [line for lines in outcomes for line in lines if line.startswith("  kill ")]
    equal = sum("equal byte for byte" in lines[-1] for lines in outcomes)
    worker = sum("one worker" in line for line in kills)
    return (
        f"{len(kills)} kills in {len(outcomes)} lineages, {equal} of which ended equal to undisturbed work, byte for byte; "
        f"{worker} kills hit one worker alone."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=SAMPLE, help="a small CALVIN recording")
    parser.add_argument("--lineages", type=int, default=4, help="of each piece of work")
    parser.add_argument("--only", choices=WORK, nargs="*", default=list(WORK))
    parser.add_argument("--log", type=Path, help="file for the log; printed alone by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    preload()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="kills", ignore_cleanup_errors=True) as temporary:
        for name in options.only:
            folder = Path(temporary) / name.replace(" ", "_")
            whole = undisturbed(name, options.root.absolute(), folder / "whole")
            for number in range(options.lineages):
                outcomes.append(follow(name, number, options.root.absolute(), folder, whole, options.seed))
                print("\n".join(outcomes[-1]), flush=True)
                if options.log is not None:
                    text = "\n".join(line for lines in outcomes for line in lines)
                    options.log.write_text(f"{text}\n{summary(outcomes)}\n")
    print(summary(outcomes))
    return int(any("equal" not in lines[-1] for lines in outcomes))


if __name__ == "__main__":
    sys.exit(main())
