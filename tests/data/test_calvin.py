"""CALVIN's data module: recordings converted at the first use, stores, generated demonstrations, and wrong places."""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lightning_robot.data import demonstrations as demonstrations_module
from lightning_robot.data.calvin import CalvinDataModule, Demonstrations
from lightning_robot.data.calvin_frames import CalvinSettings
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter

WINDOW = SimpleNamespace(
    keys=("observation.state", "observation.point_cloud"),
    observation_steps=2,
    action_horizon=8,
    action_offset=-1,
    pad_before=1,
    pad_after=3,
)


def ready(**arguments) -> CalvinDataModule:
    data = CalvinDataModule(num_workers=0, batch_size=8, **arguments)
    data.window = WINDOW
    data.prepare_data()
    data.setup()
    return data


def demonstrations(path, *, tasks=None, episodes_per_task, env_kwargs, **_) -> None:
    """Stands in for the generator: the simulator is tested elsewhere."""
    points, frames = env_kwargs["cloud"]["points"], 10
    arrays = {
        "observation.state": ((15,), "float32"),
        "observation.point_cloud": ((points, 3), "float32"),
        "action": ((7,), "float32"),
    }
    tasks = tasks or ["open_drawer", "close_drawer"]
    episodes = len(tasks) * episodes_per_task
    writer = StoreWriter(path, arrays, episodes * frames)
    rng = np.random.default_rng(0)
    writer.append({key: rng.normal(size=(episodes * frames, *shape)) for key, (shape, _) in arrays.items()})
    ends = np.arange(1, episodes + 1) * frames
    segments = np.stack([ends - frames, ends, np.arange(episodes) % len(tasks)], axis=1)
    writer.finish(ends, segments=segments, language={"texts": [f"please {task}" for task in tasks], "tasks": tasks})


@pytest.fixture
def generator(monkeypatch):
    calls = []

    def generate(path, **arguments):
        calls.append(path)
        demonstrations(path, **arguments)

    monkeypatch.setitem(sys.modules, "stand_in_generator", types.SimpleNamespace(generate=generate))
    monkeypatch.setattr(demonstrations_module, "GENERATOR", "stand_in_generator:generate")
    return calls


def test_without_a_root_demonstrations_are_generated_once_and_said(tmp_path, monkeypatch, generator, capsys):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path))
    settings = Demonstrations(tasks=["open_drawer"], episodes_per_task=3, points=32)
    data = ready(generate=settings, segments=True)
    lines = capsys.readouterr().out.splitlines()
    assert sum("No dataset is named" in line and "generated in the play table" in line for line in lines) == 1
    assert data.store.path.parent == tmp_path / "demonstrations"
    batch = next(iter(data.train_dataloader()))
    assert batch["observation.point_cloud"].shape == (8, 2, 32, 3)
    assert batch["task"] == ["please open_drawer"] * 8
    assert batch["task_embedding"].shape == (8, 384)
    assert data.language["tasks"] == ["open_drawer"]
    assert ready(generate=settings).fingerprint == data.fingerprint
    assert len(generator) == 1
    other = Demonstrations(tasks=["open_drawer"], episodes_per_task=3, points=64)
    assert other.place != settings.place
    assert Demonstrations(processes=1).place == Demonstrations(processes=2).place


def test_a_named_store_is_made_or_used(tmp_path, generator):
    path = tmp_path / "mine.zarr"
    ready(store=str(path), generate={"episodes_per_task": 2, "points": 16})
    assert len(generator) == 1
    assert ready(store=str(path)).store.path == path
    assert ready(root=str(path)).store.path == path
    assert len(generator) == 1
    with pytest.raises(StoreError, match=r"is a store already: leave out data\.init_args\.store"):
        ready(root=str(path), store=str(tmp_path / "x.zarr"))


def test_settings_of_demonstrations_concern_generated_stores_alone(tmp_path, monkeypatch, generator):
    path, arguments = tmp_path / "mine.zarr", Demonstrations(episodes_per_task=2, points=16).arguments()
    demonstrations(path, **arguments)
    assert ready(store=str(path), generate=Demonstrations()).store.path == path
    assert generator == []

    def refuse(path, **arguments):
        raise RuntimeError(f"{path} was generated with other settings.")

    monkeypatch.setattr(sys.modules["stand_in_generator"], "generate", refuse)
    monkeypatch.setattr(EpisodeStore, "provenance", {"settings": {"generator": "expert"}})
    with pytest.raises(StoreError, match=r"other settings\. To train on it as it is, name it as data\.init_args\.root"):
        ready(store=str(path), generate=Demonstrations())


