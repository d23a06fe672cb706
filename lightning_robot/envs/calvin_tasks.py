"""CALVIN's 34 tasks: how success is decided, and how each task is said.

A task is solved when the simulation *now*, compared with the simulation at the *start* of the task, passes the task's test.
Both are *infos*, plain dicts that any simulator of the play table can fill:

    {"blocks": {"block_red": {"pos": (3,) m, "quat": (4,) xyzw, "lin_vel": (3,) m/s, "ang_vel": (3,) rad/s,
                              "contacts": [(body, link), ...]}, "block_blue": ..., "block_pink": ...},
     "robot_contacts": [(body, link), ...],
     "doors": {"base__slide": m, "base__drawer": m},
     "lights": {"lightbulb": 0 | 1, "led": 0 | 1}}

A contact names the other side: ``robot``, ``table``, ``plane`` or a block, and the link of it (`TABLE_LINKS` for the table;
only equality matters elsewhere). The tests are those of "CALVIN: A Benchmark for Language-Conditioned Policy Learning for
Long-Horizon Robot Manipulation Tasks" (Mees et al., 2022), as its simulator evaluates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Info = dict[str, Any]
Contacts = set[tuple[str, int]]

BLOCKS = ("block_red", "block_blue", "block_pink")
TABLE_LINKS = {"base": -1, "button": 0, "switch": 1, "slider": 2, "drawer": 3, "led": 4, "light": 5, "plank": 6}
BASE, DRAWER, PLANK = TABLE_LINKS["base"], TABLE_LINKS["drawer"], TABLE_LINKS["plank"]
ROTATION_SLIDE = 0.1  # m: a block that moves farther was not rotated
ROTATION_TILT = 30.0  # degrees about the horizontal axes
RESTING_SPEED = 1.0  # m/s and rad/s


@dataclass(frozen=True)
class Task:
    """The success test of one task: ``test(start, now, *parameters)``."""

    test: Callable[..., bool]
    parameters: tuple[Any, ...]

    def solved(self, start: Info, now: Info) -> bool:
        return self.test(start, now, *self.parameters)


def solved(start_info: Info, now_info: Info, tasks: Iterable[str] | None = None) -> set[str]:
    """Which tasks have been solved between two moments.

    Args:
        start_info: info at the start of the task (a copy: see `copy_info`).
        now_info: info now.
        tasks: ids to look at; all 34 when None.

    Returns:
        Ids of the solved tasks.

    Raises:
        KeyError: an id that is no task.
    """
    return {name for name in (TASKS if tasks is None else tasks) if TASKS[name].solved(start_info, now_info)}


def copy_info(info: Info) -> Info:
    """A copy that shares no list and no array with `info`, whose values may be live buffers of the simulator."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(copied(item) for item in value)
        return value.copy() if isinstance(value, np.ndarray) else value

    return copied(info)


# --- the tests -------------------------------------------------------------------------------------------------------------


def _contacts(block: Info) -> Contacts:
    return {(body, link) for body, link in block["contacts"]}


def _bodies(block: Info) -> set[str]:
    return {contact[0] for contact in block["contacts"]}


def _free(block: Info) -> bool:
    return not _bodies(block) & set(BLOCKS)


def _on_blocks(block: Info) -> bool:
    touched = _bodies(block)
    return bool(touched) and touched <= set(BLOCKS)


def _slow(block: Info) -> bool:
    return all(abs(value) < RESTING_SPEED for velocity in (block["lin_vel"], block["ang_vel"]) for value in velocity)


def _turned(start: Any, now: Any) -> tuple[float, float, float]:
    """Rotation from quaternion `start` to `now` (xyzw) about the fixed axes x, y, z in degrees."""
    ax, ay, az, aw = (float(value) for value in now)
    bx, by, bz, bw = (-float(start[0]), -float(start[1]), -float(start[2]), float(start[3]))
    x = aw * bx + ax * bw + ay * bz - az * by
    y = aw * by - ax * bz + ay * bw + az * bx
    z = aw * bz + ax * by - ay * bx + az * bw
    w = aw * bw - ax * bx - ay * by - az * bz
    about_x = math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    about_y = math.asin(max(-1.0, min(1.0, 2 * (w * y - z * x))))
    about_z = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return math.degrees(about_x), math.degrees(about_y), math.degrees(about_z)


