"""Rates beyond success: the published tables of a pick-and-place log, inverse kinematics, milestones."""

import json

import numpy as np
import pytest
from rich.console import Console

from lightning_robot.evaluation import outcomes
from lightning_robot.evaluation.result import EpisodeRecord, EvaluationResult

FLAGS = {
    "success": (True, False),
    "never_picked_up": (False, False),
    "dropped_during_transport": (True, True),
    "missed_goal": (True, True),
    "timeout": (True, False),
}


def record(seed, outcome, **details):
    success = outcome == "success"
    return EpisodeRecord(
        seed, "pick_and_place", success, None if success else outcome, 100, 0.0, False, f"{seed:x}", 3, 0, details
    )


def table(**counts):
    names = [name for name, count in counts.items() for _ in range(count)]
    rows = [
        record(seed, name, was_lifted=FLAGS[name][0], was_dropped=FLAGS[name][1], max_height=0.1 * seed)
        for seed, name in enumerate(names)
    ]
    return EvaluationResult(rows)


@pytest.mark.parametrize(
    ("counts", "success", "picked", "dropped"),
    [
        ({"success": 22, "never_picked_up": 2, "dropped_during_transport": 6}, 73.3, 93.3, 21.4),
        (
            {"success": 19, "never_picked_up": 7, "dropped_during_transport": 2, "missed_goal": 1, "timeout": 1},
            63.3,
            76.7,
            13.0,
        ),
    ],
)
def test_rates_of_published_tables(counts, success, picked, dropped):
    summary = table(**counts).summary()
    for name, percent in (("success_rate", success), ("pick_rate", picked), ("drop_rate", dropped)):
        assert 100 * summary[name] == pytest.approx(percent, abs=0.05), name
    assert summary["failures"] == {name: count for name, count in counts.items() if name != "success"}


def test_tables_show_the_rates_and_the_seeds_to_look_at():
    result = table(success=22, never_picked_up=2, dropped_during_transport=6)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    console.print(result.outcome_table())
    text = console.export_text()
    for part in ("picked", "93.3 %", "dropped", "21.4 %", "dropped_during_transport", "20.0 %", "22, 23", "24, 25, 26 …"):
        assert part in text


def test_a_success_counts_as_lifted_and_a_crash_as_not():
    rows = [record(0, "success"), record(1, "error: ValueError: no"), record(2, "never_picked_up", was_lifted=False)]
    assert outcomes.pick_rate(rows) == pytest.approx(1 / 3)
    rows.append(record(3, "timeout"))  # cut off before the environment said
    assert outcomes.pick_rate(rows) is None
    assert outcomes.drop_rate(rows) is None
    assert outcomes.pick_rate([record(0, "success")]) is None  # an environment that says nothing of lifting
    assert outcomes.drop_rate([record(0, "never_picked_up", was_lifted=False)]) is None


def test_inverse_kinematics_is_weighed_by_calls():
    rows = [
        record(0, "success", ik_calls=100, ik_failures=1, ik_error_mean_mm=1.0, ik_error_max_mm=4.0),
        record(1, "timeout", ik_calls=300, ik_failures=19, ik_error_mean_mm=5.0, ik_error_max_mm=90.0),
        record(2, "error: no"),
    ]
    summary = EvaluationResult(rows).summary()
    assert (summary["ik_failure_rate"], summary["ik_error_mean_mm"], summary["ik_error_max_mm"]) == (0.05, 4.0, 90.0)
    assert outcomes.columns(rows) == {"IK failures": "5.0 %", "IK error": "4.0 mm"}
    assert outcomes.inverse_kinematics([record(0, "success", ik_calls=0)]) is None


def test_milestones_details_and_means():
    rows = [
        record(0, "success", step_reached=3, step_lifted=9, success_loose=True, final_distance=0.01, detail=None),
        record(1, "never_picked_up", step_reached=4, step_lifted=None, success_loose=False, detail="grasp_failed"),
        record(2, "never_picked_up", step_reached=None, step_lifted=None, success_loose=False, detail="never_reached"),
        record(3, "never_picked_up", step_reached=8, step_lifted=None, success_loose=True, detail="grasp_failed"),
    ]
    summary = EvaluationResult(rows).summary()
    assert summary["milestones"] == {"reached": 3, "lifted": 1}
    assert outcomes.milestone_sentence(rows) == "Of 4 episodes: reached 3 (75 %), lifted 1 (33 %)."
    assert outcomes.milestone_sentence([record(0, "success")]) is None
    assert summary["failure_details"] == {"never_picked_up": {"grasp_failed": 2, "never_reached": 1}}
    assert summary["details"] == {"success_loose": 0.5, "final_distance": 0.01}


def test_details_are_plain_and_come_back(tmp_path):
    details = outcomes.plain_details({"a": np.float32(0.5), "b": np.bool_(True), "c": float("nan"), "d": None, "e": "x"})
    assert details == {"a": 0.5, "b": True, "c": None, "d": None, "e": "x"}
    assert outcomes.plain_details(None) == {}
    with pytest.raises(TypeError, match=r"info\['details'\]\['a'\] is a ndarray"):
        outcomes.plain_details({"a": np.zeros(3)})
    result = EvaluationResult([record(0, "timeout", **details)])
    assert EvaluationResult.from_json(result.to_json()).records == result.records
    values = json.loads(result.to_json())
    del values["episodes"][0]["details"]  # a table of an earlier version
    assert EvaluationResult.from_json(json.dumps(values)).records[0].details == {}
