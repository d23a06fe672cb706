"""Episodes are played once, judged rightly, and come out the same however the work is spread."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_robot.evaluation.controller import Ensembling
from lightning_robot.evaluation.probe import NotReset
from lightning_robot.evaluation.result import EvaluationResult
from lightning_robot.evaluation.rollout import (
    GENERATION_SEEDS,
    REPORTING_SEEDS,
    SELECTION_SEEDS,
    Episode,
    choose_tasks,
    fingerprint_policy,
    inspect_environment,
    plan_episodes,
    rollout,
)
from lightning_robot.evaluation.stepping import EnvironmentFault
from lightning_robot.features import IncompatibleFeatures

sys.path.insert(0, str(Path(__file__).parent))  # worker processes find the fakes by their name
from fake_reach import Reach, TinyPolicy, features

PLAN = plan_episodes(16, REPORTING_SEEDS, ("near", "far"))


@pytest.fixture(scope="module")
def policy():
    return TinyPolicy()


@pytest.fixture(scope="module")
def reference(policy):
    return rollout(policy, Reach, PLAN, num_envs=8, progress=False)


def test_plan_spreads_episodes_over_tasks_with_consecutive_seeds():
    plan = plan_episodes(5, 10, ("a", "b"))
    assert plan == [Episode(10, "a"), Episode(11, "a"), Episode(12, "a"), Episode(13, "b"), Episode(14, "b")]
    assert plan_episodes(2, 0) == [Episode(0), Episode(1)]
    with pytest.raises(ValueError, match="at least one per task"):
        plan_episodes(1, 0, ("a", "b"))
    assert GENERATION_SEEDS < SELECTION_SEEDS < REPORTING_SEEDS


def test_tasks_are_those_asked_for_else_those_trained(policy, monkeypatch):
    description, _ = inspect_environment(policy, partial(Reach, tasks=("near", "far")))
    assert choose_tasks(policy, description) == ["near", "far"]  # the policy reads no task
    monkeypatch.setattr(policy, "trained_tasks", ("far", "fly"), raising=False)
    assert choose_tasks(policy, description) == ["far"]
    assert choose_tasks(policy, description, ["near"]) == ["near"]
    assert choose_tasks(policy, inspect_environment(policy, partial(Reach, tasks=()))[0]) == []
    monkeypatch.setattr(policy, "trained_tasks", ("fly",))
    with pytest.raises(EnvironmentFault, match="trained on fly; the environment plays near, far"):
        choose_tasks(policy, description)


def test_every_episode_is_played_once_and_the_outcomes_differ(reference):
    assert [(row.seed, row.task) for row in reference.records] == [(one.seed, one.task) for one in PLAN]
    outcomes = {row.outcome for row in reference.records}
    assert {"success", "timeout"} <= outcomes, outcomes  # a table of one outcome would prove nothing below
    for row in reference.records:
        assert row.success == (row.failure is None)
        assert row.steps <= 20
        assert row.queries == -(-row.steps // 4)
    assert reference.summary()["distinct_start_states"] == 16
    assert reference.fingerprints["simulator"] == "fake 1"
    assert reference.settings["inference_batch"] == 8
    assert reference.settings["threads"] == 1
    assert reference.settings["seeds"] == {"first": 2_000_000, "last": 2_000_015, "role": "reporting"}
    assert reference.settings["start_states_told_by"] == "first observation"
    wanted = {"checkpoint", "statistics", "configuration", "simulator", "scene", "renderer"}
    assert wanted <= reference.fingerprints.keys()


@pytest.mark.parametrize("num_envs", [1, 3, 16])
def test_table_is_byte_equal_for_any_number_of_environments(policy, reference, num_envs):
    assert rollout(policy, Reach, PLAN, num_envs=num_envs, progress=False).to_json() == reference.to_json()


def test_table_is_byte_equal_for_any_number_of_ranks_and_processes(policy, reference):
    shares = [rollout(policy, Reach, PLAN, num_envs=3, progress=False, rank=rank, world_size=2) for rank in range(2)]
    assert EvaluationResult.merge(shares).to_json() == reference.to_json()
    spread = rollout(policy, Reach, PLAN, num_envs=5, processes=2, progress=False)
    assert spread.to_json() == reference.to_json()
    assert spread.processes == 2


class LopsidedPolicy(TinyPolicy):
    """Answers each row of a batch a little otherwise, as kernels do with the last ones."""

    def predict_action_chunk(self, observation, **options):
        chunk = super().predict_action_chunk(observation, **options)
        return chunk + 1e-3 * torch.arange(len(chunk)).view(-1, 1, 1, 1)


def test_an_episode_keeps_its_row():
    policy = LopsidedPolicy()
    reference = rollout(policy, Reach, PLAN, num_envs=8, progress=False)
    for num_envs in (1, 3, 16):
        assert rollout(policy, Reach, PLAN, num_envs=num_envs, progress=False).to_json() == reference.to_json()
    for row, episode in zip(reference.records, PLAN):
        (alone,) = rollout(policy, Reach, [episode], progress=False).records
        assert alone == row


def test_observations_that_nobody_reads_are_not_computed(policy, reference):
    full = partial(Reach, skips=False)
    assert rollout(policy, full, PLAN, progress=False).to_json() == reference.to_json()
    assert rollout(policy, full, PLAN, ensembling=Ensembling(), progress=False).records == (
        rollout(policy, Reach, PLAN, ensembling=Ensembling(), progress=False).records
    )


def test_a_share_may_be_empty(policy):
    assert rollout(policy, Reach, PLAN[:1], progress=False, rank=1, world_size=2).records == []


def test_table_is_byte_equal_in_a_fresh_process(policy, reference):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fake_reach import Reach, TinyPolicy\n"
        "from lightning_robot.evaluation.rollout import *\n"
        "plan = plan_episodes(16, REPORTING_SEEDS, ('near', 'far'))\n"
        "sys.stdout.write(rollout(TinyPolicy(), Reach, plan, num_envs=2, progress=False).to_json())\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == reference.to_json()


def test_weights_and_settings_show_in_the_table(policy, reference):
    other = TinyPolicy(seed=1)
    assert fingerprint_policy(other) != fingerprint_policy(policy) == reference.fingerprints["checkpoint"]
    short = rollout(policy, Reach, PLAN, execution_horizon=1, progress=False)
    blended = rollout(policy, Reach, PLAN, ensembling=Ensembling(), progress=False)
    assert len({reference.to_json(), short.to_json(), blended.to_json()}) == 3
    assert blended.settings["ensembling"] == [0.01, "oldest"]
    assert all(row.queries == row.steps for row in blended.records)


def test_mode_and_threads_are_put_back():
    policy = TinyPolicy().train()
    policy.hidden.eval()
    torch.set_num_threads(2)
    try:
        rollout(policy, Reach, PLAN[:2], progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert policy.training
    assert policy.output.training
    assert not policy.hidden.training


def test_policy_is_always_asked_in_the_same_batch_size():
    policy = TinyPolicy()
    rollout(policy, Reach, PLAN[:5], num_envs=3, inference_batch=4, progress=False)
    assert {shape for shape, *_ in policy.calls} == {(4, 2, 6)}
    assert set(policy.calls[0][2]) == {"come near"}


@pytest.mark.parametrize("processes", [0, 2])
def test_exception_in_one_environment_costs_one_episode(policy, reference, processes):
    broken = PLAN[5].seed
    make_env = partial(Reach, raise_at=(broken,))
    result = rollout(policy, make_env, PLAN, num_envs=3, processes=processes, progress=False)
    rows = {row.seed: row for row in result.records}
    assert rows[broken].failure == f"error: ValueError: seed {broken} cannot be simulated"
    assert rows[broken].outcome == "error"
    assert [row for row in result.records if row.seed != broken] == [row for row in reference.records if row.seed != broken]
    assert result.failures()["error"] == 1
    assert any(str(broken) in sentence for sentence in result.warnings())


def test_every_episode_broken_is_fatal(policy):
    with pytest.raises(EnvironmentFault, match=r"Every one of 2 episodes .* cannot be simulated"):
        rollout(policy, partial(Reach, raise_at=[one.seed for one in PLAN]), PLAN[:2], progress=False)


def test_dead_process_is_reported_and_the_others_play_on(policy):
    make_env = partial(Reach, die_at=(PLAN[0].seed,))
    result = rollout(policy, make_env, PLAN, num_envs=4, processes=2, progress=False)
    assert len(result.records) == 16
    lost = result.errors
    assert 1 <= len(lost) <= 2  # both environments of the process that ended
    assert all("the process that ran it ended (exit code 7)" in row.failure for row in lost)


def test_no_process_left_is_fatal(policy):
    with pytest.raises(EnvironmentFault, match="Every one"):
        rollout(policy, partial(Reach, die_at=[one.seed for one in PLAN]), PLAN, num_envs=2, processes=2, progress=False)


def test_action_that_is_not_finite_fails_the_episode(policy):
    sick = TinyPolicy()
    with torch.no_grad():
        sick.output.bias[0] = float("nan")
    with pytest.raises(EnvironmentFault, match="action is not finite"):
        rollout(sick, Reach, PLAN[:3], progress=False)


def test_actions_beyond_the_bounds_are_said():
    wild = TinyPolicy()
    predict = wild.predict_action_chunk
    wild.predict_action_chunk = lambda *args, **kwargs: 5 * predict(*args, **kwargs)
    result = rollout(wild, Reach, PLAN[:4], progress=False)
    assert result.summary()["share_out_of_bounds"] > 0.5
    for factor, reported in ((1.19, False), (1.21, True)):  # the range is 2: a tenth of it is tolerated
        wild.predict_action_chunk = lambda *args, factor=factor, **kwargs: torch.full((8, 1, 4, 2), factor)
        summary = rollout(wild, Reach, PLAN[:4], progress=False).summary()
        assert summary["share_out_of_bounds"] == reported
    wild.predict_action_chunk = lambda *args, **kwargs: 5 * predict(*args, **kwargs)
    result = rollout(wild, Reach, PLAN[:4], progress=False)
    assert any("outside the environment's bounds" in sentence for sentence in result.warnings())
    wild.predict_action_chunk = lambda *args, **kwargs: 400 * predict(*args, **kwargs)
    with pytest.raises(EnvironmentFault, match="un-normalised"):
        rollout(wild, Reach, PLAN[:4], progress=False)


def test_success_at_reset_is_counted_and_named(policy):
    seed = PLAN[2].seed
    result = rollout(policy, partial(Reach, solved_at_reset=(seed,)), PLAN[:4], progress=False)
    (row,) = [row for row in result.records if row.success_at_reset]
    assert (row.seed, row.success, row.failure, row.steps) == (seed, False, "solved_at_reset", 0)
    assert result.episodes == 3
    assert result.summary()["successes_true_at_reset"] == 1
    assert any(f"seeds {seed}" in sentence for sentence in result.warnings())


def test_unfit_environments_are_refused_before_the_first_episode(policy):
    plan = PLAN[:2]
    with pytest.raises(IncompatibleFeatures, match=r"observation.state"):
        rollout(policy, partial(Reach, shape=(7,)), plan, progress=False)
    absolute = TinyPolicy()
    absolute.features = features(semantics="absolute; commanded; world; gripper +1 open -1 closed")
    with pytest.raises(IncompatibleFeatures, match="action semantics"):
        rollout(absolute, Reach, plan, progress=False)
    with pytest.raises(EnvironmentFault, match="set max_steps"):
        rollout(policy, partial(Reach, max_steps=0), plan, progress=False)
    with pytest.raises(EnvironmentFault, match="never said whether the task was solved"):
        rollout(policy, partial(Reach, silent=True), plan, progress=False)
    with pytest.raises(ValueError, match="planned twice"):
        rollout(policy, Reach, [*plan, plan[0]], progress=False)


def test_another_simulator_is_noted():
    policy = TinyPolicy()
    policy.features.source["simulator"] = "fake 0"
    result = rollout(policy, Reach, PLAN[:2], progress=False)
    assert result.notes == ["simulator: trained with fake 0, evaluated with fake 1."]
    description, notes = inspect_environment(policy, Reach, ("far",))
    assert notes == result.notes
    assert description.tasks == ("near", "far")
    with pytest.raises(EnvironmentFault, match="cannot begin the task 'fly'"):
        inspect_environment(policy, Reach, ("near", "fly"))


def test_step_limit_is_the_smaller_one(policy):
    result = rollout(policy, Reach, PLAN, max_steps=3, progress=False)
    assert max(row.steps for row in result.records) == 3
    assert result.settings["max_steps"] == 3


def test_environment_that_carries_something_over_shows(policy):
    with pytest.raises(NotReset, match=r"after 3 steps reset\(seed=999999\) gave another start state .*state differs by up to"):
        rollout(policy, partial(Reach, carry=True), PLAN, progress=False)
