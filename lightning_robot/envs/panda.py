"""The Franka Panda of the play table: its model from primitives, forward and inverse kinematics.

The chain, its joint limits and the base's place are those of CALVIN's robot; masses and shapes of the links are simplified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BASE = (-0.34, -0.46, 0.24)
REST = (-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866)
LIMITS = (
    (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
    (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
)
FINGER_OPEN = 0.04  # m per finger
FARTHEST = 0.2  # m or rad of a pose error that one step of the inverse kinematics looks at

# Per link: translation and rotation (extrinsic x, y, z) from its parent, mass, capsule (from, to, radius) in its own frame.
_HALF = math.pi / 2
_LINKS = (
    ((0, 0, 0.333), 0.0, 2.7, ((0, 0, -0.135), (0, -0.03, 0), 0.058)),
    ((0, 0, 0), -_HALF, 2.73, ((0, 0, 0.05), (0, -0.135, 0), 0.058)),
    ((0, -0.316, 0), _HALF, 2.04, ((0, 0, -0.065), (0.0825, 0.05, 0), 0.055)),
    ((0.0825, 0, 0), _HALF, 2.08, ((0, 0, 0.05), (-0.0825, 0.07, 0), 0.055)),
    ((-0.0825, 0.384, 0), -_HALF, 3.0, ((0, 0, -0.215), (0, 0.06, -0.01), 0.05)),
    ((0, 0, 0), _HALF, 1.3, ((0, 0, 0), (0.085, 0.02, 0), 0.047)),
    ((0.088, 0, 0), _HALF, 0.2, ((0, 0, 0.05), (0, 0, 0.075), 0.042)),
)


def _vector(values: Sequence[float]) -> str:
    return " ".join(f"{value:.10g}" for value in values)


def panda_body(geoms: bool = True) -> str:
    """MJCF of the robot: bodies ``arm_1`` … ``arm_7``, ``hand``, ``finger_1``, ``finger_2``; site ``tcp``; camera ``gripper``.

    Args:
        geoms: with shapes (named by the body they belong to, as contacts are reported) or, for kinematics alone, without.
    """

    def shape(text: str) -> str:
        return text if geoms else ""

    parts = [f'<body name="arm_0" pos="{_vector(BASE)}">']
    parts.append(shape('<geom name="arm_0" class="robot" type="box" pos="-0.041 0 0.07" size="0.113 0.095 0.07"/>'))
    for index, (position, roll, mass, (start, end, radius)) in enumerate(_LINKS):
        lower, upper = LIMITS[0][index] - 0.07, LIMITS[1][index] + 0.07
        parts.append(
            f'<body name="arm_{index + 1}" pos="{_vector(position)}" euler="{roll:.12g} 0 0" gravcomp="1">'
            f'<joint name="arm_{index + 1}" class="arm" axis="0 0 1" range="{lower:.6g} {upper:.6g}"/>'
        )
        if geoms:
            parts.append(
                f'<geom name="arm_{index + 1}" class="robot" type="capsule" fromto="{_vector((*start, *end))}" '
                f'size="{radius}" mass="{mass}"/>'
            )
        else:
            parts.append(f'<inertial pos="0 0 0" mass="{mass}" diaginertia="0.02 0.02 0.02"/>')
    parts.append(f'<body name="hand" pos="0 0 0.107" euler="0 0 {-math.pi / 4:.12g}" gravcomp="1">')
    parts.append(shape('<geom name="hand" class="robot" type="box" pos="0 0 0.0185" size="0.024 0.1 0.0385" mass="0.81"/>'))
    parts.append('<site name="tcp" pos="0 0 0.14" rgba="0 0 0 0"/>')
    # The camera's link looks along its own +y with -z up; MuJoCo's cameras look along -z with y up.
    parts.append('<body name="gripper_camera" pos="-0.1 0 0" euler="1.3 0 -1.57">')
    parts.append('<camera name="gripper" xyaxes="-1 0 0 0 0 -1" fovy="75"/></body>')
    for index, side in ((1, 1), (2, -1)):
        if not geoms:
            break
        parts.append(
            f'<body name="finger_{index}" pos="0 0 0.0584" gravcomp="1">'
            f'<joint name="finger_{index}" class="finger" axis="0 {side} 0" range="0 {FINGER_OPEN}"/>'
            f'<geom name="finger_{index}" class="finger" type="box" pos="0 {side * 0.013} 0.0283" '
            'size="0.0105 0.009 0.0283" mass="0.07"/>'
            f'<geom name="pad_{index}" class="finger" type="box" pos="0 {side * 0.0055} 0.077" '
            'size="0.01 0.0055 0.0204" mass="0.03"/>'
            "</body>"
        )
    return "".join(parts) + "</body>" * (len(_LINKS) + 2)


def panda_actuators() -> str:
    """Position servos ``arm_1`` … ``finger_2``. Damped so that a step decays by half per control step (1/30 s), as CALVIN's."""
    arm = "".join(f'<position name="arm_{index}" class="arm" joint="arm_{index}"/>' for index in range(1, 8))
    return arm + "".join(f'<position name="finger_{index}" class="finger" joint="finger_{index}"/>' for index in (1, 2))


PANDA_DEFAULTS = """
  <default class="arm"><joint armature="0.3"/><position kp="1600" kv="76" forcerange="-120 120"/></default>
  <default class="finger"><joint type="slide" armature="0.3"/><position kp="1000" kv="40" forcerange="-60 60"/>
    <geom group="1" contype="2" conaffinity="1" friction="0.7" rgba="0.55 0.55 0.57 1"/></default>
  <default class="robot"><geom group="1" contype="2" conaffinity="1" friction="0.5" rgba="0.88 0.88 0.9 1"/></default>
"""


