"""`evaluate --compare`: the same episodes for each, tables of earlier evaluations, plain words."""

import json
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

from lightning_robot.commands.evaluate import main
from lightning_robot.commands.evaluate_comparison import short_names

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_saved_policy import save

if "fake/Reach-v0" not in gymnasium.registry:
    gymnasium.register("fake/Reach-v0", entry_point="fake_reach:Reach")

SAVED = {"env": "fake/Reach-v0", "env_kwargs": {"max_steps": 9}, "tasks": ["near"], "execution_horizon": 2, "max_steps": None}
FAST = ["--episodes", "12", "--videos", "0", "--processes", "0"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs that differ in their weights; paths are relative to the present folder."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "good" / "checkpoints" / "best.ckpt", evaluation=SAVED)
    path = save(tmp_path / "bad" / "checkpoints" / "best.ckpt", evaluation=SAVED)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = {name: 30 * value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, path)
    return tmp_path


def table(run):
    return run / "evaluations" / "best_seed2000000_episodes12" / "evaluation.json"


def test_checkpoints_play_the_same_episodes(runs, capsys):
    assert main(["--compare", "good", "bad", *FAST]) == 0
    out = capsys.readouterr().out
    assert out.count("12 episodes, seeds 2000000 to 2000011.") == 2
    for part in ("good", "bad", "Difference good - bad: ", "stablished", "McNemar's exact test: p = ", "solved by good alone"):
        assert part in out
    rows = [json.loads(table(runs / name).read_text())["episodes"] for name in ("good", "bad")]
    assert [row["start_state"] for row in rows[0]] == [row["start_state"] for row in rows[1]]


def test_tables_of_earlier_evaluations_are_read(runs, tmp_path, capsys):
    assert main(["good", *FAST]) == 0
    capsys.readouterr()
    # A checkpoint beside a table plays the table's episodes, whatever --episodes says.
    assert main(["--compare", str(table(runs / "good")), "bad", *FAST, "--episodes", "3", "--output", "out"]) == 0
    out = capsys.readouterr().out
    assert out.count("Evaluating") == 1
    assert "12 episodes, seeds 2000000 to 2000011." in out
    (found,) = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["paired"]
    assert found["episodes"] == [12, 12]
    assert sum(found["counts"].values()) == 12
    # The folder of a table will do; nothing is played.
    assert main(["--compare", str(table(runs / "good").parent), "out/bad", *FAST]) == 0
    out = capsys.readouterr().out
    assert "Evaluating" not in out
    assert found["sentence"] in out  # the names are the same


def test_other_seeds_are_refused_and_the_unpaired_test_is_offered(runs, capsys):
    for run, seed in (("good", "2000000"), ("bad", "2000006")):
        assert main([run, *FAST, "--seed", seed, "--output", f"{run}-table"]) == 0
    capsys.readouterr()
    assert main(["--compare", "good-table", "bad-table"]) == 1
    error = capsys.readouterr().err
    assert "6 episodes in common. A paired test needs the same episodes" in error
    assert "--unpaired" in error
    assert main(["--compare", "--unpaired", "good-table", "bad-table"]) == 0
    out = capsys.readouterr().out
    assert "Fisher's exact test: p = " in out
    assert "6 episodes in common are counted as if they were different ones." in out


def test_several_comparisons_are_adjusted(runs, capsys):
    assert main(["good", "bad", "bad/checkpoints/best.ckpt", "--compare", *FAST]) == 0
    assert capsys.readouterr().out.count("adjusted for the number of comparisons (Holm)") == 2


def test_names_are_short_and_differ():
    assert short_names(["runs/act", "runs/diffusion/"]) == ["act", "diffusion"]
    assert short_names(["a/checkpoints/best.ckpt", "b/checkpoints/best.ckpt"]) == [
        "a/checkpoints/best.ckpt",
        "b/checkpoints/best.ckpt",
    ]
    assert short_names(["a/x/evaluation.json", "b"]) == ["x", "b"]
    assert short_names(["a", "./a"]) == ["a (1)", "a (2)"]


def test_what_cannot_be_compared_is_said(runs, capsys):
    assert main(["--compare", "good", *FAST]) == 1
    assert "--compare needs two or more" in capsys.readouterr().err
    Path("table.json").write_text("{}")
    assert main(["--compare", "good", "table.json", *FAST]) == 1
    assert "table.json is no table of an evaluation" in capsys.readouterr().err
    assert main(["--compare", "good", "nowhere", *FAST]) == 1
    assert "No checkpoint at nowhere" in capsys.readouterr().err
    assert main(["good", *FAST, "--output", "there"]) == 0
    text = Path("there/evaluation.json").read_text().replace("fake/Reach-v0", "other/Env-v0")
    Path("there/evaluation.json").write_text(text)
    capsys.readouterr()
    assert main(["--compare", "there", "bad", *FAST]) == 1
    assert "bad would play in fake/Reach-v0, the table is of other/Env-v0" in capsys.readouterr().err


def test_other_renderers_and_simulators_are_compared_only_when_asked(runs, capsys):
    assert main(["good", *FAST, "--output", "rays"]) == 0
    text = Path("rays/evaluation.json").read_text()
    Path("opengl").mkdir()
    Path("opengl/evaluation.json").write_text(text.replace('"renderer": "none"', '"renderer": "opengl"'))
    capsys.readouterr()
    for compared in (["rays", "opengl"], ["--unpaired", "rays", "opengl"], ["opengl", "bad", *FAST]):
        assert main(["--compare", *compared]) == 1
        streams = capsys.readouterr()
        assert "were judged in different worlds: renderer " in streams.err
        assert "or compare all the same with --across" in streams.err
        assert "Evaluating" not in streams.out  # known before anything is played
        assert main(["--compare", "--across", *compared]) == 0
        assert "Renderer: " in capsys.readouterr().out
