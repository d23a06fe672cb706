"""Frames of videos by number, with both decoders."""

import builtins
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from lerobot_folders import codes_of, picture_of, write_video

from lightning_robot.data import video
from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode, OpenDecoders, PyavVideo, VideoFrames, frame_count, video_backend


def readers():
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return ["pyav"]
    return ["pyav", "torchcodec"]


@pytest.fixture
def clips(tmp_path):
    """Two files of 30 and 20 frames, the second with a key frame every 12."""
    files = [tmp_path / "0.mp4", tmp_path / "1.mp4"]
    write_video(files[0], [picture_of(index, 0) for index in range(30)], 30)
    write_video(files[1], [picture_of(30 + index, 0) for index in range(20)], 30, keyframes=12)
    return files


def frames_of(files, backend, fps=30.0) -> VideoFrames:
    return VideoFrames(files, np.arange(50) // 30, np.r_[np.arange(30), np.arange(20)], (64, 64, 3), fps, backend)


@pytest.mark.parametrize("backend", readers())
def test_any_order_and_repeats(clips, backend):
    frames = frames_of(clips, backend)
    rng = np.random.default_rng(0)
    for rows in (np.arange(50), rng.permutation(50), rng.integers(0, 50, 80), np.array([49, 0, 31, 30, 29])):
        np.testing.assert_array_equal(codes_of(frames.gather(rows))[0], rows)


@pytest.mark.parametrize("backend", readers())
def test_a_frame_is_decoded_once_and_a_file_asked_once(clips, backend, monkeypatch):
    asked = []
    kind = PyavVideo if backend == "pyav" else video.TorchcodecVideo
    read = kind.read
    monkeypatch.setattr(kind, "read", lambda self, numbers: asked.append((self.path, numbers.tolist())) or read(self, numbers))
    frames_of(clips, backend).gather(np.array([33, 5, 33, 4, 4, 40]))
    assert asked == [(clips[0], [4, 5]), (clips[1], [3, 10])]


@pytest.mark.skipif(len(readers()) < 2, reason="torchcodec does not load here")
def test_both_decoders_give_the_same_pixels(clips):
    rows = np.arange(50)
    np.testing.assert_array_equal(frames_of(clips, "pyav").gather(rows), frames_of(clips, "torchcodec").gather(rows))


@pytest.mark.parametrize("backend", readers())
def test_wrong_rate_size_and_length_are_named(clips, backend):
    with pytest.raises(StoreError, match=r"0\.mp4: asked for frame 1.* at .* it holds a frame of"):
        frames_of(clips, backend, fps=29.0).gather(np.array([17]))
    frames = frames_of(clips, backend)
    frames.frame_shape = (32, 64, 3)
    with pytest.raises(StoreError, match=r"0\.mp4: frames of \(64, 64, 3\), but meta/info\.json says \(32, 64, 3\)"):
        frames.gather(np.array([1]))
    frames = frames_of(clips, backend)
    frames.number_of_row[49] = 20
    with pytest.raises(StoreError, match=r"1\.mp4 (ends before frame 20|cannot be decoded)"):
        frames.gather(np.array([49]))
    clips[1].write_bytes(b"no video")
    video.decoders.after_fork()
    with pytest.raises(StoreError, match=r"1\.mp4 cannot be decoded"):
        frames_of(clips, backend).gather(np.array([45]))


def test_frames_are_counted(clips):
    assert [frame_count(path) for path in clips] == [30, 20]
    clips[0].write_bytes(b"no video")
    with pytest.raises(StoreError, match=r"0\.mp4 cannot be decoded .*Copy or download the file again"):
        frame_count(clips[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_open_their_own(clips, start):
    frames = frames_of(clips, readers()[-1])
    rows = np.array([2, 40, 9])
    expected = frames.gather(rows)
    with multiprocessing.get_context(start).Pool(2) as pool:
        for found in pool.map(frames.gather, [rows] * 4):
            np.testing.assert_array_equal(found, expected)


def test_few_files_stay_open(clips, monkeypatch):
    monkeypatch.setattr(video, "OPEN_FILES", 2)
    opened = OpenDecoders()
    made = []
    for name in (0, 1, 0, 2, 0, 1):
        opened.get(name, lambda name=name: made.append(name) or name)
        assert len(opened) <= 2
    assert made == [0, 1, 2, 1]
    opened.after_fork()
    assert len(opened) == 0


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("libavutil.so"), OSError("cannot open")])
def test_pyav_is_the_announced_fallback(monkeypatch, capsys, error):
    real = builtins.__import__

    def fails(name, *arguments, **keywords):
        if name.startswith("torchcodec"):
            raise error
        return real(name, *arguments, **keywords)

    video_backend.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fails)
    assert video_backend() == video_backend() == "pyav"
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"Videos are decoded by PyAV, more slowly: torchcodec does not load ({type(error).__name__}" in out
    with pytest.raises(StoreError, match=r"torchcodec does not load .*backend: pyav"):
        video_backend("torchcodec")
    with pytest.raises(ValueError, match="use 'torchcodec', 'pyav'"):
        video_backend("opencv")
    video_backend.cache_clear()


def test_depth_codes():
    metres = DepthCode().table()
    assert metres[0] == pytest.approx(0.01, abs=1e-6)
    assert metres[4095] == pytest.approx(10.0, abs=1e-5)
    code = round(4095 * (np.log(0.5 + 3.5) - np.log(3.51)) / (np.log(13.5) - np.log(3.51)))
    assert metres[code] == pytest.approx(0.5, abs=1e-3)
    assert DepthCode(logarithmic=False).table()[2048] == pytest.approx(0.01 + 9.99 * 2048 / 4095)
