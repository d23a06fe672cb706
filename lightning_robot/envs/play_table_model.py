"""MJCF of CALVIN's play table, scenes A to D, built from primitives.

Lengths in metres, world frame of CALVIN: z up, the table's front faces -y. Bodies: ``slider``, ``drawer``, ``button``,
``switch``, ``block_<color>`` and the robot's. What is fixed belongs to the world body; of it ``plane``, ``plank``, ``led`` and
``lightbulb`` are named geoms.
Groups: 0 what never moves, 1 what moves (a fixed camera casts group 0 once).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_robot.envs.panda import PANDA_DEFAULTS, panda_actuators, panda_body
from lightning_robot.geometry import CALVIN_STATIC_POSE, look_at

Box = tuple[float, float, float, float, float, float]

POSITION_UNIT, ROTATION_UNIT = 0.02, 0.05  # m and rad that a relative action of 1 means
TOP = 0.44  # height of the working surface
DRAWER_RANGE, SWITCH_RANGE, BUTTON_RANGE = 0.22, 0.088, 0.02
BLOCK_SIZES = {"small": (0.04, 0.04, 0.04), "middle": (0.056, 0.04, 0.04), "big": (0.08, 0.04, 0.04)}
BLOCK_COLORS = {"red": "1 0 0 1", "blue": "0 0 1 1", "pink": "1 0 1 1"}
LIGHT_COLORS = {"off": (0.92, 0.92, 0.92, 1.0), "led": (0.0, 1.0, 0.0, 1.0), "lightbulb": (1.0, 1.0, 0.0, 1.0)}
SLOPE = math.radians(60)  # of the cabinet's front; (y, z) = (0.02, 0.44) lies on it
UP = (0.0, math.cos(SLOPE), math.sin(SLOPE))  # along the front, upwards
OUT = (0.0, -math.sin(SLOPE), math.cos(SLOPE))  # away from it


@dataclass(frozen=True)
class Scene:
    """Where the parts of one of CALVIN's four scenes are.

    Attributes:
        drawer, slider, button, switch: x of their origins (LED above the button, bulb above the switch).
        slider_range: travel of the sliding door.
        cavity: x range of the cabinet behind the door.
        blocks: (color, size) in the order of the scene's state vector.
        surfaces: areas in which blocks start: (x from, y from, x to, y to).
    """

    drawer: float
    slider: float
    slider_range: float
    cavity: tuple[float, float]
    button: float
    switch: float
    blocks: tuple[tuple[str, str], ...]
    surfaces: tuple[tuple[float, float, float, float], ...]


_LEFT_SIDE = ((-0.32, 0.05, -0.16, 0.12), (-0.05, 0.05, 0.13, 0.12))

SCENES = {
    "A": Scene(
        0.10, -0.10, 0.28, (-0.36, 0.16), -0.28, 0.30,
        (("pink", "small"), ("blue", "big"), ("red", "middle")),
        ((-0.2, -0.15, 0.35, -0.03), *_LEFT_SIDE),
    ),
    "B": Scene(
        0.18, 0.088, 0.304, (-0.18, 0.34), 0.28, -0.32,
        (("red", "small"), ("blue", "big"), ("pink", "middle")),
        ((-0.35, -0.15, 0.15, -0.03), (-0.12, 0.05, 0.06, 0.12), (0.15, 0.05, 0.33, 0.12)),
    ),
    "C": Scene(
        0.10, 0.06, 0.24, (-0.18, 0.34), -0.12, -0.32,
        (("blue", "small"), ("red", "big"), ("pink", "middle")),
        ((0.0, -0.15, 0.35, -0.03), (-0.12, 0.05, 0.06, 0.12), (0.15, 0.05, 0.30, 0.12)),
    ),
    "D": Scene(
        0.18, -0.10, 0.28, (-0.36, 0.16), -0.12, 0.30,
        (("red", "middle"), ("blue", "small"), ("pink", "big")),
        ((0.0, -0.15, 0.35, -0.03), *_LEFT_SIDE),
    ),
}  # fmt: skip


def play_table_xml(scene: Scene) -> str:
    """The whole model: table, its moving parts, lights, three blocks, robot, cameras ``static``, ``gripper``, ``overview``.

    Joints: ``base__slide``, ``base__drawer``, ``base__button``, ``base__switch``, ``arm_1`` … ``arm_7``, ``finger_1``,
    ``finger_2`` and a free joint per block.
    """
    left, right = scene.cavity
    fixed = [
        _box((-0.44, 0.44, -0.18, 0.18, 0.40, 0.42)),
        _box((-0.44, 0.44, -0.18, 0.02, 0.42, TOP)),
        _box((-0.44, 0.44, 0.16, 0.18, 0.42, 0.64785)),  # back wall
        _box((left, right, 0.134, 0.16, 0.62785, 0.64785)),  # over the cabinet
        _box((-0.42, scene.drawer - 0.20, -0.16, 0.16, 0.30, 0.40)),
        _box((scene.drawer + 0.20, 0.42, -0.16, 0.16, 0.30, 0.40)),
        _box((scene.drawer - 0.20, scene.drawer + 0.20, 0.06, 0.16, 0.30, 0.40)),
        _box((scene.drawer - 0.20, scene.drawer + 0.20, -0.16, 0.06, 0.30, 0.32)),
        *(_box((x, x + 0.04, y, y + 0.032, 0, 0.40)) for x in (-0.44, 0.40) for y in (-0.18, 0.148)),
        *_side(-0.44, left),
        *_side(right, 0.44),
        _box((left, right, 0.02, 0.16, 0.42, TOP + 0.001), name="plank"),  # blocks lie a millimetre higher, as in CALVIN
        _box((scene.button - 0.08, scene.button + 0.08, 0.14, 0.18, 0.64785, 0.66385), name="led"),
        f'<geom name="lightbulb" class="fixed" type="ellipsoid" size="0.028 0.028 0.0248" pos="{scene.switch} 0.16 0.67265"/>',
        # The ring stops blocks only: a finger that presses the button far down dips into it.
        f'<geom name="ring" class="fixed" type="cylinder" size="0.04 0.01" pos="{scene.button} -0.12 0.45" '
        'contype="8" rgba="0.45 0.36 0.27 1"/>',
    ]
    return f"""