class PandaKinematics:
    """Forward and inverse kinematics on a model of the bare arm, apart from any simulation.

    Angles are extrinsic x, y, z Euler angles, positions world metres; both belong to the point between the finger tips (TCP).
    """

    def __init__(self) -> None:
        self._model = mujoco.MjModel.from_xml_string(
            f'<mujoco><compiler angle="radian" eulerseq="XYZ" autolimits="true"/><default>{PANDA_DEFAULTS}</default>'
            f"<worldbody>{panda_body(geoms=False)}</worldbody></mujoco>"
        )
        self._data = mujoco.MjData(self._model)
        self._tcp = self._model.site("tcp").id
        self.position: Array = self._data.site_xpos[self._tcp]
        self._matrix: Array = self._data.site_xmat[self._tcp]
        self.camera_position: Array = self._data.xpos[self._model.body("gripper_camera").id]
        self._jacobian = np.zeros((6, 7))
        self._error = np.zeros(6)
        self._quaternion, self._target_quaternion, self._difference = np.zeros(4), np.zeros(4), np.zeros(4)
        self.rest = np.array(REST)
        self._lower, self._upper = np.array(LIMITS[0]), np.array(LIMITS[1])

    def forward(self, joints: Array) -> None:
        """Places the arm; `position`, `matrix` and `camera_position` then hold for these (7,) angles."""
        self._data.qpos[:] = joints
        mujoco.mj_kinematics(self._model, self._data)

    @property
    def matrix(self) -> Array:
        """(3, 3) orientation of the TCP at the last `forward`."""
        return self._matrix.reshape(3, 3)

    def euler(self) -> tuple[float, float, float]:
        """Orientation of the TCP at the last `forward` as Euler angles."""
        m = self._matrix.tolist()
        cosine = math.hypot(m[0], m[3])
        if cosine < 1e-9:
            return math.atan2(-m[5], m[4]), math.atan2(-m[6], cosine), 0.0
        return math.atan2(m[7], m[8]), math.atan2(-m[6], cosine), math.atan2(m[3], m[0])

    def pose_error(self, position: Array, quaternion: Array) -> Array:
        """(6,) translation and rotation vector (world axes) from the placed TCP to a pose (quaternion w, x, y, z)."""
        np.subtract(position, self.position, out=self._error[:3])
        mujoco.mju_mat2Quat(self._quaternion, self._matrix)
        mujoco.mju_negQuat(self._quaternion, self._quaternion)
        mujoco.mju_mulQuat(self._difference, quaternion, self._quaternion)
        mujoco.mju_quat2Vel(self._error[3:], self._difference, 1.0)
        return self._error

    def inverse(
        self,
        position: Array,
        euler: Sequence[float] | Array,
        start: Array,
        iterations: int = 3,
        damping: float = 0.02,
        rest_gain: float = 0.1,
    ) -> Array:
        """Joint angles for a TCP pose by damped least squares, drawn towards the rest pose in the null space.

        Where the pose is out of reach the arm comes near it: damping and a bound on each step keep it calm.

        Args:
            position: (3,) metres.
            euler: three angles.
            start: (7,) where the search starts: the previous solution.
            iterations: steps at most; fewer once the error is below 0.01 mm.
            damping: of the least squares at the pose, in the Jacobian's unit.
            rest_gain: share of the distance to the rest pose that a step may take up in the null space.

        Returns:
            (7,) within `LIMITS`, a new array.
        """
        _euler_to_quaternion(euler, self._target_quaternion)
        joints: Array = np.clip(start, self._lower, self._upper)
        jacobian, identity = self._jacobian, np.eye(6)
        for _ in range(iterations):
            self._data.qpos[:] = joints
            mujoco.mj_kinematics(self._model, self._data)
            mujoco.mj_comPos(self._model, self._data)
            error = self.pose_error(position, self._target_quaternion)
            size = float(np.abs(error).max())
            error /= max(1.0, size / FARTHEST)
            # Far from the pose the damping grows, or an arm at full stretch would swing about; the pull makes way.
            damped = (damping**2 + 0.5 * min(size, FARTHEST)) * identity
            mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._tcp)
            pull = rest_gain * min(1.0, 0.01 / (size + 1e-9)) * (self.rest - joints)
            step = pull + jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damped, error - jacobian @ pull)
            largest = np.abs(step).max()
            if largest > 0.2:
                step *= 0.2 / largest
            moved: Array = np.clip(joints + step, self._lower, self._upper)
            blocked = moved != joints + step
            if blocked.any():  # a joint at its limit absorbs the step for nothing: solve again without it
                free = np.where(blocked, 0.0, jacobian)
                other = free.T @ np.linalg.solve(free @ free.T + damped, error)
                moved[~blocked] = np.clip(joints + np.clip(other, -0.2, 0.2), self._lower, self._upper)[~blocked]
            joints = moved
            if largest < 1e-5:
                break
        return joints


def _euler_to_quaternion(euler: Sequence[float] | Array, out: Array) -> None:
    """Quaternion (w, x, y, z) of extrinsic x, y, z angles."""
    ca, sa = math.cos(euler[0] / 2), math.sin(euler[0] / 2)
    cb, sb = math.cos(euler[1] / 2), math.sin(euler[1] / 2)
    cc, sc = math.cos(euler[2] / 2), math.sin(euler[2] / 2)
    out[:] = (
        ca * cb * cc + sa * sb * sc,
        sa * cb * cc - ca * sb * sc,
        ca * sb * cc + sa * cb * sc,
        ca * cb * sc - sa * sb * cc,
    )
