"""Action post-processing: each step against hand-computed values; what does not fit is refused by name."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_robot.callbacks.checkpoints import Checkpoints
from lightning_robot.evaluation.controller import Controller
from lightning_robot.features import Feature, Features
from lightning_robot.policies.base import load_policy
from lightning_robot.transforms.postprocess import PostprocessError, build_postprocess, postprocess_action

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from tiny_run import TinyData, TinyPolicy, tiny_trainer

ARM = Features(
    {"observation.state": Feature((3,))},
    Feature((3,), names=("pan", "lift", "gripper"), kinds=("scalar", "scalar", "gripper")),
    action_semantics="absolute; commanded; joints degrees; gripper 0 closed 100 open",
)


def play(steps, actions, features=ARM):
    """What an episode's actions become."""
    steps, before, commands = build_postprocess(steps, features), None, []
    for action in actions:
        command, before = postprocess_action(steps, np.array(action, dtype=np.float32), before)
        assert command.dtype == np.float32
        commands.append(command.tolist())
    return commands


def step(name, **arguments):
    return {"class_path": f"lightning_robot.transforms.postprocess.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step("Offset", values=1.5)], [11.5, 21.5, 31.5]),
        ([step("Offset", values=[1, 0, -2])], [11, 20, 28]),
        ([step("Offset", values={"lift": -5})], [10, 15, 30]),
        ([step("Clip", low=12, high={"gripper": 25})], [12, 20, 25]),
        ([step("Clip", low={"pan": 11}), step("Offset", values=1)], [12, 21, 31]),
        ([step("Offset", values=1), step("Clip", high={"pan": 10.5})], [10.5, 21, 31]),
        ([step("GripperThreshold", threshold=30, below=0, above=100)], [10, 20, 100]),
        ([step("GripperThreshold", threshold=30.5, below=0, above=100)], [10, 20, 0]),
        ([step("GripperThreshold", threshold=15, below=-1, above=1, element="lift")], [10, 1, 30]),
        ([step("GripperBias", value=-4)], [10, 20, 26]),
        ([step("GripperBias", value=2, element="pan")], [12, 20, 30]),
        ([{"class_path": "Offset", "init_args": {"values": 1}}], [11, 21, 31]),
    ],
)
def test_single_actions(steps, expected):
    assert play(steps, [[10, 20, 30]]) == [expected]


def test_smoothing_follows_its_own_output_and_leaves_the_gripper():
    found = play([step("Smooth", weight=0.25)], [[0, 8, 0], [8, 8, 100], [8, 0, 0]])
    assert found == [[0, 8, 0], [2, 8, 100], [3.5, 6, 0]]
    found = play([step("Smooth", weight=0.5, elements=["gripper"])], [[0, 0, 0], [8, 8, 100]])
    assert found == [[0, 0, 0], [8, 8, 50]]


def test_threshold_with_a_margin_does_not_flutter():
    steps = [step("GripperThreshold", threshold=50, below=0, above=100, margin=10)]
    found = play(steps, [[0, 0, value] for value in (45, 55, 61, 45, 41, 39, 55)])
    assert [command[2] for command in found] == [0, 0, 100, 100, 100, 0, 0]


def test_order_counts_and_every_step_remembers_its_own_output():
    # The average is of unclipped values: clipping comes after it.
    found = play([step("Smooth", weight=0.5), step("Clip", high=3.0)], [[4, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert [command[0] for command in found] == [3, 2, 1]
    found = play([step("Clip", high=3.0), step("Smooth", weight=0.5)], [[4, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert [command[0] for command in found] == [3, 1.5, 0.75]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (step("Offset", values={"elbow": 1}), "no element 'elbow'; it has pan, lift, gripper"),
        (step("Offset", values=[1, 2]), "2 values for actions of 3 elements"),
        (step("Clip", low=3, high=2), "a lower bound lies above"),
        (step("Smooth", weight=0), "weight must be above 0"),
        (step("Smooth", wait=1), r"postprocess\[1\]: .*unexpected keyword argument 'wait'"),
        (step("Smoothe"), "has Clip, GripperBias, GripperThreshold, Offset, Smooth"),
        ({"class_path": "collections.OrderedDict"}, "is no step of the post-processing"),
        ({"init_args": {}}, "given as class_path and init_args"),
        (step("GripperThreshold", threshold=1, below=0, above=0), "must differ; both are 0"),
    ],
)
def test_what_does_not_fit_is_refused(broken, message):
    with pytest.raises(PostprocessError, match=message):
        build_postprocess([step("Offset", values=0), broken], ARM)


def test_elements_are_known_by_their_kind():
    bare = Features({}, Feature((2,), names=("x", "jaw.pos")))
    with pytest.raises(PostprocessError, match=r"no element of the action is of the kind gripper; name one of x, jaw.pos"):
        build_postprocess([step("GripperBias", value=1)], bare)
    assert play([step("GripperBias", value=1, element="jaw.pos")], [[0, 0]], bare) == [[0, 1]]
    pose = Feature((2,), names=("x", "yaw"), kinds=("position", "rotation"))
    with pytest.raises(PostprocessError, match="yaw are absolute rotations"):
        build_postprocess([step("Smooth", weight=0.5)], Features({}, pose, "absolute; commanded"))
    assert play([step("Smooth", weight=0.5)], [[0, 2], [2, 0]], Features({}, pose, "relative; commanded"))[1] == [1, 1]


def test_a_checkpoint_alone_post_processes(tmp_path):
    """Configuration, checkpoint, controller: the same steps, applied once and by the controller alone."""
    steps = [step("Smooth", weight=0.25), step("Offset", values=[5.0, 0.0]), step("Clip", high=4.9)]
    tiny_trainer(tmp_path, Checkpoints(), max_epochs=1).fit(TinyPolicy(postprocess=steps), datamodule=TinyData())
    policy = load_policy(tmp_path / "checkpoints" / "last.ckpt")
    assert policy.postprocess == steps
    observations = [{"observation.state": np.full(3, 0.3 * number, dtype=np.float32)} for number in range(4)]

    def play(**settings):
        controller = Controller(policy, 1, execution_horizon=1, **settings)
        controller.reset([0], [0])
        return np.stack([controller.act([observation], [number])[0] for number, observation in enumerate(observations)])

    raw, processed = play(postprocess=[]), play()
    expected = raw.copy()
    for number in range(1, 4):
        expected[number] = 0.25 * raw[number] + 0.75 * expected[number - 1]
    np.testing.assert_allclose(processed, np.minimum(expected + np.array([5, 0]), 4.9), rtol=1e-6)
    assert np.abs(processed - raw).max() > 1
