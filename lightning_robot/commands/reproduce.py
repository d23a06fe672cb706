"""`python -m lightning_robot reproduce NAME`: trains and evaluates again what a claim rests on, and judges it.

A claim is a file of the ledger, ``reproductions/NAME.yaml``::

    claim: four tasks of the play table, 100 demonstrations
    config: configs/dp3_calvin_debug.yaml        # from the folder that holds reproductions/
    overrides: {trainer.max_epochs: 60}          # settings by their whole path, as in a run's config.yaml
    seeds: {training: 42, demonstrations: 0, evaluation: 2000000}
    episodes: 200
    measured: [{training: 42, successes: 199}]   # runs that the claim rests on, each of that many episodes
    expected: [97.2, 99.9]                       # per cent: from the lowest to the highest end of their 95 % intervals
    minutes: 4                                   # on two cores
    requires: {extra: metaworld, module: metaworld}   # where an extra is needed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_robot.evaluation.result import EvaluationResult

EXAMPLES = """examples:
  python -m lightning_robot reproduce --list
  python -m lightning_robot reproduce play_table_debug
  python -m lightning_robot reproduce play_table_debug --run runs/latest

The exit code is 0 where the claim holds, 1 where the interval obtained lies wholly below the expected one, and 2 where it could
not be tried."""

REPRODUCED, BELOW, ABOVE = "reproduced", "below", "above"


class LedgerError(Exception):
    """An entry is wrong, or cannot be tried here; the message says why."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What each field of an entry must be: in words, and as a test.
_MEANT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "claim": ("a sentence", lambda value: isinstance(value, str)),
    "config": ("the path of a configuration", lambda value: isinstance(value, str)),
    "seeds": (
        "training, demonstrations and evaluation, each a whole number",
        lambda value: isinstance(value, dict) and all(isinstance(seed, int) for seed in value.values()),
    ),
    "episodes": ("a whole number", lambda value: isinstance(value, int)),
    "expected": (
        "an interval in per cent, such as [97, 99.9]",
        lambda value: isinstance(value, list) and all(map(_is_number, value)),
    ),
    "minutes": ("a number", _is_number),
    "overrides": ("settings and their values", lambda value: isinstance(value, dict)),
    "measured": ("a list of runs", lambda value: isinstance(value, list) and all(isinstance(run, dict) for run in value)),
    "requires": ("extra and module", lambda value: isinstance(value, dict) and {"extra", "module"} <= value.keys()),
}


@dataclass(frozen=True)
class Entry:
    """One claim; see the top of this file.

    Attributes:
        path: of its file.
    """

    path: Path
    claim: str
    config: str
    seeds: dict[str, int]
    episodes: int
    expected: tuple[float, float]
    minutes: float
    overrides: dict[str, Any] = field(default_factory=dict)
    measured: tuple[dict[str, int], ...] = ()
    requires: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Entry:
        """Reads and checks an entry.

        Raises:
            LedgerError: names what is wrong in it.
        """
        import yaml

        from lightning_robot.evaluation.rollout import REPORTING_SEEDS, SELECTION_SEEDS

        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise LedgerError(f"{path} is no YAML: {error}") from error
        known = {item.name: item for item in fields(cls) if item.name != "path"}
        if not isinstance(values, dict):
            raise LedgerError(f"{path} holds no entry; it needs {', '.join(known)}.")
        for name in values:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                raise LedgerError(f"{path}: no field {name!r}; " + (f"did you mean {near[0]!r}?" if near else ", ".join(known)))
        needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise LedgerError(f"{path} does not say {', '.join(missing)}.")
        if wrong := [name for name, meant in _MEANT.items() if name in values and not meant[1](values[name])]:
            told = "; ".join(f"{name} is {values[name]!r}, meant is {_MEANT[name][0]}" for name in wrong)
            raise LedgerError(f"{path}: {told}.")
        entry = cls(path, **{**values, "expected": tuple(values["expected"]), "measured": tuple(values.get("measured", ()))})
        if not (len(entry.expected) == 2 and 0 <= entry.expected[0] <= entry.expected[1] <= 100):
            raise LedgerError(
                f"{path}: expected is {list(entry.expected)}; an interval in per cent is meant, such as [97, 99.9]."
            )
        if set(entry.seeds) != {"training", "demonstrations", "evaluation"}:
            raise LedgerError(f"{path}: seeds are those of training, demonstrations and evaluation, not {list(entry.seeds)}.")
        if entry.seeds["evaluation"] < REPORTING_SEEDS or entry.seeds["demonstrations"] >= SELECTION_SEEDS:
            raise LedgerError(
                f"{path}: demonstrations have seeds below {SELECTION_SEEDS}, reporting those from {REPORTING_SEEDS} on; the "
                f"entry says {entry.seeds['demonstrations']} and {entry.seeds['evaluation']}."
            )
        if entry.episodes < 1:
            raise LedgerError(f"{path}: episodes is {entry.episodes}; it must be at least 1.")
        if not entry.config_path.is_file():
            raise LedgerError(f"{path}: there is no configuration {entry.config_path}.")
        return entry

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def config_path(self) -> Path:
        return self.path.absolute().parents[1] / self.config

    def settings(self) -> dict[str, Any]:
        """Every setting that configuration and overrides give, by its whole path."""
        import yaml

        return {
            **_leaves(yaml.safe_load(self.config_path.read_text())),
            "seed_everything": self.seeds["training"],
            **_leaves(self.overrides),
        }


