"""Writing LeRobot folders: what is read back, statistics, interrupted writers, bytes."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from lightning_robot.data.clips import ENCODINGS, depth_codes, join_clips, write_clip
from lightning_robot.data.frame_sample import FrameSample
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode, frame_count
from lightning_robot.data.write_lerobot import LeRobotWriter
from lightning_robot.features import Feature, Features

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from ranks import run_ranks

FEATURES = Features(
    observations={
        "observation.state": Feature((2,), names=("a.pos", "b.pos"), unit="degrees"),
        "observation.images.front": Feature((3, 64, 80), "uint8"),
        "observation.depth.front": Feature((1, 64, 80), unit="m"),
        "observation.point_cloud": Feature((5, 3), unit="m"),
    },
    action=Feature((1,)),
    action_semantics="absolute; commanded; joints degrees; gripper 0 closed 100 open",
    control_rate=20.0,
)
LENGTHS = (7, 4, 9)


def episode(number: int) -> dict[str, np.ndarray]:
    """Smooth pictures that tell their frame: a bright bar moves with time."""
    length = LENGTHS[number]
    rng = np.random.default_rng(number)
    picture = np.full((length, 64, 80, 3), 90, np.uint8)
    depth = np.full((length, 64, 80), 0.8, np.float32)
    for frame in range(length):
        picture[frame, :, 8 * frame : 8 * frame + 8] = 200
        picture[frame, 40:, :, 2] = 40 * number
        depth[frame, : 4 * frame] = 0.4 + 0.01 * frame
    return {
        "observation.state": rng.normal(size=(length, 2)).astype(np.float32),
        "observation.images.front": picture,
        "observation.depth.front": depth,
        "observation.point_cloud": rng.normal(size=(length, 5, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 1)).astype(np.float32),
    }


def write(path, pictures: str = "av1", **arguments) -> LeRobotFolder:
    writer = LeRobotWriter(path, FEATURES, pictures=pictures, robot="so101", provenance={"who": "a test"}, **arguments)
    for number in range(3):
        writer.append(episode(number), "push" if number == 1 else "pull")
    return LeRobotFolder.open(writer.finish())


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("pictures", ["av1", "h264", "png"])
def test_what_is_written_is_read_back(tmp_path, pictures):
    folder = write(tmp_path / "data", pictures)
    assert folder.fps == 20
    assert np.diff(folder.episode_ends, prepend=0).tolist() == list(LENGTHS)
    assert [folder.language["texts"][row] for row in folder.frame_texts] == ["pull"] * 7 + ["push"] * 4 + ["pull"] * 9
    assert folder.features.observations["observation.state"].names == ("a.pos", "b.pos")
    everything = [episode(number) for number in range(3)]
    for key in everything[0]:
        expected = np.concatenate([arrays[key] for arrays in everything])
        found = folder.gather(key, np.arange(20))
        if "images" in key and pictures != "png":
            assert np.abs(found.astype(float) - expected).mean(axis=(1, 2, 3)).max() < 6
        elif "depth" in key:
            np.testing.assert_allclose(found, expected, atol=0.001)
        else:
            np.testing.assert_array_equal(found, expected)
    info = json.loads((tmp_path / "data/meta/info.json").read_text())
    assert info["features"]["observation.depth.front"]["info"]["is_depth_map"]
    assert info["video_path"] is None if pictures == "png" else "{video_key}" in info["video_path"]
    note = parquet.read_schema(tmp_path / "data/meta/tasks.parquet").pandas_metadata
    assert note["index_columns"] == ["task"], "LeRobot reads the task from pandas' index"
    own = json.loads((tmp_path / "data/meta/lightning_robot.json").read_text())
    assert own["provenance"] == {"who": "a test"}
    assert Features.from_dict(own["features"]) == FEATURES
    assert not (tmp_path / "data.partial").exists()


def test_units_and_the_meaning_of_actions_are_read_back(tmp_path):
    """A policy that learns from the folder must not be judged in other units."""
    found = write(tmp_path / "data", "png").features
    assert (found.observations, found.action) == (FEATURES.observations, FEATURES.action)
    assert found.action_semantics == FEATURES.action_semantics
    assert found.source == {"recording": "LeRobot v3.0", "robot": "so101"}

    info = tmp_path / "data/meta/info.json"  # somebody gave the state's elements other names: of it, the note tells nothing now
    info.write_text(info.read_text().replace("a.pos", "c.pos"))
    assert LeRobotFolder.open(tmp_path / "data").features.observations["observation.state"] == Feature(
        (2,), names=("c.pos", "b.pos")
    )
    notes = tmp_path / "data/meta/lightning_robot.json"
    notes.write_text('{"features": {"observations": {}}}')
    with pytest.raises(StoreError, match=r"lightning_robot.json is damaged.*without the file"):
        _ = LeRobotFolder.open(tmp_path / "data").features
    notes.unlink()
    assert LeRobotFolder.open(tmp_path / "data").features.action_semantics == ""


def test_statistics_are_of_the_values_themselves(tmp_path):
    write(tmp_path / "data")
    statistics = json.loads((tmp_path / "data/meta/stats.json").read_text())
    states = np.concatenate([episode(number)["observation.state"] for number in range(3)]).astype(np.float64)
    for name, value in {
        "min": states.min(0),
        "max": states.max(0),
        "mean": states.mean(0),
        "std": states.std(0),
        "q01": np.quantile(states, 0.01, axis=0),
        "q50": np.quantile(states, 0.5, axis=0),
        "count": [20],
    }.items():
        np.testing.assert_allclose(statistics["observation.state"][name], value, rtol=1e-12)
    assert np.shape(statistics["observation.point_cloud"]["mean"]) == (3,)
    pixels = np.concatenate([episode(number)["observation.images.front"] for number in range(3)]).reshape(-1, 3) / 255
    picture = statistics["observation.images.front"]
    np.testing.assert_allclose(np.ravel(picture["mean"]), pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(picture["std"]), pixels.std(0), rtol=1e-9)
    np.testing.assert_allclose(np.ravel(picture["max"]), pixels.max(0))
    assert np.shape(picture["mean"]) == (3, 1, 1)
    assert np.shape(statistics["observation.depth.front"]["mean"]) == (1, 1, 1)
    assert 400 <= statistics["observation.depth.front"]["min"][0][0][0] <= 800, "in millimetres"
    rows = parquet.read_table(tmp_path / "data/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    np.testing.assert_allclose(rows[1]["stats/observation.state/mean"], states[7:11].mean(0))
    assert rows[1]["videos/observation.images.front/from_timestamp"] == 7 / 20
    assert (rows[2]["dataset_from_index"], rows[2]["dataset_to_index"]) == (11, 20)


def test_an_interrupted_writer_continues_to_the_same_bytes(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole").path
    writer = LeRobotWriter(tmp_path / "cut", FEATURES, robot="so101", provenance={"who": "a test"})
    writer.append(episode(0), "pull")
    writer.append(episode(1), "push")
    (writer.partial / "clips/observation.images.front/episode-000002.tmp").write_bytes(b"cut")
    encoded = []
    original = write_clip

    def counting(path, *rest):
        encoded.append(path.name)
        original(path, *rest)

    monkeypatch.setattr("lightning_robot.data.write_lerobot.write_clip", counting)
    assert hashes(write(tmp_path / "cut").path) == hashes(whole)
    assert encoded == ["episode-000002.mp4"] * 2, "a colour and a depth clip were missing"
    with pytest.raises(StoreError, match="exists"):
        write(tmp_path / "cut")
    LeRobotWriter(tmp_path / "other", FEATURES)
    with pytest.raises(StoreError, match=r"other settings \(pictures\)"):
        LeRobotWriter(tmp_path / "other", FEATURES, pictures="png")


def test_files_are_filled_and_then_followed_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_robot.data.write_lerobot.VIDEO_FILE_BYTES", 1)
    monkeypatch.setattr("lightning_robot.data.write_lerobot.DATA_FILE_BYTES", 1)
    monkeypatch.setattr("lightning_robot.data.write_lerobot.FILES_PER_CHUNK", 2)
    folder = write(tmp_path / "data")
    assert (folder.path / "data/chunk-001/file-000.parquet").is_file()
    assert frame_count(folder.path / "videos/observation.images.front/chunk-001/file-000.mp4") == 9
    found = folder.gather("observation.images.front", np.array([19, 7]))
    expected = np.stack([episode(2)["observation.images.front"][8], episode(1)["observation.images.front"][0]])
    assert np.abs(found.astype(float) - expected).mean() < 6


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(StoreError, match="whole number of frames per second"):
        LeRobotWriter(tmp_path / "a", Features(FEATURES.observations, FEATURES.action))
    with pytest.raises(StoreError, match="pictures 'gif'"):
        LeRobotWriter(tmp_path / "a", FEATURES, pictures="gif")
    writer = LeRobotWriter(tmp_path / "a", FEATURES)
    with pytest.raises(StoreError, match="an episode needs"):
        writer.append({"action": np.zeros((3, 1), np.float32)}, "push")
    with pytest.raises(StoreError, match="nothing to write"):
        writer.finish()
    odd = Features({**FEATURES.observations, "observation.images.top": Feature((3, 63, 64), "uint8")}, Feature((1,)))
    with pytest.raises(StoreError, match=r"observation.images.top: Video holds.*63 x 64.*--pictures png"):
        LeRobotWriter(tmp_path / "b", odd, rate=10)
    assert not list(tmp_path.glob("b*"))
    LeRobotWriter(tmp_path / "b", odd, rate=10, pictures="png")
    with pytest.raises(StoreError, match=r"even height and width.*63 x 64.*--pictures png"):
        write_clip(tmp_path / "a.mp4", np.zeros((2, 63, 64, 3), np.uint8), 30, ENCODINGS["h264"])


def test_depth_codes_are_the_readers():
    metres = np.linspace(0.02, 9.9, 500, dtype=np.float32)
    assert np.abs(DepthCode().table()[depth_codes(metres)] - metres).max() < 0.0025


def test_frames_of_joined_clips_lie_where_their_numbers_say(tmp_path):
    import av

    clips = []
    for number in range(3):
        clips.append(tmp_path / f"{number}.mp4")
        write_clip(clips[-1], episode(number)["observation.images.front"], 20, ENCODINGS["h264"])
    assert join_clips(tmp_path / "all.mp4", clips, 20) == 20
    with av.open(str(tmp_path / "all.mp4")) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(20) / 20, atol=1e-9)


def test_the_verification_finds_other_frames_and_another_order(tmp_path):
    folder = write(tmp_path / "data", "png")
    sample = FrameSample(20)
    for number in range(3):
        sample.take(episode(number))
    assert sample.compare(folder, LENGTHS, "png") == "20 frames read back as written"
    with pytest.raises(StoreError, match="another order"):
        sample.compare(folder, (4, 7, 9), "png")
    other = FrameSample(20)
    for number in range(3):
        changed = episode(number)
        changed["action"][-1] += 1e-3
        other.take(changed)
    with pytest.raises(StoreError, match="action of frame 6 is not what was written"):
        other.compare(folder, LENGTHS, "png")


def _encode_two(folder, seed, encoding):
    """A hash of the second of two small clips, encoded where other things lay in memory before."""
    random = np.random.default_rng(seed)
    used = [np.full(int(random.integers(100, 2_000_000)), random.integers(1, 255), np.uint8) for _ in range(60)]
    del used
    for clip in range(2):
        frames = np.full((28, 48, 48, 3), 90, np.uint8)
        frames[:, :24] = (40, 60, 160)
        texture = np.random.default_rng(clip)
        for number, frame in enumerate(frames):
            row, column = int(4 + 0.9 * number), int(8 + 0.6 * number + clip)
            frame[row : row + 9, column : column + 11] = (200, 30 + clip, 60)
            frame[20:30, 30:34] = texture.integers(0, 255, (10, 4, 3))
        write_clip(folder / "a.mp4", frames, 30, ENCODINGS[encoding])
    return hashlib.sha256((folder / "a.mp4").read_bytes()).hexdigest()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_clip_has_the_same_bytes_in_every_process(encoding, tmp_path):
    """Work that is taken up again encodes the rest in another process."""
    hashes = {run_ranks(_encode_two, 1, tmp_path, tmp_path, seed, encoding)[0] for seed in range(40)}
    assert len(hashes) == 1
