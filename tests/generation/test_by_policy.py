"""Demonstrations by a trained policy: what it does in evaluation, of which the successes are kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_robot.data.store import EpisodeStore
from lightning_robot.generation.generate import GenerationError, generate

ENVIRONMENT = "fake_expert_env:Reach-v0"


@pytest.fixture(autouse=True)
def _fake_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_successes_are_those_of_an_evaluation_and_failures_are_counted(tmp_path, capsys):
    from fake_walking_policy import save

    from lightning_robot.evaluation.rollout import environment_maker, plan_episodes, rollout
    from lightning_robot.policies.base import load_policy

    checkpoint = save(tmp_path / "walk.ckpt", noise=1.5)
    path = generate(
        tmp_path / "walk.zarr", env=ENVIRONMENT, policy=checkpoint, episodes_per_task=6, seed=100, hold=1, processes=1
    )
    store = EpisodeStore.open(path)
    attempted = store.provenance["policy"]["right"]["attempted"]
    assert store.provenance["policy"]["right"]["solved"] == 6
    assert store.provenance["settings"]["policy"]["class"] == "WalkRight"
    assert str(tmp_path) not in str(store.provenance)
    assert set(store.language["tasks"]) == {"right"}, "the one task that the policy was trained on"
    assert f"right: policy solved 6 of {attempted}" in capsys.readouterr().out

    plan = plan_episodes(attempted, 100, ["right"])
    result = rollout(load_policy(checkpoint), environment_maker(ENVIRONMENT), plan, inference_batch=1, progress=False)
    solved = [record for record in result.records if record.success]
    assert 0 < len(solved) < len(result.records), "the noise should fail now and then"
    assert [record.seed for record in solved] == store.provenance["seeds"]
    lengths = np.diff(store.episode_ends, prepend=0)
    assert [record.steps + 1 for record in solved] == lengths.tolist(), "one step is held after success"


@pytest.mark.slow  # worker processes import torch
def test_processes_change_nothing_and_noise_is_not_recorded(tmp_path):
    from fake_walking_policy import save

    settings = {"env": ENVIRONMENT, "policy": save(tmp_path / "walk.ckpt", noise=0.0), "episodes_per_task": 4, "processes": 1}
    one = EpisodeStore.open(generate(tmp_path / "one.zarr", **settings, noise=0.2))
    two = EpisodeStore.open(generate(tmp_path / "two.zarr", **settings | {"processes": 2}, noise=0.2))
    assert one.fingerprint == two.fingerprint
    clean = EpisodeStore.open(generate(tmp_path / "clean.zarr", **settings))
    np.testing.assert_array_equal(one.read("action", slice(0, 1)), clean.read("action", slice(0, 1)))
    assert np.abs(one.read("observation.state", slice(1, 2)) - clean.read("observation.state", slice(1, 2))).max() > 1e-3
    np.testing.assert_array_equal(one.whole("action")[:, 2], 1)


def test_wrong_policies_are_refused_before_the_work(tmp_path):
    from fake_walking_policy import save

    with pytest.raises(GenerationError, match="No checkpoint at"):
        generate(tmp_path / "a.zarr", env=ENVIRONMENT, policy=tmp_path / "none.ckpt")
    checkpoint = save(tmp_path / "walk.ckpt")
    with pytest.raises(GenerationError, match="The policy does not fit"):
        generate(tmp_path / "a.zarr", env="lightning_robot/PlayTable-v0", policy=checkpoint)
    settings = {"env": ENVIRONMENT, "episodes_per_task": 1, "processes": 1}
    generate(tmp_path / "a.zarr", policy=checkpoint, **settings)
    content = torch.load(checkpoint)
    content["state_dict"]["speed"] += 0.1
    torch.save(content, checkpoint)
    with pytest.raises(GenerationError, match=r"other settings: policy .*fingerprint"):
        generate(tmp_path / "a.zarr", policy=checkpoint, **settings)
