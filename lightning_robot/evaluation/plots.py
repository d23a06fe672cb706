"""Pictures of evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_robot.evaluation.sweep import Sweep


def plot_sweep(sweep: Sweep, path: str | Path) -> Path:
    """Draws success against training step with its 95 % interval, and the report on fresh seeds beside the selected one.

    Args:
        sweep: with at least one candidate.
        path: of the PNG file.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    path = Path(path)
    candidates = sweep.candidates
    by_step = all(one.step is not None for one in candidates)
    places = [one.step if by_step and one.step is not None else number for number, one in enumerate(candidates)]
    rates = [100 * one.result.success_rate for one in candidates]
    ends = [one.result.interval() for one in candidates]

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    episodes = candidates[0].result.episodes
    low, high = [100 * low for low, _ in ends], [100 * high for _, high in ends]
    if len(candidates) == 1:
        axes.errorbar(places, rates, yerr=_arms(rates, low, high), color="#4477aa", capsize=3)
    axes.fill_between(places, low, high, color="#4477aa", alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(places, rates, color="#4477aa", marker="o", markersize=4, label=f"selection seeds, {episodes} episodes each")
    if sweep.report is not None:
        place = places[candidates.index(sweep.selected)]
        rate = 100 * sweep.report.success_rate
        (bottom, top) = sweep.report.interval()
        axes.errorbar(
            [place],
            [rate],
            yerr=_arms([rate], [100 * bottom], [100 * top]),
            color="#cc6677",
            marker="D",
            markersize=6,
            capsize=4,
            linestyle="none",
            label=f"selected, fresh seeds, {sweep.report.episodes} episodes",
        )
    if by_step:
        axes.set_xlabel("optimizer step")
    else:
        axes.set_xticks(places, [one.name for one in candidates], rotation=45, ha="right")
    axes.set_ylabel("success in %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    os.replace(partial, path)
    return path


def _arms(rates: list[float], low: list[float], high: list[float]) -> tuple[list[float], list[float]]:
    """Lengths of error bars; never below 0, as rounding could make them."""
    return (
        [max(0.0, rate - end) for rate, end in zip(rates, low)],
        [max(0.0, end - rate) for rate, end in zip(rates, high)],
    )
