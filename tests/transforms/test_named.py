"""Named transforms: each there and back, in a chain, in a policy and through a checkpoint."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from tiny_run import TinyPolicy

from lightning_robot.features import Feature, Features
from lightning_robot.policies.base import load_policy
from lightning_robot.transforms import named
from lightning_robot.transforms.named import (
    DeltaActions,
    GripperConvention,
    PadVectors,
    RenameCameras,
    Resize,
    SelectState,
    TransformError,
    Transforms,
)
from lightning_robot.transforms.statistics import StatisticsAccumulator

JOINTS = ("pan.pos", "lift.pos", "gripper.pos")
STATE = ("extra", *reversed(JOINTS))  # another order than the action's: names decide
FEATURES = Features(
    observations={
        "observation.state": Feature((4,), names=STATE),
        "observation.images.top": Feature((3, 8, 12), dtype="uint8"),
        "observation.images.hand": Feature((3, 6, 6), dtype="uint8"),
        "observation.depth.top": Feature((1, 8, 12)),
    },
    action=Feature((3,), names=JOINTS),
    action_semantics="absolute; commanded; joints degrees; gripper 0 closed 100 open",
)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation.state": torch.randn(2, 2, 4, generator=generator),
        "observation.images.top": torch.randint(0, 256, (2, 2, 3, 8, 12), generator=generator, dtype=torch.uint8),
        "observation.images.hand": torch.randint(0, 256, (2, 2, 3, 6, 6), generator=generator, dtype=torch.uint8),
        "observation.images.hand_is_pad": torch.zeros(2, 2, dtype=torch.bool),
        "observation.depth.top": torch.rand(2, 2, 1, 8, 12, generator=generator),
        "action": torch.randn(2, 5, 3, generator=generator),
        "action_is_pad": torch.zeros(2, 5, dtype=torch.bool),
    }


def step(name, **arguments):
    return {"class_path": f"lightning_robot.transforms.named.{name}", "init_args": arguments}


STEPS = {
    "rename": step("RenameCameras", names={"top": "overhead", "hand": "wrist"}),
    "swap": step("RenameCameras", names={"top": "hand", "hand": "top"}),
    "resize": step("Resize", height=4, width=4),
    "letterbox": step("Resize", height=10, width=10, keep_ratio=True, cameras=["top"]),
    "delta": step("DeltaActions"),
    "delta of all": step("DeltaActions", elements=list(JOINTS)),
    "gripper": step("GripperConvention", element="gripper.pos", data=[0, 100]),
    "pad": step("PadVectors", state=9, action=7),
    "select": step("SelectState", elements=["lift.pos", "extra"]),
}


@pytest.mark.parametrize("names", [*((name,) for name in STEPS), ("rename", "gripper", "delta", "select", "pad", "resize")])
def test_actions_come_back_and_shapes_are_as_announced(names):
    chain = Transforms([STEPS[name] for name in names])
    after = chain.features(FEATURES)
    given = batch()
    seen = chain.apply(given)
    for key, feature in after.observations.items():
        assert tuple(seen[key].shape[2:]) == feature.shape, key
        assert seen[key].dtype == getattr(torch, feature.dtype), key
    assert tuple(seen["action"].shape[2:]) == after.action.shape
    samples = torch.stack([seen["action"], 2 * seen["action"]], 1)
    observation = {key: value for key, value in given.items() if not key.startswith("action")}
    back = chain.invert(samples, observation)
    torch.testing.assert_close(back[:, 0], given["action"])
    assert set(chain.sources(tuple(after.observations))) == set(FEATURES.observations)
    torch.testing.assert_close(given, batch())  # nothing was changed in place


def test_cameras_are_renamed_with_their_padding_and_depth():
    chain = Transforms([STEPS["swap"]])
    given, seen = batch(), chain.apply(batch())
    assert torch.equal(seen["observation.images.hand"], given["observation.images.top"])
    assert torch.equal(seen["observation.images.top"], given["observation.images.hand"])
    assert torch.equal(seen["observation.images.top_is_pad"], given["observation.images.hand_is_pad"])
    assert torch.equal(seen["observation.depth.hand"], given["observation.depth.top"])
    assert chain.sources(("observation.images.hand", "observation.state")) == ("observation.images.top", "observation.state")


def test_delta_is_to_the_newest_state_by_name_and_leaves_the_gripper():
    chain = Transforms([STEPS["delta"]])
    after = chain.features(FEATURES)
    given = batch()
    seen = chain.apply(given)["action"]
    newest = given["observation.state"][:, -1]
    torch.testing.assert_close(seen[..., 0], given["action"][..., 0] - newest[:, None, STATE.index("pan.pos")])
    torch.testing.assert_close(seen[..., 1], given["action"][..., 1] - newest[:, None, STATE.index("lift.pos")])
    assert torch.equal(seen[..., 2], given["action"][..., 2])
    assert after.action_semantics.startswith("relative to the state; commanded")
    with pytest.raises(TransformError, match="not absolute"):
        chain.features(after)


def test_delta_needs_a_state_that_has_the_action_s_elements():
    bare = Features({"observation.state": Feature((2,))}, Feature((3,)))
    Transforms([step("DeltaActions", elements=[0, 1])]).features(bare)
    with pytest.raises(TransformError, match="the state has 2 elements, none for the action's 2"):
        Transforms([step("DeltaActions", elements=[0, 1, 2])]).features(bare)


def test_gripper_is_rescaled_in_state_and_action():
    chain = Transforms([step("GripperConvention", element="gripper.pos", data=[0, 100], policy=[1, 0])])
    chain.features(FEATURES)
    given = batch()
    given["action"][..., 2] = 75.0
    given["observation.state"][..., STATE.index("gripper.pos")] = 100.0
    seen = chain.apply(given)
    assert seen["action"][..., 2].unique().tolist() == [0.25]
    assert seen["observation.state"][..., STATE.index("gripper.pos")].unique().tolist() == [0.0]


def test_resizing():
    ramp = torch.arange(12, dtype=torch.uint8).expand(1, 1, 3, 8, 12) * 20
    narrow = Resize(height=8, width=6).apply({"observation.images.top": ramp})["observation.images.top"]
    assert narrow[0, 0, 0, 0].tolist()[1:-1] == [50, 90, 130, 170]  # means of two pixels, up to the filter at the edges
    boxed = Resize(height=12, width=12, keep_ratio=True).apply({"observation.images.top": ramp})["observation.images.top"]
    assert torch.equal(boxed[..., 2:10, :], ramp)
    assert not boxed[..., :2, :].any()
    assert not boxed[..., 10:, :].any()
    depth = torch.tensor([[0.5, 3.0]]).expand(1, 1, 1, 1, 2)
    wide = Resize(height=1, width=4).apply({"observation.depth.top": depth})["observation.depth.top"]
    assert wide.unique().tolist() == [0.5, 3.0]  # no distance that no pixel had


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("RenameCameras", names={"side": "top"})], "no camera side; there are hand, top"),
        ([step("RenameCameras", names={"hand": "top"})], "there is a camera top already"),
        ([step("RenameCameras", names={"hand": "a", "top": "a"})], "two cameras one name"),
        ([step("Resize", height=0, width=3)], "no size of a picture"),
        ([step("Resize", height=3, width=3, cameras=["side"])], "no camera side"),
        ([step("SelectState", elements=["elbow"])], "no element 'elbow' in observation.state, which has 4, named extra"),
        ([step("PadVectors", action=2)], "action has 3 elements already, more than 2"),
        ([step("GripperConvention", element="gripper.pos", data=[1, 1])], "same value for closed and open"),
        ([step("Rotate")], r"transforms\[0\]: no class .*Rotate'; .* has DeltaActions, GripperConvention"),
        ([STEPS["delta"], step("DeltaActions", element="pan")], r"transforms\[1\]: .*unexpected keyword argument 'element'"),
        ([{"Resize": {}}], "given as class_path and init_args"),
        ([{"class_path": "lightning_robot.features.Feature"}], "is no transform"),
    ],
)
def test_what_does_not_fit_is_named(steps, message):
    with pytest.raises(TransformError, match=message):
        Transforms(steps).features(FEATURES)


class Data:
    """Three numbers of state, two of action that follow the first two."""

    language = None
    features = Features(
        observations={"observation.state": Feature((3,), names=("a", "b", "c"))},
        action=Feature((2,), names=("a", "b")),
        action_semantics="absolute; commanded; world",
    )
    state = 100 * torch.randn(64, 1, 3, generator=torch.Generator().manual_seed(1))
    action = state[..., :2].expand(64, 2, 2) + torch.rand(64, 2, 2, generator=torch.Generator().manual_seed(2))

    def statistics(self, keys, transform=None):
        seen = transform({"observation.state": self.state, "action": self.action})
        results = {}
        for key in keys:
            accumulator = StatisticsAccumulator()
            accumulator.update(seen[key].numpy())
            results[key] = accumulator.result()
        return results


def test_a_policy_learns_and_acts_through_its_transforms_and_its_checkpoint_keeps_them(tmp_path):
    policy = TinyPolicy(dropout=0.0, transforms=[step("DeltaActions")])
    policy._trainer = SimpleNamespace(datamodule=Data(), strategy=None)
    policy.configure_model()
    policy._trainer = None
    span = 2 / policy.normalizer.get_buffer("action_scale")
    assert (span < 1.01).all()  # of the differences, not of the positions, which span hundreds
    observation = {"observation.state": Data.state[:4]}
    chunk = policy.eval().predict_action_chunk(observation)
    assert ((chunk - Data.state[:4, :, None, :2]).abs() < 100).all()
    network = policy._predict(observation, None, 1, None)
    torch.testing.assert_close(chunk, network + Data.state[:4, :, None, :2])
    checkpoint = {
        "state_dict": policy.state_dict(),
        "hyper_parameters": dict(policy.hparams),
        "format": 1,
        "class_path": "tiny_run.TinyPolicy",
    }
    torch.save(checkpoint, tmp_path / "policy.ckpt")
    loaded = load_policy(tmp_path / "policy.ckpt")
    assert torch.equal(loaded.predict_action_chunk(observation), chunk)
    assert [type(one) for one in loaded.transforms.steps] == [DeltaActions]


def test_every_transform_is_tried_here():
    kinds = {kind.__name__ for kind in named.Transform.__subclasses__()}
    assert kinds == {one["class_path"].rpartition(".")[2] for one in STEPS.values()}
    assert {RenameCameras, PadVectors, SelectState, GripperConvention} <= set(named.Transform.__subclasses__())
