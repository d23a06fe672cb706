"""Rotations, pinhole cameras and back-projection of depth pictures, in plain numpy.

Conventions: world and camera frames are right-handed, lengths in metres, angles in radians (a field of view in degrees).
Euler angles are extrinsic x, y, z (PyBullet's and CALVIN's): ``R = Rz(c) Ry(b) Rx(a)``. Quaternions are x, y, z, w.
A camera looks along its own -z with x to the right and y up (OpenGL); row 0 of a picture is its top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def euler_to_matrix(euler: ArrayLike) -> Array:
    """Rotation matrices of extrinsic x, y, z angles: (..., 3) -> (..., 3, 3) float64."""
    angles: Array = np.asarray(euler, dtype=np.float64)
    a, b, c = (angles[..., axis] for axis in range(3))
    ca, sa, cb, sb, cc, sc = np.cos(a), np.sin(a), np.cos(b), np.sin(b), np.cos(c), np.sin(c)
    rows = (
        (cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa),
        (sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa),
        (-sb, cb * sa, cb * ca),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_euler(matrix: ArrayLike) -> Array:
    """Inverse of `euler_to_matrix`: (..., 3, 3) -> (..., 3), the middle angle in [-pi/2, pi/2].

    Where the middle angle is +-pi/2 only a sum or difference of the outer two is defined; the third is then set to 0.
    """
    m: Array = np.asarray(matrix, dtype=np.float64)
    cos_b = np.hypot(m[..., 0, 0], m[..., 1, 0])
    locked = cos_b < 1e-9
    a = np.where(locked, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    b = np.arctan2(-m[..., 2, 0], cos_b)
    c = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.stack([a, b, c], axis=-1)


def matrix_to_quaternion(matrix: ArrayLike) -> Array:
    """Unit quaternions (x, y, z, w), w >= 0, of rotation matrices: (..., 3, 3) -> (..., 4) float64."""
    m: Array = np.asarray(matrix, dtype=np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    yz, zx, xy = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sum_xy, sum_xz, sum_yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # Four equal forms, each four times one component times the quaternion; the longest loses no digits.
    forms = np.stack(
        [
            np.stack([1 + xx - yy - zz, sum_xy, sum_xz, yz], axis=-1),
            np.stack([sum_xy, 1 - xx + yy - zz, sum_yz, zx], axis=-1),
            np.stack([sum_xz, sum_yz, 1 - xx - yy + zz, xy], axis=-1),
            np.stack([yz, zx, xy, 1 + xx + yy + zz], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.einsum("...ii->...i", forms), axis=-1)
    quaternion = np.take_along_axis(forms, best[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    return np.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def quaternion_to_matrix(quaternion: ArrayLike) -> Array:
    """Rotation matrices of quaternions (x, y, z, w) of any length but zero: (..., 4) -> (..., 3, 3) float64."""
    values: Array = np.asarray(quaternion, dtype=np.float64)
    values = values / np.linalg.norm(values, axis=-1, keepdims=True)
    x, y, z, w = (values[..., element] for element in range(4))
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def wrap_angle(angle: ArrayLike) -> Array:
    """The same angle in [-pi, pi)."""
    return (np.asarray(angle, dtype=np.float64) + math.pi) % (2 * math.pi) - math.pi


def look_at(eye: ArrayLike, target: ArrayLike, up: ArrayLike) -> Array:
    """Camera-to-world pose (4, 4) of a camera at `eye` that looks at `target`, all three (3,)."""
    place: Array = np.asarray(eye, dtype=np.float64)
    forward: Array = np.asarray(target, dtype=np.float64) - place
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, np.asarray(up, dtype=np.float64))
    right = right / np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, np.cross(right, forward), -forward, place
    return pose


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion, its principal point at the picture's centre.

    Attributes:
        name: how data and environments call it, e.g. ``"static"``.
        width, height: pixels.
        fovy: vertical field of view in degrees.
        near, far: clipping planes in metres.
    """

    name: str
    width: int
    height: int
    fovy: float
    near: float
    far: float

    @property
    def focal(self) -> float:
        """Focal length in pixels, the same along rows and columns."""
        return self.height / (2 * math.tan(math.radians(self.fovy) / 2))


