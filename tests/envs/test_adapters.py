"""Any Gymnasium environment under our keys; the adapters of packages are tested beside their own names."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from lightning_robot.envs import make_environment
from lightning_robot.envs.adapters import Adapted
from lightning_robot.envs.checks import ActionOutOfBounds
from lightning_robot.evaluation.rollout import environment_maker, plan_episodes, rollout
from lightning_robot.features import Feature
from lightning_robot.policies.base import Policy

OURS = {
    "env": "tests/Reach-v0",
    "state": ["robot.joints", "robot.gripper"],
    "environment_state": "goal",
    "images": {"top": "camera.rgb"},
    "depth": {"top": "camera.depth"},
    "maxima": ["closeness", "reward"],
}


class Reach(gymnasium.Env):
    """A point moves to a goal; observations are nested as those of robot simulators are."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict(
        {
            "robot": spaces.Dict(
                {"joints": spaces.Box(-9, 9, (2,), np.float64), "gripper": spaces.Box(0, 1, (1, 1), np.float64)}
            ),
            "goal": spaces.Box(-9, 9, (2,), np.float64),
            "camera": spaces.Dict(
                {"rgb": spaces.Box(0, 255, (4, 6, 3), np.uint8), "depth": spaces.Box(0, 9, (4, 6), np.float32)}
            ),
        }
    )

    def __init__(self, render_mode=None, speed=0.5):
        self.render_mode, self.speed = render_mode, speed

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options = options
        self.place, self.goal = self.np_random.uniform(-1, 1, 2), self.np_random.uniform(-1, 1, 2)
        return self._observe(), {}

    def step(self, action):
        self.received = action
        self.place = self.place + self.speed * action
        distance = float(np.linalg.norm(self.place - self.goal))
        return self._observe(), -distance, distance < 0.1, False, {"is_success": distance < 0.1, "closeness": -distance}

    def _observe(self):
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[0, 5] = (1, 2, 3)
        camera = {"rgb": picture, "depth": np.full((4, 6), 2.0, np.float32)}
        return {"robot": {"joints": self.place, "gripper": np.array([[0.5]])}, "goal": self.goal, "camera": camera}

    def render(self):
        return np.zeros((4, 6, 3), np.uint8)


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("tests/Reach-v0", entry_point=Reach, max_episode_steps=30)
    yield
    del gymnasium.registry["tests/Reach-v0"]


def test_observations_come_under_our_keys():
    env = Adapted(**OURS)
    observation, info = env.reset(seed=3)
    assert observation["observation.state"].tolist() == pytest.approx([*env._env.unwrapped.place, 0.5])
    assert observation["observation.state"].dtype == np.float32
    assert observation["observation.images.top"][:, 0, 5].tolist() == [1, 2, 3]
    assert observation["observation.depth.top"].shape == (1, 4, 6)
    assert env.observation_space.contains(observation)
    assert info == {"task": "Reach", "success": False, "failure": None}


def test_features_tell_what_is_offered():
    env = Adapted(**OURS, state_names=["x", "y", "gripper"], action_semantics="relative; commanded; world; no gripper")
    features = env.features
    assert features.observations["observation.state"] == Feature((3,), names=("x", "y", "gripper"))
    assert features.observations["observation.images.top"] == Feature((3, 4, 6), dtype="uint8")
    assert features.observations["observation.depth.top"].unit == "m"
    assert features.action.shape == (2,)
    assert (features.control_rate, env.max_steps, features.source["simulator"]) == (20.0, 30, "tests/Reach-v0")


def test_actions_pass_unclipped_and_malformed_ones_are_refused():
    env = Adapted(**OURS, action_bounds=[[-3, -3], [3, 3]])
    env.reset(seed=0)
    env.step([2.5, -2.5])
    assert env._env.unwrapped.received.tolist() == [2.5, -2.5]
    assert env.action_space.high.tolist() == [3, 3]
    for wrong in ([1.0], [np.nan, 0.0]):
        with pytest.raises(ActionOutOfBounds, match="2 finite numbers"):
            env.step(wrong)


def test_success_limit_details_and_what_is_passed_on():
    env = Adapted(**OURS, env_kwargs={"speed": 1.0}, max_steps=3)
    env.reset(seed=1, options={"task": "Reach", "start": 7})
    assert env._env.unwrapped.options == {"start": 7}
    inner = env._env.unwrapped
    _, _, terminated, _, info = env.step(np.clip(inner.goal - inner.place, -2, 2))
    assert terminated
    assert info["success"]
    assert info["details"]["max_closeness"] == pytest.approx(info["details"]["max_reward"])
    env.reset(seed=1)
    ends = [env.step([0, 0])[3] for _ in range(3)]
    assert ends == [False, False, True]
    assert env.render() is None or env.render().shape == (4, 6, 3)


def test_skipped_observations_hold_nothing():
    env = Adapted(**OURS)
    env.reset(seed=0)
    env.skip_observation = True
    assert set(env.step([0, 0])[0]) == {"task"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "robot.arm"}, "no 'robot.arm'"),
        ({"state": "robot"}, "not an array"),
        ({"images": {"top": "goal"}}, "pictures are"),
        ({"state": None, "environment_state": None, "images": None, "depth": None}, "name at least one"),
        ({"env": "CartPole-v1"}, "flat Box"),
        ({"max_steps": 0}, "at least one step"),
    ],
)
def test_wrong_descriptions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Adapted(**{**OURS, **change})


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="not among Reach"):
        Adapted(**OURS).reset(options={"task": "lift"})


class Towards(Policy):
    """Moves to the goal in two steps."""

    observation_steps, action_horizon, execution_horizon = 1, 2, 2
    action_offset, features, observation_keys = 0, None, ("observation.state", "observation.environment_state")

    def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
        way = observation["observation.environment_state"][:, -1] - observation["observation.state"][:, -1, :2]
        return way[:, None, None].expand(-1, 1, 2, -1)


def test_evaluation_needs_nothing_but_the_mapping():
    make = environment_maker("lightning_robot/Adapted-v0", OURS)
    policy = Towards()
    policy.features = Adapted(**OURS).features
    result = rollout(policy, make, plan_episodes(4, 2_000_000), num_envs=2, progress=False)
    assert [record.success for record in result.records] == [True] * 4
    assert all(record.steps == 2 for record in result.records)


def test_an_observation_that_is_an_array_is_the_state():
    env = make_environment("lightning_robot/Adapted-v0", env="Pendulum-v1", state="", success="terminated").unwrapped
    observation, _ = env.reset(seed=0)
    assert observation["observation.state"].shape == (3,)
    assert env.step(np.zeros(1))[4]["success"] is False
    assert torch.as_tensor(observation["observation.state"]).isfinite().all()
