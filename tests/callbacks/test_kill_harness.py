"""Runs killed again and again end as runs that nothing disturbs, bit for bit: `benchmarks/kill_harness.py`, a short version."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import kill_harness
from kill_harness import Aim, Attempt, Different, Kind, Lineage

ALONE, TOGETHER = Kind(1, 0, False, epochs=2), Kind(2, 0, False, epochs=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of the runs to compare with; one serves several tests."""
    kill_harness.preload()
    return tmp_path_factory.mktemp("undisturbed")


def _killed_equals_undisturbed(kind: Kind, folder: Path, undisturbed: Path, aims: list[Aim], command_line: bool) -> list[str]:
    expected, _, configuration = kill_harness.uninterrupted(kind, undisturbed)
    lineage = Lineage(1, kind, folder, configuration, command_line)
    run = lineage.run(aims)
    found = json.loads(json.dumps(kill_harness.traces(run, kind.ranks)))
    kill_harness.require_equal(found, expected)
    assert len(lineage.lines) == len(aims)
    assert len(found["losses of rank 0"]) == 20 * kind.epochs
    assert {"last.ckpt: state_dict", "last.ckpt: ema_state_dict", "last.ckpt: optimizer_states"} < found.keys()
    return lineage.lines


def test_a_run_killed_at_a_checkpoint_and_in_simulation_ends_as_if_it_had_not_been(tmp_path, undisturbed):
    aims = [Aim("writing", 4, 0.003, None), Aim("evaluation", 1, 0.01, None), Aim("training", 5, 0.01, None)]
    _killed_equals_undisturbed(ALONE, tmp_path, undisturbed, aims, command_line=False)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_the_run_goes_on_with_both(tmp_path, undisturbed):
    aims = [Aim("writing", 3, 0.002, 0)]
    (line,) = _killed_equals_undisturbed(TOGETHER, tmp_path, undisturbed, aims, command_line=False)
    assert "the other process ended" in line


@pytest.mark.slow
def test_five_kills_of_the_real_command_line_change_nothing(tmp_path, undisturbed):
    aims = [
        Aim("training", 1, 0.0, None),  # mostly before the first checkpoint: a refusal to resume, and a fresh start
        Aim("writing", 3, 0.004, None),
        Aim("writing", 5, 0.001, None),
        Aim("validation", 1, 0.005, None),
        Aim("training", 4, 0.01, None),
    ]
    _killed_equals_undisturbed(ALONE, tmp_path, undisturbed, aims, command_line=True)


def test_a_difference_is_noticed(tmp_path, undisturbed):
    """Another learning rate makes other losses: equality says something."""
    expected, _, configuration = kill_harness.uninterrupted(ALONE, undisturbed)
    changed = tmp_path / "changed.yaml"
    changed.write_text(configuration.read_text().replace("learning_rate: 0.001", "learning_rate: 0.0010001"))
    run = Lineage(1, ALONE, tmp_path / "changed", changed, command_line=False).run([])
    with pytest.raises(Different):
        kill_harness.require_equal(json.loads(json.dumps(kill_harness.traces(run, 1))), expected)


def test_what_hangs_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    def hang(_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.fork()
        time.sleep(100)

    monkeypatch.setattr("lightning_robot.__main__.main", hang)
    monkeypatch.setattr(kill_harness, "LIMIT", 1.0)
    with Attempt(Kind(2, 0, False), [], tmp_path) as attempt, pytest.raises(Different, match="still running after 1 s"):
        attempt.finish()
    assert list(attempt.codes.values()) == [-9, -9]
    assert not kill_harness.group_runs(attempt.ids[0])
