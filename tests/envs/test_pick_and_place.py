"""Outcomes, milestones and rates of pick-and-place episodes, from made-up trajectories and published tables."""

import dataclasses
import math

import numpy as np
import pytest

from lightning_robot.envs.pick_and_place import MILESTONES, OUTCOMES, Bounds, Progress, Sight, conditional_rates, rates

BOUNDS = Bounds(rest_height=0.014, goal_radius=0.055, goal_height=0.028)
START, GOAL = np.array([0.22, 0.08, 0.014]), np.array([0.21, -0.13])


def sight(x=0.22, y=0.08, z=0.014, held=False, **others):
    block = np.array([x, y, z])
    values = {"speed": 0.0, "goal": GOAL, "tool": block[:2], "fixed_jaw": held, "moving_jaw": held, "closing": held}
    return Sight(block, **{**values, **others})


def watch(*sights, bounds=BOUNDS):
    progress = Progress(bounds, START)
    for one in sights:
        progress.see(one)
    return progress


LIFT = [sight(held=True), sight(z=0.04, held=True), sight(z=0.08, held=True)]
CARRY = [*LIFT, sight(y=0.0, z=0.09, held=True), sight(0.21, -0.13, 0.09, held=True)]
IN_BOWL = sight(0.22, -0.12)


def test_success_asks_for_release_and_rest():
    assert watch(*CARRY, *[IN_BOWL] * 4).outcome == "missed_goal"  # not yet at rest for long enough
    progress = watch(*CARRY, *[IN_BOWL] * 5)
    assert (progress.outcome, progress.detail) == ("success", None)
    assert watch(*CARRY, *[sight(0.21, -0.13, held=True)] * 20).outcome == "timeout"  # never let go
    assert watch(*CARRY, *[sight(0.21, -0.13, speed=0.2)] * 20).outcome != "success"  # still moving
    interrupted = [IN_BOWL] * 4 + [sight(0.22, -0.12, fixed_jaw=True)]
    assert not watch(*CARRY, *interrupted * 5).solved


def test_success_without_strict_and_loose_success():
    loose = dataclasses.replace(BOUNDS, strict=False)
    assert watch(*CARRY, sight(0.21, -0.13, 0.02, held=True), bounds=loose).outcome == "success"
    progress = watch(*CARRY, sight(0.21, -0.13, 0.02, held=True))
    assert progress.success_loose
    assert not progress.solved


def test_no_success_without_a_lift():
    """A block that lies in the goal from the start."""
    progress = watch(*[sight(*GOAL)] * 30)
    assert progress.success_loose
    assert progress.outcome == "never_picked_up"
    assert watch(*[sight(*GOAL)] * 30, bounds=dataclasses.replace(BOUNDS, strict=False)).outcome == "never_picked_up"


def test_success_stays():
    progress = watch(*CARRY, *[IN_BOWL] * 5, sight(0.5, 0.5, 0.014), sight(broken=True))
    assert progress.outcome == "success"
    assert progress.detail is None


def test_on_the_rim_is_not_inside():
    assert watch(*CARRY, *[sight(0.21 + 0.043, -0.13, 0.02)] * 9).solved
    assert not watch(*CARRY, *[sight(0.21 + 0.046, -0.13, 0.02)] * 9).solved
    assert not watch(*CARRY, *[sight(0.21, -0.13, 0.035)] * 9).solved


@pytest.mark.parametrize(
    ("sights", "detail"),
    [
        ([sight(tool=np.array([0.1, 0.0]))] * 9, "never_reached"),
        ([sight()] * 9, "never_closed"),
        ([sight(closing=True)] * 9, "grasp_failed"),
        ([sight(held=True), sight(z=0.05, held=True), sight()], "grasp_failed"),
        ([sight(), sight(y=0.14), sight(y=0.14, held=True)], "knocked_away"),
    ],
)
def test_never_picked_up(sights, detail):
    progress = watch(*sights)
    assert (progress.outcome, progress.detail) == ("never_picked_up", detail)


