"""The command: options reach the conversion, faults become one message and an exit status."""

import pytest

from lightning_robot.commands.convert import main
from lightning_robot.data.store import EpisodeStore


def test_options_reach_the_store(shared, tmp_path, capsys):
    command = (
        f"calvin {shared}/data/calvin_sample {tmp_path}/s --points 16 --no-colors --no-rgb --size 8 --processes 1 --strict"
    )
    assert main([*command.split(), "--pixel-offset", "0", "1", "--encoder", "all-MiniLM-L6-v2", "--splits", "validation"]) == 0
    store = EpisodeStore.open(tmp_path / "s")
    assert store.shape("observation.point_cloud") == (15, 16, 3)
    assert store.shape("observation.depth.static") == (15, 8, 8)
    assert "observation.images.static" not in store.keys
    assert store.language["encoder"] == "all-MiniLM-L6-v2"
    assert store.features.cloud["pixel_offset"] == [0, 1]
    assert "15 frames, 1 episode, 1 described segment" in capsys.readouterr().out


def test_a_missing_folder_is_one_message(tmp_path, capsys):
    assert main(["calvin", str(tmp_path / "nowhere"), str(tmp_path / "s")]) == 1
    captured = capsys.readouterr()
    assert "no such folder" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["calvin", "a", "b", "--point", "3"], ["calv", "a", "b"], ["calvin", "a"], []])
def test_abbreviations_and_missing_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_workers_are_counted_from_one(tmp_path, capsys):
    assert main(["calvin", str(tmp_path), str(tmp_path / "s"), "--processes", "-2"]) == 1
    assert "processes: -2; it must be at least 1" in capsys.readouterr().err


def test_crop_is_checked(tmp_path, capsys):
    assert main(["calvin", str(tmp_path), str(tmp_path / "s"), "--crop", "0", "0", "0", "-1", "1", "1"]) == 1
    assert "lower corner below an upper one" in capsys.readouterr().err
