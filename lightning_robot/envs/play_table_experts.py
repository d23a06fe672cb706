"""Scripted experts for the eight tasks that move no block.

Each follows way points relative to the part it moves, with a closed gripper and relative actions of at most 1. What it does is
a function of what the robot's state and the scene show now and one step ago: no timers and no hidden phases, so that a policy
can learn it from observations, and a disturbed expert finds its way back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_robot.envs.play_table_model import SCENES, UP
from lightning_robot.geometry import wrap_angle

if TYPE_CHECKING:
    from lightning_robot.envs.play_table import PlayTable

Array = NDArray[np.float64]

ROLL, YAW = 3.04, 1.57  # tool straight down but for 6 degrees: its roll keeps one sign
TILT = -0.45  # pitch at the switch: the arm does not reach behind its bar with the tool upright
LEAD = 1.0  # control steps by which the arm lags behind a moving target
GAIN = 0.7  # of the remaining way that one action covers, near a way point
BACKSTEP = 0.35


class Expert:
    """Solves one task from any state in which it can be solved.

    Args:
        environment: the play table; its privileged state is read.
        task: one of `lightning_robot.envs.calvin_tasks.BLOCK_FREE_TASKS`.
        random: for noise.
        noise: standard deviation of what `act` adds to the executed action, in units of relative actions; it is correlated over
            a quarter of a second, so that it displaces the arm instead of shaking it. The way back is the expert's.

    Raises:
        ValueError: a task without an expert.
    """

    def __init__(
        self, environment: PlayTable, task: str, random: np.random.Generator | None = None, noise: float = 0.0
    ) -> None:
        if task not in _WAYS:
            raise ValueError(f"No expert for {task!r}; there are experts for {', '.join(_WAYS)}.")
        self._environment, self._way, self._noise = environment, _WAYS[task], noise
        self._random = random if random is not None else np.random.default_rng(0)
        self._scene = SCENES[environment.scene]
        self._last: Array | None = None
        self._drift = np.zeros(6)

    def action(self) -> NDArray[np.float32]:
        """The expert's own action (7,) for the present state, each component within -1 to 1: what a demonstration records."""
        state = self._environment.robot_obs()
        pose = state[:6]
        position, pitch = self._way(pose[:3], self._environment.scene_obs(), self._scene)
        goal = np.array([*position, ROLL, pitch, YAW])
        velocity = np.zeros(6) if self._last is None else np.concatenate(
            [pose[:3] - self._last[:3], wrap_angle(pose[3:] - self._last[3:])]
        )
        self._last = pose
        ahead = pose + LEAD * velocity
        way = np.concatenate([(goal[:3] - ahead[:3]) / 0.02, wrap_angle(goal[3:] - ahead[3:]) / 0.05]) * GAIN
        for part in (slice(0, 3), slice(3, 6)):  # one common factor keeps the direction
            way[part] /= max(1.0, float(np.abs(way[part]).max()))
        return np.array([*way, -1.0], dtype=np.float32)

    def act(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The action to execute (with noise, if any) and the expert's own, which a demonstration records."""
        clean = self.action()
        if self._noise == 0:
            return clean, clean
        decay = math.exp(-1 / (0.25 * 30))
        self._drift = decay * self._drift + math.sqrt(1 - decay**2) * self._random.normal(size=6) * self._noise
        noisy = clean.copy()
        noisy[:6] = np.clip(clean[:6] + self._drift, -1, 1)
        return noisy, clean


def _funnel(place: Array, position: Array, axis: Array, height: float, width: float) -> Array:
    """Way point on the way to `position` along `axis`: the farther aside the tool is, the farther out it stays.

    Args:
        place: (3,) tool centre point.
        position: (3,) where to arrive.
        axis: (3,) unit vector out of the scene, along which the last part of the way leads back.
        height: metres out, at most.
        width: metres aside from which on the tool stays that far out; within a third of it, it heads for `position`.
    """
    offset = place - position
    aside = float(np.linalg.norm(offset - (offset @ axis) * axis))
    out = height * min(1.0, max(0.0, (aside - width / 3) / (width - width / 3)))
    return position + out * axis


def _open_drawer(place: Array, scene: Array, layout) -> tuple[Array, float]:
    """Behind the handle's bar, then towards the front."""
    bar = np.array([layout.drawer, -0.25 - scene[1], 0.36])
    hook = bar + (0.0, 0.035, -0.005)
    if abs(place[0] - hook[0]) < 0.07 and abs(place[1] - hook[1]) < 0.025 and place[2] < 0.40:
        return hook - (0.0, 0.08, 0.0), 0.0
    return _funnel(place, hook, np.array([0.0, 0.0, 1.0]), 0.12, 0.05), 0.0


def _close_drawer(place: Array, scene: Array, layout) -> tuple[Array, float]:
    """Before the handle's bar, then away from the front."""
    bar = np.array([layout.drawer, -0.25 - scene[1], 0.36])
    before = bar + (0.0, -0.05, 0.0)
    if abs(place[0] - before[0]) < 0.07 and place[1] < bar[1] - 0.015 and place[2] < 0.40:
        return before + (0.0, 0.12, 0.0), 0.0
    return _funnel(place, before, np.array([0.0, 0.0, 1.0]), 0.12, 0.05), 0.0


def _move_slider(sign: float, place: Array, scene: Array, layout) -> tuple[Array, float]:
    """Beside the handle, then towards it; `sign` is that of the handle's motion along x."""
    handle = np.array([layout.slider + 0.14 - scene[0], 0.0, 0.53])
    beside = handle - (sign * 0.06, 0.0, 0.0)
    if sign * (place[0] - handle[0]) < -0.02 and place[1] > -0.03 and abs(place[2] - 0.53) < 0.04:
        return handle + (sign * 0.08, 0.0, 0.0), 0.0
    return _funnel(place, beside, np.array([0.0, -1.0, 0.0]), 0.12, 0.06), 0.0


def _press_button(place: Array, scene: Array, layout) -> tuple[Array, float]:
    button = np.array([layout.button, -0.12, 0.45])
    return _funnel(place, button, np.array([0.0, 0.0, 1.0]), 0.10, 0.05), 0.0


def _flip_switch(sign: float, place: Array, scene: Array, layout) -> tuple[Array, float]:
    """Below the bar and up along the front (`sign` 1) or above it and down."""
    up = np.array(UP)
    bar = np.array([layout.switch, 0.018, 0.529]) + scene[3] * up
    return bar, TILT


_WAYS = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": lambda *state: _move_slider(-1.0, *state),
    "move_slider_right": lambda *state: _move_slider(1.0, *state),
    "turn_on_led": _press_button,
    "turn_off_led": _press_button,
    "turn_on_lightbulb": lambda *state: _flip_switch(1.0, *state),
    "turn_off_lightbulb": lambda *state: _flip_switch(-1.0, *state),
}
