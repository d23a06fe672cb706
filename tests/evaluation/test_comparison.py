"""Tests and intervals against reference values; a comparison says plainly what is established."""

import json

import pytest
from rich.console import Console

from lightning_robot.evaluation.comparison import (
    NotComparable,
    NotPaired,
    compare,
    compare_unpaired,
    fisher,
    holm,
    mcnemar,
    newcombe,
    newcombe_paired,
)
from lightning_robot.evaluation.result import EpisodeRecord, EvaluationResult


def result(outcomes, first=2_000_000, task=None, **settings):
    rows = [
        EpisodeRecord(first + number, task, bool(solved), None if solved else "timeout", 9, 0.0, False, f"{number:x}", 3, 0)
        for number, solved in enumerate(outcomes)
    ]
    return EvaluationResult(rows, {"environment": "fake/Reach-v0", **settings}, {"simulator": "fake 1", "checkpoint": "0"})


@pytest.mark.parametrize(
    ("only_a", "only_b", "exact", "mid"),
    [
        (0, 0, 1, 1),
        (0, 5, 0.0625, 0.03125),
        (0, 6, 0.03125, 0.015625),
        (2, 10, 0.038574, 0.022461),
        (5, 5, 1, 0.753906),
        (25, 12, 0.047031, 0.033552),
    ],
)
def test_mcnemar(only_a, only_b, exact, mid):
    assert mcnemar(only_a, only_b) == pytest.approx((exact, mid), abs=5e-7)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_tests_and_intervals_against_reference_values(shared):
    golden = json.loads((shared / "golden" / "statistics.json").read_text())
    for case in golden["mcnemar"]:
        assert mcnemar(case["b"], case["c"]) == pytest.approx((case["p_exact"], case["p_mid"]), abs=1e-12)
    for case in golden["difference_unpaired"]:
        counts = (case["k1"], case["n1"], case["k2"], case["n2"])
        assert fisher(*counts) == pytest.approx(case["fisher_p"], abs=1e-12)
        assert newcombe(*counts) == pytest.approx(case["newcombe95"], abs=1e-12)
    for case in golden["mcnemar_sequences"]:
        found = compare(result(case["a"]), result(case["b"]))
        assert (found.counts["only_a"], found.counts["only_b"]) == (case["only_a"], case["only_b"])
        assert found.p == pytest.approx(case["p_exact"], abs=1e-12)


def test_thousands_of_episodes_lose_no_digit():
    assert mcnemar(2000, 2000)[0] == 1
    assert mcnemar(1900, 2100)[0] == pytest.approx(0.001652, abs=1e-5)  # the normal distribution, corrected for continuity


def test_paired_interval():
    assert newcombe_paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)  # Newcombe 1998, his example
    low, high = newcombe_paired(30, 0, 0, 0)
    assert low < 0 < high  # no episode decides, and yet the difference is not known to be nothing
    assert newcombe_paired(5, 9, 1, 5) == pytest.approx([-end for end in reversed(newcombe_paired(5, 1, 9, 5))])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_established_and_not():
    better = compare(result([1] * 10), result([0] * 6 + [1] * 4), ("new", "old"))
    assert better.established
    assert better.sentence.startswith("Established: new solves more than old (McNemar's exact test: p = 0.031; 6 of 10 ")
    assert better.difference_sentence.startswith("Difference new - old: +60.0 points, 95 % interval +")
    worse = compare(result([0] * 6 + [1] * 4), result([1] * 10), ("new", "old"))
    assert worse.sentence.startswith("Established: old solves more than new")
    unsure = compare(result([1] * 10), result([0] * 5 + [1] * 5), ("new", "old"))
    assert not unsure.established
    assert "Not established: these episodes do not tell new and old apart" in unsure.sentence
    assert "5 of 10 episodes decide, 5 solved by new alone and 0 by old alone" in unsure.sentence
    better.p_adjusted = 0.06
    assert not better.established
    assert "0.060 adjusted for the number of comparisons (Holm)" in better.sentence
    assert json.loads(json.dumps(better.to_dict()))["counts"] == {"both": 4, "only_a": 6, "only_b": 0, "neither": 0}


def test_the_table_shows_both_intervals():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(compare(result([1] * 22 + [0] * 8), result([1] * 19 + [0] * 11), ("joints", "poses")).table())
    text = console.export_text()
    for part in ("joints", "22/30", "73.3 %", "55.6 to 85.8 %", "poses", "19/30", "45.5 to 78.1 %"):
        assert part in text


def test_other_episodes_are_never_paired():
    with pytest.raises(NotPaired, match=r"seeds 2000000 to 2000009.*seeds 2000005 to 2000014.*5 episodes in common"):
        compare(result([1] * 10), result([1] * 10, first=2_000_005))
    with pytest.raises(NotPaired, match="0 episodes in common"):
        compare(result([1] * 10, task="near"), result([1] * 10, task="far"))
    with pytest.raises(NotPaired, match="judged in fake/Reach-v0, B in other"):
        compare(result([1] * 10), result([1] * 10, environment="other"))
    with pytest.raises(ValueError, match="holds no episode"):
        compare(result([]), result([]))


def test_unpaired_comparison_of_a_published_table():
    found = compare_unpaired(result([1] * 22 + [0] * 8), result([1] * 19 + [0] * 11, first=3_000_000), ("joints", "poses"))
    assert found.p == pytest.approx(0.58, abs=5e-3)
    assert found.interval == pytest.approx((-0.13, 0.32), abs=5e-3)
    assert found.sentence == (
        "Not established: these episodes do not tell joints and poses apart (Fisher's exact test: p = 0.580)."
    )
    assert found.counts is None
    again = compare_unpaired(result([1] * 4), result([1] * 4))
    assert "4 episodes in common are counted as if they were different ones." in again.notes


def test_what_else_differs_is_named():
    a = result([1, 0], versions={"mujoco": "3.3.0"}, max_steps=300, environment_arguments={"actions": "joints"})
    b = result([1, 0], versions={"mujoco": "3.4.0"}, max_steps=200, environment_arguments={"actions": "end_effector"})
    b.fingerprints |= {"renderer": "opengl", "checkpoint": "1"}
    a.fingerprints |= {"renderer": "rays"}
    with pytest.raises(NotComparable, match=r"mujoco 3.3.0 and 3.4.0; renderer rays and opengl.*with --across"):
        compare(a, b)
    with pytest.raises(NotComparable, match="in different worlds"):
        compare_unpaired(a, b)
    assert compare_unpaired(a, b, across=True).notes[0] == "Renderer: A rays, B opengl."
    notes = compare(a, b, across=True).notes
    for part in (
        "Renderer: A rays, B opengl.",
        "Version of mujoco: A 3.3.0, B 3.4.0.",
        "Max steps: A 300, B 200.",
        "Environment arguments: A {'actions': 'joints'}, B {'actions': 'end_effector'}.",
    ):
        assert part in notes
    assert len(notes) == 4
    assert compare(a, a).notes == ["A and B have the same weights."]
