"""Intervals against published values; a table that says what happened."""

import json
import math

import pytest

from lightning_robot.evaluation.result import EpisodeRecord, EpisodeTimes, EvaluationResult, wilson


def record(seed, success=True, task="near", failure=None, **more):
    values = {
        "steps": 10,
        "total_reward": -1.5,
        "success_at_reset": False,
        "start_state": f"{seed:x}",
        "queries": 3,
        "steps_out_of_bounds": 0,
    }
    return EpisodeRecord(seed=seed, task=task, success=success, failure=failure, **(values | more))


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (0, 1, 0, 0.793451),
        (0, 10, 0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1),
        (22, 30, 0.555520, 0.858173),
        (45, 50, 0.786398, 0.956524),
        (90, 100, 0.825634, 0.944771),
        (194, 200, 0.936106, 0.986180),
    ],
)
def test_wilson_interval(successes, episodes, low, high):
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=5e-7)


def test_wilson_interval_at_other_confidence_and_its_ends():
    assert wilson(22, 30, 0.90) == pytest.approx((0.585385, 0.842677), abs=5e-7)
    assert wilson(22, 30, 0.99) == pytest.approx((0.498195, 0.883954), abs=5e-7)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="impossible"):
        wilson(3, 2)


def test_rows_are_sorted_and_counted():
    rows = [
        record(3, False, "far", "timeout"),
        record(1),
        record(2, False, "far", "error: ValueError: no"),
        record(0, False, failure="solved_at_reset", success_at_reset=True),
        record(5),
        record(4, False, "far", "timeout"),
    ]
    result = EvaluationResult(rows)
    assert [row.seed for row in result.records] == [0, 1, 2, 3, 4, 5]
    assert (result.successes, result.episodes, result.success_rate) == (2, 5, 0.4)
    assert result.failures() == {"timeout": 2, "error": 1}
    assert {task: part.success_rate for task, part in result.by_task().items()} == {"far": 0.0, "near": 1.0}
    summary = result.summary()
    assert summary["successes_true_at_reset"] == 1
    assert summary["errors"] == 1
    assert (summary["distinct_start_states"], summary["played"], summary["episodes"]) == (6, 6, 5)
    assert summary["interval_method"] == "Wilson score"
    warnings = " ".join(result.warnings())
    assert "seeds 0" in warnings
    assert "Seed 2 (far) ended by error: ValueError: no" in warnings


def test_repeated_start_states_and_out_of_bounds_actions_are_said():
    rows = [record(seed, start_state="same", steps_out_of_bounds=9) for seed in range(3)]
    result = EvaluationResult(rows, {"start_states_told_by": "first observation"})
    warnings = " ".join(result.warnings())
    assert "Only 1 distinct start state in 3 episodes, told apart by first observation: repetitions" in warnings
    assert "90 % of the steps" in warnings


def test_json_is_stable_and_comes_back(tmp_path):
    rows = [record(seed, seed % 2 == 0, failure=None if seed % 2 == 0 else "timeout") for seed in range(4)]
    times = [EpisodeTimes(seed, "near", 0.5, (1.0, 2.0)) for seed in range(4)]
    first = EvaluationResult(rows, {"threads": 1}, {"simulator": "x"}, ["a note"], times, 1.0, 2)
    second = EvaluationResult(rows[::-1], {"threads": 1}, {"simulator": "x"}, ["a note"], [], 7.0, 0)
    assert first.to_json() == second.to_json()
    path = first.save(tmp_path / "evaluation.json")
    back = EvaluationResult.from_json(path.read_text())
    assert back.to_json() == first.to_json()
    values = json.loads(path.read_text())
    assert values["summary"]["interval_95"] == list(wilson(2, 4))
    assert len(values["episodes"]) == 4
    assert "seconds" not in path.read_text()
    measured = json.loads((tmp_path / "evaluation.times.json").read_text())
    assert measured["inference_ms"]["count"] == 8
    assert measured["processes"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_shares_of_ranks_make_one_table():
    rows = [record(seed) for seed in range(5)]
    whole = EvaluationResult(rows, {"threads": 1}, {"simulator": "x"})
    parts = [EvaluationResult(rows[rank::2], {"threads": 1}, {"simulator": "x"}) for rank in range(2)]
    assert EvaluationResult.merge([EvaluationResult([]), *parts]).to_json() == whole.to_json()


def test_nothing_evaluated_is_no_number():
    empty = EvaluationResult([])
    assert math.isnan(empty.success_rate)
    assert empty.interval() == (0.0, 1.0)
    assert json.loads(empty.to_json())["summary"]["success_rate"] is None


def test_table_shows_tasks_and_the_interval():
    from rich.console import Console

    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(EvaluationResult([record(0), record(1, False, "far", "timeout")]).table("title"))
    text = console.export_text()
    for part in ("title", "near", "far", "1/2", "50.0 %", "9.5 to 90.5 %", "timeout 1"):
        assert part in text


def test_wilson_interval_against_reference_values(shared):
    for case in json.loads((shared / "golden" / "statistics.json").read_text())["intervals"]:
        assert wilson(case["k"], case["n"], case["confidence"]) == pytest.approx(case["wilson"], abs=1e-12)


def test_tables_of_the_first_format_are_read_without_their_successes_at_reset():
    old = json.loads(EvaluationResult([record(0), record(1, success_at_reset=True)]).to_json()) | {"format": 1}
    del old["unchecked"]
    back = EvaluationResult.from_json(json.dumps(old))
    assert (back.successes, back.episodes, back.records[1].failure) == (1, 1, "solved_at_reset")
    with pytest.raises(ValueError, match="no evaluation of format 2"):
        EvaluationResult.from_json(json.dumps(old | {"format": 3}))
