"""MJCF of an SO-101 arm on a table with a block and a round bowl, built from primitives.

The arm's frames, joint limits, masses, inertias and servos are those published with the arm (TheRobotStudio's SO-ARM100, "new
calibration": a joint's zero is the middle of its range); the pads of the jaws are at the places of the published jaws' inner
faces. Lengths in metres, angles in radians, z up, the arm reaches towards +x, the table's surface is z = 0.

Bodies: ``base``, the six of `LINKS`, ``block`` (free) and ``bowl`` (placed through `mocap_pos`). Site ``gripperframe``. Cameras
``overhead``, ``wrist`` and ``overview``.
Groups: 0 what stands still during an episode, 1 what moves, 3 contact shapes that no camera sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_robot.geometry import look_at

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
LOWER = (-1.9198621771937616, -1.7453292519943224, -1.69, -1.6580628494556928, -2.7438472969992493, -0.17453297762778586)
UPPER = (1.9198621771937634, 1.7453292519943366, 1.69, 1.6580627293335335, 2.841206309382605, 1.7453291995659765)

BOWL_RADIUS, BOWL_HEIGHT, BOWL_WALL = 0.055, 0.028, 0.004  # inside, metres
_BOWL_SIDES = 12
OVERHEAD_CAMERA = ((0.46, -0.02, 0.54), (0.20, -0.02, 0.01), 36)  # eye, target, vertical field of view in degrees
WRIST_CAMERA = ((0.0, 0.055, -0.045), (-0.57, 0.0, 0.0), 70)  # in the gripper's frame: place, turn, field of view
LAMP = (0.1, 0.25, 0.95)  # direction towards it, of pictures by rays


@dataclass(frozen=True)
class Physics:
    """What decides whether a grip holds, and where it can be changed.

    The servo of the gripper is soft and half as strong as the others (LeRobot limits the real one to half its torque), so what
    presses is how far its command lies beyond contact, which begins at 17.7 per cent of opening. Measured with the scripted
    expert: commands of 15.5 and below always hold; at 16 a third of the blocks is lost, at 16.5 (0.023 rad past contact)
    almost all fall on the way, at 17 none is lifted. At friction 0.3 a command of 16 drops them all.

    Attributes:
        friction: sliding friction of pads on block (plastic on plastic is 0.3 to 0.5, rubber up to 1).
        block_size: edge of the block in m.
        block_mass: kg.
        gripper_gain: N m per rad of the gripper's servo.
        gripper_torque: N m, its limit.
    """

    friction: float = 0.4
    block_size: float = 0.028
    block_mass: float = 0.1
    gripper_gain: float = 8.0
    gripper_torque: float = 1.47

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"physics: {name} is {value}; it must be above 0.")
        if not 0.01 <= self.block_size <= 0.04:
            raise ValueError(f"physics: block_size is {self.block_size} m; the jaws grip blocks of 0.01 to 0.04 m.")


@dataclass(frozen=True)
class Link:
    """One moving part of the arm: its frame in its parent's, mass, and inertia about the centre of mass in its own axes."""

    name: str
    joint: str
    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]
    mass: float
    center: tuple[float, float, float]
    inertia: tuple[float, float, float, float, float, float]


