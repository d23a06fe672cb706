"""Demonstrations as data: generated once, found again, used as they are where a store is named."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_robot.data.demonstrations import DemonstrationsDataModule
from lightning_robot.data.store import StoreError
from lightning_robot.generation.generate import generate

ENVIRONMENT = "fake_expert_env:Reach-v0"


@pytest.fixture(autouse=True)
def _fake_environment(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "generation"))
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))


def ready(**arguments) -> DemonstrationsDataModule:
    settings = {"episodes_per_task": 3, "processes": 1, "num_workers": 0, "batch_size": 4} | arguments
    data = DemonstrationsDataModule(ENVIRONMENT, **settings)
    keys = ("observation.state", "observation.images.static")
    data.window = SimpleNamespace(keys=keys, observation_steps=2, action_horizon=4, action_offset=0, pad_before=1, pad_after=3)
    data.prepare_data()
    data.setup()
    return data


def test_demonstrations_are_generated_once_into_the_cache(tmp_path, capsys):
    data = ready(tasks=["right"], env_kwargs={"size": 5})
    assert data.store.path.parent == tmp_path / "cache" / "demonstrations"
    assert data.store.path.name.startswith("reach_v0_")
    assert data.store.num_episodes == 3
    batch = next(iter(data.train_dataloader()))
    assert batch["observation.images.static"].shape == (4, 2, 3, 4, 4)
    assert batch["action"].shape == (4, 4, 3)
    assert "Generating 3 demonstrations" in capsys.readouterr().out
    assert ready(tasks=["right"], env_kwargs={"size": 5}, processes=2).fingerprint == data.fingerprint
    assert "Generating" not in capsys.readouterr().out
    assert ready(tasks=["right"], env_kwargs={"size": 5}, generation_seed=50).store.path != data.store.path


def test_a_named_store_is_used_as_it_is_and_differences_are_said(tmp_path, capsys):
    path = generate(tmp_path / "reach.zarr", env=ENVIRONMENT, episodes_per_task=2, processes=1)
    data = ready(store=str(path), episodes_per_task=3)
    assert data.store.num_episodes == 4
    output = capsys.readouterr().out
    assert "used as it is" in output
    assert "episodes_per_task 2 there, 3 here" in output
    ready(store=str(path), episodes_per_task=2)
    assert "used as it is" not in capsys.readouterr().out


def test_a_store_that_does_not_exist_is_made_where_it_is_named(tmp_path):
    assert ready(store=str(tmp_path / "new" / "reach.zarr")).store.path == tmp_path / "new" / "reach.zarr"


def test_what_the_generator_finds_wrong_is_a_store_error():
    with pytest.raises(StoreError, match="'up' cannot be demonstrated"):
        ready(tasks=["up"])
