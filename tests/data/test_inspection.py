"""What an inspection finds: planted defects, and none where there are none."""

from dataclasses import replace

import numpy as np

from lightning_robot.commands.inspect_page import page
from lightning_robot.data.inspection import inspect_dataset
from lightning_robot.data.store import StoreWriter
from lightning_robot.data.write_lerobot import LeRobotWriter
from lightning_robot.features import Feature, Features

LENGTHS = (60, 50, 70, 55)
FEATURES = Features(
    {"observation.state": Feature((3,), names=("x", "y", "z")), "observation.images.front": Feature((3, 16, 16), "uint8")},
    Feature((1,)),
    "absolute; commanded",
    control_rate=10.0,
)


def episodes() -> list[dict[str, np.ndarray]]:
    """Smooth motions, pictures that change."""
    result = []
    for number, length in enumerate(LENGTHS):
        time = np.arange(length)
        state = np.stack([np.sin(0.1 * time + number), np.cos(0.13 * time + number), 0.01 * time], axis=1)
        picture = np.random.default_rng(number).integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
        state = state.astype(np.float32)
        result.append({"observation.state": state, "observation.images.front": picture, "action": state[:, :1] + 1})
    return result


def write(path, parts):
    arrays = {key: (value.shape[1:], value.dtype) for key, value in parts[0].items()}
    ends = np.cumsum([len(part["action"]) for part in parts])
    provenance = {"settings": {"environment": "Somewhere-v0"}, "expert": {"push": {"attempted": 5, "solved": 4}}}
    writer = StoreWriter(path, arrays, int(ends[-1]), {"features": FEATURES.to_dict(), "provenance": provenance})
    for part in parts:
        writer.append(part)
    segments = np.stack([ends - np.diff(ends, prepend=0), ends, np.array([0, 1, 0, 0])], axis=1)
    writer.finish(ends, segments=segments, language={"texts": ["push", "pull"], "tasks": ["push", "pull"]})
    return path


def test_a_sound_store(tmp_path):
    result = inspect_dataset(write(tmp_path / "a.zarr", episodes()))
    assert result.defects == []
    assert result.lengths.tolist() == list(LENGTHS)
    assert result.tasks == [("push", 3), ("pull", 1)]
    assert ("kept", "4 of 5 attempts (80%)") in result.notes
    assert ("environment", "Somewhere-v0") in result.notes
    state = next(key for key in result.keys if key.name == "observation.state")
    assert [element.name for element in state.elements] == ["x", "y", "z"]
    values = np.concatenate([part["observation.state"] for part in episodes()])
    np.testing.assert_allclose([element.mean for element in state.elements], values.mean(0), rtol=1e-5)
    strip = result.strips["observation.images.front"]
    assert [episode for episode, _ in strip] == [0, 1, 3]
    assert len(strip[0][1]) == 8
    np.testing.assert_array_equal(strip[0][1][0], episodes()[0]["observation.images.front"][0])


def test_planted_defects_are_found_where_they_are(tmp_path):
    parts = episodes()
    parts[0]["observation.state"][20, 0] = np.nan
    parts[1]["observation.state"][30:, 1] += 9
    for part in parts:
        part["action"][:] = 0.5
    parts[2]["observation.images.front"][10:25] = parts[2]["observation.images.front"][10]
    parts[2]["observation.state"][12] = parts[2]["observation.state"][11]
    parts[3]["observation.images.front"][7] = 0
    parts.append({key: value.copy() for key, value in parts[3].items()})
    path = tmp_path / "a.zarr"
    arrays = {key: (value.shape[1:], value.dtype) for key, value in parts[0].items()}
    ends = np.cumsum([*LENGTHS, LENGTHS[3]])
    writer = StoreWriter(path, arrays, int(ends[-1]), {"features": FEATURES.to_dict()})
    for part in parts:
        writer.append(part)
    writer.finish(ends)
    found = {(defect.what, defect.where): defect.text for defect in inspect_dataset(path).defects}
    assert found["not finite", "observation.state[x]"] == "1 frame with nan or infinity, first in episode 0, frame 20"
    assert "1 step above 8 times" in found["jump", "observation.state[y]"]
    assert "in episode 1, frame 30" in found["jump", "observation.state[y]"]
    assert "always 0.5" in found["constant", "action[0]"]
    assert found["frozen", "observation.images.front"] == "up to 15 equal frames in a row, in episode 2, frame 10"
    assert "in episode 3, frame 7" in found["empty", "observation.images.front"]
    assert "in episode 2, frame 12" in found["duplicated", "frames"]
    assert found["duplicated", "episodes"] == "episode 4 equals episode 3 in every number"
    assert len(found) == 7


def test_a_missing_video_is_a_defect_and_the_rest_is_shown(tmp_path):
    features = replace(
        FEATURES, observations={**FEATURES.observations, "observation.images.top": Feature((3, 16, 16), "uint8")}
    )
    writer = LeRobotWriter(tmp_path / "a", features, pictures="h264")
    for part in episodes():
        writer.append({**part, "observation.images.top": part["observation.images.front"]}, "push")
    path = writer.finish()
    next(path.glob("videos/observation.images.top/*/*.mp4")).unlink()
    found = inspect_dataset(path)
    assert [(defect.what, defect.where) for defect in found.defects] == [("unreadable", "observation.images.top")]
    assert "file-000.mp4 is missing: it holds observation.images.top of episode 0, 1, 2, 3" in found.defects[0].text
    assert list(found.strips) == ["observation.images.front"]
    assert found.checked.endswith("were looked at.")
    assert {key.name: len(key.elements) for key in found.keys if "images" in key.name} == {
        "observation.images.front": 3,
        "observation.images.top": 0,
    }
    assert "observation.images.top" in page(found)


def test_a_lerobot_folder_with_wrong_times(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    writer = LeRobotWriter(tmp_path / "a", FEATURES, pictures="png")
    for part in episodes():
        writer.append(part, "push")
    path = writer.finish()
    result = inspect_dataset(path)
    assert result.defects == []
    assert result.format == "LeRobot v3.0"
    assert result.rate == 10
    assert result.tasks == [("push", 4)]
    file = path / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    times = table.column("timestamp").to_numpy().copy()
    times[30:60] += 0.4
    place = table.schema.get_field_index("timestamp")
    parquet.write_table(table.set_column(place, "timestamp", arrow.array(times)), file)
    (defect,) = inspect_dataset(path).defects
    assert defect.what == "timestamps"
    assert "episode 0, frame 30" in defect.text