<mujoco model="play_table">
  <compiler angle="radian" eulerseq="XYZ" autolimits="true" boundmass="0.01" boundinertia="1e-5"/>
  <option timestep="0.008333333333333333" integrator="implicitfast" cone="elliptic" impratio="10"
    gravity="0 0 -9.8" iterations="20" ls_iterations="30"/>
  <size memory="4M"/>
  <statistic extent="1" center="0 0 0.5"/>
  <visual>
    <global offwidth="640" offheight="480"/>
    <quality shadowsize="0" offsamples="0" numslices="16" numstacks="8" numquads="1"/>
    <headlight ambient="0.45 0.45 0.45" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    <map znear="0.01" zfar="10"/>
    <rgba haze="0.9 0.9 0.9 1"/>
  </visual>
  <default>
    {PANDA_DEFAULTS}
    <default class="fixed"><geom group="0" contype="1" conaffinity="0" friction="0.35 0.005 0.0001"
      rgba="0.62 0.48 0.33 1" solimp="0.95 0.99 0.001"/></default>
    <default class="part"><joint type="slide"/><geom group="1" contype="1" conaffinity="0" friction="0.35 0.005 0.0001"
      rgba="0.5 0.36 0.22 1" solimp="0.95 0.99 0.001"/></default>
    <default class="block"><geom group="1" type="box" contype="4" conaffinity="15" friction="0.35 0.005 0.0001" mass="1"
      solimp="0.95 0.99 0.001"/></default>
  </default>
  <worldbody>
    <light pos="0.5 -1.5 2.5" dir="-0.2 0.6 -0.8" diffuse="0.35 0.35 0.35" specular="0 0 0" castshadow="false"/>
    {_camera("static", CALVIN_STATIC_POSE, 10)}
    {_camera("overview", look_at((0.75, -1.45, 1.3), (-0.06, -0.14, 0.47), (0, 0, 1)), 40)}
    <geom name="plane" class="fixed" type="plane" size="0 0 1" friction="0.7" rgba="0.82 0.82 0.82 1"/>
    <geom name="pedestal" class="fixed" type="cylinder" size="0.13 0.12" pos="-0.39 -0.46 0.12" contype="0"
      rgba="0.92 0.92 0.92 1"/>
    {"".join(fixed)}
    {_slider(scene)}
    {_drawer(scene)}
    {_button(scene)}
    {_switch(scene)}
    {panda_body()}
    {"".join(_block(color, size) for color, size in scene.blocks)}
  </worldbody>
  <equality><joint joint1="finger_1" joint2="finger_2" solref="0.02 1"/></equality>
  <actuator>{panda_actuators()}</actuator>
