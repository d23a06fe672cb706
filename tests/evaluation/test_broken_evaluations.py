"""Evaluations that would be wrong: they cannot be written with the public interface, or they fail loudly.

Three faults that cost others weeks, because the numbers only looked like a bad policy: a controller that is not reset between
episodes, actions left in the network's units, cameras in the wrong order.
"""

import gymnasium
import numpy as np
import pytest
import torch

from lightning_robot.evaluation.controller import Controller
from lightning_robot.evaluation.plausibility import NormalizedActions, check_predictions, demonstrated_range
from lightning_robot.evaluation.probe import KeepsState
from lightning_robot.evaluation.rollout import Episode, rollout
from lightning_robot.features import Feature, Features, IncompatibleFeatures
from lightning_robot.policies.base import ImitationPolicy
from lightning_robot.transforms.statistics import Statistics

LOW, HIGH = (-90.0, 20.0, 0.0), (60.0, 140.0, 100.0)  # degrees, gripper in percent: what was demonstrated
CAMERAS = ("overhead", "wrist")


def features(cameras=CAMERAS, unit="degrees"):
    images = {f"observation.images.{name}": Feature((3, 4, 4), dtype="uint8") for name in cameras}
    action = Feature((3,), unit=unit, names=("pan", "lift", "gripper"))
    return Features({"observation.state": Feature((3,)), **images}, action, "absolute; commanded; joints; gripper 100 open")


