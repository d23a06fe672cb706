"""What stands in the ``meta`` folder of a LeRobot dataset (v3.0, v2.1 or v2.0), as one table of episodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_robot.console import say
from lightning_robot.data.store import StoreError

INFO = "meta/info.json"
NOTES = "meta/lightning_robot.json"
"""What our stores know beyond LeRobot's format, in the datasets that we write: ``features``, ``tasks``, ``provenance``."""
STATISTICS = "meta/stats.json"
"""Of all episodes, in v3.0 and v2.0."""
FROM_VERSION = {
    3: {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
    2: {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
}
"""Paths of data and video files where info.json does not give them."""


@dataclass
class Table:
    """The episodes of a folder, whatever its version.

    Attributes:
        lengths: (E,) frames.
        data_files: parquet files in the order of their rows.
        texts: one sentence per task_index.
        videos: per video feature the path and the start in seconds of each episode.
        statistics: per episode and feature ``min``, ``max``, ``mean``, ``std``, ``count`` as the writer noted them.
    """

    lengths: np.ndarray
    data_files: list[Path]
    texts: list[str]
    videos: dict[str, tuple[list[Path], np.ndarray]]
    statistics: list[dict[str, dict[str, Any]]]


def read_meta(path: Path) -> tuple[dict[str, Any], Table]:
    """Content of info.json, and the episodes.

    Args:
        path: the dataset's folder.

    Raises:
        StoreError: it is no dataset, of another version, incomplete, or contradicts itself.
    """
    info = _read_info(path)
    table = _table_v3(path, info) if _major(info) == 3 else _table_v2(path, info)
    _check_counts(path, info, table)
    return info, table


def read_notes(path: Path) -> dict[str, Any]:
    """Content of `NOTES`; empty for a dataset that somebody else wrote.

    Raises:
        StoreError: the file is damaged.
    """
    notes = read_json(path / NOTES) if (path / NOTES).exists() else {}
    return notes if isinstance(notes, dict) else {}


def _major(info: dict[str, Any]) -> int:
    return int(str(info["codebase_version"]).lstrip("v").split(".")[0])


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: the folder is no LeRobot dataset, or was not copied whole.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Copy or download it again.") from error


def _read_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The entries of a file with one per line, each of which has the `needed` names."""
    if not path.is_file():
        raise StoreError(f"{path} is missing: the folder is no LeRobot v2.1 dataset, or was not copied whole.")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Copy or download it again.") from error
    for number, line in enumerate(lines, start=1):
        lacking = [name for name in needed if not isinstance(line, dict) or name not in line]
        if lacking:
            raise StoreError(f"{path}: entry {number} has no {', '.join(lacking)}. Copy or download the file again.")
    return lines


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise StoreError(
            f"There is no dataset at {path}. Set data.init_args.root to a LeRobot folder (it holds meta/info.json), or "
            "data.init_args.repo_id to download one."
        )
    info = read_json(path / INFO)
    if not isinstance(info, dict):
        raise StoreError(f"{path / INFO} is damaged: it holds no settings but {info!r:.40}. Copy or download it again.")
    for name in ("codebase_version", "fps", "features", "total_episodes", "total_frames"):
        if not info.get(name):
            raise StoreError(
                f"{path / INFO} has no {name}: the dataset is empty or was not finished. (LeRobot itself would open it with no "
                f"frames.) Finish the recording, or add {name}."
            )
    version = str(info["codebase_version"])
    if not (version in ("v2.0", "v2.1") or version.startswith("v3.")):
        raise StoreError(
            f"{path / INFO} says codebase_version {version!r}; v3.0, v2.1 and v2.0 are read. Convert the dataset with "
            "LeRobot's own scripts, or update this project if the version is newer."
        )
    for name in ("fps", "total_episodes", "total_frames"):
        if isinstance(info[name], bool) or not isinstance(info[name], (int, float)) or info[name] <= 0:
            raise StoreError(f"{path / INFO}: {name} is {info[name]!r}, where a positive number belongs. Correct it there.")
    if not isinstance(info["features"], dict):
        raise StoreError(
            f"{path / INFO}: features is no table of names, but {info['features']!r:.40}. Copy or download it again."
        )
    for name, feature in info["features"].items():
        dtype, shape = (feature.get("dtype"), feature.get("shape")) if isinstance(feature, dict) else (None, None)
        sized = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        if isinstance(shape, list) and dtype in ("image", "video"):
            sized = sized and len(shape) == 3
        if not (isinstance(dtype, str) and (sized or dtype in ("string", "language"))):
            raise StoreError(
                f"{path / INFO}: feature {name} is {feature!r:.80}; it needs a dtype and a shape, a list of whole numbers "
                "(three for pictures). Correct it there, or copy the file again."
            )
    return info


def _check_counts(path: Path, info: dict[str, Any], table: Table) -> None:
    """Episode table against meta/info.json."""
    if len(table.lengths) != info["total_episodes"]:
        raise StoreError(
            f"{path}: {INFO} counts {info['total_episodes']} episodes, meta/episodes lists {len(table.lengths)}. The folder "
            "was not copied whole, or its writer was interrupted: copy or download it again."
        )
    if (empty := np.flatnonzero(table.lengths < 1)).size:
        raise StoreError(f"{path}: episode {empty[0]} has {table.lengths[empty[0]]} frames. Remove it from the dataset.")
    if table.lengths.sum() != info["total_frames"]:
        raise StoreError(
            f"{path}: {INFO} counts {info['total_frames']} frames, the episodes of meta/episodes have {table.lengths.sum()}. "
            "The folder was not copied whole, or its writer was interrupted: copy or download it again."
        )


def _template(info: dict[str, Any], name: str) -> str:
    return info.get(name) or FROM_VERSION[_major(info)][name]


def _table_v3(path: Path, info: dict[str, Any]) -> Table:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    files = sorted((path / "meta/episodes").glob("*/*.parquet"))
    if not files:
        raise StoreError(f"{path}/meta/episodes holds no parquet file: the folder was not copied whole.")
    try:
        tables = [parquet.read_table(file, partitioning=None) for file in files]
    except (arrow.ArrowInvalid, OSError) as error:
        raise StoreError(f"{path}/meta/episodes cannot be read ({error}). Copy or download it again.") from error
    table = arrow.concat_tables(tables, promote_options="default")

    def column(name: str) -> np.ndarray:
        if name not in table.column_names:
            raise StoreError(f"{files[0]} has no column {name}: write the dataset's metadata again.")
        return table.column(name).to_numpy()

    starts, ends = column("dataset_from_index"), column("dataset_to_index")
    wrong = np.flatnonzero(starts != np.concatenate([[0], ends[:-1]]))
    if len(wrong):
        raise StoreError(
            f"{path}: meta/episodes row {wrong[0]} begins at frame {starts[wrong[0]]}, the one before ends at "
            f"{ends[wrong[0] - 1] if wrong[0] else 0}: rows are missing or out of order. Copy or download the folder again."
        )
    if {"data/chunk_index", "data/file_index"} <= set(table.column_names):
        pairs = zip(column("data/chunk_index").tolist(), column("data/file_index").tolist())
        template = _template(info, "data_path")
        data_files = [path / template.format(chunk_index=c, file_index=f) for c, f in dict.fromkeys(pairs)]
    else:
        data_files = sorted((path / "data").glob("*/*.parquet"))
    videos = {}
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            template = _template(info, "video_path")
            chunks, numbers = column(f"videos/{key}/chunk_index"), column(f"videos/{key}/file_index")
            paths = [path / template.format(video_key=key, chunk_index=c, file_index=f) for c, f in zip(chunks, numbers)]
            videos[key] = (paths, column(f"videos/{key}/from_timestamp").astype(np.float64))
    statistics: list[dict[str, dict[str, Any]]] = [{} for _ in range(len(table))]
    for name in table.column_names:
        parts = name.split("/")
        if parts[0] == "stats" and parts[-1] in ("min", "max", "mean", "std", "count"):
            if info["features"].get("/".join(parts[1:-1]), {}).get("dtype") not in ("image", "video"):
                continue  # values that are no pictures are in memory: their statistics are computed
            for episode, value in enumerate(table.column(name).to_pylist()):
                statistics[episode].setdefault("/".join(parts[1:-1]), {})[parts[-1]] = value
    return Table((ends - starts).astype(np.int64), data_files, _texts_v3(path), videos, statistics)


def _texts_v3(path: Path) -> list[str]:
    """The sentence of every task_index, from the columns themselves, whether or not pandas would find its index there."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    file = path / "meta/tasks.parquet"
    if not file.is_file():
        raise StoreError(f"{file} is missing: the folder was not copied whole.")
    try:
        table = parquet.read_table(file, partitioning=None)
    except (arrow.ArrowInvalid, OSError) as error:
        raise StoreError(f"{file} cannot be read ({error}). Copy or download it again.") from error
    texts = [name for name in table.column_names if arrow.types.is_string(table.schema.field(name).type)]
    texts += [name for name in table.column_names if arrow.types.is_large_string(table.schema.field(name).type)]
    name = "task" if "task" in texts else texts[0] if len(texts) == 1 else None
    if name is None or "task_index" not in table.column_names:
        raise StoreError(
            f"{file} has the columns {', '.join(table.column_names)}; expected are task_index and the text column task. (It "
            "was probably written without its pandas index.) Write it again with the sentences of the tasks."
        )
    if not (table.schema.pandas_metadata or {}).get("index_columns"):
        say(f"{file} has no pandas index: its sentences are read here, but LeRobot itself would give the task as a number.")
    return _in_order(table.column("task_index").to_pylist(), table.column(name).to_pylist(), file)


def _in_order(numbers: list[int], texts: list[str], file: Path) -> list[str]:
    if sorted(numbers) != list(range(len(numbers))):
        raise StoreError(f"{file}: task_index must count from 0 without gaps; it holds {sorted(numbers)[:10]}.")
    return [text for _, text in sorted(zip(numbers, texts))]


def _table_v2(path: Path, info: dict[str, Any]) -> Table:
    episodes = sorted(
        _read_lines(path / "meta/episodes.jsonl", "episode_index", "length"), key=lambda line: line["episode_index"]
    )
    if [line["episode_index"] for line in episodes] != list(range(len(episodes))):
        raise StoreError(f"{path}/meta/episodes.jsonl: episode_index must count from 0 without gaps.")
    chunk = int(info.get("chunks_size") or 1000)

    def places(template: str, key: str = "") -> list[Path]:
        numbers = range(len(episodes))
        return [path / template.format(episode_chunk=n // chunk, episode_index=n, video_key=key) for n in numbers]

    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    videos = {key: (places(_template(info, "video_path"), key), np.zeros(len(episodes))) for key in keys}
    tasks = _read_lines(path / "meta/tasks.jsonl", "task_index", "task")
    texts = _in_order([line["task_index"] for line in tasks], [line["task"] for line in tasks], path / "meta/tasks.jsonl")
    statistics: list[dict[str, dict[str, Any]]] = [{} for _ in episodes]
    noted = path / "meta/episodes_stats.jsonl"  # v2.0 has none
    for line in _read_lines(noted, "episode_index", "stats") if noted.exists() else ():
        if line["episode_index"] < len(episodes):
            statistics[line["episode_index"]] = line["stats"]
    lengths = np.array([line["length"] for line in episodes], np.int64)
    return Table(lengths, places(_template(info, "data_path")), texts, videos, statistics)
