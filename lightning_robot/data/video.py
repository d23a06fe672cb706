"""Frames of video files by integer frame number: two decoders, a bounded number of open files, and depth codes.

A frame of a constant-rate video is found by number, ``pts * fps`` in float64, never by comparing times in float32: at
1024 s two neighbouring float32 numbers lie 0.12 ms apart, more than the tolerance that such comparisons allow.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from lightning_robot.console import say
from lightning_robot.data.store import StoreError

OPEN_FILES = 64
"""Decoders that one process keeps open; the one used longest ago is closed first."""

MISPLACED = 0.2
"""Frames by which a picture's time may differ from its number (containers round times)."""

FORWARD_FRAMES = 16
"""PyAV decodes on over gaps of up to so many frames, and seeks over larger ones."""


@cache
def video_backend(wanted: str | None = None) -> str:
    """The decoder to use: ``"torchcodec"`` where it loads, else ``"pyav"``, which is said once.

    Args:
        wanted: name one of the two to have it or an error.

    Raises:
        ValueError: unknown name.
        StoreError: the wanted decoder does not load.
    """
    if wanted not in (None, "torchcodec", "pyav"):
        raise ValueError(f"backend {wanted!r}: use 'torchcodec', 'pyav', or leave it out.")
    if wanted == "pyav":
        return wanted
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: its shared libraries do not load
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if wanted:
            raise StoreError(
                f"torchcodec does not load ({type(error).__name__}: {reason}). Install torchcodec and the shared libraries of "
                "ffmpeg that fit the installed torch, or set data.init_args.backend: pyav."
            ) from error
        say(f"Videos are decoded by PyAV, more slowly: torchcodec does not load ({type(error).__name__}: {reason}).")
        return "pyav"
    return "torchcodec"


@dataclass(frozen=True)
class DepthCode:
    """How 12-bit (video) or 16-bit (picture) values stand for metres.

    Video: ``d = exp(q / 4095 * (ln(high + shift) - ln(low + shift)) + ln(low + shift)) - shift``, linear without `logarithmic`.

    Attributes:
        low: smallest depth in metres.
        high: largest depth in metres.
        shift: in metres.
        logarithmic: whether the code is spaced logarithmically.
        unit: metres per stored unit of pictures: 0.001 for millimetres.
    """

    low: float = 0.01
    high: float = 10.0
    shift: float = 3.5
    logarithmic: bool = True
    unit: float = 0.001

    def table(self) -> np.ndarray:
        """(4096,) float32: metres of every 12-bit code."""
        code = np.arange(4096, dtype=np.float64) / 4095
        if self.logarithmic:
            near, far = np.log(self.low + self.shift), np.log(self.high + self.shift)
            metres = np.exp(code * (far - near) + near) - self.shift
        else:
            metres = self.low + code * (self.high - self.low)
        return np.clip(metres, self.low, self.high).astype(np.float32)