CALVIN_STATIC = Camera("static", 200, 200, 10.0, 0.01, 10.0)
CALVIN_GRIPPER = Camera("gripper", 84, 84, 75.0, 0.01, 2.0)
CALVIN_STATIC_POSE = look_at(
    (2.871459009488717, -2.166602199425597, 2.555159848480571),
    (-0.026242351159453392, -0.0302329882979393, 0.3920000493526459),
    (0.4041403970338857, 0.22629790978217404, 0.8862616969685161),
)
CALVIN_STATIC_POSE.flags.writeable = False

_HAND_TO_TCP = 0.14  # along the hand's z
_HAND_TO_CAMERA = np.array((-0.1, 0.0, 0.0))
_CAMERA_LINK = euler_to_matrix((1.3, 0.0, -1.57))  # 1.57, not pi/2: the simulator's own value


def calvin_gripper_pose(robot_obs: ArrayLike) -> Array:
    """Camera-to-world pose (4, 4) of CALVIN's gripper camera, from the first six numbers of `robot_obs` (TCP pose) alone."""
    state: Array = np.asarray(robot_obs, dtype=np.float64)
    hand = euler_to_matrix(state[3:6])
    eye = state[:3] - hand[:, 2] * _HAND_TO_TCP + hand @ _HAND_TO_CAMERA
    link = hand @ _CAMERA_LINK
    return look_at(eye, eye + link[:, 1], -link[:, 2])


def back_project(
    depth: NDArray[np.floating],
    camera: Camera,
    pose: Array,
    pixel_offset: tuple[float, float] = (0.5, 0.5),
    origin: tuple[int, int] = (0, 0),
    stride: int = 1,
) -> NDArray[np.float32]:
    """World points of a depth picture.

    Args:
        depth: (h, w) metres along the optical axis (not along the ray).
        camera: the camera of the *whole* picture.
        pose: (4, 4) camera-to-world.
        pixel_offset: (column, row) of the sampled place inside a pixel: (0.5, 0.5) is a pixel's centre, exact for OpenGL;
            PyBullet's software renderer samples at (0, 1).
        origin: (row, column) of `depth`'s first pixel in the whole picture, where `depth` was cut out of it.
        stride: step between neighbouring pixels of `depth` in the whole picture.

    Returns:
        (h * w, 3) float32 in row-major order; a depth of 0 gives the camera's own position, NaN gives NaN.

    Raises:
        ValueError: the picture is larger than the camera's.
    """
    height, width = depth.shape
    if origin[0] + (height - 1) * stride >= camera.height or origin[1] + (width - 1) * stride >= camera.width:
        raise ValueError(
            f"Camera {camera.name!r} has {camera.height} x {camera.width} pixels (rows x columns); a depth picture of "
            f"{height} x {width} from row {origin[0]}, column {origin[1]} with stride {stride} does not fit in."
        )
    rays = _rays(camera, tuple(pixel_offset), tuple(origin), stride, (height, width))
    points = rays @ np.asarray(pose[:3, :3].T, dtype=np.float32)
    points *= depth.reshape(-1, 1).astype(np.float32, copy=False)
    points += np.asarray(pose[:3, 3], dtype=np.float32)
    return points


@lru_cache(maxsize=16)
def _rays(
    camera: Camera, offset: tuple[float, ...], origin: tuple[int, ...], stride: int, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Points at depth 1 in the camera's frame, (h * w, 3)."""
    rows = origin[0] + stride * np.arange(shape[0]) + offset[1] - camera.height / 2
    columns = origin[1] + stride * np.arange(shape[1]) + offset[0] - camera.width / 2
    picture = np.empty((*shape, 3), dtype=np.float32)
    picture[..., 0] = columns / camera.focal
    picture[..., 1] = -rows[:, None] / camera.focal
    picture[..., 2] = -1.0
    rays = picture.reshape(-1, 3)
    rays.flags.writeable = False
    return rays
