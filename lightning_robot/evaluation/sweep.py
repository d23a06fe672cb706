"""Many checkpoints, one choice: they are judged on selection seeds, the chosen one is reported on fresh ones."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_robot.console import counted
from lightning_robot.evaluation import outcomes
from lightning_robot.evaluation.comparison import LEVEL, compare, holm
from lightning_robot.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from rich.table import Table

# The middle of the block of selection seeds: training judges its own checkpoints from the block's begin on, and a `best` chosen
# there would have an advantage on the same scenes.
SWEEP_SEEDS = 1_500_000


@dataclass
class Candidate:
    """A checkpoint and how it did on the selection seeds.

    Attributes:
        name: of its file; several names where files hold the same weights.
        step: optimizer steps, None where the checkpoint does not say.
        epoch: as Lightning counts them, from 0.
        result: on the selection seeds.
    """

    name: str
    step: int | None
    epoch: int | None
    result: EvaluationResult


@dataclass
class Sweep:
    """The candidates of a sweep in the order of training, and the report on the chosen one.

    The best of many noisy numbers is too good: of ten checkpoints that all solve 70 %, the best of 10 episodes each shows 90 %.
    So the choice is made on other seeds than the report, and the whole curve is kept.

    Attributes:
        candidates: by step.
        report: of the chosen checkpoint on fresh seeds; None until it is there.
    """

    candidates: list[Candidate]
    report: EvaluationResult | None = None

    def __post_init__(self) -> None:
        self.candidates = sorted(self.candidates, key=lambda one: (math.inf if one.step is None else one.step, one.name))

    @property
    def selected(self) -> Candidate:
        """The candidate with the most successes; of equals the later one."""
        return max(enumerate(self.candidates), key=lambda item: (item[1].result.successes, item[0]))[1]

    def conventions(self) -> dict[str, float]:
        """What papers report of such a curve: the maximum and the mean of the last ten (Diffusion Policy, arXiv 2303.04137),
        the mean of the five highest (DP3, arXiv 2403.03954). All are of selection seeds."""
        rates = [one.result.success_rate for one in self.candidates]
        return {
            "max": max(rates),
            "mean of last 10": _mean(rates[-10:]),
            "mean of five highest": _mean(sorted(rates)[-5:]),
        }

    def indistinguishable(self) -> list[Candidate]:
        """Candidates that the selection seeds do not tell apart from the selected one (McNemar, adjusted by Holm)."""
        selected = self.selected
        others = [one for one in self.candidates if one is not selected]
        values = holm([compare(selected.result, one.result).p for one in others])
        return [one for one, p in zip(others, values) if p >= LEVEL]

    def table(self) -> Table:
        """One row per candidate, for the terminal."""
        from rich import box
        from rich.table import Table

        more = list(dict.fromkeys(name for one in self.candidates for name in outcomes.columns(one.result.records)))
        table = Table(box=box.SIMPLE)
        table.add_column("checkpoint", overflow="fold")
        for name in ("step", "success", "rate", "95 % interval", "steps", *more, "ms/query"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("failures", overflow="fold")
        selected = self.selected
        for one in self.candidates:
            result = one.result
            low, high = result.interval()
            further = outcomes.columns(result.records)
            query = result.inference_ms()["p50"]
            table.add_row(
                one.name.replace(" = ", "\n= ") + (" *" if one is selected else ""),
                "" if one.step is None else str(one.step),
                f"{result.successes}/{result.episodes}",
                f"{100 * result.success_rate:.1f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
                f"{_mean([row.steps for row in result.counted]):.1f}",
                *(further.get(heading, "") for heading in more),
                "" if query is None else f"{query:.1f}",
                "\n".join(f"{failure} {count}" for failure, count in result.failures().items()),
                style="bold" if one is selected else None,
            )
        return table

    def sentences(self) -> list[str]:
        """What the curve says, and what it does not."""
        selected, others = self.selected, len(self.candidates) - 1
        numbers = ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in self.conventions().items())
        few = f"; there are {len(self.candidates)} in all" if others < 9 else ""
        lines = [f"On the selection seeds: {numbers} (published conventions; the maximum overstates{few})."]
        if others:
            alike = len(self.indistinguishable())
            lines.append(
                f"Selected: {selected.name}. These seeds do not tell it apart from {alike} of the {counted(others, 'other')}."
            )
        if self.report is not None:
            low, high = self.report.interval()
            lines.append(
                f"To report: {selected.name} solves {self.report.successes} of {self.report.episodes} fresh episodes, "
                f"{100 * self.report.success_rate:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        selected = self.selected
        return {
            "format": 1,
            "selected": selected.name,
            "not_distinguishable_from_selected": [one.name for one in self.indistinguishable()],
            "conventions_on_selection_seeds": self.conventions(),
            "report": None if self.report is None else self.report.summary(),
            "reporting_seeds": None if self.report is None else _seeds(self.report),
            "selection_seeds": _seeds(selected.result),
            "settings": selected.result.settings,
            "candidates": [
                {
                    "name": one.name,
                    "step": one.step,
                    "epoch": one.epoch,
                    "checkpoint": one.result.fingerprints.get("checkpoint"),
                    **one.result.summary(),
                }
                for one in self.candidates
            ],
        }

    def to_csv(self) -> str:
        """One line per candidate: counts, interval, rates, steps, milliseconds per query, failures by name."""
        failures = sorted({name for one in self.candidates for name in one.result.failures()})
        summaries = [one.result.summary() for one in self.candidates]
        named = ("pick_rate", "drop_rate", "ik_failure_rate", "ik_error_mean_mm")
        rates = [name for name in named if any(name in summary for summary in summaries)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["checkpoint", "step", "epoch", "successes", "episodes", "success_rate", "low_95", "high_95", "mean_steps"]
        writer.writerow([*head, *rates, "inference_ms_p50", *(f"failures_{name}" for name in failures)])
        for one, summary in zip(self.candidates, summaries):
            result = one.result
            row = [one.name, one.step, one.epoch, result.successes, result.episodes, summary["success_rate"]]
            row += [*summary["interval_95"], summary["mean_steps"], *(summary.get(name) for name in rates)]
            row += [result.inference_ms()["p50"], *(result.failures().get(name, 0) for name in failures)]
            writer.writerow(row)
        return text.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``sweep.json``, ``sweep.csv`` and ``sweep.png``; returns the files."""
        from lightning_robot.evaluation.plots import plot_sweep

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"sweep.json": json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", "sweep.csv": self.to_csv()}
        for name, text in texts.items():
            partial = folder / f"{name}.partial"
            partial.write_text(text)
            os.replace(partial, folder / name)
        return [*(folder / name for name in texts), plot_sweep(self, folder / "sweep.png")]


def _seeds(result: EvaluationResult) -> list[int]:
    """First and last."""
    seeds = [row.seed for row in result.records]
    return [min(seeds), max(seeds)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
