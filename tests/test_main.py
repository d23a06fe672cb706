"""The command table: quick, true, and helpful about a wrong word."""

import subprocess
import sys
from importlib import import_module

import pytest

from lightning_robot.__main__ import COMMANDS, TRAINER_COMMANDS, help_text, main


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_needs_no_torch(arguments):
    code = "import sys; from lightning_robot.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == help_text()


def test_the_table_is_true():
    from lightning_robot.cli import CommandLine

    assert list(CommandLine.subcommands()) == list(TRAINER_COMMANDS)
    for verb in COMMANDS:
        assert callable(import_module(f"lightning_robot.commands.{verb}").main)
    for verb in (*TRAINER_COMMANDS, *COMMANDS):
        assert f"\n  {verb} " in help_text()


def test_commands_get_their_arguments_and_their_exit_code_is_passed_on(monkeypatch):
    from lightning_robot.commands import convert

    monkeypatch.setattr(convert, "main", lambda argv: {"calvin": 7}[argv[0]])
    assert main(["convert", "calvin"]) == 7


def test_a_wrong_command_names_the_nearest(capsys):
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == "error: no command 'fitt'; did you mean 'fit'?\n"
    assert main(["dance"]) == 2
    assert "there are fit, validate" in capsys.readouterr().err


def test_version(capsys):
    import lightning_robot

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == lightning_robot.__version__
