"""`evaluate CKPT`: a checkpoint alone is enough; its number is honest and repeats."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from lightning_robot.commands.checkpoint_paths import find_checkpoint
from lightning_robot.commands.evaluate import main

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_saved_policy import save

if "fake/Reach-v0" not in gymnasium.registry:
    gymnasium.register("fake/Reach-v0", entry_point="fake_reach:Reach")

SAVED = {"env": "fake/Reach-v0", "env_kwargs": {"max_steps": 9}, "tasks": ["far"], "execution_horizon": 2, "max_steps": None}
FAST = ["--episodes", "4", "--videos", "0", "--processes", "0"]


@pytest.fixture
def run(tmp_path):
    """A run directory with a best and a last checkpoint."""
    save(tmp_path / "run" / "checkpoints" / "last.ckpt", evaluation=SAVED)
    save(tmp_path / "run" / "checkpoints" / "best.ckpt", averaged=True, evaluation=SAVED)
    return tmp_path / "run"


def table(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_run_directory_is_evaluated_as_it_was_in_training(run, capsys):
    assert main([str(run), *FAST]) == 0
    out = capsys.readouterr().out
    said = f"Evaluating {run.resolve()}/checkpoints/best.ckpt (averaged weights, epoch 3) in fake/Reach-v0: 4 episodes, "
    assert said + "seeds 2000000 to 2000003." in out
    assert "far" in out
    assert "95 % interval" in out
    found = table(run / "evaluations" / "best_seed2000000_episodes4")
    assert [row["seed"] for row in found["episodes"]] == [2_000_000 + number for number in range(4)]
    assert {row["task"] for row in found["episodes"]} == {"far"}
    settings = found["settings"]
    assert (settings["environment"], settings["max_steps"], settings["execution_horizon"]) == ("fake/Reach-v0", 9, 2)
    assert settings["weights"] == "ema"
    assert str(run) not in json.dumps(found)
    assert (run / "evaluations" / "best_seed2000000_episodes4" / "evaluation.times.json").is_file()


def test_second_run_is_byte_equal_and_options_override(run, tmp_path):
    texts = []
    for number, more in enumerate((["--num-envs", "1"], ["--num-envs", "4"], ["--execution-horizon", "4"])):
        assert main([str(run), *FAST, "--output", str(tmp_path / str(number)), *more]) == 0
        texts.append((tmp_path / str(number) / "evaluation.json").read_text())
    assert texts[0] == texts[1] != texts[2]
    other = ["--tasks", "near,far", "--env-kwargs", '{"radius": 0.0}', "--weights", "raw", "--max-steps", "5"]
    assert main([str(run), *FAST, "--output", str(tmp_path / "other"), *other]) == 0
    found = table(tmp_path / "other")
    assert set(found["tasks"]) == {"near", "far"}
    assert found["summary"]["successes"] == 0
    assert found["settings"]["environment_arguments"] == {"max_steps": 9, "radius": 0.0}
    assert found["settings"]["max_steps"] == 5
    assert found["settings"]["weights"] == "raw"


def test_ensembling_and_postprocessing_override_and_show(run, tmp_path, capsys):
    def settings(*more):
        assert main([str(run), *FAST, "--output", str(tmp_path / "out"), *more]) == 0
        found = table(tmp_path / "out")["settings"]
        return found["ensembling"], found["execution_horizon"], found["postprocess"]

    assert settings() == (None, 2, [])
    assert settings("--ensembling") == ([0.01, "oldest"], 1, [])
    assert settings("--ensembling", "0.2:newest") == ([0.2, "newest"], 1, [])
    clip = [{"class_path": "Clip", "init_args": {"high": 0.5}}]
    assert settings("--no-ensembling", "--postprocess", json.dumps(clip)) == (None, 2, clip)
    out = capsys.readouterr().out
    assert "Actions are ensembled over time: coefficient 0.2, counted from the newest." in out
    assert "Actions are post-processed: Clip high=0.5." in out
    save(run / "checkpoints" / "best.ckpt", evaluation=SAVED | {"execution_horizon": None, "ensembling": {"coefficient": 0.3}})
    assert settings() == ([0.3, "oldest"], 1, [])
    assert settings("--no-ensembling") == (None, 4, [])
    assert settings("--execution-horizon", "3") == (None, 3, [])
    assert main([str(run), *FAST, "--ensembling", "--execution-horizon", "3"]) == 1
    assert "--ensembling asks at every step" in capsys.readouterr().err
    assert main([str(run), *FAST, "--postprocess", '[{"class_path": "Clap"}]']) == 1
    assert "no class 'Clap'" in capsys.readouterr().err


def test_videos_lie_beside_the_table(run, capsys):
    assert main([str(run / "checkpoints" / "last.ckpt"), "--episodes", "2", "--videos", "1", "--processes", "0"]) == 0
    folder = run / "evaluations" / "last_seed2000000_episodes2"
    (video,) = folder.glob("*.mp4")
    assert f"Video: {video}" in capsys.readouterr().out


def test_seeds_that_were_used_are_refused(run, capsys):
    assert main([str(run), "--seed", "1000000"]) == 1
    assert "seeds that chose the checkpoint during training" in capsys.readouterr().err
    assert main([str(run), "--seed", "5"]) == 1
    assert "seeds that made the demonstrations" in capsys.readouterr().err
    assert not (run / "evaluations").exists()


def test_missing_files_are_answered_with_what_there_is(run, tmp_path, capsys):
    assert find_checkpoint(run) == (run / "checkpoints" / "best.ckpt").resolve()
    (run / "checkpoints" / "best.ckpt").unlink()
    assert find_checkpoint(run).name == "last.ckpt"
    assert main([str(run / "checkpoints" / "first.ckpt"), *FAST]) == 1
    assert "last.ckpt" in capsys.readouterr().err
    assert main([str(run / "nowhere" / "best.ckpt"), *FAST]) == 1
    assert "checkpoints/last.ckpt" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), *FAST]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    (run / "checkpoints" / "bad.ckpt").write_text("no checkpoint")
    assert main([str(run / "checkpoints" / "bad.ckpt"), *FAST]) == 1
    assert "bad.ckpt" in capsys.readouterr().err


def test_environment_must_be_known_and_fit(tmp_path, capsys):
    path = save(tmp_path / "alone.ckpt")
    assert main([str(path), *FAST]) == 1
    assert "Give --env" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reech-v0"]) == 1
    assert "Reech" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reach-v0", "--env-kwargs", '{"shape": [9]}']) == 1
    assert "observation.state: trained on shape" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reach-v0", "--env-kwargs", '{"speed": 9}']) == 1
    assert "cannot be made" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reach-v0", "--tasks", "fly"]) == 1
    assert "cannot begin the task 'fly'" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reach-v0", "--weights", "ema"]) == 1
    assert "no averaged weights" in capsys.readouterr().err
    assert main([str(path), *FAST, "--env", "fake/Reach-v0"]) == 0


def test_arguments_of_another_environment_are_not_taken_over(tmp_path, run):
    save(tmp_path / "a.ckpt", evaluation=SAVED | {"env": "other/Env-v0", "env_kwargs": {"no": 1}})
    assert main([str(tmp_path / "a.ckpt"), *FAST, "--env", "fake/Reach-v0", "--output", str(tmp_path / "out")]) == 0
    assert table(tmp_path / "out")["settings"]["environment_arguments"] == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--episode", "3"],
        ["x", "--env-kwargs", "{"],
        ["x", "--env-kwargs", "3"],
        ["x", "--postprocess", '{"class_path": "Clip"}'],
        ["x", "--ensembling", "0.1:older"],
        ["--ensembling", "x"],
        [],
    ],
)
def test_malformed_command_lines_are_refused(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom lightning_robot.commands.evaluate import parser\n"
        "parser().format_help()\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_evaluation_overwrites_one_of_other_episodes(run):
    choices = ([], ["--tasks", "near"], ["--tasks", "near,far"], ["--max-steps", "5"], ["--env-kwargs", '{"radius": 0.0}'])
    for number, choice in enumerate(choices, start=1):
        assert main([str(run), *FAST, *choice]) == 0
        assert len(list((run / "evaluations").iterdir())) == number
    assert main([str(run), *FAST, *choice]) == 0  # the same again lies in the same place
    assert {path.name for path in (run / "evaluations").iterdir()} >= {
        "best_seed2000000_episodes4",
        "best_near_seed2000000_episodes4",
    }


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (["--processes", "-1"], "--processes must be at least 0, not -1."),
        (["--max-steps", "0"], "--max-steps must be at least 1, not 0."),
        (["--videos", "-2"], "--videos must be at least 0, not -2."),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here: "),
        (["--device", "gpuu"], "--device gpuu cannot be used here: "),
    ],
)
def test_options_that_mean_nothing_are_one_line(option, line, run, capsys):
    assert main([str(run), *FAST, *option]) == 1
    assert capsys.readouterr().err.startswith(f"evaluate: {line}")


def test_a_place_that_cannot_be_written_is_found_before_the_work(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(run), *FAST, "--output", str(tmp_path / "file" / "inside")]) == 1
    streams = capsys.readouterr()
    assert str(tmp_path / "file") in streams.err
    assert "Evaluating" not in streams.out


def test_a_missing_checkpoint_names_the_present_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["nothing.ckpt"]) == 1
    assert f"{tmp_path} holds no checkpoint." in capsys.readouterr().err
