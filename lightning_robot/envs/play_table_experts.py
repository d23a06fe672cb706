"""Scripted experts for the eight tasks that move no block.

Each follows way points relative to the part it moves, with a closed gripper and relative actions of at most 1. The way point
is a function of what the robot and the scene show now: no timers and no hidden phases, so that a policy can learn it from
observations, and a disturbed expert finds its way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_robot.envs.play_table_model import OUT, POSITION_UNIT, ROTATION_UNIT, SCENES, UP, Scene
from lightning_robot.geometry import wrap_angle

if TYPE_CHECKING:
    from lightning_robot.envs.play_table import PlayTable

Array = NDArray[np.float64]

ROLL, YAW = 3.04, 1.57  # tool straight down but for 6 degrees: its roll keeps one sign
TILT = -0.45  # pitch at the switch: the arm does not reach behind its bar with the tool upright
LEAN = -0.3  # pitch at the slider: keeps the hand clear of the handle's upper end
GAIN = 0.7  # of the remaining way that one action covers, near a way point


class Expert:
    """Solves one task from any state in which it can be solved. Its actions are relative.

    Args:
        environment: the play table; its privileged state is read.
        task: one of `lightning_robot.envs.calvin_tasks.BLOCK_FREE_TASKS`.

    Raises:
        ValueError: a task without an expert, or an environment with absolute actions.
    """

    def __init__(self, environment: PlayTable, task: str) -> None:
        if task not in _WAYS:
            raise ValueError(f"No expert for {task!r}; there are experts for {', '.join(_WAYS)}.")
        if not environment.relative:
            raise ValueError("The experts give relative actions: make the environment with actions='relative'.")
        self._environment, self._way = environment, _WAYS[task]
        self._scene = SCENES[environment.scene]

    def act(self) -> NDArray[np.float32]:
        """The action (7,) for the present state, each component within -1 to 1."""
        place = self._environment.robot_obs()[:3]
        position, pitch = self._way(place, self._environment.scene_obs(), self._scene)
        target_position, target_euler = self._environment.target_pose
        turn = wrap_angle(np.array([ROLL, pitch, YAW]) - target_euler)
        way = GAIN * np.concatenate([(position - target_position) / POSITION_UNIT, turn / ROTATION_UNIT])
        for part in (slice(0, 3), slice(3, 6)):  # one common factor keeps the direction
            way[part] /= max(1.0, float(np.abs(way[part]).max()))
        return np.array([*way, -1.0], dtype=np.float32)


def _at(x: float, y: float, z: float) -> Array:
    return np.array([x, y, z])


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


def _open_drawer(place: Array, scene: Array, layout: Scene) -> tuple[Array, float]:
    """Behind the handle's bar, then towards the front."""
    bar = _at(layout.drawer, -0.25 - scene[1], 0.36)
    hook = bar + _at(0.0, 0.035, -0.005)
    if abs(place[0] - hook[0]) < 0.07 and abs(place[1] - hook[1]) < 0.025 and place[2] < 0.40:
        return hook - _at(0.0, 0.08, 0.0), 0.0
    return _funnel(place, hook, _at(0.0, 0.0, 1.0), 0.12, 0.05), 0.0


def _close_drawer(place: Array, scene: Array, layout: Scene) -> tuple[Array, float]:
    """Before the handle's bar, then away from the front."""
    bar = _at(layout.drawer, -0.25 - scene[1], 0.36)
    before = bar - _at(0.0, 0.05, 0.0)
    if abs(place[0] - before[0]) < 0.07 and place[1] < bar[1] - 0.015 and place[2] < 0.40:
        return before + _at(0.0, 0.12, 0.0), 0.0
    return _funnel(place, before, _at(0.0, 0.0, 1.0), 0.12, 0.05), 0.0


def _move_slider(sign: float, place: Array, scene: Array, layout: Scene) -> tuple[Array, float]:
    """Beside the handle's bar, then towards it; `sign` is that of the handle's motion along x."""
    handle = _at(layout.slider + 0.14 - scene[0], 0.0, 0.545)
    beside = handle - _at(sign * 0.06, 0.0, 0.0)
    if sign * (place[0] - handle[0]) < -0.02 and abs(place[1]) < 0.03 and abs(place[2] - handle[2]) < 0.04:
        return handle + _at(sign * 0.08, 0.0, 0.0), LEAN
    return _funnel(place, beside, _at(0.0, -1.0, 0.0), 0.12, 0.06), LEAN


def _press_button(place: Array, scene: Array, layout: Scene) -> tuple[Array, float]:
    button = _at(layout.button, -0.12, 0.45)
    return _funnel(place, button, _at(0.0, 0.0, 1.0), 0.10, 0.05), 0.0


def _flip_switch(sign: float, place: Array, scene: Array, layout: Scene) -> tuple[Array, float]:
    """Below the bar and up along the front (`sign` 1) or above it and down."""
    up, out = np.array(UP), np.array(OUT)
    bar = _at(layout.switch - 0.01, 0.018, 0.529) + scene[3] * up
    along, away = float((place - bar) @ up), float((place - bar) @ out)
    if abs(place[0] - bar[0]) < 0.035 and abs(away) < 0.03 and 0.012 < -sign * along < 0.075:
        return bar + sign * 0.08 * up, TILT
    if sign > 0:
        return _funnel(place, bar - 0.03 * up + 0.004 * out, _at(0.0, -0.97, 0.24), 0.10, 0.06), TILT
    return _funnel(place, bar + 0.045 * up, _at(0.0, -0.6, 0.8), 0.12, 0.06), TILT


_WAYS: dict[str, Callable[[Array, Array, Scene], tuple[Array, float]]] = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": lambda *state: _move_slider(-1.0, *state),
    "move_slider_right": lambda *state: _move_slider(1.0, *state),
    "turn_on_led": _press_button,
    "turn_off_led": _press_button,
    "turn_on_lightbulb": lambda *state: _flip_switch(1.0, *state),
    "turn_off_lightbulb": lambda *state: _flip_switch(-1.0, *state),
}