</mujoco>"""


def _box(box: Box, frame: str = "fixed", name: str = "", more: str = "") -> str:
    """An axis-parallel box given by its bounds x, y, z."""
    center = " ".join(f"{(box[2 * axis] + box[2 * axis + 1]) / 2:.8g}" for axis in range(3))
    size = " ".join(f"{(box[2 * axis + 1] - box[2 * axis]) / 2:.8g}" for axis in range(3))
    label = f'name="{name}" ' if name else ""
    return f'<geom {label}class="{frame}" type="box" pos="{center}" size="{size}" {more}/>'


def _sloped(box: Box, frame: str, more: str = "") -> str:
    """A box in the frame of the cabinet's front: bounds along x, up the slope, out of it; relative to the body."""
    x, up, out = ((box[2 * axis] + box[2 * axis + 1]) / 2 for axis in range(3))
    position = f"{x:.8g} {up * UP[1] + out * OUT[1]:.8g} {up * UP[2] + out * OUT[2]:.8g}"
    size = " ".join(f"{(box[2 * axis + 1] - box[2 * axis]) / 2:.8g}" for axis in range(3))
    return f'<geom class="{frame}" type="box" pos="{position}" euler="{SLOPE:.10g} 0 0" size="{size}" {more}/>'


def _side(start: float, end: float) -> list[str]:
    """Solid part of the cabinet beside its cavity: an oblique slab with boxes behind it."""
    x = (start + end) / 2
    length, thickness = 0.24, 0.06
    middle = [0.02 + length / 2 * UP[1] - thickness / 2 * OUT[1], TOP + length / 2 * UP[2] - thickness / 2 * OUT[2]]
    return [
        f'<geom class="fixed" type="box" pos="{x:.8g} {middle[0]:.8g} {middle[1]:.8g}" euler="{SLOPE:.10g} 0 0" '
        f'size="{(end - start) / 2:.8g} {length / 2} {thickness / 2}"/>',
        _box((start, end, 0.082, 0.16, 0.42, 0.545)),
        _box((start, end, 0.14, 0.16, 0.545, 0.64785)),
    ]


def _slider(scene: Scene) -> str:
    handle = 'rgba="0.24 0.24 0.24 1"'
    return (
        f'<body name="slider" pos="{scene.slider} 0.075 0.53526">'
        f'<joint name="base__slide" class="part" axis="-1 0 0" range="0 {scene.slider_range}" frictionloss="4" damping="2"/>'
        + _sloped((0, 0.28, -0.11, 0.11, 0, 0.02), "part", 'mass="1.2"')
        + _sloped((0.12, 0.16, -0.08, 0.08, 0.06, 0.08), "part", f'mass="0.2" {handle}')
        + _sloped((0.12, 0.16, 0.06, 0.08, 0.02, 0.06), "part", f'mass="0.07" {handle}')
        + _sloped((0.12, 0.16, -0.08, -0.06, 0.02, 0.06), "part", f'mass="0.07" {handle}')
        + "</body>"
    )


def _drawer(scene: Scene) -> str:
    handle = 'rgba="0.24 0.24 0.24 1"'
    boxes = (
        ((-0.20, 0.20, -0.16, 0.06, 0.32, 0.3423), 'mass="1.2"'),  # floor; blocks lie at z = 0.3623 in CALVIN
        ((-0.20, -0.18, -0.16, 0.06, 0.34, 0.40), 'mass="0.4"'),
        ((0.18, 0.20, -0.16, 0.06, 0.34, 0.40), 'mass="0.4"'),
        ((-0.18, 0.18, 0.04, 0.06, 0.34, 0.40), 'mass="0.6"'),
        ((-0.22, 0.22, -0.18, -0.16, 0.30, 0.40), 'mass="1.2"'),  # front
        ((-0.12, 0.12, -0.26, -0.24, 0.34, 0.38), f'mass="0.3" {handle}'),
        ((-0.12, -0.10, -0.24, -0.18, 0.34, 0.38), f'mass="0.06" {handle}'),
        ((0.10, 0.12, -0.24, -0.18, 0.34, 0.38), f'mass="0.06" {handle}'),
    )
    return (
        f'<body name="drawer" pos="{scene.drawer} 0 0">'
        f'<joint name="base__drawer" class="part" axis="0 -1 0" range="0 {DRAWER_RANGE}" frictionloss="4" damping="2"/>'
        + "".join(_box(box, "part", more=more) for box, more in boxes)
        + "</body>"
    )


def _button(scene: Scene) -> str:
    # The spring presses with about 4 N over the whole travel.
    return (
        f'<body name="button" pos="{scene.button} -0.12 0.472" gravcomp="1">'
        f'<joint name="base__button" class="part" axis="0 0 -1" range="0 {BUTTON_RANGE}" stiffness="20" springref="-0.19" '
        'damping="15" armature="1" solimplimit="0.9 0.99 0.001"/>'
        '<geom class="part" type="cylinder" size="0.032 0.012" mass="0.154" rgba="0.05 0.05 0.05 1"/></body>'
    )


def _switch(scene: Scene) -> str:
    gray = 'rgba="0.4 0.4 0.4 1"'
    return (
        f'<body name="switch" pos="{scene.switch} 0.06093 0.49489" gravcomp="1">'
        f'<joint name="base__switch" class="part" axis="{UP[0]} {UP[1]:.10g} {UP[2]:.10g}" range="0 {SWITCH_RANGE}" '
        'frictionloss="4" damping="2" armature="1"/>'
        + _sloped((-0.06, -0.04, -0.008, 0.024, 0, 0.064), "part", f'mass="0.08" {gray}')
        + _sloped((0.04, 0.06, -0.008, 0.024, 0, 0.064), "part", f'mass="0.08" {gray}')
        + _sloped((-0.052, 0.052, -0.008, 0.024, 0.044, 0.064), "part", f'mass="0.08" {gray}')
        + "</body>"
    )


def _block(color: str, size: str) -> str:
    half = " ".join(f"{length / 2:g}" for length in BLOCK_SIZES[size])
    return (
        f'<body name="block_{color}" pos="0 0 0.46"><freejoint name="block_{color}"/>'
        f'<geom name="block_{color}" class="block" size="{half}" rgba="{BLOCK_COLORS[color]}"/></body>'
    )


def _camera(name: str, pose, fovy: float) -> str:
    axes = " ".join(f"{value:.10g}" for value in (*pose[:3, 0], *pose[:3, 1]))
    position = " ".join(f"{value:.10g}" for value in pose[:3, 3])
    return f'<camera name="{name}" pos="{position}" xyaxes="{axes}" fovy="{fovy}"/>'
