"""What the probe says of environments that repeat themselves only nearly, or cannot be probed."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lightning_robot.evaluation.probe import PROBE_SEED
from lightning_robot.evaluation.rollout import REPORTING_SEEDS, plan_episodes, rollout
from lightning_robot.transforms.picture_summary import picture_grid, summarize_pictures

sys.path.insert(0, str(Path(__file__).parent))
from fake_reach import Reach, TinyPolicy

PLAN = plan_episodes(2, REPORTING_SEEDS)


class Drifting(Reach):
    """Every reset is a little off."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.place += 1e-6 * self.episodes
        return self.observe(), self.info()


def test_a_start_state_that_nearly_repeats_is_named():
    (note,) = rollout(TinyPolicy(), Drifting, PLAN, progress=False).notes
    assert note.startswith("reset(seed) repeats a start state only nearly (observation.state differs by up to ")


def test_an_environment_that_cannot_be_probed_is_judged_all_the_same():
    result = rollout(TinyPolicy(), partial(Reach, raise_at=(PROBE_SEED,)), PLAN, progress=False)
    assert result.notes == [
        f"One environment could not be probed (ValueError: seed {PROBE_SEED} cannot be simulated): whether it resets and looks "
        "as in training is not known."
    ]
    assert (result.episodes, result.errors) == (2, [])


def test_grid_tells_where_colours_are():
    pictures = np.zeros((2, 10, 9, 3), np.uint8)
    pictures[:, :2, :2, 1] = 255  # the first cell, whole
    pictures[1, 8:, 7:, 0] = 255  # much of the last one
    grid = picture_grid(pictures)
    assert grid.shape == (2, 48)
    assert grid[0].nonzero()[0].tolist() == [1]
    assert grid[1, 1] == 1
    assert 0.4 < grid[1, -3] < 1
    summary = summarize_pictures(pictures)
    assert (summary["mean"][1], summary["std"][1], summary["pictures"]) == (1, 0, 2)
    assert picture_grid(np.full((1, 2, 3), 1.5, np.float32)) == pytest.approx(np.full((1, 16), 1.5))  # depth, tiny
