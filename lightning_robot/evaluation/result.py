"""What an evaluation found: one row per episode, and what follows from the rows."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from lightning_robot.console import counted
from lightning_robot.evaluation import outcomes

if TYPE_CHECKING:
    from rich.table import Table

RESULT_FORMAT = 2
SOLVED_AT_RESET = "solved_at_reset"  # what an episode is called whose task was solved before the first action


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927).

    Args:
        successes: number of successes, 0 … `episodes`.
        episodes: number of trials.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end; (0, 1) without a trial. The lower end is exactly 0 for no success, the upper exactly 1 for
        successes only.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes is impossible.")
    if episodes == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / episodes
    scale = 1 + z * z / episodes
    centre = (rate + z * z / (2 * episodes)) / scale
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes)) / scale
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == episodes else centre + half)


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode.

    Attributes:
        seed: fixes scene, sampling noise and perturbation.
        task: task id, None where the environment has a single task.
        success: the environment reported success at some step.
        failure: why it failed, as the environment names it; else ``timeout``, ``terminated`` or ``error: …``. None after
            success.
        steps: control steps taken; after success the step of the success.
        total_reward: sum of rewards (the return).
        success_at_reset: the environment reported success before the first action. Such an episode ends there and counts
            neither as success nor as failure.
        start_state: digest of the start state; ``start_states_told_by`` of the settings says what it was taken from.
        queries: chunks asked of the policy.
        steps_out_of_bounds: steps whose action lay outside the environment's bounds by more than a tenth of their range; what
            it does with them is the environment's affair.
        details: what the environment said of the episode at its end (`lightning_robot.evaluation.outcomes`); may be empty.
    """

    seed: int
    task: str | None
    success: bool
    failure: str | None
    steps: int
    total_reward: float
    success_at_reset: bool
    start_state: str
    queries: int
    steps_out_of_bounds: int
    details: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def broke_off(self) -> bool:
        """Whether an exception or a dead process ended it."""
        return (self.failure or "").startswith("error")

    @property
    def outcome(self) -> str:
        """``success`` or the failure's name, without the text of an error."""
        return "success" if self.success else (self.failure or "failure").split(":")[0]


@dataclass(frozen=True)
class EpisodeTimes:
    """How long one episode took; kept apart from the record, which is the same in every repetition.

    Attributes:
        seed: of the episode.
        task: of the episode.
        seconds: wall time from reset to end, other environments' work in between included.
        inference_ms: milliseconds of each query that served this episode (a query serves a whole batch).
    """

    seed: int
    task: str | None
    seconds: float
    inference_ms: tuple[float, ...]


@dataclass
class EvaluationResult:
    """The table of an evaluation, with what must be known to repeat it.

    Attributes:
        records: one per episode, sorted by seed.
        settings: everything that the table depends on beside the checkpoint: environment, its arguments, step limit, execution
            horizon, ensembling, post-processing, inference batch, threads, device, library versions, seeds and what they are
            for. No process count, no path.
        fingerprints: of ``checkpoint``, ``statistics``, ``configuration``, ``simulator``, ``scene`` and ``renderer``, and what
            else the environment names.
        notes: differences between training and evaluation that do not prevent acting.
        times: one per episode, sorted by seed.
        seconds: wall time of the whole evaluation.
        processes: number of processes that stepped environments.
        unchecked: what could not be checked, because the checkpoint or the environment does not say it.
    """

    records: list[EpisodeRecord]
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: list[EpisodeTimes] = field(default_factory=list)
    seconds: float = 0.0
    processes: int = 0
    unchecked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = sorted(self.records, key=lambda row: (row.seed, row.task or ""))
        self.times = sorted(self.times, key=lambda row: (row.seed, row.task or ""))

    @classmethod
    def merge(cls, parts: Iterable[EvaluationResult]) -> EvaluationResult:
        """Joins the shares of several ranks. The table is that of one rank playing every episode."""
        parts = list(parts)
        # A rank without episodes knows neither settings nor fingerprints.
        first = next((part for part in parts if part.records), parts[0])
        return cls(
            records=[record for part in parts for record in part.records],
            settings=first.settings,
            fingerprints=first.fingerprints,
            notes=first.notes,
            unchecked=first.unchecked,
            times=[times for part in parts for times in part.times],
            seconds=max(part.seconds for part in parts),
            processes=sum(part.processes for part in parts),
        )

    @property
    def counted(self) -> list[EpisodeRecord]:
        """The episodes that count: those that were not solved before the policy did anything."""
        return [record for record in self.records if not record.success_at_reset]

    @property
    def episodes(self) -> int:
        """Number of episodes that count."""
        return len(self.counted)

    @property
    def successes(self) -> int:
        return sum(record.success for record in self.counted)

    @property
    def success_rate(self) -> float:
        """Share of successful episodes, NaN without an episode."""
        return self.successes / self.episodes if self.episodes else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the success rate."""
        return wilson(self.successes, self.episodes, confidence)

    def by_task(self) -> dict[str, EvaluationResult]:
        """The result of each task, by task id in alphabetical order; empty where the environment names no task."""
        tasks = sorted({record.task for record in self.records if record.task is not None})
        return {task: EvaluationResult([row for row in self.records if row.task == task]) for task in tasks}

    def failures(self) -> dict[str, int]:
        """How often each failure happened, most frequent first."""
        counts = Counter(record.outcome for record in self.counted if not record.success)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def errors(self) -> list[EpisodeRecord]:
        """Episodes that ended by an exception or a dead process. They count as failures."""
        return [record for record in self.records if record.broke_off]

    def summary(self) -> dict[str, Any]:
        """Plain containers, the same for every repetition."""
        low, high = self.interval()
        rows = self.counted
        steps = sum(record.steps for record in rows)
        solved = [record.steps for record in rows if record.success]
        return {
            "episodes": self.episodes,
            "successes": self.successes,
            "success_rate": _plain(self.success_rate),
            "interval_95": [low, high],
            "interval_method": "Wilson score",
            "failures": self.failures(),
            "mean_steps": _plain(_mean([record.steps for record in rows])),
            "mean_steps_of_successes": _plain(_mean(solved)),
            "mean_total_reward": _plain(_mean([record.total_reward for record in rows])),
            "played": len(self.records),
            "distinct_start_states": len({record.start_state for record in self.records if record.start_state}),
            "successes_true_at_reset": sum(record.success_at_reset for record in self.records),
            "share_out_of_bounds": sum(record.steps_out_of_bounds for record in rows) / steps if steps else 0.0,
            "errors": len(self.errors),
            **outcomes.summarize(rows),
        }

    def to_dict(self) -> dict[str, Any]:
        tasks = {task: result.summary() for task, result in self.by_task().items()}
        return {
            "format": RESULT_FORMAT,
            "summary": self.summary(),
            "tasks": tasks,
            "settings": self.settings,
            "fingerprints": dict(sorted(self.fingerprints.items())),
            "notes": self.notes,
            "warnings": self.warnings(),
            "unchecked": self.unchecked,
            "episodes": [asdict(record) for record in self.records],
        }

    def to_json(self) -> str:
        """The table as text: byte-equal whenever checkpoint, seeds and settings are, on one machine and software stack."""
        values = self.to_dict()
        rows = [json.dumps(row, allow_nan=False) for row in values.pop("episodes")]
        head = json.dumps(values, indent=2, allow_nan=False).removesuffix("\n}")
        return head + ',\n  "episodes": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        values = json.loads(text)
        if values.get("format") not in (1, RESULT_FORMAT):
            raise ValueError(f"This is no evaluation of format {RESULT_FORMAT} (format {values.get('format')!r}).")
        records = [EpisodeRecord(**row) for row in values["episodes"]]
        if values["format"] == 1:  # it counted successes at reset
            records = [
                replace(record, success=False, failure=SOLVED_AT_RESET) if record.success_at_reset else record
                for record in records
            ]
        return cls(records, values["settings"], values["fingerprints"], values["notes"], unchecked=values.get("unchecked", []))

    def inference_ms(self) -> dict[str, float | int | None]:
        """Milliseconds per query: mean, p50, p95, max and count; a query serves a whole batch."""
        milliseconds = sorted(value for row in self.times for value in row.inference_ms)
        return {
            "mean": _plain(_mean(milliseconds)),
            "p50": _quantile(milliseconds, 0.5),
            "p95": _quantile(milliseconds, 0.95),
            "max": milliseconds[-1] if milliseconds else None,
            "count": len(milliseconds),
        }

    def times_to_json(self) -> str:
        """Times and everything else that differs between repetitions."""
        steps = sum(record.steps for record in self.records)
        values = {
            "seconds": self.seconds,
            "steps_per_second": steps / self.seconds if self.seconds else 0.0,
            "processes": self.processes,
            "inference_ms": self.inference_ms(),
            "episodes": [
                {"seed": row.seed, "task": row.task, "seconds": row.seconds, "inference_ms": _plain(_mean(row.inference_ms))}
                for row in self.times
            ],
        }
        return json.dumps(values, indent=2) + "\n"

    def save(self, path: str | Path) -> Path:
        """Writes the table to `path` and the times beside it (``X.json`` and ``X.times.json``); returns the former."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, text in ((path, self.to_json()), (path.with_suffix(".times.json"), self.times_to_json())):
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text)
            os.replace(partial, target)
        return path

    def table(self, title: str = "") -> Table:
        """Success by task and over all, with intervals, steps and failures, for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE)
        table.add_column("task", no_wrap=True)
        more = list(outcomes.columns(self.counted))
        for name in ("success", "rate", "95 % interval", "steps", *more):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("failures", overflow="fold")
        tasks = self.by_task()
        for name, result in [*tasks.items(), ("all", self)]:
            further = outcomes.columns(result.counted)
            if name == "all" and len(tasks) > 1:
                table.add_section()
            low, high = result.interval()
            table.add_row(
                name,
                f"{result.successes}/{result.episodes}",
                f"{100 * result.success_rate:.1f} %" if result.episodes else "",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{_mean([record.steps for record in result.counted]):.1f}",
                *(further.get(heading, "") for heading in more),
                ", ".join(f"{failure} {count}" for failure, count in result.failures().items()),
            )
        return table

    def outcome_table(self) -> Table:
        """How often each outcome came, what is known of it, and seeds to look at, for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        table.add_column("outcome", no_wrap=True)
        for name in ("episodes", "share", "steps"):
            table.add_column(name, justify="right", no_wrap=True)
        open_ends = outcomes.failure_details(self.counted)
        if open_ends:
            table.add_column("of these", overflow="fold")
        table.add_column("seeds", overflow="fold")
        for outcome in [*(["success"] if self.successes else []), *self.failures()]:
            rows = [record for record in self.counted if record.outcome == outcome]
            of_these = ", ".join(f"{name} {count}" for name, count in open_ends.get(outcome, {}).items())
            table.add_row(
                outcome,
                str(len(rows)),
                f"{100 * len(rows) / self.episodes:.1f} %",
                f"{_mean([row.steps for row in rows]):.1f}",
                *([of_these] if open_ends else []),
                ", ".join(str(row.seed) for row in rows[:3]) + (" …" if len(rows) > 3 else ""),
            )
        return table

    def warnings(self) -> list[str]:
        """Sentences about what a reader of the rate must know."""
        sentences = []
        summary = self.summary()
        if early := summary["successes_true_at_reset"]:
            seeds = [str(record.seed) for record in self.records if record.success_at_reset]
            listed = ", ".join(seeds[:10]) + (" …" if len(seeds) > 10 else "")
            sentences.append(
                f"Success was true already at reset in {early} of {counted(len(self.records), 'episode')} (seeds {listed}): "
                "the policy did nothing for it, and these episodes are not counted."
            )
        if at_once := [row for row in self.counted if row.success and row.steps <= 1]:
            listed = ", ".join(str(row.seed) for row in at_once[:10]) + (" …" if len(at_once) > 10 else "")
            sentences.append(
                f"Success was true after a single step in {len(at_once)} of {counted(len(self.records), 'episode')} (seeds "
                f"{listed}): look whether it was so already at the reset, where the environment may not say it."
            )
        distinct, told_by = summary["distinct_start_states"], self.settings.get("start_states_told_by")
        if distinct < len(self.records) - len(self.errors):
            by = f", told apart by {told_by}" if told_by else ""
            sentences.append(
                f"Only {counted(distinct, 'distinct start state')} in {counted(len(self.records), 'episode')}{by}: repetitions "
                "are no further evidence, the interval is too narrow."
            )
        if summary["share_out_of_bounds"] > 0.1:
            share = 100 * summary["share_out_of_bounds"]
            sentences.append(
                f"Actions of {share:.0f} % of the steps lay outside the environment's bounds: compare units and action "
                "form of training and environment."
            )
        for record in self.errors[:5]:
            where = f"Seed {record.seed}" + (f" ({record.task})" if record.task else "")
            sentences.append(f"{where} ended by {record.failure}; it counts as a failure.")
        if len(self.errors) > 5:
            sentences.append(f"{len(self.errors)} episodes ended by an error in all; each counts as a failure.")
        return sentences


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _plain(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
