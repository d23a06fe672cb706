"""History, chunk queue, ensembling, noise and resets of the controller."""

import numpy as np
import pytest
import torch

from lightning_robot.evaluation.controller import Controller, Ensembling, chunk_seed
from lightning_robot.features import Feature, Features
from lightning_robot.policies.base import Window


class Counting:
    """Predicts 100 * (query number) + (step in the chunk), and remembers what it was asked."""

    observation_steps = 3
    action_horizon = 8
    execution_horizon = 4
    action_offset = -2

    def __init__(self):
        self.features = Features({"observation.state": Feature((1,))}, Feature((2,)))
        self.window = Window(3, 8, -2, ("observation.state",), 2, 3)
        self.asked = []
        self.seeds = []

    def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
        self.asked.append(observation)
        self.seeds.append(noise_seeds.tolist())
        steps = torch.arange(6.0) + 100 * (len(self.asked) - 1)
        return steps[None, None, :, None].expand(len(noise_seeds), 1, 6, 2).clone()


def observation(value):
    return {"observation.state": np.array([value], dtype=np.float32), "task": f"task {value}"}


def test_chunks_are_executed_up_to_the_execution_horizon():
    controller = Controller(Counting(), 1, inference_batch=1)
    controller.reset([0], [5])
    actions = []
    for step in range(9):
        assert controller.needs_query(0) == (step % 4 == 0)
        actions.append(controller.act([observation(step)], [step])[0][0])
        assert controller.position[0] == step % 4 + 1
        np.testing.assert_array_equal(controller.chunks[0][controller.position[0] - 1], [actions[-1]] * 2)
    assert actions == [0, 1, 2, 3, 100, 101, 102, 103, 200]
    assert len(controller.queries) == 3


def test_history_repeats_the_first_observation_and_slides():
    policy = Counting()
    controller = Controller(policy, 1, execution_horizon=1, inference_batch=1)
    controller.reset([0], [0])
    for step in range(4):
        controller.act([observation(step)], [step])
    histories = [asked["observation.state"][0, :, 0].tolist() for asked in policy.asked]
    assert histories == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert policy.asked[2]["task"] == ["task 2"]
    assert policy.asked[0]["observation.state"].shape == (1, 3, 1)


def test_only_observations_of_a_query_are_read():
    policy = Counting()
    controller = Controller(policy, 1, inference_batch=1, execution_horizon=6)
    controller.reset([0], [0])
    given, read = observation(0), []
    for step in range(13):
        controller.act([given], [step])
        read.append(controller.will_read(0))
        given = observation(step + 1) if read[-1] else {"task": "not looked at"}
    # A query before the actions 0, 6, 12 reads three observations; number n follows action n - 1.
    assert [number + 1 for number, wanted in enumerate(read) if wanted] == [4, 5, 6, 10, 11, 12]
    assert policy.asked[1]["observation.state"][0, :, 0].tolist() == [4, 5, 6]
    assert Controller(policy, 1, ensembling=Ensembling()).will_read(0)


def test_queries_have_one_size_and_noise_belongs_to_episode_and_chunk():
    policy = Counting()
    controller = Controller(policy, 5, inference_batch=3)
    controller.reset(range(5), [10, 11, 12, 13, 14])
    controller.act([observation(i) for i in range(5)], [0] * 5)
    assert [len(seeds) for seeds in policy.seeds] == [3, 3]
    assert policy.seeds[0] == [chunk_seed(seed, 0) for seed in (12, 10, 11)]  # in the rows that the seeds say
    assert policy.seeds[1] == [chunk_seed(seed, 0) for seed in (13, 13, 14)]  # filled with copies
    assert policy.asked[1]["observation.state"][:, 0, 0].tolist() == [3, 3, 4]
    for step in range(1, 5):
        controller.act([observation(step)], [step], indices=[4])
    assert policy.seeds[2] == [chunk_seed(14, 1)] * 3


def test_chunk_seeds_differ_and_stay():
    seeds = {chunk_seed(seed, chunk) for seed in range(300) for chunk in range(300)}
    assert len(seeds) == 300 * 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert chunk_seed(2_000_000, 3) == 3050577415634286449


