"""gym-aloha behind our interface. Needs the extra aloha, and OpenGL for pictures."""

import importlib.util

import numpy as np
import pytest

from lightning_robot.envs import make_environment
from lightning_robot.envs.adapters import MissingPackage
from lightning_robot.envs.gym_aloha import Aloha
from lightning_robot.envs.opengl import NoOpenGL
from lightning_robot.features import check_compatible

installed = pytest.mark.skipif(importlib.util.find_spec("gym_aloha") is None, reason="the extra aloha is not installed")
REST = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gym_aloha" else find(name))
    with pytest.raises(MissingPackage, match=r'pip install "lightning_robot\[aloha\]"'):
        make_environment("lightning_robot/Aloha-v0")


@installed
@pytest.mark.parametrize(("task", "size"), [("transfer_cube", 7), ("insertion", 14)])
def test_a_seed_fixes_the_episode(task, size):
    seen = []
    used = Aloha(task, observations=["state", "environment_state"])
    used.reset(seed=1)
    used.step(REST)
    for env in (used, Aloha(task, observations=["state", "environment_state"])):
        first, info = env.reset(seed=5)
        assert info["success"] is False
        assert first["observation.environment_state"].shape == (size,)
        for _ in range(5):
            last, *_ = env.step(REST)
        seen.append(np.concatenate([last["observation.state"], last["observation.environment_state"]]))
    np.testing.assert_array_equal(*seen)
    start = first["observation.environment_state"]
    assert not np.array_equal(used.reset(seed=6)[0]["observation.environment_state"], start)


@installed
def test_actions_are_absolute_joints_beyond_the_declared_box():
    env = Aloha(observations=["state"], max_steps=60)
    env.reset(seed=0)
    assert env.action_space.contains(REST.astype(np.float32))
    target = REST.copy()
    target[2], target[6] = 1.3, 1.0
    for step in range(60):
        observation, _, _, truncated, info = env.step(target)
        assert truncated == (step == 59)
    assert observation["observation.state"][2] == pytest.approx(1.3, abs=0.05)  # 1.16 at the start, 1 if it were clipped
    assert observation["observation.state"][6] > 0.9
    assert info["details"] == {"max_reward": 0.0}


@installed
def test_features_are_those_of_the_data_sets():
    features = Aloha().features
    assert features.observations["observation.images.top"].shape == (3, 480, 640)
    assert features.action.names[6:8] == ("left_gripper", "right_waist")
    assert features.control_rate == 50


@installed
def test_only_the_cameras_asked_for_are_drawn():
    env = Aloha(camera_sizes={"angle": (48, 64)})
    try:
        observation, _ = env.reset(seed=0)
    except NoOpenGL as error:
        pytest.skip(str(error).splitlines()[0])
    assert observation["observation.images.angle"].std() > 10
    assert set(env._renderers) == {(48, 64)}
    env.skip_observation = True
    assert set(env.step(REST)[0]) == {"task"}
    trained = Aloha(camera_sizes={"top": (24, 32)}).features
    env.match(trained)
    env.skip_observation = False
    assert check_compatible(trained, env.features) == []
    assert env.reset(seed=0)[0]["observation.images.top"].shape == (3, 24, 32)
    env.close()


@installed
def test_unknown_cameras_are_refused():
    with pytest.raises(ValueError, match="camera_sizes"):
        Aloha(camera_sizes={"wrist": 64})


@installed
@pytest.mark.parametrize("task", ["transfer_cube", "insertion"])
def test_experts_solve_their_tasks(task):
    env = Aloha(task, observations=["state"])
    env.reset(seed=0)
    expert = env.expert()
    for _ in range(340):
        action = expert.act()
        assert env.action_space.contains(action)
        _, _, terminated, _, info = env.step(action)
        if terminated:
            break
    assert info["success"]
    assert info["details"] == {"max_reward": 4.0}
