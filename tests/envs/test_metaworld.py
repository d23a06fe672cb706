"""Meta-World behind our interface: seeds, clouds, markers, experts, success. Needs the extra metaworld."""

import importlib.util

import numpy as np
import pytest

from lightning_robot.envs import make_environment
from lightning_robot.envs.adapters import MissingPackage
from lightning_robot.envs.checks import ActionOutOfBounds
from lightning_robot.envs.metaworld import SENTENCES, MetaWorld
from lightning_robot.envs.opengl import NoOpenGL
from lightning_robot.features import check_compatible

installed = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="the extra metaworld is not installed")
SMALL = {"camera_sizes": {"corner2": 48}, "cloud": {"points": 128}}


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "metaworld" else find(name))
    with pytest.raises(MissingPackage, match=r'pip install "lightning_robot\[metaworld\]"'):
        make_environment("lightning_robot/MetaWorld-v0")


def _play(env, task, seed, steps=200):
    observation, info = env.reset(seed=seed, options={"task": task})
    expert, seen = env.expert(), [observation]
    for _ in range(steps):
        observation, _, terminated, truncated, info = env.step(expert.act())
        seen.append(observation)
        if terminated or truncated:
            break
    return seen, info, env.state_fingerprint()


@installed
class TestEpisodes:
    def test_every_task_is_known(self):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        assert {f"{task}-v3" for task in SENTENCES} == set(ALL_V3_ENVIRONMENTS)

    @pytest.mark.parametrize("task", ["drawer-open", "pick-place", "button-press-topdown"])
    def test_a_seed_fixes_the_episode_whatever_ran_before(self, task):
        fresh, used = MetaWorld(**SMALL), MetaWorld(**SMALL)
        _play(used, task, 3, 40)
        _play(used, "reach", 4, 5)
        (first, _, digest), (second, _, other) = _play(fresh, task, 7, 30), _play(used, task, 7, 30)
        assert digest == other
        for one, two in zip(first, second):
            np.testing.assert_array_equal(one["observation.point_cloud"], two["observation.point_cloud"])
            np.testing.assert_array_equal(one["observation.state"], two["observation.state"])
        assert _play(fresh, task, 8, 1)[2] != _play(fresh, task, 7, 1)[2]

    @pytest.mark.parametrize("task", ["drawer-open", "door-open", "push", "reach"])
    def test_start_states_are_told_apart(self, task):
        env, digests = MetaWorld(observations=["state"]), []
        for seed in (1, 2, 3, 1):
            env.reset(seed=seed, options={"task": task})
            digests.append(env.state_fingerprint())
        assert len(set(digests)) == 3
        assert digests[0] == digests[3]

    @pytest.mark.parametrize("task", ["drawer-open", "button-press-topdown", "reach", "push"])
    def test_experts_solve_their_tasks(self, task):
        env = MetaWorld(observations=["state"], success_steps=5)
        seen, info, _ = _play(env, task, 0)
        assert info["success"]
        assert info["failure"] is None
        assert info["details"]["was_near"]
        assert len(seen) < 150
        assert seen[0]["task"] == SENTENCES[task]

    def test_success_must_hold_as_long_as_asked(self):
        lengths = [len(_play(MetaWorld(observations=["state"], success_steps=steps), "reach", 0)[0]) for steps in (1, 5)]
        assert lengths[1] == lengths[0] + 4

    def test_time_runs_out(self):
        env = MetaWorld(task="drawer-open", observations=["state"], max_steps=3)
        env.reset(seed=0)
        ends = [env.step(np.zeros(4))[3:] for _ in range(3)]
        assert [truncated for truncated, _ in ends] == [False, False, True]
        assert ends[-1][1]["failure"] == "timeout"

    def test_actions_are_checked(self):
        env = MetaWorld(task="reach", observations=["state"])
        env.reset(seed=0)
        for wrong in (np.zeros(7), np.full(4, 50.0), np.full(4, np.nan)):
            with pytest.raises(ActionOutOfBounds):
                env.step(wrong)