def rotate(start: Info, now: Info, block: str, degrees: float) -> bool:
    """The block lies where it was and has turned about the vertical by more than `degrees` (positive: counter-clockwise)."""
    before, after = start["blocks"][block], now["blocks"][block]
    if math.dist(before["pos"], after["pos"]) > ROTATION_SLIDE or not _bodies(after) - {"robot"}:
        return False
    x, y, z = _turned(before["quat"], after["quat"])
    if abs(x) >= ROTATION_TILT or abs(y) >= ROTATION_TILT:
        return False
    return degrees < z < 180 if degrees > 0 else -180 < z < degrees


def push(start: Info, now: Info, block: str, distance: float) -> bool:
    """The block has moved along x by more than `distance` (m, signed) and still lies on what it lay on."""
    before, after = start["blocks"][block], now["blocks"][block]
    moved = after["pos"][0] - before["pos"][0]
    if not (moved > distance if distance > 0 else moved < distance):
        return False
    support_before = {contact for contact in _contacts(before) if contact[0] != "robot"}
    support_after = {contact for contact in _contacts(after) if contact[0] != "robot"}
    return bool(support_before) and support_before <= support_after


def lift(start: Info, now: Info, block: str, height: float, link: int) -> bool:
    """The block has left the table's `link` upwards by more than `height` (m) and touches nothing but the robot."""
    before, after = start["blocks"][block], now["blocks"][block]
    if after["pos"][2] - before["pos"][2] <= height:
        return False
    return _bodies(after) == {"robot"} and ("table", link) in _contacts(before)


def place(start: Info, now: Info, link: int) -> bool:
    """The block that was held, and touched nothing else, has been let go and lies on the table's `link`."""
    held = {contact[0] for contact in start["robot_contacts"]}
    if len(held) != 1:
        return False
    (block,) = held
    if block not in BLOCKS or _bodies(start["blocks"][block]) != {"robot"}:
        return False
    after = now["blocks"][block]
    return "robot" not in _bodies(after) and ("table", link) in _contacts(after)


def push_into(start: Info, now: Info, source: int, target: int) -> bool:
    """Some block that lay on the table's link `source` lies on `target`; the robot holds it at neither moment."""
    for block in BLOCKS:
        before, after = _contacts(start["blocks"][block]), _contacts(now["blocks"][block])
        if before == {("table", source)} and ("table", target) in after and "robot" not in {body for body, _ in after}:
            return True
    return False


def door(start: Info, now: Info, joint: str, distance: float) -> bool:
    """The joint has moved by more than `distance` (m, signed)."""
    moved = now["doors"][joint] - start["doors"][joint]
    return bool(moved > distance if distance > 0 else moved < distance)


def light(start: Info, now: Info, name: str, before: int, after: int) -> bool:
    """The light has gone from state `before` to state `after`."""
    return start["lights"][name] == before and now["lights"][name] == after


def stack(start: Info, now: Info) -> bool:
    """Some block that touched no other block rests on blocks alone."""
    blocks = [(start["blocks"][name], now["blocks"][name]) for name in BLOCKS]
    return any(_free(before) and _on_blocks(after) and _slow(after) for before, after in blocks)


def unstack(start: Info, now: Info) -> bool:
    """Some block that rested on blocks alone touches no block any more."""
    blocks = [(start["blocks"][name], now["blocks"][name]) for name in BLOCKS]
    return any(_on_blocks(before) and _slow(before) and _free(after) for before, after in blocks)


# --- the tasks -------------------------------------------------------------------------------------------------------------


