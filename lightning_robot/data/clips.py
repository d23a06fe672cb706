"""Writing video: one clip per episode and camera, joined into longer files without encoding anew.

The same frames give the same bytes: encoders run on one thread, containers hold neither times nor versions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode

DEPTH = DepthCode()
_CONTAINER = {"fflags": "+bitexact"}


@dataclass(frozen=True)
class Encoding:
    """How frames become a video stream.

    Attributes:
        name: the codec's canonical name.
        encoder: of ffmpeg.
        pixel_format: of the stream.
        options: of the encoder. Every second frame is a key frame, so that random windows are decoded quickly, and no frame
            refers to a later one.
    """

    name: str
    encoder: str
    pixel_format: str
    options: dict[str, str] = field(default_factory=dict)


ENCODINGS = {
    "av1": Encoding("av1", "libsvtav1", "yuv420p", {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}),
    # Without mbtree: its motion search reads memory that nobody has written (x264 165), and bytes differ between processes.
    "h264": Encoding("h264", "libx264", "yuv420p", {"g": "2", "crf": "18", "bf": "0", "preset": "medium", "mbtree": "0"}),
}
"""Of colour pictures; the first with the settings of LeRobot's own recordings."""

DEPTH_ENCODING = Encoding(
    "hevc",
    "libx265",
    "gray12le",
    {"x265-params": "lossless=1:keyint=2:bframes=0:pools=1:frame-threads=1:info=0:log-level=error"},
)


def depth_codes(metres: np.ndarray) -> np.ndarray:
    """12-bit codes of depth, uint16: the inverse of `DepthCode.table`."""
    near, far = np.log(DEPTH.low + DEPTH.shift), np.log(DEPTH.high + DEPTH.shift)
    depth = np.clip(metres.astype(np.float64), DEPTH.low, DEPTH.high)
    return np.rint(4095 * (np.log(depth + DEPTH.shift) - near) / (far - near)).astype(np.uint16)


def write_clip(path: Path, frames: np.ndarray, rate: int, encoding: Encoding) -> None:
    """Encodes frames at a constant rate; written aside and renamed.

    Args:
        path: of the clip.
        frames: (T, height, width, 3) uint8, or (T, height, width) uint16 codes for depth.
        rate: frames per second.
        encoding: codec and settings.

    Raises:
        StoreError: the encoder does not take such frames.
    """
    import av

    height, width = frames.shape[1:3]
    if encoding.pixel_format == "yuv420p" and (height % 2 or width % 2):
        raise StoreError(
            f"Video holds pictures of even height and width only; these have {height} x {width}. Store them as PNG "
            "(--pictures png), or record another size (generate: --camera-size)."
        )
    os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder prints its settings for every clip
    aside = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    source = "rgb24" if frames.ndim == 4 else "gray12le"
    count = 0
    try:
        with av.open(str(aside), "w", format="mp4", options=_CONTAINER) as container:
            stream: Any = container.add_stream(encoding.encoder, rate=rate, options=dict(encoding.options))
            stream.height, stream.width, stream.pix_fmt = height, width, encoding.pixel_format
            stream.codec_context.time_base = Fraction(1, rate)
            stream.codec_context.thread_count = 1
            for number, pixels in enumerate([*frames, None]):
                frame = None
                if pixels is not None:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
                    frame.pts, frame.time_base = number, Fraction(1, rate)
                for packet in stream.encode(frame):
                    container.mux(packet)
                    count += 1
    except (av.FFmpegError, ValueError) as error:
        aside.unlink(missing_ok=True)
        raise StoreError(
            f"Pictures of {height} x {width} cannot be encoded by {encoding.encoder} ({error}). Store them as PNG "
            "(--pictures png), or record another size (generate: --camera-size)."
        ) from error
    if count != len(frames):
        raise StoreError(f"{path}: {encoding.encoder} made {count} packets of {len(frames)} frames.")
    os.replace(aside, path)


def try_encoding(height: int, width: int, encoding: Encoding) -> None:
    """Encodes two black pictures, to learn before the work whether the encoder is there and takes their size.

    Raises:
        StoreError: see `write_clip`.
    """
    frames = (
        np.zeros((2, height, width), np.uint16) if encoding is DEPTH_ENCODING else np.zeros((2, height, width, 3), np.uint8)
    )
    with TemporaryDirectory() as folder:
        write_clip(Path(folder) / "try.mp4", frames, 30, encoding)


def join_clips(path: Path, clips: Sequence[Path], rate: int) -> int:
    """Copies the streams of clips one after another into one file: frame k of the whole is shown at k / rate seconds.

    Args:
        path: of the file.
        clips: made by `write_clip` with the same size, rate and encoding.
        rate: frames per second.

    Returns:
        Number of frames.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with av.open(str(path), "w", format="mp4", options={**_CONTAINER, "movflags": "+faststart"}) as container:
        stream: Any = None
        for clip in clips:
            with av.open(str(clip)) as source:
                if stream is None:
                    stream = container.add_stream_from_template(source.streams.video[0], opaque=True)
                    stream.time_base = Fraction(1, rate)
                for packet in source.demux(source.streams.video[0]):
                    if not packet.size:  # the end of the clip
                        continue
                    packet.stream, packet.time_base = stream, Fraction(1, rate)
                    packet.pts = packet.dts = count
                    packet.duration = 1
                    container.mux(packet)
                    count += 1
    return count
