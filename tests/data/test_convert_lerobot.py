"""A store as a LeRobot dataset: the same frames, the sentences of segments."""

import numpy as np
import pytest

from lightning_robot.commands.convert import main
from lightning_robot.data.convert_lerobot import convert_to_lerobot
from lightning_robot.data.store import EpisodeStore, StoreError, StoreWriter
from lightning_robot.features import Feature, Features


def store(path, rate=10.0) -> EpisodeStore:
    features = Features(
        {"observation.state": Feature((2,)), "observation.images.static": Feature((3, 64, 64), "uint8")},
        Feature((1,)),
        control_rate=rate,
        source={"robot": "panda"},
    )
    arrays = {
        "observation.state": ((2,), "float32"),
        "observation.images.static": ((64, 64, 3), "uint8"),
        "action": ((1,), "float32"),
    }
    writer = StoreWriter(path, arrays, 12, {"features": features.to_dict(), "provenance": {"who": "a test"}})
    frame = np.arange(12)
    picture = np.zeros((12, 64, 64, 3), np.uint8)
    picture[...] = (15 * frame)[:, None, None, None]
    state = np.stack([frame, -frame], axis=1).astype(np.float32)
    writer.append({"observation.state": state, "observation.images.static": picture, "action": state[:, :1]})
    segments = np.array([[0, 5, 1], [2, 5, 0], [6, 12, 0]])
    language = {"texts": ["close it", "open it"], "tasks": ["close", "open"]}
    return writer.finish(np.array([5, 12]), segments=segments, language=language)


def test_every_frame_and_sentence_arrives(tmp_path, capsys):
    source = store(tmp_path / "a.zarr")
    assert main(["lerobot", str(source.path), str(tmp_path / "lerobot")]) == 0
    assert "Verified: 2 episodes and 12 frames in order" in capsys.readouterr().out
    dataset, _ = convert_to_lerobot(source.path, tmp_path / "png", pictures="png")
    assert dataset.info["robot_type"] == "panda"
    for key in source.keys:
        np.testing.assert_array_equal(dataset.gather(key, np.arange(12)), source.read(key, slice(None)))
    texts = [dataset.language["texts"][row] for row in dataset.frame_texts]
    assert texts == ["open it"] * 5 + [""] + ["close it"] * 6
    ids = dict(zip(dataset.language["texts"], dataset.language["tasks"]))
    assert ids == {"open it": "open", "": "", "close it": "close"}  # by which an environment plays them
    assert main(["lerobot", str(source.path), str(tmp_path / "png")]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_store_without_a_rate_needs_one(tmp_path):
    source = store(tmp_path / "a.zarr", rate=0.0)
    with pytest.raises(StoreError, match="does not say its rate"):
        convert_to_lerobot(source.path, tmp_path / "b")
    dataset, _ = convert_to_lerobot(source.path, tmp_path / "c", rate=10)
    assert dataset.fps == 10
