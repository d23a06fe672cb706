"""What became of a pick-and-place episode, from privileged state: success, kinds of failure, milestones, rates.

Outcomes, in the order in which they are tested:

    success                    the block was lifted, lies in the goal, is let go and rests
    never_picked_up            it was never lifted; ``detail`` tells how far the arm came
    dropped_during_transport   lifted, then let go above the table farther than `near_radius` from the goal
    missed_goal                lifted, then let go nearer than that, or put down beside the goal
    timeout                    anything else: still held or falling at the end; ``detail`` "out_of_limits" if the simulation
                               broke or the block left the table

Names and first thresholds are those of a public log of SO-101 experiments (D. Bryars, lerobot-thesis); its tables can be
compared. Beyond it, success asks for a release, thresholds scale with the block, and contact tells a drop from a placement.
Heights are of the block's centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OUTCOMES = ("success", "never_picked_up", "missed_goal", "dropped_during_transport", "timeout")
MILESTONES = ("reached", "grasped", "lifted", "near_goal", "released", "success")
RESTING_SPEED, RESTING_STEPS = 0.05, 5  # m/s; control steps
REACHED = 0.06  # m from tool to block on the table
KNOCKED = 0.05  # m that a block may be pushed before the first grasp
TABLE_RADIUS = 0.7  # m from the arm's base
LOOSE_HEIGHT = 0.05  # m


@dataclass(frozen=True)
class Bounds:
    """Thresholds of an episode, which scale with block and goal.

    Attributes:
        rest_height: of the block on the table.
        goal_radius: of the goal, inside its wall.
        goal_height: of the goal's wall.
        strict: success asks that the block is let go and rests; else that it was lifted and is inside.
    """

    rest_height: float
    goal_radius: float
    goal_height: float
    strict: bool = True

    @property
    def lift(self) -> float:
        return self.rest_height + 0.04

    @property
    def drop(self) -> float:
        return self.rest_height + 0.02

    @property
    def inside_radius(self) -> float:
        """Of the block's centre, for a block that lies flat against the wall, with 3 mm to spare."""
        return self.goal_radius - self.rest_height + 0.003

    @property
    def near_radius(self) -> float:
        return 2 * self.goal_radius


@dataclass(frozen=True)
class Sight:
    """The privileged state after one control step.

    Attributes:
        block: (3,) centre.
        speed: of the block in m/s.
        goal: (2,) centre on the table.
        tool: (2,) horizontal place of the point between the jaws.
        fixed_jaw, moving_jaw: whether the jaw touches the block.
        closing: whether the gripper is commanded narrower than the block.
        broken: whether the simulation became unstable.
    """

    block: Array
    speed: float
    goal: Array
    tool: Array
    fixed_jaw: bool = False
    moving_jaw: bool = False
    closing: bool = False
    broken: bool = False


