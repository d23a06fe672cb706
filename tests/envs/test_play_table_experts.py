"""The scripted experts solve their tasks, in every scene, also when they are disturbed."""

import numpy as np
import pytest

from lightning_robot.envs.calvin_tasks import BLOCK_FREE_TASKS
from lightning_robot.envs.play_table import PlayTable


def solve(table: PlayTable, seed: int, noise: float = 0.0) -> tuple[bool, int]:
    random = np.random.default_rng(seed)
    observation, _ = table.reset(seed=seed)
    expert, steps, done = table.expert(random), 0, False
    while not done:
        action = expert.act()
        assert np.abs(action).max() <= 1
        if noise:
            action[:6] = np.clip(action[:6] + noise * random.normal(size=6), -1, 1)
        observation, _, success, truncated, _ = table.step(action)
        if not noise:
            assert observation["observation.state"][3] > 2.9  # the roll never flips its sign
        steps, done = steps + 1, success or truncated
    return success, steps


@pytest.mark.parametrize("task", BLOCK_FREE_TASKS)
def test_solves_a_hundred_starts(task):
    table = PlayTable(task=task, observations=("state",))
    results = [solve(table, seed) for seed in range(100)]
    assert sum(success for success, _ in results) >= 99
    assert np.mean([steps for _, steps in results]) < 40


@pytest.mark.parametrize("scene", ["A", "B", "C"])
@pytest.mark.parametrize("task", BLOCK_FREE_TASKS)
def test_solves_other_scenes(task, scene):
    table = PlayTable(scene=scene, task=task, observations=("state",))
    assert all(solve(table, seed)[0] for seed in range(8))


@pytest.mark.parametrize("task", BLOCK_FREE_TASKS)
def test_finds_its_way_back(task):
    table = PlayTable(task=task, observations=("state",))
    assert sum(solve(table, seed, noise=0.7)[0] for seed in range(10)) >= 9


def test_refuses_what_it_cannot_do():
    table = PlayTable(task="lift_red_block_table", observations=("state",))
    table.reset(seed=0)
    with pytest.raises(ValueError, match="No expert for 'lift_red_block_table'"):
        table.expert()
    table = PlayTable(task="open_drawer", actions="absolute", observations=("state",))
    table.reset(seed=0)
    with pytest.raises(ValueError, match="relative"):
        table.expert()