def test_an_episode_depends_on_nothing_before_it():
    fresh, used = Controller(Counting(), 1, inference_batch=1), Controller(Counting(), 1, inference_batch=1)
    used.reset([0], [1])
    for step in range(6):
        used.act([observation(50 + step)], [step])
    for controller in (fresh, used):
        controller.reset([0], [2])
        controller.act([observation(0)], [0])
    assert used.policy.seeds[-1] == fresh.policy.seeds[-1]
    assert torch.equal(used.policy.asked[-1]["observation.state"], fresh.policy.asked[-1]["observation.state"])
    assert used.position == fresh.position


def test_missing_resets_and_dropped_steps_are_refused():
    controller = Controller(Counting(), 2, inference_batch=1)
    with pytest.raises(RuntimeError, match=r"Environment 1 was never reset"):
        controller.act([observation(0)], [0], indices=[1])
    controller.reset([0, 1], [0, 1])
    for step in range(3):
        controller.act([observation(step)] * 2, [step] * 2)
    with pytest.raises(RuntimeError, match=r"a new episode began without controller.reset"):
        controller.act([observation(0)], [0], indices=[0])
    with pytest.raises(RuntimeError, match="observations of 2 steps never reached"):
        controller.act([observation(5)], [5], indices=[1])


@pytest.mark.parametrize(("direction", "first"), [("oldest", 0.01574), ("newest", 0.00585)])
def test_ensembling_weights_as_published(direction, first):
    weights = Ensembling(0.01, direction).weights(100)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(first, abs=5e-6)
    assert max(weights) / min(weights) == pytest.approx(np.exp(0.99))


def test_ensembling_averages_every_prediction_of_a_step():
    policy = Counting()
    controller = Controller(policy, 1, ensembling=Ensembling(0.5), inference_batch=1)
    controller.reset([0], [0])
    for step in range(9):
        action = controller.act([observation(step)], [step])[0]
        # Query q predicts 100 q + (step - q) for this step, and reaches six steps.
        predictions = [100 * query + step - query for query in range(max(0, step - 5), step + 1)]
        weights = np.exp(-0.5 * np.arange(len(predictions)))
        np.testing.assert_allclose(action, np.average(predictions, weights=weights), rtol=1e-6)
    assert len(policy.asked) == 9


class Table:
    """Predicts given chunks one after the other, one action element."""

    observation_steps, action_offset = 1, 0

    def __init__(self, chunks, **more):
        self.chunks = torch.tensor(chunks, dtype=torch.float32)
        self.action_horizon = self.execution_horizon = self.chunks.shape[1]
        self.features = Features({"observation.state": Feature((1,))}, Feature((1,), names=("jaw",), kinds=("gripper",)))
        self.window = Window(1, self.action_horizon, 0, ("observation.state",), 0, 0)
        self.queries = 0
        for name, value in more.items():
            setattr(self, name, value)

    def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
        self.queries += 1
        return self.chunks[self.queries - 1].view(1, 1, -1, 1)


def play(controller, steps, begin=0):
    controller.reset([0], [begin])
    return [float(controller.act([observation(step)], [step])[0][0]) for step in range(steps)]


@pytest.mark.parametrize(("direction", "expected"), [("oldest", 2.323339), ("newest", 2.343339)])
def test_ensembling_as_the_original_does(direction, expected):
    policy = Table([[0, 0, 1], [0, 2, 0], [4, 0, 0]])
    assert play(Controller(policy, 1, ensembling=Ensembling(0.01, direction), inference_batch=1), 3)[2] == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    [
        (0.01, [0.0, 5.4775, 10.94, 16.387505, 26.387503, 36.387501]),
        (-0.5, [0.0, 6.602134, 13.881411, 21.761189, 31.761189, 41.761185]),
    ],
)
def test_ensembling_as_lerobot_does(coefficient, expected):
    chunks = [[10 * number + step for step in range(4)] for number in range(6)]
    policy = Table(chunks, ensembling={"coefficient": coefficient, "direction": "oldest"})
    assert play(Controller(policy, 1, inference_batch=1), 6) == pytest.approx(expected, abs=2e-5)


