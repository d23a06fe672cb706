"""Pictures by casting rays: exact, the same with and without a cache, and those of the recorded simulator."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from lightning_robot.envs.play_table import SEGMENTS, PlayTable
from lightning_robot.envs.ray_camera import RayCamera
from lightning_robot.envs.so101 import SO101PickPlace
from lightning_robot.geometry import CALVIN_STATIC_POSE, calvin_gripper_pose


@pytest.fixture
def table():
    table = PlayTable(observations=("state",), task="open_drawer")
    table.reset(seed=4)
    for _ in range(6):
        table.step([0.5, 1, -1, 0, 0.3, 0, -1])
    table._update_poses()
    return table


@pytest.fixture
def arm():
    """Lifting the block: every link has turned, and their centres of mass lie beside their shapes."""
    arm = SO101PickPlace(observations=("state",))
    arm.reset(seed=3)
    expert = arm.expert()
    for _ in range(100):
        arm.step(expert.act())
    mujoco.mj_camlight(arm._model, arm._data)
    return arm


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ("table", "static"),
        ("table", "gripper"),
        ("table", "overview"),
        ("arm", "overhead"),
        ("arm", "overview"),
        ("arm", "wrist"),
    ],
)
def test_agrees_with_single_rays(request, environment, name):
    scene = request.getfixturevalue(environment)
    model, data = scene._model, scene._data
    view = RayCamera(model, name, 40, 52)
    depth, geom = view.cast(data)
    pose = view.pose(data)
    groups, hit = np.array([1, 1, 0, 0, 0, 0], np.uint8), np.zeros(1, np.int32)
    normal = (None,) if "normal" in mujoco.mj_ray.__doc__ else ()
    wrong = 0
    for row in range(40):
        for column in range(52):
            x, y = (column + 0.5 - 26) / view.camera.focal, -(row + 0.5 - 20) / view.camera.focal
            distance = mujoco.mj_ray(model, data, pose[:3, 3], pose[:3, :3] @ (x, y, -1.0), groups, 1, -1, hit, *normal)
            expected = distance if distance >= 0 else 10.0
            wrong += abs(depth[row, column] - expected) > 1e-5 or geom[row, column] != hit[0]
    assert wrong <= 2  # a ray along an edge may go either way


def test_poses_are_calvins(table):
    assert RayCamera(table._model, "static", 8, 8).pose(table._data) == pytest.approx(CALVIN_STATIC_POSE, abs=1e-6)
    pose = RayCamera(table._model, "gripper", 8, 8).pose(table._data)
    assert pose == pytest.approx(calvin_gripper_pose(table.robot_obs()), abs=1e-6)


def test_cache_of_fixed_geoms_changes_nothing(table):
    cached = RayCamera(table._model, "static", 60, 60)
    cached.cast(table._data)
    for _ in range(5):
        table.step([1, 0, -1, 0, 0, 0, 1])
    table._update_poses()
    for first, second in zip(cached.cast(table._data), RayCamera(table._model, "static", 60, 60).cast(table._data)):
        assert np.array_equal(first, second)


def test_segmentation_and_colours(table):
    view = RayCamera(table._model, "static", 120, 120)
    _, geom = view.cast(table._data)
    segments = table._segment_of_geom[geom]
    hidden = set(SEGMENTS) - {SEGMENTS[number] for number in np.unique(segments)}
    assert hidden <= {"block_red", "block_pink", "plank"}
    blue = view.colors(geom)[segments == SEGMENTS.index("block_blue")]
    assert (blue == (0, 0, 255)).all()


def test_depth_is_that_of_the_recorded_simulator(shared):
    table = PlayTable(observations=("depth",), camera_sizes={"static": 200, "gripper": 84})
    for number in (3120, 3136, 3160):
        frame = np.load(shared / f"data/calvin_sample/training/episode_{number:07d}.npz")
        options = {"robot_obs": frame["robot_obs"], "scene_obs": frame["scene_obs"]}
        observation, _ = table.reset(seed=0, options=options)
        for name in ("static", "gripper"):  # half a pixel apart: the recording's renderer draws a pixel's corner
            difference = np.abs(observation[f"observation.depth.{name}"][0] - frame[f"depth_{name}"])
            assert np.median(difference) < 0.003
        scene = table.scene_obs()
        assert scene == pytest.approx(frame["scene_obs"], abs=2e-3)


def test_needs_no_opengl():
    code = (
        "from lightning_robot.envs.play_table import PlayTable\n"
        "table = PlayTable(observations=('point_cloud', 'depth', 'segmentation', 'images'), render_mode='rgb_array')\n"
        "table.reset(seed=0)\n"
        "assert table.render().std() > 10\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MUJOCO_GL": "disable"})