_ROOT = math.sqrt(0.5)
_BASE = (0.147, (0.0137179, -5.19711e-5, 0.0334843), (1.14686e-4, 1.36117e-4, 1.30364e-4, -4.59787e-7, 4.97151e-6, 9.75275e-8))
LINKS = (
    Link(
        "shoulder", "shoulder_pan", (0.0388353, -8.97657e-9, 0.0624), (0, 0, -1, 0),
        0.100006, (-0.0307604, -1.66727e-5, -0.0252713),
        (8.3759e-5, 8.10403e-5, 2.39783e-5, 7.55525e-8, -1.16342e-6, 1.54663e-7),
    ),
    Link(
        "upper_arm", "shoulder_lift", (-0.0303992, -0.0182778, -0.0542), (0.5, -0.5, -0.5, -0.5),
        0.103, (-0.0898471, -0.00838224, 0.0184089),
        (4.08002e-5, 1.47318e-4, 1.42487e-4, -1.97819e-5, -4.03016e-8, 8.97326e-9),
    ),
    Link(
        "lower_arm", "elbow_flex", (-0.11257, -0.028, 0), (_ROOT, 0, 0, _ROOT),
        0.104, (-0.0980701, 0.00324376, 0.0182831),
        (2.87438e-5, 1.59844e-4, 1.4529e-4, 7.41152e-6, 1.26409e-6, -4.90188e-8),
    ),
    Link(
        "wrist", "wrist_flex", (-0.1349, 0.0052, 0), (_ROOT, 0, 0, -_ROOT),
        0.079, (-0.000103312, -0.0386143, 0.0281156),
        (3.68263e-5, 2.5391e-5, 2.1e-5, 1.7893e-8, -5.28128e-8, 3.6412e-6),
    ),
    Link(
        "gripper", "wrist_roll", (0, -0.0611, 0.0181), (0.0172091, -0.0172091, 0.706897, 0.706897),
        0.087, (0.000213627, 0.000245138, -0.025187),
        (2.75087e-5, 4.33657e-5, 3.45059e-5, -3.35241e-7, -5.7352e-6, -5.17847e-8),
    ),
    Link(
        "moving_jaw", "gripper", (0.0202, 0.0188, -0.0234), (_ROOT, _ROOT, 0, 0),
        0.012, (-0.00157495, -0.0300244, 0.0192755),
        (6.61427e-6, 1.89032e-6, 5.28738e-6, -3.19807e-7, -5.90717e-9, -1.09945e-7),
    ),
)  # fmt: skip

# Shapes: half sizes, position, orientation of boxes in the link's frame. They are seen and, where marked, felt.
_Shape = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float, float]]
_STRAIGHT = (1.0, 0.0, 0.0, 0.0)
_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "shoulder": (((0.038, 0.025, 0.02), (-0.025, 0, 0), (0.5, 0.5, -0.5, 0.5)),),
    "upper_arm": (((0.01, 0.07, 0.03), (-0.06, 0, 0.02), (0, -_ROOT, _ROOT, 0)),),
    "lower_arm": (
        ((0.07, 0.01, 0.03), (-0.05, 0, 0.0182), (0, 1, 0, 0)),
        ((0.023, 0.013, 0.018), (-0.125, 0.005, 0.018), _STRAIGHT),
    ),
    "wrist": (((0.027, 0.01, 0.03), (0, -0.02, 0.0191), (0.5, -0.5, -0.5, -0.5)),),
    "gripper": (((0.0325, 0.024, 0.0215), (-0.0025, 0, -0.0215), _STRAIGHT),),
    "moving_jaw": (((0.01, 0.012, 0.0165), (0, -0.010, 0.019), _STRAIGHT),),
}
# Jaws as they look: tapered, in two pieces each. They are seen, not felt.
_JAWS: dict[str, tuple[_Shape, ...]] = {
    "gripper": (
        ((0.0085, 0.010, 0.020), (-0.0235, 0, -0.060), _STRAIGHT),
        ((0.0035, 0.006, 0.0135), (-0.0130, 0, -0.0905), _STRAIGHT),
    ),
    "moving_jaw": (
        ((0.0060, 0.020, 0.0085), (0.0000, -0.038, 0.0190), _STRAIGHT),
        ((0.0040, 0.0125, 0.0050), (-0.0070, -0.0695, 0.0189), _STRAIGHT),
    ),
}
# Motors and brackets at the joints, seen alone: ends of a cylinder's axis and its radius; motors are dark.
_JOINT_COVERS: dict[str, tuple[tuple[str, tuple[float, float, float], tuple[float, float, float], float], ...]] = {
    "shoulder": (
        ("motor", (-0.0304, -0.024, -0.0542), (-0.0304, 0.024, -0.0542), 0.019),
        ("link", (-0.0304, 0, -0.0542), (-0.0304, 0, -0.03), 0.017),
    ),
    "upper_arm": (
        ("link", (-0.0900, 0, 0.0182), (-0.1126, -0.028, 0.0182), 0.013),
        ("motor", (-0.1126, -0.028, -0.006), (-0.1126, -0.028, 0.042), 0.016),
    ),
    "lower_arm": (
        ("link", (-0.1100, 0.003, 0.0182), (-0.1349, 0.0052, 0.0182), 0.013),
        ("motor", (-0.1349, 0.0052, -0.006), (-0.1349, 0.0052, 0.042), 0.016),
    ),
    "wrist": (("motor", (0, -0.030, 0.0181), (0, -0.0611, 0.0181), 0.016),),
}
# Pads as they are felt: half sizes and position.
_PADS: dict[str, tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...]] = {
    "gripper": (
        ((0.001, 0.004, 0.004), (-0.009, 0, -0.0982)),
        ((0.001, 0.005, 0.006), (-0.0108, 0, -0.0905)),
        ((0.001, 0.009, 0.008), (-0.0125, 0, -0.0727)),
        ((0.001, 0.010, 0.008), (-0.0143, 0, -0.053)),
    ),
    "moving_jaw": (
        ((0.001, 0.004, 0.004), (-0.0113, -0.076, 0.01875)),
        ((0.001, 0.005, 0.006), (-0.0093, -0.067, 0.01875)),
        ((0.001, 0.008, 0.008), (-0.0073, -0.053, 0.01875)),
    ),
}