def test_the_policy_says_whether_it_is_ensembled():
    own = {"coefficient": 0.2, "direction": "newest"}
    policy = Table([[1, 2, 3]] * 9, ensembling=own)
    assert Controller(policy, 1).ensembling == Ensembling(0.2, "newest")
    assert Controller(policy, 1).execution_horizon == 1
    assert Controller(policy, 1, ensembling=False).execution_horizon == 3
    assert Controller(policy, 1, execution_horizon=2).ensembling is None
    assert Controller(policy, 1, ensembling=Ensembling()).ensembling == Ensembling(0.01, "oldest")
    assert Controller(Table([[1]]), 1).ensembling is None


def test_postprocessing_is_the_policys_and_begins_anew_in_every_episode():
    smooth = [{"class_path": "Smooth", "init_args": {"weight": 0.5, "elements": ["jaw"]}}]
    policy = Table([[8, 0, 0, 0], [4, 0, 0, 0], [2, 0, 0, 0]], postprocess=smooth)
    controller = Controller(policy, 1, inference_batch=1)
    assert controller.postprocess == smooth
    assert play(controller, 3) == [8, 4, 2]
    assert play(controller, 2, begin=1) == [4, 2]  # nothing of the episode before
    np.testing.assert_array_equal(controller.chunks[0][:, 0], [4, 0, 0, 0])  # the chunk is the policy's
    assert play(Controller(policy, 1, postprocess=[], inference_batch=1), 2) == [2, 0]
    with pytest.raises(ValueError, match="no element 'elbow'"):
        Controller(policy, 1, postprocess=[{"class_path": "Offset", "init_args": {"values": {"elbow": 1}}}])


def test_environments_are_smoothed_apart():
    class Two(Table):
        def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
            return observation["observation.state"][:, -1].view(-1, 1, 1, 1)

    policy = Two([[0]], postprocess=[{"class_path": "Smooth", "init_args": {"weight": 0.5, "elements": ["jaw"]}}])
    controller = Controller(policy, 2)
    controller.reset([0, 1], [0, 1])
    controller.act([observation(0), observation(100)], [0, 0])
    assert [action[0] for action in controller.act([observation(8), observation(100)], [1, 1])] == [4, 100]
    controller.reset([0], [2])
    assert [action[0] for action in controller.act([observation(8), observation(0)], [0, 2])] == [8, 50]


def test_ensembling_comes_before_postprocessing():
    policy = Table([[0, 0, 1], [0, 2, 0], [4, 0, 0]], ensembling={"coefficient": 0.01, "direction": "oldest"})
    steps = [{"class_path": "GripperThreshold", "init_args": {"threshold": 2.33, "below": 0, "above": 9}}]
    assert play(Controller(policy, 1, postprocess=steps, inference_batch=1), 3)[2] == 0  # of 2.3233, not of 4
    policy.queries = 0
    newest = Ensembling(0.01, "newest")
    assert play(Controller(policy, 1, ensembling=newest, postprocess=steps, inference_batch=1), 3)[2] == 9


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="predicts 6 actions"):
        Controller(Counting(), 1, execution_horizon=7)
    with pytest.raises(ValueError, match="execution_horizon must be 1"):
        Controller(Counting(), 1, execution_horizon=4, ensembling=Ensembling())
    with pytest.raises(ValueError, match="oldest"):
        Ensembling(direction="older")
    bare = Counting()
    bare.features = None
    with pytest.raises(ValueError, match="nothing says what its actions mean"):
        Controller(bare, 1)


def test_wrong_chunks_and_missing_keys_are_named():
    policy = Counting()
    controller = Controller(policy, 1, inference_batch=2)
    controller.reset([0], [0])
    with pytest.raises(KeyError, match=r"observation.state: the policy reads it"):
        controller.act([{"observation.depth": np.zeros(1)}], [0])
    policy.predict_action_chunk = lambda *args, **kwargs: torch.zeros(2, 1, 6, 3)
    controller.reset([0], [0])
    with pytest.raises(RuntimeError, match="actions of size 2"):
        controller.act([observation(0)], [0])