def test_drops():
    far = [sight(y=0.05, z=0.08, held=True), sight(y=0.05, z=0.07), sight(y=0.04)]
    assert watch(*LIFT, *far).outcome == "dropped_during_transport"
    near = [sight(0.21, -0.06, 0.08, held=True), sight(0.21, -0.06, 0.07), sight(0.21, -0.05)]
    assert watch(*LIFT, *near).outcome == "missed_goal"
    assert not watch(*LIFT, *near).details()["released"]
    assert watch(*LIFT, *far[:2]).outcome == "timeout"  # still falling
    assert watch(*LIFT, *far, sight(y=0.04, fixed_jaw=True)).outcome == "dropped_during_transport"  # pushed about later
    again = [sight(y=0.04, held=True), sight(y=0.04, z=0.08, held=True)]
    assert watch(*LIFT, *far, *again).outcome == "timeout"  # picked up once more and held
    assert watch(*LIFT, *far, *again, *CARRY, *[IN_BOWL] * 5).outcome == "success"


def test_put_down_elsewhere_is_no_drop_in_transport():
    progress = watch(*LIFT, sight(y=0.2, z=0.02, held=True), sight(y=0.2), sight(y=0.2))
    assert progress.outcome == "missed_goal"
    assert progress.details()["released"]


def test_held_until_the_end():
    assert watch(*CARRY).outcome == "timeout"


@pytest.mark.parametrize("broken", [sight(broken=True), sight(x=math.nan), sight(x=0.9), sight(z=-0.5)])
def test_out_of_limits(broken):
    progress = watch(*LIFT, broken)
    assert (progress.outcome, progress.detail) == ("timeout", "out_of_limits")
    assert np.isfinite(progress.details()["final_height"])


def test_milestones_have_the_step_they_were_first_met():
    details = watch(sight(tool=np.zeros(2)), sight(), *CARRY, *[IN_BOWL] * 6).details()
    steps = {name: details[f"step_{name}"] for name in MILESTONES}
    assert steps == {"reached": 2, "grasped": 3, "lifted": 5, "near_goal": 7, "released": 8, "success": 12}
    assert details["max_height"] == 0.09
    assert details["final_distance"] == pytest.approx(math.hypot(0.01, 0.01))
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in details.values())


def test_thresholds_scale_with_the_block():
    assert BOUNDS.lift == pytest.approx(0.054)
    assert Bounds(0.0096, 0.06, 0.03).lift == pytest.approx(0.05, abs=5e-4)  # the published block and threshold
    assert Bounds(0.0096, 0.06, 0.03).drop == pytest.approx(0.03, abs=5e-4)
    assert Bounds(0.0096, 0.06, 0.03).near_radius == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("counts", "success", "pick", "drop"),
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
def test_rates_of_published_tables(counts, success, pick, drop):
    outcomes = [name for name, count in counts.items() for _ in range(count)]
    found = rates(outcomes)
    assert 100 * found["success_rate"] == pytest.approx(success, abs=0.05)
    assert 100 * found["pick_rate"] == pytest.approx(pick, abs=0.05)
    assert 100 * found["drop_rate"] == pytest.approx(drop, abs=0.05)


def test_rates_of_nothing_and_of_unknown_outcomes():
    assert all(math.isnan(value) for value in rates([]).values())
    assert math.isnan(rates(["never_picked_up"])["drop_rate"])
    assert rates(["timeout"], lifted=0)["pick_rate"] == 0
    with pytest.raises(ValueError, match="No outcome lost; there are success"):
        rates(["lost"])
    assert set(rates(OUTCOMES)) == {"success_rate", "pick_rate", "drop_rate"}


def test_conditional_rates():
    episodes = [watch(*CARRY, *[IN_BOWL] * 5).details(), watch(*LIFT).details(), watch(sight(held=True)).details()]
    found = conditional_rates(episodes)
    assert found["grasped"] == 1
    assert found["lifted"] == pytest.approx(2 / 3)
    assert found["near_goal"] == 0.5
    assert found["success"] == 1
