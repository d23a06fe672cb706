"""An old store is verified: every kind of change is found and named, and nothing is said of a store that is whole."""

import json
import shutil

import numpy as np
import pytest
import zarr

from lightning_robot.data.checksums import changed_blocks, checksum
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter, partial_folder
from lightning_robot.data.verification import outcome, verify_store

ARRAYS = {"observation.state": ((3,), "float32"), "observation.point_cloud": ((400, 3), "float32"), "action": ((2,), "float32")}
FRAMES = 40


def writer_of(path) -> StoreWriter:
    writer = StoreWriter(path, ARRAYS, FRAMES, shard_frames=16)
    rng = np.random.default_rng(0)
    values = {key: rng.normal(size=(FRAMES, *shape)).astype(dtype) for key, (shape, dtype) in ARRAYS.items()}
    values["action"][16:32] = 0  # Zarr writes no file for such a shard
    values["observation.state"][3] = np.nan
    values["observation.state"][4] = -0.0
    writer.append(values)
    return writer


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    language = {"texts": ["go"], "tasks": ["go"], "embeddings": np.eye(1, 4)}
    return writer_of(tmp_path / "s.zarr").finish(
        np.array([30, FRAMES]), split=np.array([0, 1]), segments=np.array([[0, 30, 0]]), language=language
    )


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_whole_store_is_whole(store, processes):
    verify_store(store, processes)
    assert outcome(store, "nothing else") == "Verified: 2 episodes and 40 frames in order; 7 checksums hold; nothing else."
    assert {name: len(digits) // 8 for name, digits in store.checksums["data"].items()} == dict.fromkeys(
        ("state", "point_cloud", "action"), 3
    )
    state = store.read("observation.state", slice(0, 16))
    assert store.checksums["data"]["state"][:8] == f"{checksum(state):08x}"
    assert checksum(state[8:], checksum(state[:8])) == checksum(state)


@pytest.mark.parametrize(
    ("array", "row", "where"),
    [
        ("state", 20, "data/state, rows from 16"),
        ("action", 17, "data/action, rows from 16"),
        ("point_cloud", 39, "rows from 32"),
    ],
)
def test_a_changed_value_is_found(store, array, row, where):
    values = zarr.open_array(str(store.path / "data" / array), mode="r+")
    values[row] = np.nextafter(values[row], 9, dtype=np.float32)
    with pytest.raises(StoreError, match=f"does not hold what was written: .*{where}"):
        verify_store(EpisodeStore.open(store.path))


def test_a_changed_byte_of_a_file_is_found(store):
    file = store.path / "data" / "point_cloud" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="data/point_cloud, rows from 16"):
        verify_store(EpisodeStore.open(store.path))


def test_changed_episodes_segments_features_and_additions_are_found(store, tmp_path):
    def changed(what) -> str:
        copy = tmp_path / "copy.zarr"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store.path, copy)
        what(zarr.open_group(str(copy), mode="r+", use_consolidated=False))
        with pytest.raises(StoreError) as error:
            verify_store(EpisodeStore.open(copy))
        return str(error.value)

    def ends(group):
        group["meta/episode_ends"][:] = [29, FRAMES]

    def segments(group):
        group["meta/segments"][:] = [[0, 29, 0]]

    def features(group):
        group.attrs["features"] = {"observations": {}}

    def addition(group):
        group["data"].create_array("reward", data=np.ones(FRAMES, np.float32))

    assert "meta/episode_ends" in changed(ends)
    assert "meta/segments" in changed(segments)
    assert "fingerprint" in changed(features)
    assert "what its writer did not write: observation.reward" in changed(addition)


def test_several_changes_are_counted(store):
    for row in (0, 20):
        zarr.open_array(str(store.path / "data" / "state"), mode="r+")[row] = 7
    with pytest.raises(StoreError, match="data/state, rows from 0, and 1 more"):
        verify_store(store)
    assert changed_blocks(store.path, store.checksums) == [("data/state", 0), ("data/state", 16)]


def test_a_zip_file_is_verified_too(store, tmp_path):
    shutil.make_archive(str(tmp_path / "z"), "zip", store.path)
    (tmp_path / "z.zip").rename(tmp_path / "z.zarr.zip")
    verify_store(EpisodeStore.open(tmp_path / "z.zarr.zip"))


def test_a_store_without_checksums_is_compared_with_its_fingerprint(store):
    attributes = json.loads((store.path / "zarr.json").read_text())
    del attributes["attributes"]["checksums"]
    (store.path / "zarr.json").write_text(json.dumps(attributes))
    old = EpisodeStore.open(store.path)
    verify_store(old)
    assert "; no checksums were noted when it was written; " in outcome(old, "nothing else")
    zarr.open_array(str(store.path / "data" / "state"), mode="r+")[20] = 7
    with pytest.raises(StoreError, match="not those that its fingerprint was made of"):
        verify_store(EpisodeStore.open(store.path))


def test_the_writer_reads_back_and_writes_anew_what_differs(tmp_path, store):
    writer = writer_of(tmp_path / "t.zarr")
    zarr.open_array(str(writer.partial / "store" / "data" / "state"), mode="r+")[33] = 7
    rest = {"split": np.array([0, 1]), "segments": np.array([[0, 30, 0]])}
    rest["language"] = {"texts": ["go"], "tasks": ["go"], "embeddings": np.eye(1, 4)}
    with pytest.raises(StoreError, match="what is read back is not what was written: data/state, rows from 32"):
        writer.finish(np.array([30, FRAMES]), **rest)
    assert not (tmp_path / "t.zarr").exists()
    again = StoreWriter(tmp_path / "t.zarr", ARRAYS, FRAMES, shard_frames=16)
    assert [again.is_written(start) for start in again.shards] == [True, True, False]
    assert again.is_written(32, ["action"])
    again = writer_of(tmp_path / "t.zarr").finish(np.array([30, FRAMES]), **rest)
    for file in store.path.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (again.path / file.relative_to(store.path)).read_bytes()
    assert not partial_folder(again.path).exists()


def test_a_refusal_of_the_caller_keeps_the_store_from_its_place(tmp_path):
    def refuse(found):
        assert found.num_frames == FRAMES
        raise StoreError("as asked")

    with pytest.raises(StoreError, match="as asked"):
        writer_of(tmp_path / "t.zarr").finish(np.array([30, FRAMES]), check=refuse)
    assert not (tmp_path / "t.zarr").exists()


def test_a_journal_without_checksums_is_not_believed(tmp_path):
    """As an interrupted writer of an earlier version left it."""
    writer = writer_of(tmp_path / "t.zarr")
    journal = writer.partial / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().split("\n") if line]
    journal.write_text("\n".join(json.dumps(line[:2]) for line in lines))
    again = StoreWriter(tmp_path / "t.zarr", ARRAYS, FRAMES, shard_frames=16)
    assert not any(again.is_written(start) for start in again.shards)