@dataclass
class Progress:
    """Watches one episode step by step; `outcome` and `details` then tell what became of it."""

    bounds: Bounds
    start: Array
    steps: int = 0
    max_height: float = 0.0
    success_loose: bool = False
    knocked: bool = False
    closed: bool = False
    out_of_limits: bool = False
    first: dict[str, int] = field(default_factory=dict)  # step of each milestone
    fell_from: float | None = None  # distance to the goal at which the jaws lost the lifted block above the table
    _resting: int = 0
    _held: bool = False
    _height: float = 0.0
    _distance: float = math.inf

    def see(self, sight: Sight) -> bool:
        """Takes one control step into account.

        Returns:
            Whether the task is solved (it stays so).
        """
        self.steps += 1
        bounds, block = self.bounds, sight.block
        if sight.broken or not np.isfinite(block).all() or math.hypot(block[0], block[1]) > TABLE_RADIUS or block[2] < -0.02:
            self.out_of_limits = True
            return self.solved
        self._height = float(block[2])
        self._distance = math.dist(block[:2], sight.goal)
        self.max_height = max(self.max_height, self._height)
        touched = sight.fixed_jaw or sight.moving_jaw
        if math.dist(sight.tool, block[:2]) < REACHED:
            self._reach("reached")
            self.closed |= sight.closing
        if "grasped" not in self.first:
            self.knocked |= math.dist(block[:2], self.start[:2]) > KNOCKED
        if sight.fixed_jaw and sight.moving_jaw:
            self._reach("grasped")
        if self._height > bounds.lift:
            self._reach("lifted")
        lifted = "lifted" in self.first
        if lifted and self._distance < bounds.near_radius:
            self._reach("near_goal")
        if lifted and self._held and not touched:
            self._reach("released")
            if self._height > bounds.drop:
                self.fell_from = self._distance
        elif touched and self._height > bounds.lift:  # caught, or picked up again
            self.fell_from = None
        self._held = touched

        self.success_loose |= self._distance < bounds.goal_radius and self._height < LOOSE_HEIGHT
        inside = self._distance < bounds.inside_radius and self._height < bounds.goal_height
        at_rest = not touched and sight.speed < RESTING_SPEED
        self._resting = self._resting + 1 if inside and at_rest else 0
        if lifted and inside and (not bounds.strict or self._resting >= RESTING_STEPS):
            self._reach("success")
        return self.solved

    def _reach(self, milestone: str) -> None:
        self.first.setdefault(milestone, self.steps)

    @property
    def solved(self) -> bool:
        return "success" in self.first

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`, if the episode ended now."""
        if self.solved:
            return "success"
        if self.out_of_limits:
            return "timeout"
        if "lifted" not in self.first:
            return "never_picked_up"
        if self._height >= self.bounds.drop:
            return "timeout"
        if self.fell_from is not None:
            return "dropped_during_transport" if self.fell_from >= self.bounds.near_radius else "missed_goal"
        return "timeout" if self._held else "missed_goal"

    @property
    def detail(self) -> str | None:
        """What `outcome` leaves open, None where it says all."""
        if self.out_of_limits and not self.solved:
            return "out_of_limits"
        if self.outcome != "never_picked_up":
            return None
        if self.knocked:
            return "knocked_away"
        if "reached" not in self.first:
            return "never_reached"
        return "grasp_failed" if self.closed or "grasped" in self.first else "never_closed"

    def details(self) -> dict[str, float | int | bool | str | None]:
        """Flat record of the episode: lengths in m, and ``step_<milestone>`` counted from 1 (None where not reached).

        ``released`` tells that a missed block was put down on the table, not dropped. ``success_loose`` asks only that the
        block was low inside the goal at some step, however it came there.
        """
        outcome = self.outcome
        return {
            "outcome": outcome,
            "detail": self.detail,
            "was_lifted": "lifted" in self.first,
            "was_dropped": outcome in ("missed_goal", "dropped_during_transport"),
            "released": outcome == "missed_goal" and self.fell_from is None,
            "success_loose": self.success_loose,
            "max_height": self.max_height,
            "final_height": self._height,
            "final_distance": self._distance,
            **{f"step_{name}": self.first.get(name) for name in MILESTONES},
        }


def rates(outcomes: Iterable[str], lifted: int | None = None) -> dict[str, float]:
    """Success, pick and drop rate of episodes.

    Args:
        outcomes: one of `OUTCOMES` per episode.
        lifted: how many episodes lifted the block; all that were not ``never_picked_up`` when None.

    Returns:
        ``success_rate``; ``pick_rate``, lifted of all; ``drop_rate``, dropped or beside the goal, of the lifted. An empty
        denominator gives NaN.
    """
    names = list(outcomes)
    if unknown := set(names) - set(OUTCOMES):
        raise ValueError(f"No outcome {', '.join(sorted(unknown))}; there are {', '.join(OUTCOMES)}.")
    picked = len(names) - names.count("never_picked_up") if lifted is None else lifted
    dropped = names.count("missed_goal") + names.count("dropped_during_transport")
    return {
        "success_rate": names.count("success") / len(names) if names else math.nan,
        "pick_rate": picked / len(names) if names else math.nan,
        "drop_rate": dropped / picked if picked else math.nan,
    }


def conditional_rates(details: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of the episodes that reached a milestone among those that reached the one before (the first: of all)."""
    episodes = list(details)
    result, before = {}, len(episodes)
    for name in MILESTONES:
        reached = sum(episode[f"step_{name}"] is not None for episode in episodes)
        result[name] = reached / before if before else math.nan
        before = reached
    return result
