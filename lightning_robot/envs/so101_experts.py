"""Scripted pick and place for the SO-101: way points through the inverse kinematics, joined by smooth ramps of the joints.

The way is planned on privileged state when a phase begins and then followed whatever the arm does, since commands are absolute:
a disturbed arm is led back to it. If the block does not come along, the expert tries once more.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_robot.envs.so101_model import LOWER, UPPER

if TYPE_CHECKING:
    from lightning_robot.envs.so101 import SO101PickPlace

Array = NDArray[np.float64]

PEAK_SPEED, PEAK_ACCELERATION = 1.4, 9.0  # rad/s and rad/s² of any arm joint
OPEN, CLOSED = 45.0, 0.0  # of 100
HOVER, LIFT, OVER, RELEASE = 0.055, 0.075, 0.085, 0.05  # m above the table, of the block's centre in the jaws
SIDE = 0.003  # m between the fixed jaw and the block on the way down
TILT = 0.30  # rad from the vertical by which the gripper leans outwards: farther and higher places come into reach
JAWS = 14  # control steps for closing
ATTEMPTS = 2


class Expert:
    """Picks the block up and drops it into the bowl. Its commands are absolute joint targets, in the environment's action form.

    Args:
        environment: its privileged state is read.
        closed: command that closes the gripper, 0 to 100; for studies of weak grips.
        aside: (2,) metres by which the block is gripped beside its centre, along the jaws' width and their opening; likewise.
        turn: rad by which the jaws are turned from the block's faces; likewise.
    """

    def __init__(
        self, environment: SO101PickPlace, closed: float = CLOSED, aside: tuple[float, float] = (0.0, 0.0), turn: float = 0.0
    ) -> None:
        self._environment, self._closed, self._aside, self._turn = environment, closed, aside, turn
        self._command: Array = environment.joint_targets
        self._way: deque[tuple[str, Array]] = deque()
        self._attempts = 0
        self.phase = "rest"
        self._plan_pick()

    def act(self) -> NDArray[np.float32]:
        """The action for the present step."""
        if not self._way:
            if self.phase == "lift":
                self._plan_place() if self._is_held() or self._attempts >= ATTEMPTS else self._plan_pick()
            elif self.phase == "release":
                self._plan_retreat()
        if self._way:
            self.phase, self._command = self._way.popleft()
        return self._environment.action_of(self._command)

    def _is_held(self) -> bool:
        return bool(self._environment.block_pose()[0][2] > self._environment.bounds.drop)

    # --- phases ------------------------------------------------------------------------------------------------------------

    def _plan_pick(self) -> None:
        self._attempts += 1
        block, rotation = self._environment.block_pose()
        here = self._command
        yaw = _jaw_yaw(block, rotation) + self._turn
        hover, grip, lift = (
            self._reach(block[:2], height, yaw, here) for height in (HOVER, self._environment.bounds.rest_height, LIFT)
        )
        self._go("approach", _with_gripper(hover, OPEN))
        self._go("descend", _with_gripper(grip, OPEN))
        self._go("close", _with_gripper(grip, self._closed), JAWS)
        self._wait("close", 5)
        self._go("lift", _with_gripper(lift, self._closed))

    def _plan_place(self) -> None:
        goal, here = self._environment.bowl_position, self._command
        yaw = math.atan2(goal[1], goal[0]) + math.pi / 2
        over, down = (self._reach(goal, height, yaw, here) for height in (OVER, RELEASE))
        self._go("transport", _with_gripper(over, self._closed))
        self._go("lower", _with_gripper(down, self._closed))
        self._go("release", _with_gripper(down, OPEN), JAWS)

    def _plan_retreat(self) -> None:
        self._go("retreat", _with_gripper(self._environment.rest, OPEN))

    # --- motions -----------------------------------------------------------------------------------------------------------

    def _reach(self, place: Array, height: float, yaw: float, start: Array) -> Array:
        """(5,) joints that hold the middle of a block at a place; the jaws open along `yaw`."""
        along = np.array([math.cos(yaw), math.sin(yaw), 0.0])
        across = np.array([math.sin(yaw), -math.cos(yaw), 0.0])  # outwards, away from the base
        approach = math.sin(TILT) * across - math.cos(TILT) * np.array([0.0, 0.0, 1.0])
        rotation = np.stack([approach, np.cross(along, approach), along], axis=1)
        half = self._environment.bounds.rest_height
        grip = np.array([*place, height]) - (half + SIDE) * along + self._aside[0] * across + self._aside[1] * along
        return self._environment.kinematics.inverse(grip, rotation, start, rotation_weight=0.05, iterations=60)

    def _go(self, phase: str, target: Array, least: int = 4) -> None:
        """Appends a ramp of the joints from the last way point to (6,) radians."""
        start = self._way[-1][1] if self._way else self._command
        far = float(np.abs(target[:5] - start[:5]).max())
        seconds = max(far * math.pi / 2 / PEAK_SPEED, math.pi * math.sqrt(far / (2 * PEAK_ACCELERATION)))
        steps = max(least, math.ceil(seconds * self._environment.control_rate))
        for number in range(1, steps + 1):
            share = 0.5 - 0.5 * math.cos(math.pi * number / steps)
            self._way.append((phase, start + share * (target - start)))

    def _wait(self, phase: str, steps: int) -> None:
        self._way.extend([(phase, self._way[-1][1])] * steps)


def _jaw_yaw(block: Array, rotation: Array) -> float:
    """Direction from the fixed to the moving jaw: of the block's sides the one nearest to the arm's own, across its reach."""
    own = math.atan2(block[1], block[0]) + math.pi / 2
    side = math.atan2(rotation[1, 0], rotation[0, 0])
    quarter = math.pi / 2
    return own + (side - own + quarter / 2) % quarter - quarter / 2


def _with_gripper(joints: Array, percent: float) -> Array:
    return np.array([*joints[:5], LOWER[5] + (UPPER[5] - LOWER[5]) * percent / 100])
