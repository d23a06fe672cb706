"""Forward and inverse kinematics of the SO-101, its units, and its gripper.

The tool's frame is the site ``gripperframe`` on the inner face of the fixed jaw's tip: x is the direction of approach, z points
from the fixed to the moving jaw.
"""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_robot.envs.so101_model import ARM_DEFAULTS, JOINTS, LOWER, UPPER, arm_body

Array = NDArray[np.float64]

UNITS = ("degrees", "normalized")
_LOWER, _UPPER = np.array(LOWER), np.array(UPPER)


def to_units(joints: ArrayLike, units: str = "degrees") -> Array:
    """LeRobot's numbers of joint angles.

    Args:
        joints: (..., 6) radians.
        units: "degrees" (the gripper in 0 closed to 100 open) or "normalized" (-100 to 100 over each joint's range, the gripper
            the same 0 to 100).

    Returns:
        (..., 6).
    """
    values = np.asarray(joints, dtype=np.float64)
    share = (values - _LOWER) / (_UPPER - _LOWER)
    result: Array = np.degrees(values) if units == "degrees" else 200 * share - 100
    result[..., 5] = 100 * share[..., 5]
    return result


def from_units(values: ArrayLike, units: str = "degrees") -> Array:
    """Joint angles (..., 6) in radians of LeRobot's numbers; the inverse of `to_units`."""
    given = np.asarray(values, dtype=np.float64)
    joints: Array = np.radians(given) if units == "degrees" else _LOWER + (_UPPER - _LOWER) * (given + 100) / 200
    joints[..., 5] = _LOWER[5] + (_UPPER[5] - _LOWER[5]) * given[..., 5] / 100
    return joints


class So101Kinematics:
    """Kinematics on a model of the bare arm, apart from any simulation.

    Attributes:
        position: (3,) of the tool's frame at the last `forward`, metres.
        error: metres between the wanted and the reached position at the end of the last `inverse`.
    """

    def __init__(self) -> None:
        self._model = mujoco.MjModel.from_xml_string(
            f'<mujoco><compiler angle="radian" autolimits="true"/><default>{ARM_DEFAULTS}</default>'
            f"<worldbody>{arm_body(shapes=False)}</worldbody></mujoco>"
        )
        self._data = mujoco.MjData(self._model)
        self._site = self._model.site("gripperframe").id
        self.position: Array = self._data.site_xpos[self._site]
        self._matrix: Array = self._data.site_xmat[self._site]
        self._jacobian = np.zeros((6, len(JOINTS)))
        self.error = 0.0

    @property
    def matrix(self) -> Array:
        """(3, 3) orientation of the tool's frame at the last `forward`: its axes are the columns."""
        return self._matrix.reshape(3, 3)

    def forward(self, joints: Array) -> None:
        """Places the arm at (5,) or (6,) joint angles in radians."""
        self._data.qpos[: len(joints)] = joints
        mujoco.mj_kinematics(self._model, self._data)

    def jacobian(self) -> Array:
        """(6, 6) of the tool's position and rotation (world axes) by the joints, at the last `forward`; not a copy."""
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        return self._jacobian

    def inverse(
        self,
        position: ArrayLike,
        rotation: ArrayLike | None,
        start: Array,
        *,
        rotation_weight: float = 0.01,
        damping: float = 0.02,
        tolerance: float = 2e-4,
        iterations: int = 30,
    ) -> Array:
        """Joint angles that bring the tool to a pose, by damped least squares within the limits.

        Five joints cannot meet six numbers. Position comes first: the rotation counts with a small weight (metres per radian),
        and the last steps leave it aside. A joint at its limit that would move outwards is taken out and the step solved again.

        Args:
            position: (3,) metres.
            rotation: (3, 3) wanted axes of the tool's frame as columns, or None for any.
            start: (5,) or (6,) angles from which the search starts: the present joints.
            rotation_weight: of the rotation against the position.
            damping: of the least squares, in the Jacobian's unit.
            tolerance: metres at which the position is good.
            iterations: at most.

        Returns:
            (5,) radians, a new array; `error` tells how far from `position` they are.
        """
        place = np.asarray(position, dtype=np.float64)
        wanted = None if rotation is None else np.asarray(rotation, dtype=np.float64)
        joints: Array = np.clip(np.asarray(start, dtype=np.float64)[:5], _LOWER[:5], _UPPER[:5])
        first = iterations if wanted is None else (2 * iterations) // 3
        self.forward(joints)
        for number in range(iterations):
            turning = wanted is not None and number < first
            jacobian = self.jacobian()[: 6 if turning else 3, :5].copy()
            error = np.empty(len(jacobian))
            error[:3] = place - self.position
            if not turning and np.linalg.norm(error[:3]) < tolerance:
                break
            if turning:
                assert wanted is not None
                error[3:] = rotation_weight * rotation_vector(wanted @ self.matrix.T)
                jacobian[3:] *= rotation_weight
            step = _step_within(joints, jacobian, error, damping if not turning else min(damping, rotation_weight))
            joints = np.clip(joints + step, _LOWER[:5], _UPPER[:5])
            self.forward(joints)
            if turning and np.abs(step).max() < 1e-4:
                first = number  # settled: the rest is for the position
        self.error = float(np.linalg.norm(place - self.position))
        return joints


def _step_within(joints: Array, jacobian: Array, error: Array, damping: float) -> Array:
    """(5,) damped least-squares step of at most 0.2 rad that no limit absorbs."""
    free = jacobian
    step: Array = np.zeros(5)
    identity = damping**2 * np.eye(len(error))
    for _ in range(5):
        step = free.T @ np.linalg.solve(free @ free.T + identity, error)
        step *= min(1.0, 0.2 / (float(np.abs(step).max()) + 1e-12))
        outward = ((joints <= _LOWER[:5]) & (step < 0)) | ((joints >= _UPPER[:5]) & (step > 0))
        if not outward.any():
            break
        free = np.where(outward, 0.0, free)
    return step


def rotation_vector(matrix: Array) -> Array:
    """(3,) axis times angle in [0, pi] of a rotation matrix (3, 3), also near pi."""
    quaternion, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(matrix).reshape(-1))
    if quaternion[0] < 0:
        quaternion *= -1
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector
