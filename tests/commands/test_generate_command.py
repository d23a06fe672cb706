"""The ``generate`` command: its options and what it says when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_robot.commands.generate import environment_arguments, main, parser

FAKE = Path(__file__).parents[1] / "generation"


def test_a_store_is_written_and_found_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FAKE))
    command = [str(tmp_path / "reach.zarr"), "--env", "fake_expert_env:Reach-v0", "--episodes-per-task", "2"]
    command += ["--tasks", "right", "--processes", "1", "--env-kwargs", '{"size": 5}']
    assert main(command) == 0
    assert (tmp_path / "reach.zarr" / "zarr.json").exists()
    assert main(command) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*command, "--seed", "7"]) == 1
    assert "seed 0 there, 7 asked for" in capsys.readouterr().err


def test_options_become_arguments_of_the_environment():
    assert environment_arguments(parser().parse_args(["x.zarr"])) == {}
    command = ["x.zarr", "--scene", "A", "--points", "512", "--colors", "--observations", "state,point_cloud"]
    command += ["--camera-size", "64", "--actions", "absolute", "--env-kwargs", '{"max_steps": 90}']
    assert environment_arguments(parser().parse_args(command)) == {
        "scene": "A",
        "cloud": {"points": 512, "colors": True},
        "observations": ("state", "point_cloud"),
        "camera_sizes": 64,
        "actions": "absolute",
        "max_steps": 90,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.zarr", "--episodes", "3"], "unrecognized arguments: --episodes"),
        (["x.zarr", "--env-kwargs", "[1]"], "a JSON object is wanted"),
        ([], "STORE"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "nowhere/Thing-v0"], "nowhere"),
        (["--env", "lightning_robot/PlayTabel-v0"], "Did you mean"),
        (["--env", "CartPole-v1"], "has no scripted expert"),
        (["--scene", "Z"], "'Z' is not among A, B, C, D"),
        (["--env-kwargs", '{"colour": 1}'], "unexpected keyword argument 'colour'"),
        (["--processes", "-1"], "must be at least 1"),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(arguments, message, tmp_path, capsys):
    assert main([str(tmp_path / "x.zarr"), *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("generate: ")
    assert not list(tmp_path.iterdir())


def test_help_needs_no_torch():
    program = (
        "import sys; from lightning_robot.commands.generate import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'mujoco', 'zarr', 'numpy'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "Run the same command again to continue" in output
