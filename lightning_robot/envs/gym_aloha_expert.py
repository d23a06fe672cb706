"""A scripted expert for gym-aloha's tasks.

Its way points are poses of the grippers in time; inverse kinematics makes joint targets of them, which are the actions. By as
much as tool, or what it carries, stays behind, the targets are slowly moved ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOOL = 0.135  # m from the gripper's link to between its fingers
MEETING = np.array([0.0, 0.5, 0.25])  # m, where the cube changes hands
STEEP = np.deg2rad(60)  # from the horizontal, at which things are picked up
LOWEST = 0.02  # m, of the tool above the table: a finger's tips reach below it
OPEN, CLOSED = 1.0, 0.0
_GAIN, _MOST = 0.04, 0.04  # per step, and m: correction of where the tool stays behind


@dataclass(frozen=True, eq=False)
class Waypoint:
    """Where an arm is to be at a step.

    Attributes:
        step: of the episode.
        position: (3,) of the tool, or of what it carries.
        rotation: (3, 3) of the gripper.
        gripper: 0 closed, 1 open.
        carries: body whose position is meant; the tool's when None.
    """

    step: int
    position: Array
    rotation: Array
    gripper: float
    carries: str | None = None


class Arm:
    """Kinematics of one arm: six joints, and the tool between the fingers.

    Args:
        model: of both arms.
        name: "left" or "right".
    """

    def __init__(self, model: mujoco.MjModel, name: str) -> None:
        joints = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
        ids = [model.joint(f"vx300s_{name}/{joint}").id for joint in joints]
        self._model, self._data = model, mujoco.MjData(model)
        self._qpos, self._dofs = model.jnt_qposadr[ids], model.jnt_dofadr[ids]
        self._low, self._high = model.jnt_range[ids].T
        self._link = model.body(f"vx300s_{name}/gripper_link").id
        self._jacobian = np.zeros((6, model.nv))

    def joints(self, data: mujoco.MjData) -> Array:
        """(6,) joint angles."""
        return data.qpos[self._qpos].copy()

    def tool(self, data: mujoco.MjData) -> tuple[Array, Array]:
        """Position (3,) and rotation (3, 3) of the tool."""
        rotation = data.xmat[self._link].reshape(3, 3)
        return data.xpos[self._link] + TOOL * rotation[:, 0], rotation

    def inverse(self, position: Array, rotation: Array, start: Array, iterations: int = 10) -> Array:
        """Joints (6,) within their limits that bring the tool nearest to a pose, by damped least squares from `start`."""
        data, joints, change = self._data, start.copy(), np.zeros(3)
        for _ in range(iterations):
            data.qpos[self._qpos] = joints
            mujoco.mj_kinematics(self._model, data)
            mujoco.mj_comPos(self._model, data)
            place, turn = self.tool(data)
            wanted = np.zeros(4)
            mujoco.mju_mat2Quat(wanted, (rotation @ turn.T).ravel())
            mujoco.mju_quat2Vel(change, wanted, 1.0)
            error = np.concatenate([position - place, 0.3 * change])
            mujoco.mj_jac(self._model, data, self._jacobian[:3], self._jacobian[3:], place, self._link)
            jacobian = self._jacobian[:, self._dofs] * np.array([1.0, 1, 1, 0.3, 0.3, 0.3])[:, None]
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
            joints = np.clip(joints + np.clip(step, -0.2, 0.2), self._low, self._high)
        return joints


class Expert:
    """Does a task from the present state on.

    Args:
        model, data: of the simulation, which is only read.
        task: "transfer_cube" or "insertion".
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, task: str) -> None:
        self._model, self._data = model, data
        self._arms = {name: Arm(model, name) for name in ("left", "right")}
        self._step = 0
        self._corrections = {name: np.zeros(3) for name in self._arms}
        self._joints = {name: arm.joints(data) for name, arm in self._arms.items()}
        plans = self._transfer() if task == "transfer_cube" else self._insertion()
        self._plans = {}
        for name, arm in self._arms.items():
            place, turn = arm.tool(data)
            self._plans[name] = [Waypoint(0, place.copy(), turn.copy(), CLOSED), *plans[name]]

    def _transfer(self) -> dict[str, list[Waypoint]]:
        down, across = _pointing(-1, STEEP), _rolled(_pointing(1, 0.0))
        return {
            "right": [
                *_pick(self._resting("box"), down, None),
                Waypoint(200, MEETING, down, CLOSED),
                Waypoint(270, MEETING, down, CLOSED),
                Waypoint(285, MEETING, down, OPEN),
                Waypoint(320, _beside(MEETING, 0.12, 0.05), down, OPEN),
            ],
            "left": [
                Waypoint(100, _beside(MEETING, -0.20), across, OPEN),
                Waypoint(200, _beside(MEETING, -0.12), across, OPEN),
                Waypoint(235, _beside(MEETING, -0.01), across, OPEN),
                Waypoint(245, _beside(MEETING, -0.01), across, OPEN),
                Waypoint(265, _beside(MEETING, -0.01), across, CLOSED),
                Waypoint(285, _beside(MEETING, -0.01), across, CLOSED),
                Waypoint(330, _beside(MEETING, -0.10), across, CLOSED),
            ],
        }

    def _insertion(self) -> dict[str, list[Waypoint]]:
        plans = {}
        for name, thing, side in (("right", "peg", 1), ("left", "socket", -1)):
            turn = _pointing(-side, STEEP)
            apart, together = _beside(MEETING, 0.10 * side), _beside(MEETING, 0.045 * side)
            plans[name] = [
                *_pick(self._resting(thing), turn, thing),
                Waypoint(210, apart, turn, CLOSED, thing),
                Waypoint(250, apart, turn, CLOSED, thing),
                Waypoint(320, together, turn, CLOSED, thing),
            ]
        return plans

    def _resting(self, thing: str) -> Array:
        """Where a thing will lie, which the package drops from a little above the table."""
        body = self._model.body(thing).id
        geoms = np.flatnonzero(self._model.geom_bodyid == body)
        lowest = min(float(self._model.geom_pos[geom, 2] - self._model.geom_size[geom, 2]) for geom in geoms)
        return np.array([*self._data.xpos[body][:2], -lowest])

    def act(self) -> NDArray[np.float32]:
        """(14,) the action for the present step."""
        self._step += 1
        command = [np.append(self._joints_of(name), self._at(name)[2]) for name in ("left", "right")]
        return np.concatenate(command).astype(np.float32)

    def _joints_of(self, name: str) -> Array:
        position, rotation, _ = self._at(name)
        carried = self._next(name).carries
        reached = self._arms[name].tool(self._data)[0] if carried is None else self._data.body(carried).xpos
        behind = position - reached
        self._corrections[name] = np.clip(self._corrections[name] + _GAIN * behind, -_MOST, _MOST)
        self._joints[name] = self._arms[name].inverse(position + self._corrections[name], rotation, self._joints[name])
        return self._joints[name]

    def _next(self, name: str) -> Waypoint:
        """The way point that an arm is heading for."""
        plan = self._plans[name]
        return next((point for point in plan if point.step >= self._step), plan[-1])

    def _at(self, name: str) -> tuple[Array, Array, float]:
        """Pose and gripper that the plan has at the present step."""
        plan, two = self._plans[name], self._next(name)
        if self._step >= two.step:
            return two.position, two.rotation, two.gripper
        one = plan[plan.index(two) - 1]
        share = (self._step - one.step) / (two.step - one.step)
        smooth = 0.5 - 0.5 * np.cos(np.pi * share)
        position = one.position + smooth * (two.position - one.position)
        return position, _between(one.rotation, two.rotation, smooth), one.gripper + share * (two.gripper - one.gripper)