def parser() -> argparse.ArgumentParser:
    """The command's own parser: it needs neither a Trainer nor torch."""
    result = argparse.ArgumentParser(
        "python -m lightning_robot reproduce",
        description="Trains and evaluates what a claim of the ledger rests on, and compares what comes of it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("name", nargs="?", metavar="NAME", help="an entry of the ledger, or the path of one")
    result.add_argument("--list", action="store_true", help="print the ledger")
    result.add_argument("--run", metavar="RUN", help="judge this run, trained as the entry says, instead of training")
    result.add_argument("--root", default="runs", help="where the new run goes: ROOT/reproduce/NAME (default %(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``reproduce``; those of the process when None.

    Returns:
        0 reproduced, 1 the interval obtained lies wholly below the expected one, 2 it could not be tried, 130 interrupted.
    """
    arguments = parser().parse_args(argv)
    try:
        if arguments.list:
            from lightning_robot.commands.evaluate import print_tables

            print_tables(table(read_ledger()))
            return 0
        if arguments.name is None:
            raise LedgerError("name an entry, or ask for the --list.")
        return 1 if reproduce(find_entry(arguments.name), arguments.root, arguments.run) == BELOW else 0
    except (LedgerError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "reproduce: interrupted. To go on: fit --resume with the run directory, then reproduce NAME --run with it.",
            file=sys.stderr,
        )
        return 130


def reproduce(entry: Entry, root: str | Path, run: str | Path | None = None) -> str:
    """Trains (where no run is given), evaluates on the reporting seeds, prints and writes the verdict.

    Both steps are commands that anybody can repeat, each in a process of its own; they are printed.

    Args:
        entry: what is claimed.
        root: of the new run.
        run: a run directory that was trained as the entry says.

    Returns:
        ``reproduced``, ``below`` or ``above``; also in ``reproduction.json`` of the run.

    Raises:
        LedgerError: an extra is missing, a command failed, or the run was trained otherwise.
    """
    from lightning_robot.console import duration, say
    from lightning_robot.evaluation.result import EvaluationResult

    if entry.requires and find_spec(entry.requires["module"]) is None:
        raise LedgerError(
            f"{entry.name} needs {entry.requires['module']}, which is not installed: pip install "
            f'"lightning_robot[{entry.requires["extra"]}]".'
        )
    started = time.monotonic()
    say(f"{entry.name}: {entry.claim}. Expected {_per_cent(*entry.expected)}; about {entry.minutes:g} min on two cores.")
    if run is None:
        experiment = Path(root).expanduser().absolute() / "reproduce" / entry.name
        _command("fit", *fit_options(entry), f"--run.root={experiment.parents[1]}", f"--run.experiment=reproduce/{entry.name}")
        run = experiment / "latest"
    run = Path(run).expanduser().resolve()
    check_run(entry, run)
    folder = run / "evaluations" / f"reproduce_{entry.name}"
    seed, episodes = entry.seeds["evaluation"], entry.episodes
    _command("evaluate", str(run), f"--episodes={episodes}", f"--seed={seed}", f"--output={folder}", "--videos=0")
    result = EvaluationResult.from_json((folder / "evaluation.json").read_text())
    verdict = judge(entry, result)
    _write(run / "reproduction.json", report(entry, result, verdict, run))
    low, high = (100 * end for end in result.interval())
    say(f"Expected: {_per_cent(*entry.expected)}.")
    say(f"Got: {result.successes} of {result.episodes}, 95 % interval {_per_cent(low, high)}.")
    say(_SENTENCES[verdict].format(entry=entry) + f" It took {duration(time.monotonic() - started)}.")
    say(f"Result: {run / 'reproduction.json'}")
    return verdict


_SENTENCES = {
    REPRODUCED: "Reproduced: the interval obtained reaches the expected one.",
    BELOW: "NOT reproduced: the interval obtained lies wholly below the expected one.",
    ABOVE: "Better than claimed: the interval obtained lies wholly above the expected one; {entry.path} claims too little.",
}


def judge(entry: Entry, result: EvaluationResult) -> str:
    """Compares intervals: ``below`` and ``above`` where they have no point in common."""
    low, high = (round(100 * end, 1) for end in result.interval())  # as precise as the ledger's
    return BELOW if high < entry.expected[0] else ABOVE if low > entry.expected[1] else REPRODUCED


def report(entry: Entry, result: EvaluationResult, verdict: str, run: Path) -> dict[str, Any]:
    """What is written into the run: plain values, the same whenever the evaluation is the same."""
    low, high = result.interval()
    return {
        "entry": entry.name,
        "claim": entry.claim,
        "verdict": verdict,
        "expected_95": [round(end / 100, 3) for end in entry.expected],
        "interval_95": [low, high],
        "successes": result.successes,
        "episodes": result.episodes,
        "seeds": entry.seeds,
        "tasks": {task: [part.successes, part.episodes] for task, part in result.by_task().items()},
        "fingerprints": dict(sorted(result.fingerprints.items())),
        "data": json.loads((run / "run.json").read_text()).get("data", {}).get("fingerprint"),
    }


def fit_options(entry: Entry) -> list[str]:
    """Options of `fit` that train what the entry claims."""
    flags = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in entry.overrides.items()]
    return ["--config", str(entry.config_path), f"--seed_everything={entry.seeds['training']}", *flags]


def check_run(entry: Entry, run: Path) -> None:
    """Refuses a run that is not finished, or was trained otherwise than the entry says.

    Raises:
        LedgerError: names the differences.
    """
    import yaml

    from lightning_robot.commands.checkpoint_paths import read_metadata

    try:
        config, record = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "run.json").read_text())
        step = read_metadata(run / "checkpoints" / "last.ckpt").get("global_step", 0)
    except FileNotFoundError as error:
        raise LedgerError(f"{run} is no run that was trained: {error.filename} is missing.") from error
    if step < record.get("total_steps", 0):
        raise LedgerError(
            f"{run} is at step {step} of {record['total_steps']}. Finish it first: python -m lightning_robot fit --resume {run}"
        )
    have = _leaves(config)
    data = config.get("data", {}).get("init_args", {})
    first = data.get("generation_seed", (data.get("generate") or {}).get("seed"))
    wanted = {name: value for name, value in entry.settings().items() if not name.startswith("run.")}
    different = [f"{name} {have.get(name)!r} for {value!r}" for name, value in wanted.items() if have.get(name) != value]
    if first is not None and first != entry.seeds["demonstrations"]:
        different.append(f"seed of the demonstrations {first} for {entry.seeds['demonstrations']}")
    if different:
        raise LedgerError(f"{run} was trained otherwise than {entry.path} says: {'; '.join(different)}.")


def ledger_folder() -> Path:
    """``reproductions`` in the current folder, else in the checkout that the package runs from.

    Raises:
        LedgerError: there is none.
    """
    places = [Path.cwd() / "reproductions", Path(__file__).resolve().parents[2] / "reproductions"]
    for place in places:
        if place.is_dir():
            return place
    raise LedgerError(f"No folder reproductions in {places[0].parent}: the ledger is in the repository; clone it and go there.")


def read_ledger() -> list[Entry]:
    """All entries by name."""
    return [Entry.read(path) for path in sorted(ledger_folder().glob("*.yaml"))]


def find_entry(name: str) -> Entry:
    """The entry of a name or a path.

    Raises:
        LedgerError: there is none; names the nearest.
    """
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise LedgerError(f"There is no file {name}.")
        return Entry.read(Path(name))
    path = ledger_folder() / f"{name}.yaml"
    if not path.is_file():
        names = sorted(other.stem for other in path.parent.glob("*.yaml"))
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
        raise LedgerError(f"no entry {name!r}; {hint}")
    return Entry.read(path)


def table(entries: Sequence[Entry]) -> Any:
    """The ledger for the terminal."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE)
    result.add_column("entry", no_wrap=True)
    result.add_column("claim", overflow="fold")
    for name in ("measured", "expected", "minutes"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("needs")
    for entry in entries:
        measured = ", ".join(str(run["successes"]) for run in entry.measured)
        result.add_row(
            entry.name,
            entry.claim,
            f"{measured} of {entry.episodes}" if measured else "not yet",
            _per_cent(*entry.expected),
            f"{entry.minutes:g}",
            entry.requires.get("extra", ""),
        )
    return result


# Below: private.


def _command(verb: str, *options: str) -> None:
    """Runs a command of ours in a process of its own; what it prints is seen."""
    import shlex

    from lightning_robot.console import say

    say(f"+ python -m lightning_robot {verb} {shlex.join(options)}")
    package = str(Path(__file__).resolve().parents[2])  # the same code, wherever this was started
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_robot", verb, *options], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal told it too: it saves and ends by itself
        process.wait()
        raise
    if code:
        raise LedgerError(f"{verb} ended with exit code {code}; nothing is judged.")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole path: mappings are gone into, lists are values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _per_cent(low: float, high: float) -> str:
    """``97.2 to 99.9 %``, whole numbers without a digit."""
    return f"{low:.1f} to {high:.1f} %".replace(".0 ", " ")


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)