@installed
class TestObservations:
    def test_state_is_hand_and_fingers(self):
        env = MetaWorld(task="reach", observations=["state", "environment_state"])
        observation, _ = env.reset(seed=0)
        np.testing.assert_allclose(
            observation["observation.state"][:3], observation["observation.environment_state"][:3], atol=1e-6
        )
        middle = observation["observation.state"][3:].reshape(2, 3).mean(axis=0)
        assert np.linalg.norm(middle - env._scene()._simulator.tcp_center) < 1e-6
        assert env.observation_space.contains(observation)

    @pytest.mark.parametrize("task", ["reach", "push"])
    def test_the_goal_is_seen_as_a_marker(self, task):
        for markers in (True, False):
            env = MetaWorld(task=task, markers=markers, camera_sizes={"corner2": 96})
            cloud = env.reset(seed=1)[0]["observation.point_cloud"]
            goal = env._scene()._simulator._target_pos
            distance = np.linalg.norm(cloud - goal, axis=1)
            assert (distance < 0.0201).any() == markers
            if markers:
                assert distance.min() > 0.0199  # on the sphere of 2 cm

    def test_rays_and_depth_buffer_see_the_same(self):
        depths = {}
        for renderer in ("rays", "opengl"):
            env = MetaWorld(task="drawer-open", observations=["depth"], camera_sizes={"corner2": 96}, renderer=renderer)
            try:
                depths[renderer] = env.reset(seed=2)[0]["observation.depth.corner2"]
            except NoOpenGL as error:
                pytest.skip(str(error).splitlines()[0])
            env.close()
        difference = np.abs(depths["rays"] - depths["opengl"])
        assert np.median(difference) < 1e-5
        assert (difference < 2e-3).mean() > 0.985  # edges differ; collision boxes or other sites would be many more pixels

    def test_invisible_geoms_hide_nothing(self):
        env = MetaWorld(task="drawer-open", observations=["depth"])
        env.reset(seed=0)
        scene = env._scene()
        _, geom = scene._camera("corner2", 96, 96).cast(scene.data)
        assert set(np.unique(scene.model.geom_group[geom[geom >= 0]])) <= {0, 1}

    def test_pictures_have_their_cameras(self):
        env = MetaWorld(task="reach", observations=["images"], camera_sizes={"corner2": [20, 30], "gripperPOV": 16})
        observation, _ = env.reset(seed=0)
        assert observation["observation.images.corner2"].shape == (3, 20, 30)
        assert observation["observation.images.gripperPOV"].shape == (3, 16, 16)
        assert observation["observation.images.corner2"].std() > 10

    def test_colored_clouds_show_the_marker(self):
        cloud = MetaWorld(task="reach", cloud={"colors": True}).reset(seed=0)[0]["observation.point_cloud"]
        assert cloud.shape == (512, 6)
        assert ((cloud[:, 3] > 0.7) & (cloud[:, 4] == 0)).any()  # red

    def test_a_policy_gets_what_it_was_trained_on(self):
        trained = MetaWorld(observations=["state", "point_cloud"], **SMALL).features
        env = MetaWorld(observations=["images"])
        env.match(trained)
        assert check_compatible(trained, env.features) == []
        assert env.reset(seed=0)[0]["observation.point_cloud"].shape == (128, 3)

    def test_unread_observations_cost_nothing(self):
        env = MetaWorld(task="reach")
        env.reset(seed=0)
        env.skip_observation = True
        assert set(env.step(np.zeros(4))[0]) == {"task"}


@installed
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "fly"}, "not among assembly"),
        ({"tasks": "reach"}, "tasks is a list"),
        ({"task": "reach", "tasks": ["push"]}, "not both"),
        ({"observations": ["smell"]}, "observations"),
        ({"camera_sizes": {"front": 84}}, "cameras"),
        ({"success_steps": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetaWorld(**arguments)


@installed
def test_demonstrations_are_generated(tmp_path):
    from lightning_robot.data.store import EpisodeStore
    from lightning_robot.generation.generate import generate

    path = generate(
        tmp_path / "reach.zarr",
        env="lightning_robot/MetaWorld-v0",
        env_kwargs={"success_steps": 5, **SMALL},
        tasks=("reach",),
        episodes_per_task=2,
        hold=2,
        processes=1,
    )
    store = EpisodeStore.open(path)
    assert len(store.episode_ends) == 2
    actions = store.whole("action")
    assert np.abs(actions).max() <= 1
    assert actions.shape[1] == 4
