"""Videos: failures first, named, playable; never a reason to fail."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lightning_robot.evaluation.rollout import plan_episodes, rollout
from lightning_robot.evaluation.video import VideoWriter, choose_episodes, record_videos
from lightning_robot.features import Feature

sys.path.insert(0, str(Path(__file__).parent))
from fake_reach import Reach, TinyPolicy

PLAN = plan_episodes(8, 2_000_000, ("near", "far"))


@pytest.fixture(scope="module")
def policy():
    return TinyPolicy()


def frames_of(path):
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]


def test_failures_come_first_and_can_be_watched(policy, tmp_path, capsys):
    result = rollout(policy, Reach, PLAN, progress=False)
    record_videos(policy, Reach, result, tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    chosen = choose_episodes(result, 3)
    assert not chosen[0].success
    for number, (file, record) in enumerate(zip(files, chosen, strict=True)):
        assert file.name == f"{number:02d}_{record.task}_seed{record.seed}_{record.outcome}.mp4"
        frames = frames_of(file)
        assert len(frames) == record.steps + 1
        assert frames[0].shape == (64, 80, 3)  # odd sizes lose a row and a column
        assert frames[0].max() > 150
    assert "did not repeat" not in capsys.readouterr().out


def test_tasks_take_turns(policy):
    result = rollout(policy, partial(Reach, radius=0.0), PLAN, progress=False)  # nothing succeeds
    assert [record.task for record in choose_episodes(result, 4)] == ["near", "far", "near", "far"]


def test_impossible_rendering_is_said_and_costs_nothing(policy, tmp_path, capsys):
    make_env = partial(Reach, renders=False)
    result = rollout(policy, make_env, PLAN[:2], progress=False)
    assert record_videos(policy, make_env, result, tmp_path / "videos") == []
    said = "No video beyond 0 of 2: RuntimeError: RuntimeError: no display, and the observation holds no picture"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "videos").exists()


class Cameras(Reach):
    """Shows nothing but two cameras' pictures, of different sizes, and knows no render mode."""

    def __init__(self, **arguments):
        super().__init__(renders=False, **arguments)
        self.features.observations["observation.images.a"] = Feature((3, 32, 40), dtype="uint8")

    def observe(self):
        observation = super().observe()
        if not getattr(self, "skip_observation", False):
            for number, (camera, size) in enumerate((("wrist", 16), ("above", 32))):
                picture = np.full((3, size, 40), 20 * number + 10 * self.count, dtype=np.uint8)
                observation[f"observation.images.{camera}"] = picture
        return observation


def without_render_mode(**arguments):
    if "render_mode" in arguments:
        raise TypeError("no argument render_mode")
    return Cameras(**arguments)


@pytest.mark.parametrize("make_env", [Cameras, without_render_mode])
def test_cameras_stand_in_for_a_renderer(policy, tmp_path, make_env, capsys):
    make_env = partial(make_env, radius=0.0)  # nothing succeeds
    result = rollout(policy, make_env, PLAN[:2], progress=False)
    (video,) = record_videos(policy, make_env, result, tmp_path, 1)
    frames = frames_of(video)
    record = choose_episodes(result, 1)[0]
    assert len(frames) == record.steps + 1
    assert frames[0].shape == (32, 80, 3)
    above, wrist = frames[5][:, :38].mean(), frames[5][:14, 42:].mean()
    assert (above, wrist) == (pytest.approx(70, abs=6), pytest.approx(50, abs=6))  # the newest picture, unread or not
    assert frames[5][20:, 42:].max() < 12  # the smaller picture is filled up
    assert "did not repeat" not in capsys.readouterr().out


def test_episode_that_does_not_repeat_is_said(policy, tmp_path, capsys):
    result = rollout(policy, Reach, PLAN[:2], progress=False)
    record_videos(TinyPolicy(seed=9), Reach, result, tmp_path, 1)
    assert "did not repeat" in capsys.readouterr().out


def test_writer_leaves_nothing_half_done(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4")
    assert not writer.close()
    writer = VideoWriter(tmp_path / "b.mp4", rate=29.97)
    for level in range(5):
        writer.add(np.full((32, 48, 3), 50 * level, dtype=np.uint8))
    assert not (tmp_path / "b.mp4").exists()
    assert writer.close()
    assert [int(frame.mean() / 50 + 0.5) for frame in frames_of(tmp_path / "b.mp4")] == [0, 1, 2, 3, 4]
    writer = VideoWriter(tmp_path / "c.mp4")
    writer.add(np.zeros((32, 48, 3), dtype=np.uint8))
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]
