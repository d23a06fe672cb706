"""Rotations against scipy-free identities; cameras against points measured in the original simulator."""

import numpy as np
import pytest

from lightning_robot import geometry
from lightning_robot.geometry import CALVIN_GRIPPER, CALVIN_STATIC, CALVIN_STATIC_POSE, Camera, back_project

# camera, (column, row), world point for pixel offset (0, 1), the same for (0, 0), tolerance of the former
WORLD_POINTS = [
    ("static", (150, 110), (0.304443, -0.120389, 0.440056), (0.304340, -0.118032, 0.442522), 2e-6),
    ("static", (60, 150), (-0.562805, 0.045585, 0.000016), (-0.562933, 0.048492, 0.003058), 2e-6),
    ("static", (30, 190), (-0.563768, -0.184783, 0.000003), (-0.563892, -0.181946, 0.002971), 2e-6),
    ("static", (155, 94), (0.315800, -0.074500, 0.472200), None, 6e-5),
    ("static", (154, 98), (0.312100, -0.084300, 0.462600), None, 6e-5),
    ("static", (110, 150), (0.173292, -0.259033, 0.374825), (0.173188, -0.256643, 0.377325), 2e-6),
    ("static", (165, 8), (0.325917, 0.150932, 0.664286), (0.325813, 0.153294, 0.666757), 2e-6),
    ("gripper", (10, 70), (-0.125701, -0.436646, 0.000001), (-0.125686, -0.427481, 0.002546), 2e-6),
    ("gripper", (42, 60), (0.178821, -0.347121, 0.000001), (0.178836, -0.337532, 0.002664), 2e-6),
    ("gripper", (70, 20), (0.284105, -0.180000, 0.398712), (0.284111, -0.176385, 0.399716), 2e-6),
]


@pytest.fixture(scope="module")
def frame(shared):
    with np.load(shared / "data/calvin_sample/training/episode_0003120.npz") as archive:
        return {key: archive[key] for key in archive.files}


def test_focal_lengths_and_static_pose():
    assert CALVIN_STATIC.focal == pytest.approx(1143.0052302761342, abs=1e-9)
    assert CALVIN_GRIPPER.focal == pytest.approx(54.73546565933064, abs=1e-9)
    published = [
        [0.723244476, -0.030260576, 0.689928720, 2.871459182],
        [0.514123377, 0.690610503, -0.508659244, -2.166602320],
        [-0.461079736, 0.722593461, 0.515037967, 2.555159982],
        [0, 0, 0, 1],
    ]
    np.testing.assert_allclose(CALVIN_STATIC_POSE, published, atol=4e-7)


@pytest.mark.parametrize(("name", "pixel", "exact", "zero", "tolerance"), WORLD_POINTS)
def test_world_points_of_a_real_frame(frame, name, pixel, exact, zero, tolerance):
    camera = {"static": CALVIN_STATIC, "gripper": CALVIN_GRIPPER}[name]
    pose = CALVIN_STATIC_POSE if name == "static" else geometry.calvin_gripper_pose(frame["robot_obs"])
    column, row = pixel
    points = back_project(frame[f"depth_{name}"], camera, pose, (0, 1)).reshape(camera.height, camera.width, 3)
    np.testing.assert_allclose(points[row, column], exact, atol=tolerance)
    if zero is not None:
        points = back_project(frame[f"depth_{name}"], camera, pose, (0, 0)).reshape(camera.height, camera.width, 3)
        np.testing.assert_allclose(points[row, column], zero, atol=2e-6)


def test_gripper_camera_position(frame):
    pose = geometry.calvin_gripper_pose(frame["robot_obs"])
    np.testing.assert_allclose(pose[:3, 3], (0.178805, -0.310703, 0.575492), atol=1e-6)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)