def test_recordings_are_converted_at_the_first_use(shared, tmp_path):
    root = shared / "data" / "calvin_sample"
    settings = CalvinSettings(points=64, rgb=False, depth=False, pixel_offset=(0.0, 1.0))
    data = ready(root=str(root), store=str(tmp_path / "sample.zarr"), convert=settings)
    assert len(data.train_episodes) >= 1
    assert len(data.validation_episodes) >= 1  # CALVIN's own validation folder
    assert data.store.episode_split[data.validation_episodes].all()
    assert len(data.train_windows) > 0
    again = ready(root=str(root), store=str(tmp_path / "sample.zarr"))
    assert again.fingerprint == data.fingerprint
    with pytest.raises(StoreError, match="converted with other settings"):
        ready(root=str(root), store=str(tmp_path / "sample.zarr"), convert=CalvinSettings(points=128))
    segmented = ready(root=str(root), store=str(tmp_path / "sample.zarr"), segments=True)
    assert segmented.language["embeddings"].shape[1] == 384
    assert len(segmented.language["texts"]) == len(segmented.language["tasks"])


def test_default_place_is_beside_the_recordings_or_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "task_D_D" / "training").mkdir(parents=True)
    (tmp_path / "task_D_D" / "training" / "ep_start_end_ids.npy").touch()
    data = CalvinDataModule(root=str(tmp_path / "task_D_D"))
    assert data.find_store() == tmp_path / "task_D_D.zarr"
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))
    tmp_path.chmod(0o555)
    assert data.find_store().parent == tmp_path / "cache" / "calvin"
    tmp_path.chmod(0o755)


def test_a_root_that_is_wrong_says_how_to_get_data(tmp_path):
    with pytest.raises(StoreError, match=r"nothing at .*missing.*download_data\.sh.*convert calvin ROOT STORE.*generate STORE"):
        ready(root=str(tmp_path / "missing"))
    with pytest.raises(StoreError, match=r"neither a CALVIN folder .* nor an episode store"):
        ready(root=str(tmp_path))
    with pytest.raises(StoreError, match="nothing at"):
        CalvinDataModule(root=str(tmp_path / "missing")).setup()


def test_configuration_is_checked_by_type(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(CalvinDataModule, "data")
    name = "lightning_robot.data.calvin.CalvinDataModule"
    arguments = ["--data", name, "--data.generate.points=512", "--data.generate.tasks=[open_drawer]", "--data.segments=true"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(data.generate, Demonstrations)
    assert (data.generate.points, data.generate.tasks, data.use_segments) == (512, ["open_drawer"], True)
    with pytest.raises(Exception, match="pionts"):
        parser.parse_args(["--data", name, "--data.generate.pionts=512"])


def test_a_cut_store_is_refused(tmp_path, generator):
    path = tmp_path / "mine.zarr"
    ready(store=str(path), generate=Demonstrations(episodes_per_task=2, points=16))
    (path / "meta" / "episode_ends" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="incomplete: it has no meta/episode_ends"):
        CalvinDataModule(root=str(path)).setup()


def test_what_the_converter_or_the_generator_finds_wrong_is_a_store_error(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path))

    def generate(path, **settings):
        raise RuntimeError("nobody can fly")

    monkeypatch.setitem(sys.modules, "stand_in_generator", types.SimpleNamespace(generate=generate))
    monkeypatch.setattr(demonstrations_module, "GENERATOR", "stand_in_generator:generate")
    with pytest.raises(StoreError, match="nobody can fly"):
        ready(generate={"tasks": ["fly"]})
    (tmp_path / "raw" / "training").mkdir(parents=True)
    (tmp_path / "raw" / "training" / "ep_start_end_ids.npy").write_bytes(b"nothing")
    with pytest.raises(StoreError, match=r"holds no episode_\*\.npz files"):
        ready(root=str(tmp_path / "raw"))
