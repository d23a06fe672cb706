"""`convert … --verify`: an old store against its recordings, an old LeRobot dataset against its store."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import zarr

from lightning_robot.commands.convert import main
from lightning_robot.data import convert_calvin
from lightning_robot.data.calvin_frames import CalvinSettings
from lightning_robot.data.convert_lerobot import convert_to_lerobot, verify_conversion
from lightning_robot.data.lerobot_checksums import changed_parts
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import StoreError

sys.path.insert(0, str(Path(__file__).parent))
from test_convert_lerobot import store as small_store

# --- CALVIN ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    """A recording and the store made of it, with settings that are not the default's."""
    folder = tmp_path_factory.mktemp("calvin")
    root = folder / "recording"
    shutil.copytree(shared / "data" / "calvin_sample", root)
    settings = CalvinSettings(points=16, size=8, depth=False, pixel_offset=(0, 1), colors=False)
    convert_calvin.convert_calvin(root, folder / "s", settings, processes=1, shard_frames=16)
    return root, folder / "s"


def test_an_old_store_is_compared_with_its_recordings(converted, capsys):
    root, store = converted
    assert main(["calvin", str(root), str(store), "--verify", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{store}: Verified: 3 episodes and 53 frames in order; " in out
    assert "8 checksums hold; 53 frames converted again and equal." in out


def test_without_the_recordings_the_rest_is_verified(converted, capsys):
    _, store = converted
    assert main(["calvin", "/nowhere", str(store), "--verify"]) == 0
    assert "checksums hold; no frame was compared with its recording, /nowhere is not there." in capsys.readouterr().out


def test_changed_recordings_are_found(converted, tmp_path, capsys):
    root, store = converted
    shutil.copytree(root, tmp_path / "r")
    file = sorted((tmp_path / "r" / "training").glob("episode_*.npz"))[0]
    arrays = dict(np.load(file))
    arrays["robot_obs"] = arrays["robot_obs"] + 1e-3
    np.savez(file, **arrays)
    assert main(["calvin", str(tmp_path / "r"), str(store), "--verify", "--processes", "1"]) == 1
    assert "gives other values, first observation.state of row 0. Were the recordings changed?" in capsys.readouterr().err


def test_a_changed_store_and_one_of_another_kind_are_found(converted, tmp_path, capsys):
    root, store = converted
    shutil.copytree(store, tmp_path / "s")
    zarr.open_array(str(tmp_path / "s" / "data" / "action"), mode="r+")[40, 2] += 1
    assert main(["calvin", str(root), str(tmp_path / "s"), "--verify", "--processes", "1"]) == 1
    assert "does not hold what was written: data/action, rows from 32" in capsys.readouterr().err
    other = small_store(tmp_path / "other.zarr")
    assert main(["calvin", str(root), str(other.path), "--verify"]) == 1
    assert "was not converted from CALVIN" in capsys.readouterr().err


# --- LeRobot ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["av1", "png"])
def dataset(request, tmp_path_factory):
    """A store and the LeRobot dataset made of it."""
    folder = tmp_path_factory.mktemp("lerobot")
    source = small_store(folder / "a.zarr")
    convert_to_lerobot(source.path, folder / "d", pictures=request.param)
    return source.path, folder / "d"


def test_an_old_dataset_is_compared_with_its_store(dataset, tmp_path, capsys):
    source, folder = dataset
    shutil.rmtree(folder.with_name("d.decoded"), ignore_errors=True)
    assert main(["lerobot", str(source), str(folder), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "Verified: 2 episodes and 12 frames in order; " in out
    assert "checksums hold; 12 frames read back as written" in out
    assert main(["lerobot", "/nowhere", str(folder), "--verify"]) == 0
    assert "no frame was compared with its source, /nowhere is not there." in capsys.readouterr().out
    another = small_store(tmp_path / "b.zarr", rate=5.0)
    assert main(["lerobot", str(another.path), str(folder), "--verify"]) == 1
    assert "was made of another store" in capsys.readouterr().err


def test_every_change_of_a_dataset_is_named(dataset, tmp_path):
    source, folder = dataset
    video = bool(list(folder.rglob("*.mp4")))

    def changed(name, change) -> list[str]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy / name)
        found = changed_parts(copy, LeRobotFolder.open(folder).checksums)
        assert found
        if (copy / name).exists():
            with pytest.raises(StoreError, match=r"does not hold what was written|cannot be read|is missing|is damaged"):
                verify_conversion(source, copy)
        return found

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def rewrite(column, frame):
        """Gives a frame the value of the frame before."""

        def change(path):
            table = parquet.read_table(path)
            rows = np.arange(len(table))
            rows[frame] -= 1
            index = table.column_names.index(column)
            parquet.write_table(table.set_column(index, table.schema.field(index), table.column(index).take(rows)), path)

        return change

    data = "data/chunk-000/file-000.parquet"
    assert changed(data, rewrite("action", 7)) == ["column action"]
    if video:
        name = "videos/observation.images.static/chunk-000/file-000.mp4"
        assert changed(name, flip) == [name]
        assert changed(name, Path.unlink) == [name]
    else:
        assert changed(data, rewrite("observation.images.static", 3)) == ["column observation.images.static"]
    assert changed("meta/stats.json", flip) == ["meta/stats.json"]
    assert changed("meta/tasks.parquet", Path.unlink) == ["meta/tasks.parquet"]
    assert changed("meta/more.json", lambda path: path.write_text("{}")) == ["meta/more.json"]
    assert changed(data, lambda path: path.write_bytes(b"PAR1 nothing")) == [data]


def test_rewriting_the_parquet_files_changes_nothing(dataset, tmp_path):
    """Checksums are of values: another compression or another size of row groups is no damage."""
    _, folder = dataset
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy/data/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(path), path, row_group_size=5, compression="zstd")
    assert changed_parts(tmp_path / "copy", LeRobotFolder.open(folder).checksums) == []


def test_the_notes_hold_no_times_and_no_paths(dataset):
    notes = json.loads((dataset[1] / "meta/lightning_robot.json").read_text())
    assert set(notes) == {"features", "provenance", "tasks", "checksums"}
    assert set(notes["checksums"]) == {"columns", "files"}
    assert str(dataset[1].parent) not in json.dumps(notes)
