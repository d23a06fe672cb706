"""Kills training at random moments and resumes it: is what comes out what would have come out?

    python benchmarks/kill_harness.py [--lineages 20] [--out FOLDER] [--log FILE] [--seed 0]

A lineage is one run, killed five times by SIGKILL and taken up again each time. Lineages go over {1, 2 processes (gloo)} x
{0, 2 workers}; in two of five of them the policy is also validated within epochs. The first lineage of each kind is started by
the real command line each time, the others by processes forked after the imports, which is the same program without the
seconds that an interpreter takes to begin.

A third of the kills is aimed at the writing of a checkpoint: the harness waits until one is being written, then kills after a
random part of the time that writing takes. Some are aimed at validation and at simulation, the rest at any moment from the
start of the processes. With two processes, two kills of five hit one of them alone; the other must then end by itself. Before
the first checkpoint the right answer to ``--resume`` is a refusal; the run is then begun afresh.

In the end must be equal, bit for bit, to what a run of the same kind gives that nothing disturbs: every loss of every rank,
also those computed twice; every row of metrics.csv; parameters, averages, optimizer, schedule and ranking in last.ckpt; the
weights in all other checkpoints; the tables of all evaluations. What is finished is kept in FOLDER: a second call goes on with
the lineages that are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

import lightning_robot  # noqa: F401  (before lightning: see its docstring)

sys.path.append(str(Path(__file__).parent))  # where a test imports this file

import kill_subject
from kill_subject import TABLE, Table

KILLS = 5
PATIENCE = 120.0  # seconds that a process may take to notice that another one is gone
LIMIT = 300.0  # seconds that one start may last in all: what takes longer hangs, and is ended
UNTIMED = ("data_wait", "samples_per_second", "throughput", "memory", "gb")  # columns that measure the machine
LIBC = ctypes.CDLL(None)


class Different(AssertionError):
    """Something is not what the uninterrupted run gives."""


class Late(Different):
    """The run had ended before a kill was due."""


def die_with_parent() -> None:
    """Called in a new process: should the harness be killed itself, nothing of what it started is left behind."""
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Kind:
    """What a lineage runs."""

    ranks: int
    workers: int
    within_epochs: bool
    epochs: int = 4

    def __str__(self) -> str:
        validated = "validated within epochs" if self.within_epochs else "validated after epochs"
        return f"{self.ranks} process{'es' * (self.ranks > 1)}, {self.workers} workers, {validated}"


@dataclass
class Attempt:
    """The processes of one start. Leaving it as a context ends them all, whatever happened."""

    kind: Kind
    arguments: list[str]
    folder: Path
    command_line: bool = False
    ids: list[int] = field(default_factory=list)  # of the processes that this one started
    codes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "table"
        path.unlink(missing_ok=True)
        self.table = Table(path)
        environment = {TABLE: str(path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.log = self.folder / "output.txt"
        self.began = time.monotonic()
        if self.command_line:
            here, root = Path(__file__).parent, Path(__file__).parents[1]
            paths = [str(here), str(root), os.environ.get("PYTHONPATH", "")]
            environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            command = [sys.executable, "-m", "lightning_robot", *self.arguments]
            with open(self.log, "a") as log:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            process.returncode = 0  # waited for below, by its number
            self.ids = [process.pid]
            return
        if self.kind.ranks > 1:  # as torchrun starts them
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        try:
            for rank in range(self.kind.ranks):
                own = environment | ({"LOCAL_RANK": str(rank)} if self.kind.ranks > 1 else {})
                self.ids.append(_fork(self.arguments, own, self.log, self.ids[0] if self.ids else 0))
        except OSError:
            self.end()
            raise

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def running(self) -> bool:
        """Whether a process that was started here still runs. Every wait of the harness asks this, so that none is endless.

        Raises:
            Different: the start has lasted longer than `LIMIT`; its processes are ended.
        """
        running = self._reap()
        if running and time.monotonic() > self.began + LIMIT:
            self.end()
            raise Different(f"still running after {LIMIT:.0f} s: {self.said()}")
        return running

    def _reap(self) -> bool:
        for process in self.ids:
            if process not in self.codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.ids)

    def said(self) -> str:
        """Exit codes and the end of what was printed."""
        printed = self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""
        return f"codes {list(self.codes.values())}\n{printed}"

    def process(self, rank: int) -> int:
        """Number of the process of a rank, 0 while it is not known."""
        return self.ids[rank] if rank < len(self.ids) else self.table.process(rank)

    def kill(self, rank: int | None) -> None:
        """SIGKILL to one rank, or to all and their workers."""
        if rank is None:
            os.killpg(self.ids[0], signal.SIGKILL)
        else:
            os.kill(self.process(rank), signal.SIGKILL)

    def wait(self, patience: float) -> bool:
        """Waits until all have ended; False if they did not in time, and kills them."""
        end = time.monotonic() + patience
        while self.running() or self._others():
            if time.monotonic() > end:
                self.end()
                return False
            time.sleep(0.01)
        return True

    def finish(self) -> None:
        """Waits for the end of a start that nothing disturbs.

        Raises:
            Different: it hangs or fails.
        """
        while self.running():
            time.sleep(0.02)
        if any(self.codes.values()):
            raise Different(f"not killed, and yet failed: {self.said()}")

    def end(self) -> None:
        """Kills whatever is left of the processes and their workers, and waits until they are gone."""
        if not self.ids:
            return
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.ids[0], signal.SIGKILL)
            for process in set(self.ids) - set(self.codes):  # one that had not joined the group yet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if not self._reap() and not group_runs(self.ids[0]):
                return
            time.sleep(0.01)
        print(f"Processes of group {self.ids[0]} do not end by SIGKILL.", file=sys.stderr)

    def _others(self) -> bool:
        """Whether a rank that another rank started still runs."""
        for rank in range(len(self.ids), self.kind.ranks):
            process = self.table.process(rank)
            if process and (_state(process) or ("X", 0))[0] not in "ZX":
                return True
        return False


def _state(process: int) -> tuple[str, int] | None:
    """State letter and process group of a process, None where there is none."""
    try:
        state, _, group = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return state, int(group)


def group_runs(group: int) -> bool:
    """Whether any process of a group still runs; those that only wait to be reaped do not."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    states = (_state(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit())
    return any(state[0] not in "ZX" for state in states if state is not None and state[1] == group)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(arguments: list[str], environment: dict[str, str], log: Path, group: int) -> int:
    """Runs the command line in a forked process, in the process group of number `group` (0: one of its own)."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it did so itself
            os.setpgid(child, group or child)
        return child
    code = 70
    try:
        die_with_parent()
        os.setpgid(0, group)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # A test runner has put objects of its own there.
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.update(environment)
        sys.argv = ["lightning_robot", *arguments]
        torch.set_num_threads(1)
        import lightning_robot.__main__ as program

        sys.modules["__main__"] = program  # what worker processes that are started afresh import
        code = program.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Imports once what every forked process needs, and starts no thread."""
    torch.set_num_threads(1)
    for name in ("cli", "envs", "policies.diffusion_policy"):
        import_module(f"lightning_robot.{name}")
    import_module("torch.utils.tensorboard")


# What a run leaves.


def newest_run(root: Path) -> Path | None:
    runs = sorted((root / "subject").glob("*_seed*"), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1] if runs else None


def digest(value: Any) -> str:
    """A hash of nested containers and tensors: names, types, shapes and every bit."""
    whole = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            whole.update(f"{item.dtype}{tuple(item.shape)}".encode())
            whole.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                whole.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            whole.update(f"{len(item)}".encode())
            for part in item:
                add(part)
        else:
            whole.update(repr(item).encode())

    add(value)
    return whole.hexdigest()[:16]


def losses(run: Path, rank: int) -> dict[str, str]:
    """Every loss of a rank by epoch and batch; computed again after a kill, it must come out the same."""
    found: dict[str, str] = {}
    for line in (run / f"losses{rank}.txt").read_text().splitlines():
        place, _, value = line.rpartition(" ")
        if found.setdefault(place, value) != value:
            raise Different(f"rank {rank}, epoch and batch {place}: loss {value}, before the kill {found[place]}")
    return found


def traces(run: Path, ranks: int) -> dict[str, Any]:
    """All that must be equal."""
    with (run / "metrics.csv").open(newline="") as file:
        metrics = [
            {key: value for key, value in row.items() if value and not any(name in key for name in UNTIMED)}
            for row in csv.DictReader(file)
        ]
    found: dict[str, Any] = {"metrics.csv": [row for row in metrics if len(row) > 1]}
    found |= {f"losses of rank {rank}": losses(run, rank) for rank in range(ranks)}
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        names = ["state_dict", "ema_state_dict", "ema_updates", "global_step", "epoch"]
        if path.name == "last.ckpt":
            names += ["optimizer_states", "lr_schedulers", "callbacks", "EpisodeDataModule", "loops"]
        found |= {f"{path.name}: {name}": digest(checkpoint.get(name)) for name in names if name != "loops"}
    found["checkpoint.json"] = json.loads((run / "checkpoints" / "checkpoint.json").read_text())
    for path in sorted((run / "evaluations").glob("epoch????.json")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def require_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `Different`, naming the first thing that differs."""
    for name in sorted(found.keys() | expected.keys()):
        mine, theirs = found.get(name), expected.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, list) and isinstance(theirs, list):
            pairs = [(a, b) for a, b in zip(mine, theirs) if a != b] or [(f"{len(mine)} rows", f"{len(theirs)} rows")]
            mine, theirs = pairs[0]
        elif isinstance(mine, dict) and isinstance(theirs, dict):
            keys = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
            mine, theirs = ({key: side.get(key) for key in keys[:3]} for side in (mine, theirs))
        raise Different(f"{name}: {mine}, uninterrupted {theirs}")


# Kills.


@dataclass(frozen=True)
class Aim:
    """A kill to be: what the run is to be doing, how often it has begun that, how much later, and who is hit."""

    phase: str
    occurrence: int
    delay: float
    rank: int | None

    def __str__(self) -> str:
        hit = "all" if self.rank is None else f"rank {self.rank}"
        return f"{self.phase} {self.occurrence} + {1000 * self.delay:.1f} ms, {hit}"


def aims(chance: random.Random, number: int, kind: Kind, seconds: float) -> list[Aim]:
    """The five kills of a lineage: one or two at the writing of checkpoints, one at validation or simulation.

    Args:
        chance: random numbers.
        number: of the lineage.
        kind: of the lineage.
        seconds: that the uninterrupted run takes.
    """
    phases = ["writing"] * (2 if number % 10 < 7 else 1) + [("validation", "evaluation")[number % 2]]
    phases += ["any"] * (KILLS - len(phases))
    chance.shuffle(phases)
    alone = set(chance.sample(range(KILLS), 2)) if kind.ranks > 1 else set()
    chosen = []
    for position, phase in enumerate(phases):
        rank = chance.randrange(kind.ranks) if position in alone else None
        if phase == "any":  # from the start of the processes, or from a step
            if chance.random() < 0.4:
                chosen.append(Aim("start", 0, chance.uniform(0.0, 0.5 * seconds), rank))
            else:
                chosen.append(Aim("training", chance.randint(1, 12), chance.uniform(0.0, 0.1), rank))
        elif phase == "writing":
            chosen.append(Aim("writing", chance.randint(1, 8), chance.uniform(0.0, 0.012), rank))
        else:
            chosen.append(Aim(phase, 1, chance.uniform(0.0, 0.05), rank))
    return chosen


def await_and_kill(attempt: Attempt, aim: Aim) -> bool:
    """Kills as aimed; False where the run ended before."""
    watched = aim.rank or 0
    while aim.phase != "start" and attempt.table.count(watched, aim.phase) < aim.occurrence:
        if not attempt.running():
            return False
        time.sleep(0.0002)
    end = (attempt.began if aim.phase == "start" else time.monotonic()) + aim.delay
    while (left := end - time.monotonic()) > 0:
        if left > 0.01 and not attempt.running():
            return False
        time.sleep(min(left, 0.01))
    while aim.rank is not None and not attempt.process(aim.rank):  # the command line has not started it yet
        if not attempt.running():
            return False
        time.sleep(0.001)
    if not attempt.running():
        return False
    try:
        attempt.kill(aim.rank)
    except ProcessLookupError:
        return False
    return True


class Lineage:
    """One run, killed and taken up again."""

    def __init__(self, number: int, kind: Kind, folder: Path, configuration: Path, command_line: bool) -> None:
        self.number, self.kind, self.folder, self.command_line = number, kind, folder, command_line
        self.configuration, self.root, self.attempts = configuration, folder / "runs", 0
        self.lines: list[str] = []

    def run(self, chosen: list[Aim]) -> Path:
        """Kills as chosen, then lets the run end; returns its directory.

        Raises:
            Different: a start, a refusal or the end went wrong.
        """
        for kill, aim in enumerate(chosen, 1):
            with self._start() as attempt:
                if not await_and_kill(attempt, aim):
                    attempt.wait(PATIENCE)
                    raise Late(f"kill {kill} ({aim}) came too late: {attempt.said()}")
                ended = time.monotonic()
                alone = attempt.wait(PATIENCE)
                self.lines.append(f"  kill {kill}: {aim!s:<40} {self._left()}")
                if aim.rank is not None and self.kind.ranks > 1:
                    self.lines[-1] += f"; the other process ended {time.monotonic() - ended:.1f} s later"
                    if not alone:
                        raise Different(f"kill {kill} ({aim}): the other process still ran after {PATIENCE:.0f} s")
        with self._start() as attempt:
            attempt.finish()
        run = newest_run(self.root)
        assert run is not None
        return run

    def _start(self) -> Attempt:
        """Resumes; where there is nothing to resume from yet, sees that this is refused and begins afresh."""
        fresh = ["fit", "--config", str(self.configuration), "--run.root", str(self.root)]
        run = newest_run(self.root)
        if run is None:
            return self._attempt(fresh)
        resume = ["fit", "--resume", str(run)]
        if (run / "checkpoints" / "last.ckpt").exists():
            return self._attempt(resume)
        with self._attempt(resume, Kind(1, 0, False)) as refused:
            refused.wait(PATIENCE)
        said = refused.log.read_text()
        if list(refused.codes.values()) != [2] or "error: Nothing to resume" not in said or "Traceback" in said:
            raise Different(f"resuming without a checkpoint ended with {refused.codes}: {said[-500:]}")
        self.lines[-1] += "; resuming is refused, begun afresh"
        return self._attempt(fresh)

    def _attempt(self, arguments: list[str], kind: Kind | None = None) -> Attempt:
        self.attempts += 1
        return Attempt(kind or self.kind, arguments, self.folder / f"attempt{self.attempts}", self.command_line)

    def _left(self) -> str:
        """What lies there after a kill."""
        run = newest_run(self.root)
        if run is None:
            return "no run directory yet"
        checkpoints = run / "checkpoints"
        partial = [path.name for path in checkpoints.glob(".*.partial")]
        try:
            last = torch.load(checkpoints / "last.ckpt", weights_only=True, mmap=True)
            step = f"last.ckpt is of step {last['global_step']}"
        except FileNotFoundError:
            step = "no last.ckpt yet"
        return step + (f", {partial[0]} was being written" if partial else "")


def uninterrupted(kind: Kind, folder: Path) -> tuple[dict[str, Any], float, Path]:
    """What a run gives that nothing disturbs, how long it takes, and its configuration; kept in `folder`."""
    store = folder / "dots.zarr"
    if not store.exists():
        kill_subject.make_store(store)
    name = f"whole_{kind.ranks}_{kind.workers}_{int(kind.within_epochs)}_{kind.epochs}"
    configuration, result = folder / f"{name}.yaml", folder / f"{name}.json"
    if not result.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        settings = kill_subject.configuration(store, kind.ranks, kind.workers, kind.within_epochs, kind.epochs)
        configuration.write_text(yaml.safe_dump(settings))
        arguments = ["fit", "--config", str(configuration), "--run.root", str(folder / name / "runs")]
        with Attempt(kind, arguments, folder / name) as attempt:
            attempt.finish()
        seconds = time.monotonic() - attempt.began
        run = newest_run(folder / name / "runs")
        assert run is not None
        result.write_text(json.dumps([traces(run, kind.ranks), seconds]))
    expected, seconds = json.loads(result.read_text())
    return expected, seconds, configuration


def plan(lineages: int) -> Iterator[tuple[int, Kind, bool]]:
    """(number, kind, whether through the command line) of every lineage."""
    cells = [(ranks, workers) for ranks in (1, 2) for workers in (0, 2)]
    for number in range(lineages):
        ranks, workers = cells[number % 4]
        turn = number // 4
        yield number, Kind(ranks, workers, turn % 5 in (1, 3)), turn == 0


def follow(number: int, kind: Kind, command_line: bool, folder: Path, seed: int) -> tuple[bool, list[str]]:
    """Runs one lineage; whether all is equal, and its lines for the log."""
    expected, seconds, configuration = uninterrupted(kind, folder)
    chance, late = random.Random(1000 * seed + number), 0
    if command_line:
        seconds += 8  # of imports
    while True:
        lineage = Lineage(number, kind, folder / f"lineage{number:02d}", configuration, command_line)
        shutil.rmtree(lineage.folder, ignore_errors=True)
        how = "command line" if command_line else "forked"
        head = f"lineage {number + 1}: {kind}, {how}"
        try:
            run = lineage.run(aims(chance, number, kind, seconds))
            found = json.loads(json.dumps(traces(run, kind.ranks)))
            require_equal(found, expected)
        except Different as difference:
            if isinstance(difference, Late) and (late := late + 1) < 8:
                seconds *= 0.7  # the machine may have been slower when this was measured
                continue  # begun again with other moments
            return False, [head, *lineage.lines, f"  FAILED: {difference}"]
        compared = f"{len(found['losses of rank 0'])} losses per rank, {len(found)} things in all"
        shutil.rmtree(lineage.folder, ignore_errors=True)
        again = f" (moments drawn {late + 1} times: the run had ended before a kill)" if late else ""
        return True, [head, *lineage.lines, f"  equal bit for bit: {compared}{again}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lineages", type=int, default=20)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of lineages, from 1")
    parser.add_argument("--out", type=Path, help="where runs are kept until they are compared, and what is finished")
    parser.add_argument("--log", type=Path, help="file for the log; printed alone by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no lineage after so many minutes")
    options = parser.parse_args(argv)
    folder = (options.out or Path(tempfile.mkdtemp(prefix="kills"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    preload()
    began, done = time.monotonic(), 0
    for number, kind, command_line in plan(options.lineages):
        if options.only and number + 1 not in options.only:
            continue
        kept = folder / f"lineage{number + 1:02d}.json"
        if not kept.exists():
            if time.monotonic() - began > 60 * options.minutes:
                break
            good, lines = follow(number, kind, command_line, folder, options.seed)
            print("\n".join(lines), flush=True)
            if not good:
                return 1
            kept.write_text(json.dumps(lines))
        done += 1
    outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("lineage??.json"))]
    text = "\n".join(line for lines in outcomes for line in lines) + "\n" + summary(outcomes)
    print(summary(outcomes))
    if options.log is not None:
        options.log.write_text(text + "\n")
    return 0


def summary(outcomes: list[list[str]]) -> str:
    kills = [line for lines in outcomes for line in lines if line.startswith("  kill ")]

    def count(text: str) -> int:
        return sum(text in line for line in kills)

    equal = sum("equal bit for bit" in lines[-1] for lines in outcomes)
    return (
        f"{len(kills)} kills in {len(outcomes)} lineages, {equal} of which ended equal to an uninterrupted run, bit for bit.\n"
        f"Aimed at the writing of a checkpoint {count(': writing')} (of all, {count('was being written')} left a half-written "
        f"file), at validation {count(': validation')}, at simulation {count(': evaluation')}, at any moment "
        f"{count(': start') + count(': training')}; {count(', rank')} hit one of two processes; {count('refused')} came before "
        "the first checkpoint."
    )


if __name__ == "__main__":
    sys.exit(main())