def _tasks() -> dict[str, Task]:
    tasks = {}
    for block in BLOCKS:
        tasks[f"rotate_{block[6:]}_block_right"] = Task(rotate, (block, -60.0))
        tasks[f"rotate_{block[6:]}_block_left"] = Task(rotate, (block, 60.0))
    for block in BLOCKS:
        tasks[f"push_{block[6:]}_block_right"] = Task(push, (block, 0.1))
        tasks[f"push_{block[6:]}_block_left"] = Task(push, (block, -0.1))
    tasks["move_slider_left"] = Task(door, ("base__slide", 0.15))
    tasks["move_slider_right"] = Task(door, ("base__slide", -0.15))
    tasks["open_drawer"] = Task(door, ("base__drawer", 0.12))
    tasks["close_drawer"] = Task(door, ("base__drawer", -0.12))
    for block in BLOCKS:
        tasks[f"lift_{block[6:]}_block_table"] = Task(lift, (block, 0.05, BASE))
        tasks[f"lift_{block[6:]}_block_slider"] = Task(lift, (block, 0.03, PLANK))
        tasks[f"lift_{block[6:]}_block_drawer"] = Task(lift, (block, 0.05, DRAWER))
    tasks["place_in_slider"] = Task(place, (PLANK,))
    tasks["place_in_drawer"] = Task(place, (DRAWER,))
    tasks["stack_block"] = Task(stack, ())
    tasks["unstack_block"] = Task(unstack, ())
    tasks["turn_on_lightbulb"] = Task(light, ("lightbulb", 0, 1))
    tasks["turn_off_lightbulb"] = Task(light, ("lightbulb", 1, 0))
    tasks["turn_on_led"] = Task(light, ("led", 0, 1))
    tasks["turn_off_led"] = Task(light, ("led", 1, 0))
    tasks["push_into_drawer"] = Task(push_into, (BASE, DRAWER))
    return tasks


TASKS: dict[str, Task] = _tasks()
"""The 34 tasks by id, in the order of CALVIN's own configuration (its evaluation chains number them by this order)."""

BLOCK_FREE_TASKS = (
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_led",
    "turn_off_led",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
)
"""The eight tasks that move no block."""

SENTENCES: dict[str, str] = {
    **{
        f"rotate_{color}_block_{side}": f"take the {color} block and rotate it to the {side}"
        for color in ("red", "blue", "pink")
        for side in ("right", "left")
    },
    **{
        f"push_{color}_block_{side}": f"go push the {color} block {side}"
        for color in ("red", "blue", "pink")
        for side in ("right", "left")
    },
    "move_slider_left": "push the sliding door to the left side",
    "move_slider_right": "push the sliding door to the right side",
    "open_drawer": "pull the handle to open the drawer",
    "close_drawer": "push the handle to close the drawer",
    **{f"lift_{color}_block_table": f"grasp and lift the {color} block" for color in ("red", "blue", "pink")},
    **{f"lift_{color}_block_slider": f"lift the {color} block from the sliding cabinet" for color in ("red", "blue", "pink")},
    **{f"lift_{color}_block_drawer": f"Take the {color} block from the drawer" for color in ("red", "blue", "pink")},
    "place_in_slider": "store the grasped block in the sliding cabinet",
    "place_in_drawer": "store the grasped block in the drawer",
    "stack_block": "stack the grasped block",
    "unstack_block": "remove the stacked block",
    "turn_on_lightbulb": "use the switch to turn on the light bulb",
    "turn_off_lightbulb": "use the switch to turn off the light bulb",
    "turn_on_led": "press the button to turn on the led light",
    "turn_off_led": "press the button to turn off the led light",
    "push_into_drawer": "slide the block that it falls into the drawer",
}
"""The one sentence per task that CALVIN evaluates with."""


