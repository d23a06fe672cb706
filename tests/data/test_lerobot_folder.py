"""Reading LeRobot folders: both versions, both ways of storing pictures, against LeRobot's own items; and broken folders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from lerobot_folders import CAMERAS, change_episodes, change_json, codes_of, picture_of, state_of, write_folder

from lightning_robot.data import pictures
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import StoreError


def values_of(episode, frame):
    """State of the shipped samples (their formula)."""
    joint = np.arange(6)
    state = 30 * np.sin(0.1 * (frame + 1) * (joint + 1) / 2 + 0.7 * episode)
    state[4], state[5] = 12.5, 50 + 50 * np.cos(0.15 * frame + episode)
    return state


@pytest.mark.parametrize("backend", ["torchcodec", "pyav"])
@pytest.mark.parametrize("name", ["lerobot_v3_sample", "lerobot_v3_image_sample", "lerobot_v21_sample"])
def test_every_frame_of_what_lerobot_wrote_is_the_right_one(shared, name, backend):
    if backend == "torchcodec":
        pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    folder = LeRobotFolder.open(shared / "data" / name, backend)
    assert folder.episode_ends.tolist() == [40, 77, 120]
    assert set(folder.keys) == {"observation.state", "action", *CAMERAS}
    state = folder.whole("observation.state")
    assert state.dtype == np.float32
    for episode, (start, end) in enumerate(zip(folder.episode_starts, folder.episode_ends)):
        expected = np.stack([values_of(episode, frame) for frame in range(end - start)])
        np.testing.assert_allclose(state[start:end], expected, atol=1e-5)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(120), 2))
    for number, camera in enumerate(CAMERAS):
        found, view = codes_of(folder.gather(camera, rows))
        assert (view == number).all()
        np.testing.assert_array_equal(found, rows)
        np.testing.assert_array_equal(codes_of(folder.read(camera, slice(30, 50)))[0], np.arange(30, 50))
    assert folder.language["texts"] == ["pick up the block", "place the block"]
    assert np.unique(folder.frame_texts[40:77]).tolist() == [1]
    features = folder.features
    assert features.control_rate == 30
    assert features.action.names[0] == "shoulder_pan.pos"
    assert features.observations[CAMERAS[1]].shape == (3, 64, 64)


def test_stored_pictures_are_exact(shared):
    folder = LeRobotFolder.open(shared / "data/lerobot_v3_image_sample")
    picture = folder.gather(CAMERAS[0], np.array([5]))[0]
    rows, columns = np.mgrid[20:30, 50:64]
    np.testing.assert_array_equal(picture[20:30, 50:64, 0], 40 + 100 * columns // 63)
    np.testing.assert_array_equal(picture[20:30, 50:64, 1], 40 + 100 * rows // 63)


def test_depth_is_in_metres(shared):
    folder = LeRobotFolder.open(shared / "data/lerobot_v3_depth_sample")
    assert "observation.depth.depth" in folder.keys
    assert "observation.images.depth" not in folder.keys
    feature = folder.features.observations["observation.depth.depth"]
    assert (feature.shape, feature.dtype, feature.unit) == ((1, 64, 64), "float32", "m")
    depth = folder.read("observation.depth.depth", slice(None))
    assert depth.dtype == np.float32
    rows, columns = np.mgrid[:64, :64]
    for index, (episode, frame) in {3: (0, 3), 19: (0, 19), 22: (1, 2)}.items():
        expected = 400 + 3 * rows + 2 * columns + 5 * frame + 100 * episode
        expected[28:37, 28:37] -= 80
        outside = np.ones((64, 64), bool)
        outside[27:38, 27:38] = False
        assert np.abs(depth[index] * 1000 - expected)[outside].max() <= 1.0


@pytest.mark.parametrize("storage", ["image", "video"])
def test_both_versions_give_the_same(tmp_path, storage):
    new = LeRobotFolder.open(write_folder(tmp_path / "new", storage=storage))
    old = LeRobotFolder.open(write_folder(tmp_path / "old", storage=storage, version="v2.1"))
    assert new.keys == old.keys
    rows = np.array([59, 3, 3, 20, 36, 37, 19])
    for key in new.keys:
        have, expected = old.gather(key, rows).astype(float), new.gather(key, rows).astype(float)
        assert np.abs(have - expected).max() <= (12 if key in CAMERAS and storage == "video" else 0)
    for camera in CAMERAS:
        np.testing.assert_array_equal(codes_of(old.gather(camera, rows))[0], rows)
        np.testing.assert_array_equal(codes_of(new.gather(camera, rows))[0], rows)
    np.testing.assert_array_equal(new.frame_texts, old.frame_texts)
    np.testing.assert_array_equal(new.whole("observation.state")[20:37], state_of(1, np.arange(17)))


def test_many_pictures_are_unpacked_into_a_mapped_file(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LIGHTNING_ROBOT_CACHE", raising=False)
    path = write_folder(tmp_path / "a")
    rows = np.array([7, 50, 7, 0])
    in_memory = LeRobotFolder.open(path).gather(CAMERAS[1], rows)
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    folder = LeRobotFolder.open(path)
    np.testing.assert_array_equal(folder.gather(CAMERAS[1], rows), in_memory)
    assert isinstance(folder.frames(CAMERAS[1]).data, np.memmap)
    assert "Unpacking the pictures of observation.images.wrist once into a memory-mapped file of" in capsys.readouterr().out
    LeRobotFolder.open(path).gather(CAMERAS[1], rows)
    assert capsys.readouterr().out == ""
    assert len(list((tmp_path / "a.decoded").glob("*.bytes"))) == 1


def test_a_picture_that_is_named_only_is_read_from_its_file(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = write_folder(tmp_path / "a")
    file = path / "data/chunk-000/file-000.parquet"
    columns = parquet.read_table(file).to_pydict()
    encoded = columns[CAMERAS[0]][3]["bytes"]
    (path / "apart.png").write_bytes(encoded)
    columns[CAMERAS[0]][3] = {"bytes": None, "path": "apart.png"}
    parquet.write_table(arrow.table(columns), file)
    found = LeRobotFolder.open(path).gather(CAMERAS[0], np.arange(6))
    np.testing.assert_array_equal(found[3], picture_of(3, 0))
    (path / "apart.png").unlink()
    with pytest.raises(StoreError, match=r"front names the picture .*apart\.png, which does not exist"):
        LeRobotFolder.open(path).gather(CAMERAS[0], np.arange(6))


def test_a_camera_with_another_name_is_offered_as_one(tmp_path):
    folder = LeRobotFolder.open(write_folder(tmp_path / "a", cameras=("observation.image",)))
    assert folder.keys == ("observation.state", "action", "observation.images.image")
    assert codes_of(folder.gather("observation.images.image", np.array([8])))[0].tolist() == [8]
    assert len(folder.episode_statistics("observation.images.image", np.array([0, 2]))) == 2


# Folders that are wrong.


def refused(path, match, **arguments):
    with pytest.raises(StoreError, match=match):
        LeRobotFolder.open(path, **arguments)


def test_info_that_says_too_little_or_something_else(tmp_path):
    refused(tmp_path / "none", r"There is no dataset at .*none\. Set data\.init_args\.root")
    path = write_folder(tmp_path / "a")
    info = path / "meta/info.json"
    change_json(info, total_frames=None)
    refused(path, r"info\.json has no total_frames: .*Finish the recording, or add total_frames")
    change_json(info, total_frames=61)
    refused(path, r"counts 61 frames, the episodes of meta/episodes have 60")
    change_json(info, total_frames=60, total_episodes=4)
    refused(path, r"counts 4 episodes, meta/episodes lists 3")
    for version in ("v1.6", "v4.0", "3"):
        change_json(info, total_episodes=3, codebase_version=version)
        refused(path, rf"codebase_version '{version}'; v3\.0, v2\.1 and v2\.0 are read")
    for wrong in ("thirty", -30, True):
        change_json(info, codebase_version="v3.0", fps=wrong)
        refused(path, rf"info\.json: fps is {wrong!r}, where a positive number belongs")
    info.write_text("{")
    refused(path, r"info\.json is damaged")
    info.write_text("[]")
    refused(path, r"info\.json is damaged: it holds no settings")
    info.unlink()
    refused(path, r"info\.json is missing")


def test_rows_that_disagree_with_the_metadata(tmp_path):
    path = write_folder(tmp_path / "more", change={"index": np.arange(60)})
    change_json(path / "meta/info.json", total_frames=62)
    change_episodes(path, dataset_from_index=[0, 20, 37], dataset_to_index=[20, 37, 62])
    refused(path, r"tells of 62 frames in 3 episodes, but the parquet files hold 60 rows \(file-000\.parquet 60\)")
    episode = np.repeat(np.arange(3), (20, 17, 23))
    episode[20] = 0
    path = write_folder(tmp_path / "episode", change={"episode_index": episode})
    refused(path, r"column episode_index of the parquet files is 0 in row 20, where episode 1, frame 0")
    path = write_folder(tmp_path / "rows")
    change_episodes(path, dataset_from_index=[0, 21, 37], dataset_to_index=[20, 37, 60])
    refused(path, r"meta/episodes row 1 begins at frame 21, the one before ends at 20")
    path = write_folder(tmp_path / "task", change={"task_index": np.full(60, 7)})
    refused(path, r"task_index 7 of episode 0, frame 0 is not in meta/tasks, which holds 2 tasks")
    path = write_folder(tmp_path / "missing")
    (path / "data/chunk-000/file-000.parquet").unlink()
    refused(path, r"file-000\.parquet is missing")
    path = write_folder(tmp_path / "damaged")
    (path / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1 no more")
    refused(path, r"file-000\.parquet cannot be read")


def test_times_that_are_no_frame_numbers(tmp_path):
    frame = np.concatenate([np.arange(n) for n in (20, 17, 23)])
    times = (frame / 30).astype(np.float32)
    times[25] += 0.004
    path = write_folder(tmp_path / "a", change={"timestamp": times})
    refused(path, r"timestamp of episode 1, frame 5 is 0\.170667 s, 0\.004000 s away from frame / fps = 0\.166667 s \(1 such")
    assert LeRobotFolder.open(path, tolerance=0.005).num_frames == 60
    times[25] = np.nan
    refused(write_folder(tmp_path / "nan", change={"timestamp": times}), r"timestamp of episode 1, frame 5 is nan s")
    path = write_folder(tmp_path / "b", storage="video")
    column = f"videos__{CAMERAS[0]}__from_timestamp"
    change_episodes(path, **{column: [0.0, 20 / 30 + 0.011, 37 / 30]})
    refused(path, r"front of episode 1 begins at 0\.677667 s of .*mp4, which is 0\.011000 s off a frame at 30 frames")
    change_episodes(path, **{column: [0.0, 20 / 30 + 2e-5, 37 / 30]})  # sums of rounded durations
    np.testing.assert_array_equal(codes_of(LeRobotFolder.open(path).gather(CAMERAS[0], np.array([20, 36])))[0], [20, 36])


def test_long_recordings_keep_their_frames(tmp_path):
    """Beyond 1024 s neighbouring float32 numbers are further apart than the tolerance."""
    length = 45_000
    path = write_folder(tmp_path / "a", lengths=(3,), storage="image", cameras=())
    change_json(path / "meta/info.json", total_frames=length)
    change_episodes(path, dataset_from_index=[0], dataset_to_index=[length])
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    frame = np.arange(length)
    columns = {"timestamp": (frame / 30).astype(np.float32), "frame_index": frame, "index": frame}
    columns |= {"episode_index": 0 * frame, "task_index": 0 * frame}
    vectors = {name: [[0.0] * 6] * length for name in ("observation.state", "action")}
    parquet.write_table(arrow.table(columns | vectors), path / "data/chunk-000/file-000.parquet")
    assert LeRobotFolder.open(path).num_frames == length


def test_tasks_without_an_index_of_pandas_are_read_or_refused(tmp_path, capsys):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = write_folder(tmp_path / "a")
    file = path / "meta/tasks.parquet"
    parquet.write_table(arrow.table({"task_index": [1, 0], "task": ["place", "pick"]}), file)
    assert LeRobotFolder.open(path).language["texts"] == ["pick", "place"]
    assert "has no pandas index: its sentences are read here, but LeRobot itself" in capsys.readouterr().out
    parquet.write_table(arrow.table({"task_index": [0, 1]}), file)
    refused(path, r"tasks\.parquet has the columns task_index; expected are task_index and the text column task")
    parquet.write_table(arrow.table({"task_index": [0, 2], "task": ["a", "b"]}), file)
    refused(path, r"tasks\.parquet: task_index must count from 0 without gaps; it holds \[0, 2\]")
    file.unlink()
    refused(path, r"tasks\.parquet is missing")


def test_videos_that_are_missing_or_too_short(tmp_path, capsys):
    path = write_folder(tmp_path / "a", storage="video", version="v2.1")
    folder = LeRobotFolder.open(path)
    everything = np.arange(3)
    folder.check_videos(folder.keys, everything)
    files = [path / f"videos/chunk-000/{CAMERAS[1]}/episode_{number:06d}.mp4" for number in range(3)]
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(StoreError, match=r"episode_000000\.mp4 holds 17 frames, but .*wrist of episode 0 needs 20"):
        folder.check_videos(folder.keys, everything)
    folder.check_videos(folder.keys, np.array([1, 2]))
    files[0].write_bytes(files[2].read_bytes())
    folder.check_videos(folder.keys, everything)
    assert "holds 23 frames, 3 more than its episodes have" in capsys.readouterr().out
    files[0].unlink()
    with pytest.raises(StoreError, match=r"episode_000000\.mp4 is missing: it holds .*wrist of episode 0\. Copy .*train_epi"):
        folder.check_videos(folder.keys, everything)
    files[0].write_bytes(b"no video")
    with pytest.raises(StoreError, match=r"episode_000000\.mp4 cannot be decoded"):
        folder.check_videos(folder.keys, everything)


def test_features_that_cannot_be_read(tmp_path):
    path = write_folder(tmp_path / "a")
    info = path / "meta/info.json"
    good = json.loads(info.read_text())["features"]
    change_json(info, features={name: feature for name, feature in good.items() if name != "action"})
    refused(path, r"info\.json names no feature 'action'")
    change_json(info, features=good | {"observation.force": {"dtype": "float32", "shape": [3], "names": None}})
    refused(path, r"file-000\.parquet has no column observation\.force")
    change_json(info, features=good | {"action": {"dtype": "float32", "shape": [7], "names": None}})
    refused(path, r"action has 360 values in 60 frames, but meta/info\.json gives it the shape \(7,\)")
    change_json(info, features=good | {CAMERAS[0]: good[CAMERAS[0]] | {"shape": [64, 64, 1]}})
    refused(path, r"front has the shape \[64, 64, 1\]; colour has 3 channels")
    change_json(info, features=good | {CAMERAS[0]: good[CAMERAS[0]] | {"shape": [32, 64, 3]}})
    with pytest.raises(StoreError, match=r"front: the picture of frame 9 has the shape \(64, 64, 3\), .* \(32, 64, 3\)"):
        LeRobotFolder.open(path).gather(CAMERAS[0], np.array([9]))
    for wrong in ({"shape": [6]}, {"dtype": "float32"}, {"dtype": "float32", "shape": "six"}, "six"):
        change_json(info, features=good | {"action": wrong})
        refused(path, r"info\.json: feature action is .*it needs a dtype and a shape")
    change_json(info, features=good | {CAMERAS[0]: good[CAMERAS[0]] | {"shape": [64, 64]}})
    refused(path, r"info\.json: feature observation\.images\.front is .*three for pictures")
    change_json(info, features=["action"])
    refused(path, r"features is no table of names")
    change_json(info, features=good)
    with pytest.raises(StoreError, match=r"holds no observation\.force; it holds observation\.state, action"):
        LeRobotFolder.open(path).whole("observation.force")


def test_damaged_lists_of_episodes_and_tasks_are_named(tmp_path):
    path = write_folder(tmp_path / "tasks")
    (path / "meta/tasks.parquet").write_bytes(b"hello")
    refused(path, r"meta/tasks\.parquet cannot be read")
    path = write_folder(tmp_path / "old", version="v2.1")
    for name, entry, lacking in (
        ("episodes.jsonl", {"episode_index": 0}, "length"),
        ("tasks.jsonl", {"task_index": 0}, "task"),
        ("episodes_stats.jsonl", {"episode_index": 0}, "stats"),
    ):
        file = path / "meta" / name
        whole = file.read_bytes() if file.exists() else None
        file.write_text(json.dumps(entry))
        refused(path, rf"meta/{name}: entry 1 has no {lacking}")
        file.unlink() if whole is None else file.write_bytes(whole)
