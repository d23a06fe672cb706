"""Rates beyond success, from what an environment says of an episode at its end (``info["details"]``).

An environment may say what it likes there, as a flat dict of numbers, booleans and strings. Some names have a meaning:

| name | meaning |
| --- | --- |
| ``was_lifted``, ``was_dropped`` | pick rate and drop rate (of the lifted ones) |
| ``ik_calls``, ``ik_failures``, ``ik_error_mean_mm``, ``ik_error_max_mm`` | inverse kinematics |
| ``step_<milestone>`` | step of a milestone's first time, None if it was not reached |
| ``detail`` | what the failure's name leaves open |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_robot.evaluation.result import EpisodeRecord

NAMED = ("was_lifted", "was_dropped", "detail", "outcome")  # told as rates and failures


def plain_details(details: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plain Python values, fit for JSON and for comparison: numpy's scalars converted, what is not finite made None.

    Raises:
        TypeError: a value is no number, boolean, string or None.
    """
    plain: dict[str, Any] = {}
    for name, value in (details or {}).items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy's scalars
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"info['details'][{name!r}] is a {type(value).__name__}; numbers, booleans and strings are wanted.")
        plain[str(name)] = None if isinstance(value, float) and not math.isfinite(value) else value
    return plain


def pick_rate(records: Sequence[EpisodeRecord]) -> float | None:
    """Share of episodes in which the object was lifted; a success counts as lifted, an episode that broke off does not.

    None where the environment does not say.
    """
    lifted = _lifted(records)
    return None if lifted is None else len(lifted) / len(records)


def drop_rate(records: Sequence[EpisodeRecord]) -> float | None:
    """Share of the lifted objects that were dropped; None where nothing was lifted or the environment does not say."""
    lifted = _lifted(records)
    return sum(bool(row.details.get("was_dropped")) for row in lifted) / len(lifted) if lifted else None


def _lifted(records: Sequence[EpisodeRecord]) -> list[EpisodeRecord] | None:
    if not any("was_lifted" in row.details for row in records):
        return None
    if any("was_lifted" not in row.details and not row.success and not row.broke_off for row in records):
        return None  # ended before the environment said: a rate of the others would be another one
    return [row for row in records if row.success or row.details.get("was_lifted")]


def inverse_kinematics(records: Sequence[EpisodeRecord]) -> dict[str, float] | None:
    """``ik_failure_rate`` over all calls, ``ik_error_mean_mm`` and ``ik_error_max_mm``; None where there were no calls."""
    rows = [row.details for row in records if row.details.get("ik_calls")]
    calls = sum(row["ik_calls"] for row in rows)
    if not calls:
        return None
    return {
        "ik_failure_rate": sum(row.get("ik_failures") or 0 for row in rows) / calls,
        "ik_error_mean_mm": math.fsum((row.get("ik_error_mean_mm") or 0.0) * row["ik_calls"] for row in rows) / calls,
        "ik_error_max_mm": max(row.get("ik_error_max_mm") or 0.0 for row in rows),
    }


def milestones(records: Sequence[EpisodeRecord]) -> dict[str, int]:
    """How many episodes reached each milestone, in the environment's order."""
    counts: dict[str, int] = {}
    for row in records:
        for name, step in row.details.items():
            if name.startswith("step_"):
                counts[name.removeprefix("step_")] = counts.get(name.removeprefix("step_"), 0) + (step is not None)
    return counts


def milestone_sentence(records: Sequence[EpisodeRecord]) -> str | None:
    """How far the episodes came, one milestone after the other; the share is of those that reached the one before."""
    counts = milestones(records)
    if not counts:
        return None
    parts, before = [], len(records)
    for name, count in counts.items():
        parts.append(f"{name} {count}" + (f" ({100 * count / before:.0f} %)" if before else ""))
        before = count
    return f"Of {len(records)} episodes: {', '.join(parts)}."


def failure_details(records: Sequence[EpisodeRecord]) -> dict[str, dict[str, int]]:
    """What the failures' names leave open: failure → detail → count, for failures with details."""
    counts: dict[str, Counter] = {}
    for row in records:
        if not row.success and row.details.get("detail"):
            counts.setdefault(row.outcome, Counter())[str(row.details["detail"])] += 1
    return {failure: dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))) for failure, found in counts.items()}


def summarize(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Everything that the details say, for a summary; empty where there are none.

    Booleans become the share of episodes, numbers their mean (of the episodes that have one).
    """
    if not any(row.details for row in records):
        return {}
    summary: dict[str, Any] = {}
    for name, rate in (("pick_rate", pick_rate(records)), ("drop_rate", drop_rate(records))):
        if rate is not None:
            summary[name] = rate
    summary |= inverse_kinematics(records) or {}
    if reached := milestones(records):
        summary["milestones"] = reached
    if open_ends := failure_details(records):
        summary["failure_details"] = open_ends
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for row in records for name in row.details):
        if name in NAMED or name.startswith(("step_", "ik_")):
            continue
        values = [row.details[name] for row in records if isinstance(row.details.get(name), bool | int | float)]
        if values:
            means[name] = math.fsum(values) / len(values)
    if means:
        summary["details"] = means
    return summary


def columns(records: Sequence[EpisodeRecord]) -> dict[str, str]:
    """Headings and texts of a table's further columns; those that the environment says nothing of are left out."""
    found = {}
    for heading, rate in (("picked", pick_rate(records)), ("dropped", drop_rate(records))):
        if rate is not None:
            found[heading] = f"{100 * rate:.1f} %"
    if (solved := inverse_kinematics(records)) is not None:
        found["IK failures"] = f"{100 * solved['ik_failure_rate']:.1f} %"
        found["IK error"] = f"{solved['ik_error_mean_mm']:.1f} mm"
    return found