class Arm(gymnasium.Env):
    """An arm that follows its commands. It should reach a pose that only the overhead camera tells."""

    action_space = gymnasium.spaces.Box(-180, 180, (3,))

    def __init__(self, cameras=CAMERAS, max_steps=12):
        self.features, self.cameras, self.max_steps = features(cameras), cameras, max_steps

    def observe(self):
        level = np.uint8(255 * (self.goal - LOW[0]) / (HIGH[0] - LOW[0]))
        pictures = {name: np.full((3, 4, 4), level if name == "overhead" else 0, dtype=np.uint8) for name in self.cameras}
        return {
            **{f"observation.images.{name}": picture for name, picture in pictures.items()},
            "observation.state": self.pose.astype(np.float32),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.count = self.np_random.uniform(LOW[0], HIGH[0]), 0
        self.pose = np.array([0.0, 80.0, 50.0])
        return self.observe(), {"success": False}

    def step(self, action):
        self.count += 1
        self.pose += 0.5 * (action - self.pose)
        solved = bool(abs(self.pose[0] - self.goal) < 2 and self.count >= 6)
        return self.observe(), 0.0, solved, self.count >= self.max_steps, {"success": solved}


class Goer(ImitationPolicy):
    """Turns to where the overhead picture's brightness says, four steps at a time."""

    normalization = {"action": "limits"}  # noqa: RUF012
    forgets = False

    def __init__(self, transforms=None, postprocess=None, features=None, language=None):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.observation_steps, self.action_horizon, self.execution_horizon = 1, 4, 4

    @property
    def observation_keys(self):
        return ("observation.images.overhead", "observation.images.wrist")

    def build(self):
        self.network = torch.nn.Identity()

    def compute_loss(self, batch):
        raise NotImplementedError

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        brightness = observation["observation.images.overhead"].float().mean(dim=(1, 2, 3, 4)) / 255
        chunk = torch.zeros(len(brightness), 1, 4, 3)
        chunk[..., 0] = (2 * brightness - 1)[:, None, None]
        return chunk if self.forgets else self.normalizer.unnormalize("action", chunk)


class Forgetful(Goer):
    """The mistake: actions leave `_predict` as the network made them."""

    forgets = True


def policy(kind=Goer, low=LOW, high=HIGH, mode="limits"):
    made = kind(features=features().to_dict())
    made.normalization = {"action": mode}
    made.configure_model()
    low, high = np.array(low), np.array(high)
    middle, spread = (low + high) / 2, (high - low) / 4
    made.normalizer.set_statistics({"action": Statistics(low, high, middle, spread, low, high, count=9)})
    return made.eval()


EPISODES = [Episode(2_000_000 + number) for number in range(6)]


def test_the_right_evaluation_succeeds():
    result = rollout(policy(), Arm, EPISODES, progress=False)
    assert result.success_rate == 1
    assert result.notes == []


# No reset between episodes.


def test_rollout_resets_by_itself():
    """The public function takes no hook where a reset could be forgotten: every episode is what it is alone."""
    together = rollout(policy(), Arm, EPISODES, num_envs=1, progress=False)
    for row in together.records:
        (alone,) = rollout(policy(), Arm, [Episode(row.seed)], progress=False).records
        assert alone == row


def test_a_loop_of_ones_own_that_forgets_the_reset_is_refused():
    controller, env = Controller(policy(), 1), Arm()
    with pytest.raises(RuntimeError, match="was never reset"):
        controller.act([env.reset(seed=0)[0]], [0])
    observation, _ = env.reset(seed=0)
    controller.reset([0], [0])
    for _ in range(6):
        (action,) = controller.act([observation], [env.count])
        observation = env.step(action)[0]
    observation, _ = env.reset(seed=1)  # and no controller.reset: half a chunk of the episode before is left
    with pytest.raises(RuntimeError, match=r"a new episode began without controller.reset"):
        controller.act([observation], [env.count])


# Actions left normalised.


@pytest.mark.parametrize("mode", ["limits", "mean_std"])
@pytest.mark.parametrize("num_envs", [1, 8])
def test_actions_left_normalised_end_the_evaluation(mode, num_envs):
    with pytest.raises(NormalizedActions, match=r"within -1.5 to 1.5 in lift.*`_predict` must return them un-normalised"):
        rollout(policy(Forgetful, mode=mode), Arm, EPISODES, num_envs=num_envs, progress=False)


def test_actions_unnormalised_by_other_statistics_end_the_evaluation():
    """Scale and offset of identity: no element stays within a fixed range, and two come near no demonstration."""
    changed = policy(mode="mean_std")
    changed.demonstrations = {"action_range": [[-17.0, -40.0, 80.0], [40.0, -20.0, 100.0]]}
    predicted = np.array([[-2.0, -2.5, -3.5], [2.0, 2.5, 3.5]])
    with pytest.raises(
        NormalizedActions, match=r"between -3.5 and 3.5 in gripper, where demonstrations lie between 80 and 100"
    ):
        check_predictions(changed, predicted)
    assert check_predictions(changed, np.array([[-2.0, -25.0, -3.5], [2.0, 2.5, 3.5]])) is None  # one alone may be the policy's
    changed.demonstrations = {"action_range": [[-1.0, 0.5, 0.2], [1.0, 0.5, 0.2]]}
    assert check_predictions(changed, np.array([[-2.0, 0.3, 0.4], [2.0, 0.4, 0.5]])) is None  # two that stood still


@pytest.mark.parametrize("kind", ["queue", "raw"])
def test_the_python_function_sees_what_the_command_sees(kind):
    made = policy()
    if kind == "raw":
        made.averaged_weights = "left"  # as `load_policy(path, weights="raw")` says
        assert rollout(made, Arm, EPISODES, progress=False).notes[0].startswith("weights: the raw ones are judged")
        return
    levels = iter((40, 60))
    made._predict = lambda *_: torch.full((8, 1, 4, 3), float(next(levels)))
    with pytest.raises(KeepsState, match="answered the same observation"):
        rollout(made, Arm, EPISODES, progress=False)


def test_what_cannot_be_told_for_certain_is_said():
    """Where demonstrations lie evenly around zero, a policy that hardly moves would look the same."""
    result = rollout(policy(Forgetful, (-90, -60, -50), (90, 60, 50)), Arm, EPISODES, progress=False)
    assert "look as if they had been left normalised, or the policy hardly moves" in result.notes[0]


def test_small_physical_ranges_are_no_suspicion():
    metres = policy(Forgetful, (-0.3, 0.1, 0.0), (0.3, 0.4, 1.0))
    assert check_predictions(metres, np.array([[-1.0] * 3, [1.0] * 3])) is None
    gripper = policy(Goer, (-0.3, 0.1, 0.0), (0.3, 0.4, 100.0))  # one wide element, which may well stay closed
    assert check_predictions(gripper, np.zeros((2, 3))) is None
    np.testing.assert_allclose(demonstrated_range(policy()), [LOW, HIGH], atol=1e-4)


def test_a_policy_without_units_cannot_act():
    bare = policy()
    bare.features = None
    with pytest.raises(ValueError, match="nothing says what its actions mean"):
        Controller(bare)
    unfitted = Goer(features=features().to_dict())
    unfitted.configure_model()
    with pytest.raises(ValueError, match="has no statistics yet"):
        rollout(unfitted, Arm, EPISODES, progress=False)


def test_other_units_of_the_environment_are_refused():
    class Normalized(Arm):
        def __init__(self):
            super().__init__()
            self.features = features(unit="normalized")

    with pytest.raises(IncompatibleFeatures, match="action: trained in 'degrees', offered in 'normalized'"):
        rollout(policy(), Normalized, EPISODES, progress=False)


# Cameras in the wrong order.


def test_cameras_are_known_by_name_whatever_their_order():
    class Reversed(Arm):
        def __init__(self):
            super().__init__(cameras=CAMERAS[::-1])

    assert list(Reversed().reset(seed=0)[0]) != list(Arm().reset(seed=0)[0])
    assert rollout(policy(), Reversed, EPISODES, progress=False).records == (
        rollout(policy(), Arm, EPISODES, progress=False).records
    )


def test_cameras_of_other_names_are_refused():
    class Renamed(Arm):
        def __init__(self):
            super().__init__(cameras=("top", "wrist"))

    with pytest.raises(IncompatibleFeatures, match=r"observation.images.overhead: the policy needs it; offered are .*top"):
        rollout(policy(), Renamed, EPISODES, progress=False)


def test_swapped_cameras_would_show():
    """The policy depends on one camera: with the pictures exchanged it fails, so the tests above mean something."""

    class Swapped(Arm):
        def observe(self):
            observation = super().observe()
            first, second = (f"observation.images.{name}" for name in CAMERAS)
            observation[first], observation[second] = observation[second], observation[first]
            return observation

    assert rollout(policy(), Swapped, EPISODES, progress=False).success_rate == 0
