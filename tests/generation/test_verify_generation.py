"""`generate STORE --verify`: counts, order, checksums, and episodes attempted again."""

import json
import shutil
from pathlib import Path

import pytest
import zarr

from lightning_robot.commands.generate import main
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.generation import packing
from lightning_robot.generation.generate import GenerationError, generate
from lightning_robot.generation.verification import verify_generation

SETTINGS = {"env": "fake_expert_env:Reach-v0", "episodes_per_task": 3, "processes": 1, "noise": 0.1}


@pytest.fixture(autouse=True)
def _fake_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(("form", "pictures"), [("zarr", "png"), ("lerobot", "png")])
def test_what_is_whole_is_attempted_again_and_equal(tmp_path, capsys, form, pictures):
    path = generate(tmp_path / "reach", format=form, pictures=pictures, **SETTINGS)
    assert "checksums hold; " in capsys.readouterr().out
    assert main([str(path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: Verified: 6 episodes and " in out
    assert "checksums hold; 2 episodes attempted again and equal." in out


def edited(path, tmp_path, change):
    """A copy whose attributes were changed by hand."""
    copy = tmp_path / "copy.zarr"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    metadata = json.loads((copy / "zarr.json").read_text())
    change(metadata["attributes"])
    (copy / "zarr.json").write_text(json.dumps(metadata))
    return copy


def test_what_was_changed_is_told(tmp_path, capsys):
    path = generate(tmp_path / "reach.zarr", **SETTINGS)

    def one_seed_less(attributes):
        attributes["provenance"]["seeds"].pop()

    def other_order(attributes):
        attributes["provenance"]["seeds"].reverse()

    def other_noise(attributes):
        attributes["provenance"]["settings"]["noise"] = 0.2

    def other_simulator(attributes):
        attributes["provenance"]["simulator"]["simulator"] = "old"

    def no_checksums(attributes):
        other_noise(attributes)
        del attributes["checksums"]

    def other_texts(attributes):
        attributes["language"]["texts"].reverse()

    for change in (one_seed_less, other_order):
        with pytest.raises(StoreError, match="in the order of seeds"):
            verify_generation(edited(path, tmp_path, change))
    with pytest.raises(StoreError, match="is labelled"):
        verify_generation(edited(path, tmp_path, other_texts))
    told = verify_generation(edited(path, tmp_path, other_noise))
    assert "attempted again, episode 0 " in told
    assert "this machine or its libraries compute otherwise" in told
    with pytest.raises(StoreError, match="no checksums say which is right"):
        verify_generation(edited(path, tmp_path, no_checksums))
    assert "the simulator is another one (simulator old then, " in verify_generation(edited(path, tmp_path, other_simulator))
    zarr.open_array(str(path / "data" / "state"), mode="r+")[5, 0] += 1
    assert main([str(path), "--verify"]) == 1
    assert "does not hold what was written: data/state, rows from 0" in capsys.readouterr().err


def test_other_data_are_no_demonstrations(tmp_path):
    path = generate(tmp_path / "reach.zarr", **SETTINGS)
    with pytest.raises(GenerationError, match="names no settings and seeds"):
        verify_generation(edited(path, tmp_path, lambda attributes: attributes.pop("provenance")))


def test_episodes_of_a_policy_need_that_policy(tmp_path):
    from fake_walking_policy import save

    acting = {"env": SETTINGS["env"], "seed": 100, "hold": 1, "processes": 1, "episodes_per_task": 2}
    checkpoint = save(tmp_path / "walk.ckpt", noise=0.5)
    path = generate(tmp_path / "walk.zarr", policy=checkpoint, **acting)
    assert "name the policy that acted (--policy)" in verify_generation(path)
    assert "2 episodes attempted again and equal" in verify_generation(path, policy=checkpoint)
    with pytest.raises(GenerationError, match="is not the policy that acted"):
        verify_generation(path, policy=save(tmp_path / "other.ckpt", speed=0.7))


def test_a_generation_whose_frames_are_not_read_back_is_packed_anew(tmp_path, monkeypatch):
    compare, spoiled = packing.FrameSample.compare, []

    def spoil(sample, dataset, *arguments):
        if not spoiled:
            spoiled.append(sample._kept[0]["action"].__iadd__(1))
        return compare(sample, dataset, *arguments)

    monkeypatch.setattr(packing.FrameSample, "compare", spoil)
    with pytest.raises(GenerationError, match="action of frame 0 is not what was written"):
        generate(tmp_path / "reach.zarr", **SETTINGS)
    assert not (tmp_path / "reach.zarr").exists()
    assert EpisodeStore.open(generate(tmp_path / "reach.zarr", **SETTINGS)).num_episodes == 6
