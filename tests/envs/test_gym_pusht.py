"""gym-pusht behind our interface. Needs the extra pusht."""

import importlib.util

import numpy as np
import pytest

from lightning_robot.envs import make_environment
from lightning_robot.envs.adapters import MissingPackage
from lightning_robot.envs.gym_pusht import PushT
from lightning_robot.features import check_compatible

installed = pytest.mark.skipif(importlib.util.find_spec("gym_pusht") is None, reason="the extra pusht is not installed")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gym_pusht" else find(name))
    with pytest.raises(MissingPackage, match=r'pip install "lightning_robot\[pusht\]"'):
        make_environment("lightning_robot/PushT-v0")


@installed
def test_pictures_carry_the_key_of_the_data_set():
    env = PushT()
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"task", "observation.state", "observation.image"}
    assert observation["observation.image"].shape == (3, 96, 96)
    assert env.observation_space.contains(observation)
    assert (env.control_rate, env.max_steps, env.features.action.shape) == (10.0, 300, (2,))


@installed
def test_a_seed_fixes_the_episode():
    ends = []
    for _ in range(2):
        env = PushT(observations=["state", "environment_state"])
        env.reset(seed=3)
        for target in ([100, 100], [300, 256], [400, 400]):
            observation, *_ = env.step(target)
        ends.append(np.concatenate([observation["observation.state"], observation["observation.environment_state"]]))
    np.testing.assert_array_equal(*ends)


@installed
def test_success_is_a_coverage_above_95_percent_and_the_largest_is_reported():
    env = PushT(observations=["state"], max_steps=2)
    env.reset(seed=0)
    block = env._env.unwrapped.block
    block.angle, block.position = np.pi / 4, (250, 256)  # an angle turns about the centre of gravity, not the position
    first = env.step([20, 20])[4]
    assert not first["success"]
    assert 0.5 < first["coverage"] < 0.95
    block.angle = 0.3
    _, _, _, truncated, last = env.step([20, 20])
    assert truncated
    assert last["details"]["max_coverage"] == pytest.approx(first["coverage"])
    env.reset(seed=0)
    block = env._env.unwrapped.block
    block.angle, block.position = np.pi / 4, (256, 256)
    _, _, terminated, _, info = env.step([20, 20])
    assert terminated
    assert info["success"]
    assert info["details"]["max_coverage"] > 0.95


@installed
def test_a_policy_gets_what_it_was_trained_on():
    for trained in (PushT(image_size=48, camera="top").features, PushT(["state", "environment_state"]).features):
        env = PushT()
        env.match(trained)
        assert check_compatible(trained, env.features) == []
        assert set(trained.observations) <= set(env.reset(seed=0)[0])


@installed
def test_unread_pictures_are_not_drawn(monkeypatch):
    env = PushT()
    env.reset(seed=0)
    env.skip_observation = True
    monkeypatch.setattr(env._env.unwrapped, "_draw", None)
    assert set(env.step([20, 20])[0]) == {"task"}
    monkeypatch.undo()
    env.skip_observation = False
    assert "observation.image" in env.reset(seed=0)[0]  # an episode may end on such a step


@installed
def test_states_and_pictures_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        PushT(["images", "environment_state"])