class TorchcodecVideo:
    """Colour frames through torchcodec.

    Files are opened without reading them through ("approximate"); one whose frames do not lie where their numbers say is
    opened again with an exact index.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._open("approximate")

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Frames by sorted number.

        Returns:
            (N, height, width, 3) uint8.
        """
        for mode in ("approximate", "exact"):
            try:
                batch = self._decoder.get_frames_at(indices=numbers.tolist())
            except (IndexError, RuntimeError, ValueError) as error:
                if mode == "exact":
                    raise _unreadable(self.path, error) from error
            else:
                found = batch.pts_seconds.numpy() * self.fps
                if (np.abs(found - numbers) < MISPLACED).all():
                    return batch.data.numpy()
                if mode == "exact":
                    raise _misplaced(self.path, numbers, found, self.fps)
            self._open("exact")
        raise AssertionError

    def _open(self, mode: Literal["approximate", "exact"]) -> None:
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder = VideoDecoder(str(self.path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(self.path, error) from error


class PyavVideo:
    """Frames through PyAV: colour as (height, width, 3) uint8, depth codes as (height, width) uint16."""

    def __init__(self, path: Path, fps: float, depth: bool = False) -> None:
        import av

        self.path, self.fps, self.depth = path, fps, depth
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise _unreadable(path, error) from error
        self._stream.thread_type = "NONE"
        self._frames: Any = None
        self._position = -1  # number of the frame decoded last

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """As `TorchcodecVideo.read`; depth codes (N, height, width) uint16."""
        import av

        try:
            return np.stack([self._frame(number) for number in numbers.tolist()])
        except (av.FFmpegError, StopIteration) as error:
            self._frames = None
            raise _unreadable(self.path, error) from error

    def _frame(self, number: int) -> np.ndarray:
        if self._frames is None or not self._position < number <= self._position + FORWARD_FRAMES:
            time_base = self._stream.time_base or Fraction(1, 90_000)
            self._container.seek(round((number + 0.5) / self.fps / time_base), stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        for frame in self._frames:
            place = float(frame.pts * frame.time_base) * self.fps
            self._position = round(place)
            if abs(place - number) < MISPLACED:
                return self._codes(frame) if self.depth else frame.to_ndarray(format="rgb24")
            if self._position >= number:
                raise _misplaced(self.path, np.array([number]), np.array([place]), self.fps)
        self._frames = None
        raise StoreError(f"{self.path} ends before frame {number}. {_REMEDY}")

    def _codes(self, frame: Any) -> np.ndarray:
        if frame.format.name != "gray12le":
            frame = frame.reformat(format="gray12le")
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint16).reshape(plane.height, plane.line_size // 2)
        return rows[:, : plane.width].copy()


class VideoFrames:
    """All frames of one camera that is stored in video files; each call decodes a frame once, in one request per file.

    Can be pickled: files are opened where and when they are read.
    """

    in_threads = True
    """Decoders let other threads run: several cameras are worth reading at the same time."""

    def __init__(
        self,
        files: list[Path],
        file_of_row: np.ndarray,
        number_of_row: np.ndarray,
        frame_shape: tuple[int, ...],
        fps: float,
        backend: str,
        depth: DepthCode | None = None,
    ) -> None:
        """Describes where each row lies.

        Args:
            files: video files.
            file_of_row: (frames,) index of its file.
            number_of_row: (frames,) its frame number in that file.
            frame_shape: (height, width, 3), or (height, width) for depth.
            fps: frames per second of all files.
            backend: see `video_backend`; depth is always decoded by PyAV.
            depth: how codes become metres, for depth.
        """
        self.files, self.file_of_row, self.number_of_row = files, file_of_row, number_of_row
        self.frame_shape, self.fps, self.backend, self.depth = frame_shape, fps, backend, depth
        self._metres = depth.table() if depth else None

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Frames in any order, repeats allowed.

        Args:
            rows: (R,)

        Returns:
            (R, height, width, 3) uint8, or (R, height, width) float32 metres.
        """
        unique, place = np.unique(rows, return_inverse=True)
        files = self.file_of_row[unique]
        result = np.empty((len(rows), *self.frame_shape), np.float32 if self.depth else np.uint8)
        for file in np.unique(files).tolist():
            mine = np.flatnonzero(files == file)
            numbers = self.number_of_row[unique[mine]]
            frames = self._decoder(self.files[file]).read(numbers)
            if frames.shape[1:] != self.frame_shape:
                raise StoreError(
                    f"{self.files[file]}: frames of {frames.shape[1:]}, but meta/info.json says {self.frame_shape} (height, "
                    f"width, channels). {_REMEDY}"
                )
            if self._metres is not None:
                frames = self._metres[frames]
            for slot in np.flatnonzero(files[place] == file).tolist():
                result[slot] = frames[np.searchsorted(mine, place[slot])]
        return result

    def _decoder(self, path: Path) -> Any:
        depth = self.depth is not None
        if depth or self.backend == "pyav":
            return decoders.get((path, depth, "pyav"), lambda: PyavVideo(path, self.fps, depth))
        return decoders.get((path, depth, "torchcodec"), lambda: TorchcodecVideo(path, self.fps))


class OpenDecoders:
    """The decoders of this process, at most `OPEN_FILES`.

    Threads of one process share it; no two of them read one file at a time, since each takes another camera.

    A forked process begins with none: those of its parent are kept, unused and never closed, because closing joins threads that
    exist in the parent only.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Any, Any] = OrderedDict()
        self._inherited: list[Any] = []
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, name: Any, make: Callable[[], Any]) -> Any:
        """The open decoder of that name, else a new one."""
        with self._lock:
            decoder = self._open.pop(name) if name in self._open else make()
            self._open[name] = decoder
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return decoder

    def after_fork(self) -> None:
        """Forgets the parent's decoders."""
        self._inherited.append(self._open)
        self._open, self._lock = OrderedDict(), Lock()


decoders = OpenDecoders()
os.register_at_fork(after_in_child=decoders.after_fork)


def frame_count(path: Path) -> int:
    """Frames of a video file, as its header says; counted where the header does not.

    Raises:
        StoreError: the file cannot be opened.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    except (av.FFmpegError, IndexError) as error:
        raise _unreadable(path, error) from error


_REMEDY = "Copy or download the file again; the folder was written wrongly if that does not help."


def _unreadable(path: Path, error: Exception) -> StoreError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StoreError(f"{path} cannot be decoded ({reason}). {_REMEDY}")


def _misplaced(path: Path, wanted: np.ndarray, found: np.ndarray, fps: float) -> StoreError:
    first = int(np.flatnonzero(np.abs(found - wanted) >= MISPLACED)[0])
    asked, held = wanted[first] / fps, found[first] / fps
    return StoreError(
        f"{path}: asked for frame {wanted[first]} at {asked:.4f} s, it holds a frame of {held:.4f} s there: the video does not "
        f"run at a constant {fps:g} frames per second from time 0. Encode it again at that rate."
    )
