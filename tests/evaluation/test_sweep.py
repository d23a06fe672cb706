"""A sweep selects on one set of seeds and reports on another; the whole curve is told."""

import csv
import io
import json
import random

import pytest
from rich.console import Console

from lightning_robot.evaluation.result import EpisodeRecord, EpisodeTimes, EvaluationResult
from lightning_robot.evaluation.sweep import Candidate, Sweep


def result(outcomes, first=1_500_000, **details):
    rows = [
        EpisodeRecord(
            first + number, None, bool(ok), None if ok else "timeout", 10, 0.0, False, f"{number}", 2, 0, dict(details)
        )
        for number, ok in enumerate(outcomes)
    ]
    times = [EpisodeTimes(row.seed, None, 0.1, (3.0, 4.0)) for row in rows]
    return EvaluationResult(rows, {"environment": "e"}, {"checkpoint": f"{first}"}, times=times)


def sweep(*counts, episodes=20, **more):
    found = [
        Candidate(f"epoch{number:04d}.ckpt", 100 * number, number, result([1] * count + [0] * (episodes - count), **more))
        for number, count in enumerate(counts)
    ]
    return Sweep(random.Random(1).sample(found, len(found)))  # whatever the order they come in


def test_order_is_that_of_training_and_the_best_is_selected():
    found = sweep(3, 12, 18, 12, 18, 5)
    assert [one.step for one in found.candidates] == [0, 100, 200, 300, 400, 500]
    assert found.selected.step == 400  # of equals the later one
    unnumbered = Sweep([Candidate("b", None, None, result([1])), Candidate("a", None, None, result([0]))])
    assert [one.name for one in unnumbered.candidates] == ["a", "b"]


def test_published_conventions():
    numbers = sweep(*range(12)).conventions()  # 0 to 11 of 20
    assert numbers == {
        "max": pytest.approx(11 / 20),
        "mean of last 10": pytest.approx(6.5 / 20),
        "mean of five highest": pytest.approx(9 / 20),
    }
    assert sweep(10, 20).conventions()["mean of five highest"] == pytest.approx(0.75)


def test_candidates_that_cannot_be_told_apart_are_counted():
    found = sweep(0, 15, 16, 20)
    # 20 against 16: four episodes decide, p = 0.125; against 15: five, p = 0.0625; against none: established.
    assert [one.step for one in found.indistinguishable()] == [100, 200]
    assert "These seeds do not tell it apart from 2 of the 3 others." in " ".join(found.sentences())


def test_the_report_is_told_apart_from_the_selection():
    found = sweep(5, 20)
    found.report = result([1] * 80 + [0] * 20, first=2_000_000)
    assert found.sentences()[-1] == (
        "To report: epoch0001.ckpt solves 80 of 100 fresh episodes, 80.0 %, 95 % interval 71.1 to 86.7 %."
    )
    values = found.to_dict()
    assert values["selected"] == "epoch0001.ckpt"
    assert values["report"]["success_rate"] == 0.8
    assert values["selection_seeds"] == [1_500_000, 1_500_019]
    assert values["reporting_seeds"] == [2_000_000, 2_000_099]
    assert [one["success_rate"] for one in values["candidates"]] == [0.25, 1.0]


def test_tables_for_people_and_for_machines():
    found = sweep(5, 20, was_lifted=True, was_dropped=False, ik_calls=10, ik_failures=1)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.table())
    text = console.export_text()
    for part in (
        "epoch0000.ckpt",
        "epoch0001.ckpt *",
        "5/20",
        "25.0 %",
        "11.2 to 46.9 %",
        "timeout 15",
        "picked",
        "IK failures",
    ):
        assert part in text
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["successes"] for row in rows] == ["5", "20"]
    assert rows[0]["failures_timeout"] == "15"
    assert rows[0]["ik_failure_rate"] == "0.1"
    assert float(rows[0]["inference_ms_p50"]) == 4.0


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("counts", [(3, 12, 18), (7,)])
def test_files_and_picture(tmp_path, counts, numbered):
    found = sweep(*counts)
    if not numbered:
        for one in found.candidates:
            one.step = None
    found.report = result([1] * 8 + [0] * 2, first=2_000_000)
    names = [path.name for path in found.save(tmp_path)]
    assert names == ["sweep.json", "sweep.csv", "sweep.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert json.loads((tmp_path / "sweep.json").read_text())["format"] == 1
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert found.to_dict() == json.loads((tmp_path / "sweep.json").read_text())
