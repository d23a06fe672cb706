"""LeRobot folders small enough for tests, written here: values are formulas of episode and frame.

Every picture carries the number of its frame as a bar code, so that a test reads off which one it got.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

CAMERAS = ("observation.images.front", "observation.images.wrist")
SIZE = 64


def state_of(episode: int, frame: Any) -> np.ndarray:
    """(frames, 6) float32."""
    frame = np.atleast_1d(frame)[:, None]
    return (30 * np.sin(0.1 * (frame + 1) * np.arange(1, 7) / 2 + 0.7 * episode)).astype(np.float32)


def picture_of(index: int, camera: int) -> np.ndarray:
    """(64, 64, 3) uint8 with a bar code of eight bits in the first eight rows."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    picture = np.stack([40 + columns, 40 + rows, np.full((SIZE, SIZE), 90 + 60 * camera)], -1).astype(np.uint8)
    code = index | 128 * camera
    for bit in range(8):
        picture[:8, 8 * bit : 8 * bit + 8] = 235 if code >> bit & 1 else 20
    return picture


def codes_of(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers and cameras of pictures (..., height, width, 3)."""
    bits = (pictures[..., 4, 4:64:8, 0] > 128).astype(np.int64)
    code = (bits << np.arange(8)).sum(-1)
    return code & 127, code >> 7


def write_folder(
    path: Path,
    lengths: tuple[int, ...] = (20, 17, 23),
    storage: str = "image",
    version: str = "v3.0",
    fps: int = 30,
    action_size: int = 6,
    cameras: tuple[str, ...] = CAMERAS,
    change: dict[str, Any] | None = None,
    action_names: list[str] | None = None,
    action_scale: float = 1.0,
) -> Path:
    """Writes a dataset of one data file and one video file per camera (v3.0), or one of each per episode (v2.1).

    Args:
        path: where.
        lengths: frames per episode.
        storage: ``image`` or ``video``.
        version: ``v3.0`` or ``v2.1``.
        fps: frames per second.
        action_size: elements of the action.
        cameras: names of the features.
        change: columns of the frame table (name to array) that are written otherwise than right.
        action_names: of the action's elements.
        action_scale: factor of the actions.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    names = [f"joint_{number}.pos" for number in range(6)]
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [6], "names": names},
        "action": {"dtype": "float32", "shape": [action_size], "names": action_names},
    }
    for camera in cameras:
        features[camera] = {"dtype": storage, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}
    counters = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in counters.items()}
    ends = np.cumsum(lengths)
    starts = ends - lengths
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.arange(ends[-1]) - starts[episode]
    columns: dict[str, Any] = {
        "observation.state": np.concatenate([state_of(e, np.arange(n)) for e, n in enumerate(lengths)]),
        "action": np.concatenate([state_of(e, 1 + np.arange(n)) for e, n in enumerate(lengths)])[:, :action_size]
        * action_scale,
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": episode,
        "index": np.arange(ends[-1]),
        "task_index": episode % 2,
    } | (change or {})
    for number, camera in enumerate(cameras) if storage == "image" else ():
        columns[camera] = [{"bytes": _png(picture_of(i, number)), "path": f"{i}.png"} for i in range(ends[-1])]

    def table(rows: slice) -> Any:
        arrays = {}
        for name, values in columns.items():
            if isinstance(values, np.ndarray) and values.ndim == 2:
                flat = arrow.array(values[rows].ravel(), arrow.float32())
                arrays[name] = arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
            else:
                arrays[name] = arrow.array(values[rows])
        return arrow.table(arrays)

    (path / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": fps, "features": features, "total_episodes": len(lengths)}
    info |= {"total_frames": int(ends[-1]), "total_tasks": 2, "robot_type": "so101_follower"}
    texts = ["pick up the block", "place the block"]
    statistics = [
        {key: _statistics(np.stack([picture_of(i, n) for i in range(a, b)])) for n, key in enumerate(cameras)}
        for a, b in zip(starts, ends)
    ]
    if version == "v3.0":
        _put(table(slice(None)), path / "data/chunk-000/file-000.parquet")
        rows: dict[str, Any] = {
            "episode_index": np.arange(len(lengths)),
            "length": np.array(lengths),
            "data/chunk_index": np.zeros(len(lengths), int),
            "data/file_index": np.zeros(len(lengths), int),
            "dataset_from_index": starts,
            "dataset_to_index": ends,
        }
        for number, camera in enumerate(cameras):
            if storage == "video":
                file = path / f"videos/{camera}/chunk-000/file-000.mp4"
                write_video(file, [picture_of(i, number) for i in range(ends[-1])], fps)
                rows |= {f"videos/{camera}/{name}": np.zeros(len(lengths), int) for name in ("chunk_index", "file_index")}
                rows |= {f"videos/{camera}/from_timestamp": starts / fps, f"videos/{camera}/to_timestamp": ends / fps}
            for name in ("min", "max", "mean", "std", "count"):
                rows[f"stats/{camera}/{name}"] = [noted[camera][name] for noted in statistics]
        _put(arrow.table({name: arrow.array(list(values)) for name, values in rows.items()}), _episodes(path))
        tasks = arrow.table({"task_index": [0, 1], "task": texts})
        pandas = {b"pandas": json.dumps({"index_columns": ["task"], "columns": []}).encode()}
        parquet.write_table(tasks.replace_schema_metadata(pandas), path / "meta/tasks.parquet")
    else:
        info |= {"chunks_size": 1000}
        for number, (start, end) in enumerate(zip(starts, ends)):
            _put(table(slice(start, end)), path / f"data/chunk-000/episode_{number:06d}.parquet")
            for view, camera in enumerate(cameras if storage == "video" else ()):
                file = path / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4"
                write_video(file, [picture_of(i, view) for i in range(start, end)], fps)
        _lines(path / "meta/tasks.jsonl", [{"task_index": n, "task": text} for n, text in enumerate(texts)])
        _lines(path / "meta/episodes.jsonl", [{"episode_index": n, "length": length} for n, length in enumerate(lengths)])
        noted = [{"episode_index": number, "stats": values} for number, values in enumerate(statistics)]
        _lines(path / "meta/episodes_stats.jsonl", noted)
    (path / "meta/info.json").write_text(json.dumps(info))
    return path


def change_json(path: Path, **values: Any) -> None:
    """Changes entries of a JSON file; those that are None are left out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_episodes(path: Path, **columns: Any) -> None:
    """Changes columns of meta/episodes (``__`` for ``/``); those that are None are left out."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = parquet.read_table(_episodes(path)).to_pydict()
    rows |= {name.replace("__", "/"): values for name, values in columns.items()}
    parquet.write_table(arrow.table({name: values for name, values in rows.items() if values is not None}), _episodes(path))


def write_video(path: Path, pictures: list[np.ndarray], fps: float, keyframes: int = 2) -> None:
    """H.264 with a key frame every so many frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"bf": "0", "crf": "10", "g": str(keyframes)})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _episodes(path: Path) -> Path:
    return path / "meta/episodes/chunk-000/file-000.parquet"


def _put(table: Any, path: Path) -> None:
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def _lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    with io.BytesIO() as buffer:
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()


def _statistics(pictures: np.ndarray) -> dict[str, Any]:
    values = (pictures / 255).reshape(-1, 3)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()} | {"count": [len(pictures)]}
