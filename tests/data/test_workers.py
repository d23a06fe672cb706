"""Tasks over processes and the notes about them."""

import operator

import pytest

from lightning_robot.data.workers import append_line, claimed, read_lines, run_tasks


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_is_done_once(processes):
    assert sorted(run_tasks(operator.add, 10, list(range(20)), processes)) == list(range(10, 30))
    assert list(run_tasks(operator.add, 10, [], processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_in_a_task_comes_through(processes):
    with pytest.raises(ZeroDivisionError):
        list(run_tasks(operator.floordiv, 10, [2, 1, 0, 5], processes))


def test_a_line_cut_by_a_kill_costs_nothing_else(tmp_path):
    path = tmp_path / "notes.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": [1, 2')
    append_line(path, {"c": 3})
    assert read_lines(path) == [{"a": 1}, {"c": 3}]


def test_a_claim_ends_with_its_holder(tmp_path):
    with (
        claimed(tmp_path / "work"),
        pytest.raises(RuntimeError, match="Another process is at work"),
        claimed(tmp_path / "work"),
    ):
        pass
    with claimed(tmp_path / "work") as folder:
        assert folder.is_dir()
