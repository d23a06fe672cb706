"""Stores of the Diffusion Policy family open unchanged; our own survive kills; broken ones are refused with a remedy."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter, partial_folder
from lightning_robot.features import Feature, Features

ARRAYS = {
    "observation.state": ((3,), "float32"),
    "observation.point_cloud": ((400, 6), "float32"),
    "action": ((2,), "float32"),
}
FRAMES = 70


def frames(count=FRAMES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=(count, *shape)).astype(dtype) for key, (shape, dtype) in ARRAYS.items()}


def write(path, attrs=None, ends=(30, 45, FRAMES), **extra) -> EpisodeStore:
    writer = StoreWriter(path, ARRAYS, FRAMES, attrs, shard_frames=16)
    values = frames()
    for start, end in zip((0, *ends), ends):
        writer.append({key: value[start:end] for key, value in values.items()})
    return writer.finish(np.array(ends), **extra)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["dp3_demo.zarr", "dp_replay_buffer.zarr"])
def test_published_layout_opens_unchanged(shared, name):
    expected = torch.load(shared / "golden" / "dp3_zarr_expected.pt", weights_only=True)
    store = EpisodeStore.open(shared / "golden" / name)
    assert store.keys == ("action", "observation.images.static", "observation.point_cloud", "observation.state")
    np.testing.assert_array_equal(store.episode_ends, expected["episode_ends"].numpy())
    for key, array in (("observation.state", "state"), ("action", "action"), ("observation.images.static", "img")):
        np.testing.assert_array_equal(store.read(key, slice(None)), expected["arrays"][array].numpy())
        np.testing.assert_array_equal(
            store.gather(key, np.array([47, 0, 0, 9])), expected["arrays"][array][[47, 0, 0, 9]].numpy()
        )
    assert store.features.observations["observation.images.static"] == Feature((3, 8, 8), "uint8")
    assert store.features.observations["observation.point_cloud"].shape == (32, 6)
    assert store.language is None
    assert store.segments is None
    assert store.episode_split is None


def test_fingerprint_is_of_values_not_of_bytes(shared):
    stores = [EpisodeStore.open(shared / "golden" / name) for name in ("dp3_demo.zarr", "dp_replay_buffer.zarr")]
    assert stores[0].fingerprint == stores[1].fingerprint  # other chunks, other compressors, the same episodes


def test_zip_file_of_a_store(shared, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "demo.zarr"), "zip", shared / "golden" / "dp3_demo.zarr")
    assert EpisodeStore.open(archive).num_frames == 48


def test_what_is_written_is_read(tmp_path):
    features = Features(
        {"observation.state": Feature((3,)), "observation.point_cloud": Feature((400, 6))}, Feature((2,)), control_rate=30.0
    )
    language = {"texts": ["open", "close"], "tasks": ["o", "c"], "encoder": "e", "embeddings": np.eye(2, 5)}
    store = write(
        tmp_path / "a.zarr",
        {"features": features.to_dict(), "provenance": {"seed": 3}},
        split=[0, 1, 0],
        segments=[[0, 12, 1], [31, 45, 0]],
        language=language,
    )
    rows = np.array([69, 3, 3, 44, 0])
    for key, value in frames().items():
        np.testing.assert_array_equal(store.read(key, slice(10, 50)), value[10:50])
        np.testing.assert_array_equal(store.gather(key, rows), value[rows])
    assert store.features == features
    assert store.provenance == {"seed": 3}
    assert store.episode_split.tolist() == [0, 1, 0]
    assert store.segments.tolist() == [[0, 12, 1], [31, 45, 0]]
    assert store.language["tasks"] == ["o", "c"]
    np.testing.assert_array_equal(store.language["embeddings"], np.eye(2, 5, dtype=np.float32))
    assert not partial_folder(store.path).exists()
    group = zarr.open_group(str(store.path), mode="r")
    assert group.metadata.zarr_format == 3
    assert {array.shards[0] for _, array in group["data"].arrays()} == {16}
    assert group["data/point_cloud"].chunks[0] == 4
    again = pickle.loads(pickle.dumps(store))
    assert again.fingerprint == store.fingerprint
    assert again.fingerprint == again.compute_fingerprint()


def test_killed_writer_continues_to_the_same_bytes(tmp_path):
    whole = content(write(tmp_path / "whole.zarr", {"provenance": {"seed": 1}}).path)

    def die_in_third_shard(path):
        writer = StoreWriter(path, ARRAYS, FRAMES, {"provenance": {"seed": 1}}, shard_frames=16)
        write_one, count = writer.write, 0

        def write(key, start, block):
            nonlocal count
            count += 1
            if count == 8:
                os._exit(9)  # nothing is flushed, as by kill -9
            write_one(key, start, block)

        writer.write = write
        writer.append(frames())

    path = tmp_path / "killed.zarr"
    process = multiprocessing.get_context("fork").Process(target=die_in_third_shard, args=(path,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    with pytest.raises(StoreError, match=r"not finished.*Run the same command again"):
        EpisodeStore.open(path)
    with open(partial_folder(path) / "journal.jsonl", "a") as journal:
        journal.write('["action", 3')  # a line cut by the kill
    with pytest.raises(StoreError, match=r"begun with other settings \(attrs\)"):
        StoreWriter(path, ARRAYS, FRAMES, {"provenance": {"seed": 2}}, shard_frames=16)
    writer = StoreWriter(path, ARRAYS, FRAMES, {"provenance": {"seed": 1}}, shard_frames=16)
    assert [writer.is_written(start) for start in writer.shards] == [True, True, False, False, False]
    with pytest.raises(StoreError, match="3 of 5 shards are not written, the first at row 32"):
        writer.finish(np.array([30, 45, FRAMES]))
    writer = StoreWriter(path, ARRAYS, FRAMES, {"provenance": {"seed": 1}}, shard_frames=16)
    writer.append(frames())
    writer.finish(np.array([30, 45, FRAMES]))
    assert content(path) == whole


def test_what_a_kill_after_the_last_rename_left_is_begun_afresh(tmp_path):
    path = tmp_path / "a.zarr"
    writer = StoreWriter(path, ARRAYS, FRAMES, shard_frames=16)
    writer.append(frames())
    shutil.copytree(writer.partial, tmp_path / "left")
    writer.finish(np.array([30, FRAMES]))
    whole = content(path)
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "left", partial_folder(path), ignore=shutil.ignore_patterns("store"))
    writer = StoreWriter(path, ARRAYS, FRAMES, shard_frames=16)
    assert not any(writer.is_written(start) for start in writer.shards)
    writer.append(frames())
    writer.finish(np.array([30, FRAMES]))
    assert content(path) == whole
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="exists"):
        StoreWriter(tmp_path / "link", ARRAYS, FRAMES)


def _write_shard(job):
    writer, start = job
    for key, value in frames().items():
        writer.write(key, start, value[start : start + 16])


def test_several_processes_write_shards(tmp_path):
    expected = content(write(tmp_path / "one.zarr").path)
    writer = StoreWriter(tmp_path / "many.zarr", ARRAYS, FRAMES, shard_frames=16)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_write_shard_by_path, [(str(tmp_path / "many.zarr"), start) for start in writer.shards])
    writer.finish(np.array([30, 45, FRAMES]))
    assert content(tmp_path / "many.zarr") == expected


def _write_shard_by_path(job):
    path, start = job
    _write_shard((pickle.loads(pickle.dumps(StoreWriter(path, ARRAYS, FRAMES, shard_frames=16))), start))


def test_writer_refuses_what_would_lose_frames(tmp_path):
    writer = StoreWriter(tmp_path / "a.zarr", ARRAYS, FRAMES, shard_frames=16)
    with pytest.raises(StoreError, match="shard by shard: 16 rows at a multiple of 16, not 5 rows at 16"):
        writer.write("action", 16, np.zeros((5, 2), np.float32))
    with pytest.raises(StoreError, match=r"action has frames of shape \(2,\), given \(3,\)"):
        writer.write("action", 16, np.zeros((16, 3), np.float32))
    with pytest.raises(StoreError, match=r"needs observation\.state, observation\.point_cloud, action; given action"):
        writer.append({"action": np.zeros((1, 2))})
    blocks = frames(4)
    blocks["action"] = blocks["action"][:3]
    with pytest.raises(StoreError, match=r"different lengths.*'action': 3"):
        writer.append(blocks)
    with pytest.raises(StoreError, match="71 frames given, 70 announced"):
        writer.append(frames(71))
    with pytest.raises(StoreError, match="from 1 to 4"):
        StoreWriter(tmp_path / "b.zarr", ARRAYS, 9, cloud_chunk=100)
    write(tmp_path / "c.zarr")
    with pytest.raises(StoreError, match=r"c\.zarr exists"):
        StoreWriter(tmp_path / "c.zarr", ARRAYS, 9)


def test_segments_and_ends_are_checked_before_they_are_written(tmp_path):
    with pytest.raises(StoreError, match=r"segment 0 \(frames 10 to 40, text 0\)"):
        write(tmp_path / "a.zarr", segments=[[10, 40, 0]], language={"texts": ["x"], "tasks": ["x"]})
    with pytest.raises(StoreError, match="episode_ends must increase from above 0 to 70"):
        write(tmp_path / "b.zarr", ends=(30, 30, FRAMES))


def test_broken_stores_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(StoreError, match=r"no store at .*none\.zarr.*convert calvin.*generate"):
        EpisodeStore.open(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=r"not a Zarr group.*convert calvin"):
        EpisodeStore.open(tmp_path / "folder")
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    with pytest.raises(StoreError, match="is empty: it holds no array"):
        EpisodeStore.open(tmp_path / "empty.zarr")

    def damaged(name):
        path = write(tmp_path / f"{name}.zarr").path
        return path, zarr.open_group(str(path), mode="r+")

    path, group = damaged("cut")
    del group["meta/episode_ends"]
    with pytest.raises(StoreError, match=r"incomplete: it has no meta/episode_ends.*interrupted"):
        EpisodeStore.open(path)
    path, group = damaged("garbled")
    next(file for file in (path / "data" / "action" / "c").rglob("*") if file.is_file()).write_bytes(b"x" * 100)
    with pytest.raises(StoreError, match=r"data/action cannot be read .*damaged"):
        EpisodeStore.open(path).read("action", slice(None))
    path, group = damaged("no_frames")
    group["data"].create_array("version", data=np.array(3))
    with pytest.raises(StoreError, match="data/version 0"):
        EpisodeStore.open(path)
    path, group = damaged("no_episodes")
    group["meta"].create_array("episode_ends", data=np.zeros(0, np.int64), overwrite=True)
    with pytest.raises(StoreError, match="is empty: it holds no episode"):
        EpisodeStore.open(path)
    path, group = damaged("lengths")
    group["data/action"].resize((60, 2))
    with pytest.raises(StoreError, match=r"different lengths: data/action 60, data/point_cloud 70, data/state 70.*ends at 70"):
        EpisodeStore.open(path)
    path, group = damaged("features")
    group.attrs["features"] = Features({"observation.state": Feature((15,))}, Feature((2,))).to_dict()
    with pytest.raises(StoreError, match=r"features give observation\.state the shape \(15,\), data/ has \(3,\)"):
        _ = EpisodeStore.open(path).features
    with pytest.raises(StoreError, match=r"holds no observation\.images\.static; it holds action, observation\.point_cloud"):
        EpisodeStore.open(path).read("observation.images.static", slice(0, 1))


def test_large_arrays_are_gathered_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_robot.data.store.IN_MEMORY_BYTES", 0)
    store = write(tmp_path / "a.zarr")
    rows = np.array([69, 3, 3, 44, 0])
    assert store.is_large("observation.point_cloud")
    assert not store.is_large("action")
    cloud = store.gather("observation.point_cloud", rows)
    np.testing.assert_array_equal(cloud, frames()["observation.point_cloud"][rows])
    assert "observation.point_cloud" not in store._in_memory


def test_floating_point_comes_as_float32(tmp_path):
    group = zarr.open_group(str(tmp_path / "f64.zarr"), mode="w", zarr_format=2)
    group.create_array("data/state", data=np.arange(12.0).reshape(4, 3))
    group.create_array("data/action", data=np.arange(4.0).reshape(4, 1))
    group.create_array("meta/episode_ends", data=np.array([4]))
    store = EpisodeStore.open(tmp_path / "f64.zarr")
    assert store.read("observation.state", slice(0, 2)).dtype == np.float32
    assert store.gather("action", np.array([1])).dtype == np.float32


@pytest.mark.parametrize(("harm", "message"), [("unlink", "files of data/action are missing"), ("truncate", "is empty")])
def test_a_store_that_lost_a_file_is_refused(tmp_path, harm, message):
    path = write(tmp_path / "a.zarr").path
    file = next(item for item in (path / "data" / "action" / "c").rglob("*") if item.is_file())
    file.unlink() if harm == "unlink" else file.write_bytes(b"")
    with pytest.raises(StoreError, match=message):
        EpisodeStore.open(path)


def test_zeros_are_data(tmp_path):
    writer = StoreWriter(tmp_path / "zeros.zarr", {"observation.state": ((3,), "float32"), "action": ((2,), "float32")}, 40)
    writer.append({"observation.state": np.zeros((40, 3), np.float32), "action": np.zeros((40, 2), np.float32)})
    store = writer.finish(np.array([40]))  # opens it: what Zarr left out must not count as lost
    assert not store.read("action", slice(None)).any()