def _pick(place: Array, turn: Array, thing: str | None) -> list[Waypoint]:
    """From above down to what lies there, and a firm grip."""
    grip = np.array([*place[:2], max(place[2], LOWEST)])
    return [
        Waypoint(70, _beside(place, 0.0, 0.10), turn, OPEN),
        Waypoint(100, grip, turn, OPEN),
        Waypoint(115, grip, turn, OPEN),
        Waypoint(135, grip, turn, CLOSED),
        Waypoint(145, _beside(place, 0.0, 0.01), turn, CLOSED, thing),
    ]


def _beside(place: Array, x: float, z: float = 0.0) -> Array:
    return place + np.array([x, 0.0, z])


def _pointing(side: int, pitch: float) -> Array:
    """Rotation of a gripper that points to +x (side 1) or -x (-1), and downwards by an angle; its fingers close along y."""
    forward = np.array([side * np.cos(pitch), 0.0, -np.sin(pitch)])
    across = np.array([0.0, float(side), 0.0])
    return np.stack([forward, across, np.cross(forward, across)], axis=1)


def _rolled(rotation: Array) -> Array:
    """The same, turned about its pointing direction by a quarter: fingers close along what was its z."""
    return rotation @ np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def _between(one: Array, two: Array, share: Any) -> Array:
    """A rotation on the shortest way from one to two."""
    quaternion, velocity = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, (two @ one.T).ravel())
    mujoco.mju_quat2Vel(velocity, quaternion, 1.0)
    angle = float(np.linalg.norm(velocity))
    if angle < 1e-9:
        return two
    turn, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(turn, velocity / angle, angle * share)
    mujoco.mju_quat2Mat(matrix, turn)
    return matrix.reshape(3, 3) @ one
