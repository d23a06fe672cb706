"""Where an episode of the play table starts: a random state in which its task can be done.

What varies: the tool centre point by ±5 cm in x and y and ±4 cm in z, its roll and pitch by ±0.05 rad and its yaw by ±0.1 rad
around CALVIN's start pose; blocks as CALVIN draws them, but clear of the cabinet's walls and door (a wedged block stops the
door); slider and drawer within 5 and 2 cm of the end at which the task needs them, else at either end; lights as the task needs
them, else on or off.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lightning_robot.envs.calvin_tasks import TASKS
from lightning_robot.envs.play_table_model import BLOCK_SIZES, DRAWER_RANGE, SWITCH_RANGE, Scene

Array = NDArray[np.float64]

START_POSITION = (0.02586889, -0.2313129, 0.5712808)
# CALVIN's is (3.0905, -0.029, 1.5001). A roll that stays this far below pi does not flip its sign along the way.
START_EULER = (3.04, 0.0, 1.53)
RESTING, RESTING_PLANK, RESTING_DRAWER = 0.46, 0.461, 0.3623  # heights of a block's centre
DOOR_BACK, CABINET_BACK = 0.045, 0.158  # y of the door's rear at a block's upper edge, and of the back wall


def sample_tool_pose(random: np.random.Generator) -> tuple[Array, Array]:
    """Position (3,) and Euler angles (3,) of the tool centre point at the start."""
    position = np.array(START_POSITION) + random.uniform(-1, 1, 3) * (0.05, 0.05, 0.04)
    return position, np.array(START_EULER) + random.uniform(-1, 1, 3) * (0.05, 0.05, 0.1)


def sample_scene(scene: Scene, task: str, random: np.random.Generator) -> Array:
    """A state vector (24,) of the scene, in its own order of blocks, in which `task` can be done. Blocks do not overlap.

    Raises:
        ValueError: a task that starts with a block in the gripper.
    """
    if task.startswith("place_in_"):
        raise ValueError(
            f"{task!r} starts with a block in the gripper, which no random start has: pass options={{'robot_obs': ..., "
            "'scene_obs': ...} of such a state, or begin the task after a lift with begin_task."
        )
    # Drawn in the same order whatever the task, so that a seed gives the same blocks and tool pose for all.
    slider_end, drawer_end, led, bulb = (bool(value) for value in random.integers(0, 2, 4))
    slider_offset, drawer_offset = random.uniform(0, 0.05), random.uniform(0, 0.02)
    slider = scene.slider_range if slider_end else 0.0
    drawer = DRAWER_RANGE if drawer_end else 0.0
    if task == "move_slider_left":
        slider = slider_offset
    elif task == "move_slider_right":
        slider = scene.slider_range - slider_offset
    elif task == "open_drawer":
        drawer = drawer_offset
    elif task == "close_drawer":
        drawer = DRAWER_RANGE - drawer_offset
    elif task == "push_into_drawer" or task.endswith("_drawer"):
        drawer = DRAWER_RANGE
    if "led" in task.split("_"):
        led = task == "turn_off_led"
    if task.endswith("lightbulb"):
        bulb = task == "turn_off_lightbulb"
    blocks = _sample_blocks(scene, task, slider, random)
    state = np.array([slider, drawer, 0.0, SWITCH_RANGE if bulb else 0.0, float(bulb), float(led)])
    return np.concatenate([state, *blocks])


def _sample_blocks(scene: Scene, task: str, slider: float, random: np.random.Generator) -> list[Array]:
    color = next((name for name, _ in scene.blocks if name in task.split("_")), None)
    stacked = ("unstack" in task.split("_")) * 2  # the second of the scene's blocks lies on the first
    while True:
        blocks: list[Array] = []
        for index, (name, size) in enumerate(scene.blocks):
            surface = int(random.integers(0, 3))
            if name == color and task.endswith("_slider"):
                surface = 1 if slider < scene.slider_range / 2 else 2  # where the door is not
            elif name == color or stacked or task == "push_into_drawer" or task == "stack_block":
                surface = 0
            x_low, y_low, x_high, y_high = scene.surfaces[surface]
            if name == color and task.endswith("_drawer"):
                x_low, y_low, x_high, y_high = scene.drawer - 0.12, -0.32, scene.drawer + 0.12, -0.24
            position = random.uniform((x_low, y_low), (x_high, y_high))
            height = RESTING_DRAWER if position[1] < -0.18 else RESTING_PLANK if surface else RESTING
            yaw = random.uniform(-math.pi, math.pi)
            if stacked and index == 1:
                position, height, yaw = blocks[0][:2].copy(), RESTING + 0.0399, blocks[0][5]
            if surface and not _clear_of_walls(scene, size, position, yaw):
                break
            blocks.append(np.array([*position, height, 0.0, 0.0, yaw]))
        if len(blocks) == 3 and not _overlap(scene, blocks):
            return blocks


def _clear_of_walls(scene: Scene, size: str, position: Array, yaw: float) -> bool:
    """Whether a block on the cabinet's floor touches neither its walls nor the sliding door, wherever that is."""
    length, width = BLOCK_SIZES[size][:2]
    half_x = (abs(length * math.cos(yaw)) + abs(width * math.sin(yaw))) / 2
    half_y = (abs(length * math.sin(yaw)) + abs(width * math.cos(yaw))) / 2
    left, right = scene.cavity
    in_depth = position[1] - half_y > DOOR_BACK and position[1] + half_y < CABINET_BACK
    return in_depth and position[0] - half_x > left and position[0] + half_x < right


def _overlap(scene: Scene, blocks: list[Array]) -> bool:
    """Whether circles around two blocks of the same height meet (a little stricter than the blocks themselves)."""
    radii = [math.hypot(*BLOCK_SIZES[size][:2]) / 2 + 0.002 for _, size in scene.blocks]
    return any(
        abs(blocks[a][2] - blocks[b][2]) < 0.039 and math.dist(blocks[a][:2], blocks[b][:2]) < radii[a] + radii[b]
        for a in range(3)
        for b in range(a)
    )


def known_task(task: str) -> str:
    """The id itself.

    Raises:
        ValueError: no task of that name; lists all.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}. The tasks are {', '.join(TASKS)}.")
    return task