@pytest.mark.parametrize(
    ("position", "quaternion", "camera"),
    [
        ((0.440256, -0.495832, 0.855310), (-0.024902, -0.031905, 0.472232, 0.880545), (0.396219, -0.581076, 0.712502)),
        ((-0.749079, -0.501444, 1.093693), (0.398157, 0.871575, -0.15598, -0.239787), (-0.616377, -0.566996, 1.181404)),
    ],
)
def test_gripper_camera_follows_forward_kinematics(position, quaternion, camera):
    euler = geometry.matrix_to_euler(geometry.quaternion_to_matrix(quaternion))
    np.testing.assert_allclose(geometry.calvin_gripper_pose([*position, *euler])[:3, 3], camera, atol=3e-6)


def test_blue_block_comes_back_as_a_cube(frame):
    """The 4 cm block's visible pixels lie in its own frame within half an edge."""
    points = back_project(frame["depth_static"], CALVIN_STATIC, CALVIN_STATIC_POSE, (0, 1))
    color = frame["rgb_static"].reshape(-1, 3).astype(int)
    blue = (color[:, 2] > 60) & (color[:, 0] < 10) & (color[:, 1] < 10)
    block = frame["scene_obs"][12:18]
    near = np.linalg.norm(points - block[:3], axis=1) < 0.05
    local = (points[blue & near] - block[:3]) @ geometry.euler_to_matrix(block[3:6])
    assert len(local) > 150
    assert np.abs(local).max() < 0.0205


def test_a_cut_or_thinned_picture_gives_the_same_points(frame):
    depth = frame["depth_static"]
    whole = back_project(depth, CALVIN_STATIC, CALVIN_STATIC_POSE).reshape(200, 200, 3)
    cut = back_project(depth[20:180, 30:170], CALVIN_STATIC, CALVIN_STATIC_POSE, origin=(20, 30)).reshape(160, 140, 3)
    np.testing.assert_array_equal(cut, whole[20:180, 30:170])
    thinned = back_project(depth[1::4, 2::4], CALVIN_STATIC, CALVIN_STATIC_POSE, origin=(1, 2), stride=4)
    np.testing.assert_array_equal(thinned.reshape(50, 50, 3), whole[1::4, 2::4])


def test_a_picture_larger_than_the_camera_is_refused():
    with pytest.raises(ValueError, match=r"'small' has 8 x 8 pixels"):
        back_project(np.ones((9, 8), np.float32), Camera("small", 8, 8, 60.0, 0.01, 5.0), np.eye(4))


def test_rotations_round_trip():
    generator = np.random.default_rng(0)
    euler = generator.uniform((-np.pi, -np.pi / 2, -np.pi), (np.pi, np.pi / 2, np.pi), size=(500, 3))
    matrix = geometry.euler_to_matrix(euler)
    np.testing.assert_allclose(matrix @ np.swapaxes(matrix, -1, -2), np.broadcast_to(np.eye(3), matrix.shape), atol=1e-12)
    np.testing.assert_allclose(geometry.matrix_to_euler(matrix), euler, atol=1e-9)
    quaternion = geometry.matrix_to_quaternion(matrix)
    np.testing.assert_allclose(geometry.quaternion_to_matrix(quaternion), matrix, atol=1e-12)
    assert (quaternion[:, 3] >= 0).all()
    half_turns = geometry.euler_to_matrix([[np.pi, 0, 0], [0, np.pi / 2, 0.3], [0, -np.pi / 2, 0], [0, 0, np.pi]])
    np.testing.assert_allclose(geometry.euler_to_matrix(geometry.matrix_to_euler(half_turns)), half_turns, atol=1e-9)
    back = geometry.quaternion_to_matrix(geometry.matrix_to_quaternion(half_turns))
    np.testing.assert_allclose(back, half_turns, atol=1e-12)


def test_extrinsic_order_and_wrapping():
    a, b, c = 0.3, -0.7, 1.1
    turns = [geometry.euler_to_matrix(angles) for angles in ((a, 0, 0), (0, b, 0), (0, 0, c))]
    np.testing.assert_allclose(geometry.euler_to_matrix((a, b, c)), turns[2] @ turns[1] @ turns[0], atol=1e-12)
    np.testing.assert_allclose(geometry.wrap_angle([3.2, -3.2, 0.1]), [3.2 - 2 * np.pi, 2 * np.pi - 3.2, 0.1])