def _vector(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " ".join(f"{value:.12g}" for value in values)


def _inertial(mass: float, center: Sequence[float], inertia: Sequence[float]) -> str:
    return f'<inertial mass="{mass}" pos="{_vector(center)}" fullinertia="{_vector(inertia)}"/>'


def _camera(name: str, pose: NDArray[np.float64], view: float) -> str:
    axes = _vector([*pose[:3, 0], *pose[:3, 1]])
    return f'<camera name="{name}" pos="{_vector(pose[:3, 3])}" xyaxes="{axes}" fovy="{view}"/>'


def _box(kind: str, shape: _Shape) -> str:
    size, position, quaternion = shape
    return f'<geom class="{kind}" type="box" size="{_vector(size)}" pos="{_vector(position)}" quat="{_vector(quaternion)}"/>'


def _cover(kind: str, start: Sequence[float], end: Sequence[float], radius: float) -> str:
    color = ' rgba="0.2 0.2 0.22 1"' if kind == "motor" else ""
    return f'<geom class="seen" type="cylinder" fromto="{_vector((*start, *end))}" size="{radius}"{color}/>'


def arm_body(shapes: bool = True) -> str:
    """MJCF of the arm, base fixed at the origin.

    Args:
        shapes: with geoms and the wrist's camera or, for kinematics alone, without.
    """
    parts = [f'<body name="base">{_inertial(*_BASE)}']
    if shapes:
        parts.append('<geom class="foot" type="box" size="0.048 0.0555 0.012" pos="0.017 0 0.012"/>')
        parts.append('<geom class="foot" type="box" size="0.028 0.028 0.024" pos="0.030 0 0.046" rgba="0.2 0.2 0.22 1"/>')
    for link, lower, upper in zip(LINKS, LOWER, UPPER):
        parts.append(f'<body name="{link.name}" pos="{_vector(link.position)}" quat="{_vector(link.quaternion)}">')
        parts.append(f'<joint name="{link.joint}" class="servo" range="{lower:.17g} {upper:.17g}"/>')
        parts.append(_inertial(link.mass, link.center, link.inertia))
        if link.name == "gripper":
            parts.append(
                f'<site name="gripperframe" pos="-0.0079 -0.000218121 -0.0981274" quat="{_vector((_ROOT, 0, _ROOT, 0))}" '
                'rgba="0 0 0 0"/>'
            )
        if not shapes:
            continue
        if link.name == "gripper":
            place, turn, view = WRIST_CAMERA
            parts.append(f'<camera name="wrist" pos="{_vector(place)}" euler="{_vector(turn)}" fovy="{view}"/>')
        kind = "motor" if link.name in ("wrist", "gripper", "moving_jaw") else "link"
        parts.extend(_box(kind, shape) for shape in _SHAPES[link.name])
        parts.extend(_box("seen", shape) for shape in _JAWS.get(link.name, ()))
        parts.extend(_cover(*cover) for cover in _JOINT_COVERS.get(link.name, ()))
        for number, (size, position) in enumerate(_PADS.get(link.name, ())):
            parts.append(
                f'<geom name="{link.name}_pad_{number}" class="pad" size="{_vector(size)}" pos="{_vector(position)}"/>'
            )
    return "".join(parts) + "</body>" * (len(LINKS) + 1)


ARM_DEFAULTS = """<default class="servo"><joint axis="0 0 1" damping="0.60" frictionloss="0.052" armature="0.028"/></default>"""


def scene_xml(physics: Physics) -> str:
    """The whole model. Actuators have the joints' names; their controls are joint angles."""
    half = physics.block_size / 2
    friction = f"{physics.friction:.10g} 0.002 0.0001"
    servos = "".join(
        f'<position name="{joint}" joint="{joint}" kp="998.22" kv="2.731" forcerange="-2.94 2.94" '
        f'ctrlrange="{lower:.17g} {upper:.17g}"/>'
        for joint, lower, upper in zip(JOINTS[:5], LOWER, UPPER)
    )
    overhead = look_at(*OVERHEAD_CAMERA[:2], (0, 0, 1))
    overview = look_at((0.62, 0.42, 0.42), (0.16, 0.0, 0.08), (0, 0, 1))
    return f"""
<mujoco model="so101_pick_and_place">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.004166666666666667" integrator="implicitfast" cone="elliptic" impratio="10"
    iterations="10" ls_iterations="20"/>
  <size memory="4M"/>
  <statistic extent="1" center="0.2 0 0.1"/>
  <visual>
    <global offwidth="640" offheight="640"/>
    <quality shadowsize="0" offsamples="0" numslices="12" numstacks="6" numquads="1"/>
    <headlight ambient="0.5 0.5 0.5" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
    <map znear="0.005" zfar="5"/>
    <rgba haze="0.9 0.9 0.9 1"/>
  </visual>
  <default>
    {ARM_DEFAULTS}
    <default class="foot"><geom group="0" contype="1" conaffinity="0" friction="0.5" rgba="0.93 0.76 0.16 1"/></default>
    <default class="link"><geom group="1" contype="2" conaffinity="1" friction="0.3" rgba="0.93 0.76 0.16 1"/></default>
    <default class="motor"><geom group="1" contype="2" conaffinity="1" friction="0.3" rgba="0.2 0.2 0.22 1"/></default>
    <default class="seen"><geom group="1" contype="0" conaffinity="0" rgba="0.93 0.76 0.16 1"/></default>
    <default class="pad"><geom group="3" type="box" contype="2" conaffinity="1" condim="4" friction="{friction}" mass="0"
      priority="1" rgba="0.3 0.3 0.3 0.5"/></default>
    <default class="bowl"><geom group="0" type="box" contype="1" conaffinity="0" friction="0.3"
      rgba="0.10 0.35 0.80 1"/></default>
  </default>
  <worldbody>
    <light pos="0.3 -0.6 1.5" dir="-0.1 0.4 -0.9" diffuse="0.35 0.35 0.35" specular="0 0 0" castshadow="false"/>
    {_camera("overhead", overhead, OVERHEAD_CAMERA[2])}
    {_camera("overview", overview, 38)}
    <geom name="table" type="plane" size="0 0 1" group="0" contype="1" conaffinity="0" friction="0.5" rgba="0.86 0.84 0.80 1"/>
    {arm_body()}
    <body name="block"><freejoint name="block"/>
      <geom name="block" type="box" size="{half} {half} {half}" mass="{physics.block_mass}" group="1" contype="4"
        conaffinity="15" condim="4" friction="{friction}" rgba="0.85 0.10 0.10 1"/></body>
    <body name="bowl" mocap="true">{_bowl()}</body>
  </worldbody>
  <contact><exclude body1="base" body2="shoulder"/><exclude body1="base" body2="upper_arm"/></contact>
  <actuator>{servos}
    <position name="gripper" joint="gripper" kp="{physics.gripper_gain:.10g}" kv="0.5"
      forcerange="{-physics.gripper_torque:.10g} {physics.gripper_torque:.10g}" ctrlrange="{LOWER[5]:.17g} {UPPER[5]:.17g}"/>
  </actuator>
</mujoco>"""


def _bowl() -> str:
    """Walls around a disc; the disc is seen alone: what lies in the bowl lies on the table."""
    parts = [
        f'<geom name="bowl_floor" class="bowl" type="cylinder" size="{BOWL_RADIUS + 0.003} 0.0005" pos="0 0 0.0005" '
        'contype="0" rgba="0.20 0.50 0.95 1"/>'
    ]
    middle = BOWL_RADIUS + BOWL_WALL / 2
    length = (BOWL_RADIUS + BOWL_WALL) * math.tan(math.pi / _BOWL_SIDES)
    for number in range(_BOWL_SIDES):
        angle = 2 * math.pi * number / _BOWL_SIDES
        position = (middle * math.cos(angle), middle * math.sin(angle), BOWL_HEIGHT / 2)
        parts.append(
            f'<geom class="bowl" size="{_vector((BOWL_WALL / 2, length, BOWL_HEIGHT / 2))}" pos="{_vector(position)}" '
            f'euler="0 0 {angle:.12g}"/>'
        )
    return "".join(parts)
