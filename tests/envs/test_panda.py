"""The robot's kinematics against values of CALVIN's own simulator."""

import numpy as np
import pytest

from lightning_robot.envs.panda import LIMITS, REST, PandaKinematics
from lightning_robot.geometry import euler_to_matrix, matrix_to_quaternion

VECTORS = [  # joints; position and quaternion (xyzw) of the tool centre point; position of the gripper camera
    (
        (0.069, 1.588, -2.062, -0.224, -1.09, 1.578, 1.899),
        (0.440256, -0.495832, 0.855310),
        (-0.024902, -0.031905, 0.472232, 0.880545),
        (0.396219, -0.581076, 0.712502),
    ),
    (
        (-0.526, 0.175, -2.738, -0.81, 0.221, 1.226, 1.671),
        (-0.749079, -0.501444, 1.093693),
        (0.398157, 0.871575, -0.15598, -0.239787),
        (-0.616377, -0.566996, 1.181404),
    ),
    (
        (-1.14, -0.164, -2.121, -1.862, -1.718, 0.971, 1.451),
        (-0.748570, -0.115763, 0.837199),
        (0.299471, 0.555326, 0.767876, 0.110892),
        (-0.750597, -0.276153, 0.774984),
    ),
    (
        (-1.272, -0.052, 2.786, -0.185, 1.303, 2.023, -1.293),
        (-0.521569, -0.252327, 1.444654),
        (-0.370919, 0.4305, 0.744665, -0.35009),
        (-0.354059, -0.221654, 1.420168),
    ),
]


@pytest.fixture
def arm():
    return PandaKinematics()


@pytest.mark.parametrize(("joints", "position", "quaternion", "camera"), VECTORS)
def test_forward_kinematics(arm, joints, position, quaternion, camera):
    arm.forward(np.array(joints))
    assert arm.position == pytest.approx(position, abs=1e-4)
    assert arm.camera_position == pytest.approx(camera, abs=1e-4)
    got = matrix_to_quaternion(arm.matrix)
    assert min(np.abs(got - quaternion).max(), np.abs(got + quaternion).max()) < 1e-4
    assert euler_to_matrix(arm.euler()) == pytest.approx(arm.matrix, abs=1e-9)


def test_rest_pose_is_the_start_of_calvins_evaluation(arm):
    arm.forward(np.array(REST))
    assert arm.position == pytest.approx((0.02586889, -0.2313129, 0.5712808), abs=1e-6)
    assert arm.euler() == pytest.approx((3.09045411, -0.02908596, 1.50013585), abs=1e-6)


def test_inverse_follows_a_path_and_stays_near_the_rest_pose(arm):
    joints = np.array(REST)
    for x in np.arange(0.04, 0.36, 0.02):
        joints = arm.inverse(np.array([x, -0.2, 0.5]), (3.05, -0.1, 1.5), joints)
    for _ in range(10):  # stopped at the end of the path
        joints = arm.inverse(np.array([0.34, -0.2, 0.5]), (3.05, -0.1, 1.5), joints)
    arm.forward(joints)
    assert arm.position == pytest.approx((0.34, -0.2, 0.5), abs=1e-3)
    assert arm.euler() == pytest.approx((3.05, -0.1, 1.5), abs=1e-3)
    elsewhere = arm.inverse(np.array([0.34, -0.2, 0.5]), (3.05, -0.1, 1.5), np.array(REST), iterations=200)
    assert joints == pytest.approx(elsewhere, abs=0.1)  # the seventh degree of freedom does not drift with the path


def test_out_of_reach_stays_calm_and_within_limits(arm):
    joints, far = np.array(REST), np.array([1.5, 1.0, 0.5])
    for _ in range(100):
        joints = arm.inverse(far, (3.05, 0.0, 1.5), joints)
        assert (joints >= LIMITS[0]).all()
        assert (joints <= LIMITS[1]).all()
    later = arm.inverse(far, (3.05, 0.0, 1.5), joints)
    assert np.abs(later - joints).max() < 0.05
    arm.forward(joints)
    toward = (far - (-0.34, -0.46, 0.57)) / np.linalg.norm(far - (-0.34, -0.46, 0.57))
    assert (arm.position - (-0.34, -0.46, 0.57)) @ toward > 0.6
