"""Decoded copies: equal to the store, made once, renewed when the store changes, refused when the disk is full."""

import multiprocessing
import shutil

import numpy as np
import pytest

from lightning_robot.data.cache import cache_folder, decoded_array, file_lock
from lightning_robot.data.store import EpisodeStore, StoreWriter


def make(path, seed=0) -> EpisodeStore:
    writer = StoreWriter(
        path, {"observation.point_cloud": ((300, 6), "float32"), "action": ((2,), "float32")}, 50, shard_frames=16
    )
    rng = np.random.default_rng(seed)
    writer.append(
        {"observation.point_cloud": rng.normal(size=(50, 300, 6)).astype("float32"), "action": rng.normal(size=(50, 2))}
    )
    return writer.finish(np.array([20, 50]))


def test_copy_equals_the_store_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    store = make(tmp_path / "a.zarr")
    whole = store.read("observation.point_cloud", slice(None))
    copy = decoded_array(store, "observation.point_cloud", channels=3)
    assert isinstance(copy, np.memmap)
    np.testing.assert_array_equal(copy, whole[..., :3])
    np.testing.assert_array_equal(decoded_array(store, "observation.point_cloud"), whole)
    monkeypatch.setattr(EpisodeStore, "read", None)
    np.testing.assert_array_equal(decoded_array(store, "observation.point_cloud", channels=3), whole[..., :3])
    assert len(list((tmp_path / "a.zarr.decoded").glob("*.npy"))) == 2


def test_another_store_at_the_same_place_replaces_the_copy(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    decoded_array(make(tmp_path / "a.zarr"), "observation.point_cloud")
    shutil.rmtree(tmp_path / "a.zarr")
    store = make(tmp_path / "a.zarr", seed=1)
    np.testing.assert_array_equal(
        decoded_array(store, "observation.point_cloud"), store.read("observation.point_cloud", slice(None))
    )
    assert len(list((tmp_path / "a.zarr.decoded").glob("*.npy"))) == 1


def test_place_by_environment_variable_and_foreign_store(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    store = EpisodeStore.open(shared / "golden" / "dp3_demo.zarr")
    cloud = decoded_array(store, "observation.point_cloud", channels=3)
    np.testing.assert_array_equal(cloud, store.read("observation.point_cloud", slice(None))[..., :3])
    assert len(list((tmp_path / "cache" / "decoded").rglob("*.npy"))) == 1


def test_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    store = make(tmp_path / "a.zarr")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"point_cloud needs [\d.]+ [kM]?B, but .* has 1\.0 kB left.*LIGHTNING_ROBOT_CACHE"):
        decoded_array(store, "observation.point_cloud")
    assert not list((tmp_path / "a.zarr.decoded").glob("*.npy"))


def _hold(path, entered, release):
    with file_lock(path):
        entered.set()
        release.wait(10)
        (path.parent / "left").touch()


def test_lock_admits_one_process(tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    entered, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "x.lock", entered, release), daemon=True)
    process.start()
    assert entered.wait(10)
    said = []
    monkeypatch.setattr("lightning_robot.data.cache.say", lambda message: (said.append(message), release.set()))
    with file_lock(tmp_path / "x.lock"):
        assert (tmp_path / "left").exists()
    process.join(10)
    assert process.exitcode == 0
    assert len(said) == 1
    assert said[0].startswith("Waiting for another process")


def test_a_place_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write in .*file.*LIGHTNING_ROBOT_CACHE"), file_lock(tmp_path / "file" / "lock"):
        pass
