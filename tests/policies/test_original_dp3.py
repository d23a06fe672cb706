"""Original checkpoints: the same outputs, and no code run."""

import os
import pickle
import zipfile

import pytest
import torch

from lightning_robot.policies.base import load_policy
from lightning_robot.policies.dp3 import CLOUD, STATE, SimpleDP3
from lightning_robot.policies.original_dp3 import load_original_dp3
from lightning_robot.unpickling import ForbiddenPickle


@pytest.fixture(scope="module")
def checkpoint(shared):
    return shared / "golden" / "dp3_workspace_small.ckpt"


@pytest.fixture(scope="module")
def expected(shared):
    return torch.load(shared / "golden" / "dp3_workspace_small_expected.pt", weights_only=True)


def rewritten(checkpoint, path, payload):
    """The checkpoint with another pickle in it."""
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, payload if name.endswith("data.pkl") else source.read(name))
    return path


@pytest.mark.parametrize("formula", ["current", "historical"])
@pytest.mark.parametrize("weights", ["ema", "model"])
@torch.no_grad()
def test_outputs_are_the_originals(checkpoint, expected, weights, formula):
    policy = load_original_dp3(checkpoint, weights, sampler_formula=formula)
    values = expected["ema_model" if weights == "ema" else "model"]
    assert isinstance(policy, SimpleDP3)
    assert not policy.training
    sample = policy._sample(
        policy.encode({CLOUD: expected["obs"]["point_cloud"], STATE: expected["obs"]["agent_pos"]}), lambda _: expected["x_T"]
    )
    torch.testing.assert_close(sample, values[formula]["normalized_sample"], rtol=0, atol=2e-4)
    actions = policy.normalizer.unnormalize("action", sample)
    torch.testing.assert_close(actions, values[formula]["action_pred"], rtol=0, atol=2e-4)
    batch = expected["loss_batch"]
    loss = policy._loss(
        {CLOUD: batch["obs"]["point_cloud"][:, :2], STATE: batch["obs"]["agent_pos"][:, :2], "action": batch["action"]},
        expected["loss_noise"],
        torch.as_tensor(expected["loss_timesteps"]),
    )
    assert abs(float(loss) - float(values["loss"])) < 1e-6


def test_settings_are_read(checkpoint, expected):
    policy, settings = load_original_dp3(checkpoint), expected["config"]
    assert policy.execution_horizon == settings["n_action_steps"]
    assert policy.hparams["down_dims"] == settings["down_dims"]
    assert policy.features.observations[CLOUD].shape == (32, 3)


def test_it_becomes_a_checkpoint_of_ours(checkpoint, expected, tmp_path):
    policy = load_original_dp3(checkpoint)
    content = {"state_dict": policy.state_dict(), "hyper_parameters": dict(policy.hparams)}
    policy.on_save_checkpoint(content)
    torch.save(content, tmp_path / "ours.ckpt")
    observation = {CLOUD: expected["obs"]["point_cloud"], STATE: expected["obs"]["agent_pos"]}
    seeds = torch.tensor([1, 2])
    again = load_policy(tmp_path / "ours.ckpt").predict_action_chunk(observation, noise_seeds=seeds)
    assert torch.equal(again, policy.predict_action_chunk(observation, noise_seeds=seeds))


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("place", ["payload", "cfg"])
def test_code_is_refused_by_name(checkpoint, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    payload = {"cfg": Harmful() if place == "cfg" else {}, "state_dicts": {}, "more": Harmful()}
    path = rewritten(checkpoint, tmp_path / "harmful.ckpt", pickle.dumps(payload, protocol=2))
    with pytest.raises(ForbiddenPickle, match=r"(posix|nt|os)\.system"):
        load_original_dp3(path)
    assert not (tmp_path / "harmed").exists()


def test_other_types_of_dill_are_refused(checkpoint, tmp_path):
    harmful = b"\x80\x02cdill._dill\n_load_type\nX\x04\x00\x00\x00eval\x85R."
    with pytest.raises(ForbiddenPickle, match="'eval'"):
        load_original_dp3(rewritten(checkpoint, tmp_path / "harmful.ckpt", harmful))


def test_damaged_and_foreign_files(checkpoint, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.ckpt is damaged or no checkpoint"):
        load_original_dp3(cut)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.ckpt is damaged or no checkpoint"):
        load_original_dp3(foreign)
    with pytest.raises(ValueError, match=r"load_original_dp3\(path\)"):
        load_policy(checkpoint)