def _paraphrases() -> dict[str, tuple[str, ...]]:
    texts: dict[str, tuple[str, ...]] = {
        "open_drawer": (
            "grasp the drawer handle, then open it",
            "open the drawer",
            "go open the drawer",
            "pull the drawer open by its handle",
            "slide the drawer out towards you",
            "hook the handle and pull out the drawer",
            "get the drawer open",
        ),
        "close_drawer": (
            "close the drawer",
            "push the drawer shut",
            "shut the drawer by pushing its handle",
            "slide the drawer back in until it is closed",
            "go and close the open drawer",
            "push against the handle so that the drawer closes",
            "get the drawer closed",
        ),
        "move_slider_left": (
            "slide the door to the left",
            "move the sliding door left",
            "take the door handle and push it to the left side",
            "drag the cabinet door over to the left",
            "push the slider left",
            "slide the cabinet door leftwards",
            "get the sliding door to the left end",
        ),
        "move_slider_right": (
            "slide the door to the right",
            "move the sliding door right",
            "take the door handle and push it to the right side",
            "drag the cabinet door over to the right",
            "push the slider right",
            "slide the cabinet door rightwards",
            "get the sliding door to the right end",
        ),
        "turn_on_led": (
            "push down the button to turn on the led light",
            "press the button so that the green led lights up",
            "turn on the led",
            "switch the led on with the button",
            "push the button to light the led",
            "go press the button, the led should be on",
            "turn on the green light",
        ),
        "turn_off_led": (
            "push down the button to turn off the led",
            "press the button so that the green led goes dark",
            "turn off the led",
            "switch the led off with the button",
            "push the button to put out the led",
            "go press the button, the led should be off",
            "turn off the green light",
        ),
        "turn_on_lightbulb": (
            "toggle the light switch to turn on the yellow light",
            "turn on the light bulb",
            "move the switch up to light the bulb",
            "flip the switch so that the yellow bulb lights up",
            "push the light switch upwards",
            "use the light switch, the bulb should be on",
            "turn on the yellow lamp with the switch",
        ),
        "turn_off_lightbulb": (
            "toggle the light switch to turn off the yellow light",
            "turn off the light bulb",
            "move the switch down to put out the bulb",
            "flip the switch so that the yellow bulb goes dark",
            "push the light switch downwards",
            "use the light switch, the bulb should be off",
            "turn off the yellow lamp with the switch",
        ),
        "place_in_slider": (
            "put the object in the cabinet",
            "place the block you hold inside the sliding cabinet",
            "set the held block down behind the sliding door",
            "store the block in the cabinet",
        ),
        "place_in_drawer": (
            "put the object in the drawer",
            "place the block you hold inside the drawer",
            "let the held block down into the drawer",
            "store the block in the drawer",
        ),
        "stack_block": (
            "put the block you hold on top of another block",
            "place the held block onto another one",
            "build a tower with the block in the gripper",
            "stack the block you hold on another block",
            "stack the held block onto another block",
        ),
        "unstack_block": (
            "collapse the stacked blocks",
            "take the upper block off the tower",
            "knock the top block down from the stack",
            "remove the block that is stacked on another",
        ),
        "push_into_drawer": (
            "push a block over the edge into the open drawer",
            "sweep the block from the table into the drawer",
            "let a block fall into the drawer by pushing it",
            "slide a block until it falls into the drawer",
        ),
    }
    for color in ("red", "blue", "pink"):
        for side in ("right", "left"):
            texts[f"rotate_{color}_block_{side}"] = (
                f"turn the {color} block to the {side}",
                f"rotate the {color} block towards the {side}",
                f"grab the {color} block and twist it {side}",
            )
            texts[f"push_{color}_block_{side}"] = (
                f"slide the {color} block to the {side}",
                f"push the {color} block towards the {side}",
                f"shove the {color} block over to the {side} side",
            )
        texts[f"lift_{color}_block_table"] = (
            f"pick up the {color} block from the table",
            f"lift the {color} block off the table",
            f"take hold of the {color} block on the table and raise it",
        )
        texts[f"lift_{color}_block_slider"] = (
            f"pick up the {color} block in the cabinet",
            f"grab the {color} block inside the sliding cabinet and raise it",
            f"get the {color} block out of the cabinet",
        )
        texts[f"lift_{color}_block_drawer"] = (
            f"pick up the {color} block from the drawer",
            f"lift the {color} block out of the drawer",
            f"reach into the drawer and get the {color} block",
        )
    return {task: texts[task] for task in TASKS}


PARAPHRASES: dict[str, tuple[str, ...]] = _paraphrases()
"""Training sentences per task; none is an evaluation sentence."""
