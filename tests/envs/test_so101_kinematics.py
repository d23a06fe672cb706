"""The arm's kinematics are the published ones; its inverse reaches positions within the limits; units are LeRobot's."""

import json
import math

import mujoco
import numpy as np
import pytest

from lightning_robot.envs.so101_kinematics import So101Kinematics, from_units, rotation_vector, to_units
from lightning_robot.envs.so101_model import JOINTS, LOWER, UPPER, Physics, scene_xml

LOW, HIGH = np.array(LOWER)[:5], np.array(UPPER)[:5]


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/so101_fk.json").read_text())


def test_forward_kinematics_is_the_published(golden):
    arm = So101Kinematics()
    model = mujoco.MjModel.from_xml_string(scene_xml(Physics()))
    data = mujoco.MjData(model)
    joints = [model.joint(name).qposadr[0] for name in golden["meta"]["joint_names"]]
    for case in golden["cases"]:
        arm.forward(np.array(case["q_rad"]))
        assert arm.position == pytest.approx(case["site_pos"], abs=1e-6), case["label"]
        assert arm.matrix == pytest.approx(np.array(case["site_mat"]), abs=1e-6)
        jacobian = arm.jacobian()
        assert jacobian[:3] == pytest.approx(np.array(case["jac_pos"]), abs=1e-6)
        assert jacobian[3:] == pytest.approx(np.array(case["jac_rot"]), abs=1e-6)
        data.qpos[joints] = case["q_rad"]  # the simulated arm, too
        mujoco.mj_kinematics(model, data)
        assert data.site("gripperframe").xpos == pytest.approx(case["site_pos"], abs=1e-6)
        assert data.body("gripper").xpos == pytest.approx(case["gripper_body_pos"], abs=1e-6)
        assert data.body("moving_jaw").xpos == pytest.approx(case["moving_jaw_body_pos"], abs=1e-6)
        assert data.body("moving_jaw").xmat.reshape(3, 3) == pytest.approx(np.array(case["moving_jaw_body_mat"]), abs=1e-5)


def test_limits_are_the_published(golden):
    assert golden["meta"]["joint_names"] == list(JOINTS)
    assert pytest.approx(golden["meta"]["lower"]) == LOWER
    assert pytest.approx(golden["meta"]["upper"]) == UPPER


def test_units_are_lerobots(golden):
    for case in golden["cases"]:
        assert to_units(case["q_rad"]) == pytest.approx(case["lerobot_deg"], abs=1e-6)
        assert to_units(case["q_rad"], "normalized") == pytest.approx(case["norm_m100_100"], abs=1e-6)
        for units, key in (("degrees", "lerobot_deg"), ("normalized", "norm_m100_100")):
            assert from_units(case[key], units) == pytest.approx(case["q_rad"], abs=1e-8)


def test_units_of_many_at_once():
    joints = np.random.default_rng(0).uniform(LOWER, UPPER, (3, 4, 6))
    for units in ("degrees", "normalized"):
        assert from_units(to_units(joints, units), units) == pytest.approx(joints)


def test_inverse_reaches_what_the_arm_can_reach():
    random, arm = np.random.default_rng(1), So101Kinematics()
    for _ in range(100):
        joints = random.uniform(LOW, HIGH)
        arm.forward(joints)
        position, rotation = arm.position.copy(), arm.matrix.copy()
        start = joints + random.uniform(-0.05, 0.05, 5)
        found = arm.inverse(position, rotation, start)
        assert arm.error < 1e-3
        assert np.linalg.norm(rotation_vector(rotation @ arm.matrix.T)) < 0.02
        assert (found >= LOW).all()
        assert (found <= HIGH).all()
        arm.inverse(position, None, start)
        assert arm.error < 1e-3


def test_position_comes_before_rotation():
    """A gripper straight down at any yaw is often out of reach: the position is met all the same."""
    random, arm = np.random.default_rng(2), So101Kinematics()
    for _ in range(60):
        yaw = random.uniform(-math.pi, math.pi)
        jaws, down = np.array([math.cos(yaw), math.sin(yaw), 0.0]), np.array([0.0, 0.0, -1.0])
        rotation = np.stack([down, np.cross(jaws, down), jaws], axis=1)
        arm.inverse(random.uniform((0.15, -0.15, 0.02), (0.35, 0.15, 0.12)), rotation, np.zeros(5))
        assert arm.error < 1e-3


def test_inverse_does_not_stall_at_a_limit():
    """The wrist's limit is met on the way; the other joints go on."""
    arm = So101Kinematics()
    start = np.array([0.0, 0.3, -0.2, UPPER[3], 0.0])
    arm.inverse((0.20, 0.05, 0.08), None, start, iterations=60)
    assert arm.error < 1e-3


def test_out_of_reach_is_told():
    arm = So101Kinematics()
    joints = arm.inverse((0.8, 0.0, 0.1), None, np.zeros(5), iterations=100)
    assert 0.30 < arm.error < 0.40  # 0.4486 m from the shoulder's axis at (0.069, 0, 0.117)
    assert np.isfinite(joints).all()


def test_rotation_vector_near_half_a_turn():
    for angle in (0.0, 1e-9, 1.0, math.pi - 1e-7, math.pi):
        matrix = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
        assert np.abs(rotation_vector(matrix)) == pytest.approx([angle, 0, 0], abs=1e-6)
