"""The adapter to the original simulator, on a stand-in; on the original where it is importable."""

import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_robot.envs import calvin, make_environment
from lightning_robot.envs.calvin import START, Calvin, MissingCalvin, convert_info
from lightning_robot.envs.calvin_tasks import BLOCK_FREE_TASKS, SENTENCES, TASKS
from lightning_robot.envs.checks import ActionOutOfBounds
from lightning_robot.envs.play_table import PlayTable
from lightning_robot.features import check_compatible

REAL = importlib.util.find_spec("calvin_env") is not None


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    fake_calvin_env = importlib.import_module("fake_calvin_env")
    monkeypatch.setattr(calvin, "_FREE", {})
    monkeypatch.setattr(calvin, "_ALL", [])
    fake_calvin_env.MADE.clear()
    fake_calvin_env.install(tmp_path, monkeypatch)
    return fake_calvin_env


def test_without_the_simulator_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "calvin_env", None)
    with pytest.raises(MissingCalvin, match=r"numpy below 2.*virtual environment of its own.*PlayTable-v0"):
        make_environment("lightning_robot/Calvin-v0")


def test_it_offers_what_the_play_table_offers(fake):
    names = ("state", "point_cloud", "images", "depth", "environment_state")
    original = Calvin(observations=names, cloud={"points": 64}, camera_sizes={"static": 20, "gripper": 10})
    ours = PlayTable(observations=names, cloud={"points": 64}, camera_sizes={"static": 20, "gripper": 10})
    assert original.features.observations == ours.features.observations
    assert original.features.action == ours.features.action
    assert original.features.action_semantics == ours.features.action_semantics
    assert original.tasks == ours.tasks == BLOCK_FREE_TASKS
    assert original.metadata == ours.metadata
    notes = check_compatible(ours.features, original.features)
    assert len(notes) == 1
    assert "pixel_offset" in notes[0]
    observation, info = original.reset(seed=1)
    assert original.observation_space.contains(observation)
    assert observation["task"] == SENTENCES[info["task"]]
    assert set(info) == set(ours.reset(seed=1)[1])
    assert original.fingerprint["calvin_env"] == "unknown", "a missing git checkout is no error"


def test_an_episode_is_judged_by_our_tests(fake):
    env = Calvin(observations=("state",), max_steps=12)
    state, info = env.reset(seed=0, options={"task": "open_drawer"})
    np.testing.assert_allclose(state["observation.state"], np.float32(START))
    assert info == {"task": "open_drawer", "success": False, "failure": None}
    action = np.array([0, -1, 0, 0, 0, 0, 0.3], np.float32)
    before = action.copy()
    for step in range(1, 8):
        _, reward, terminated, truncated, info = env.step(action)
        assert terminated == info["success"] == (step >= 7), step  # 0.02 m a step, more than 0.12 m
        assert not truncated
    assert reward == 1.0
    np.testing.assert_array_equal(action, before)
    assert fake.MADE[0].robot.gripper_action == 1

    env.reset(seed=0, options={"task": "open_drawer"})
    for _ in range(12):
        _, _, terminated, truncated, info = env.step(np.zeros(7))
    assert not terminated
    assert truncated
    assert info["failure"] == "timeout"
    assert fake.MADE[0].robot.gripper_action == -1


def test_absolute_actions_are_poses(fake):
    env = Calvin(observations=("state",), actions="absolute")
    env.reset(seed=0, options={"task": "open_drawer"})
    state, *_ = env.step([0.1, START[1] - 0.07, 0.5, 3.1, 0, 1.5, -0.2])
    assert state["observation.state"][1] == pytest.approx(START[1] - 0.07)
    assert state["observation.state"][14] == -1


def test_a_reset_leaves_nothing_of_the_episode_before(fake):
    env = Calvin(observations=("state",))
    env.reset(seed=5)
    first = env.scene_obs()
    env.step([0, -1, 0, 0, 0, 0, -1])
    env.reset(seed=5)
    np.testing.assert_array_equal(env.scene_obs(), first)
    simulator = fake.MADE[0]
    assert simulator.loads == 2
    assert simulator.robot.gripper_action == 1
    env.reset(seed=5, options={"task": "turn_off_led"})
    assert env.scene_obs()[5] == 1
    assert simulator.scene.buttons[0].state.value == 1, "else the first press would not turn the light off"
    assert not simulator.scene.buttons[0].prev_is_pressed


@pytest.mark.parametrize("scene", "ABCD")
def test_every_start_lets_its_task_be_done(fake, scene):
    env = Calvin(scene=scene, observations=("state", "environment_state"))
    for task in TASKS:
        if task.startswith("place_in_"):
            with pytest.raises(ValueError, match="options"):
                env.reset(seed=1, options={"task": task})
            continue
        env.reset(seed=1, options={"task": task})
        _, drawer, _, switch, bulb, led = env.scene_obs()[:6]
        assert (switch > 0.044) == (bulb == 1)
        assert {"turn_on_led": led == 0, "turn_off_led": led == 1, "open_drawer": drawer < 0.05}.get(task, True)
    red = 6 + 6 * fake.BLOCKS[scene].index("red")
    observation, _ = env.reset(seed=2)
    np.testing.assert_allclose(observation["observation.environment_state"][6:12], env.scene_obs()[red : red + 6], rtol=1e-6)


def test_it_adopts_what_a_policy_was_trained_on(fake):
    trained = PlayTable(
        observations=("state", "point_cloud"),
        cloud={"points": 32, "colors": True, "crop": ((-0.4, -0.5, 0.3), (0.4, 0.2, 0.8))},
        camera_sizes={"static": 30, "gripper": 20},
        actions="absolute",
    ).features
    env = Calvin(observations=("state",))
    env.reset(seed=0)
    env.match(trained)
    observation, _ = env.reset(seed=0)
    assert observation["observation.point_cloud"].shape == (32, 6)
    assert not env.relative
    assert env.recipe.pixel_offset == (0, 1), "where this renderer samples a pixel, not where another one does"
    assert env.recipe.crop[0] == (-0.4, -0.5, 0.3)
    made = fake.MADE[-1].configuration
    assert {name: (view["height"], view["width"]) for name, view in made["cameras"].items()} == {
        "static": (30, 30),
        "gripper": (20, 20),
    }


def test_configuration_of_the_simulator(fake, tmp_path, shared):
    Calvin(observations=("state",)).reset(seed=0)
    assert fake.MADE[0].configuration["cameras"] == {}, "cameras that nobody looks through cost time"
    assert fake.MADE[0].configuration["env"]["use_egl"] is False
    assert fake.MADE[0].configuration["robot"] == {"filename": "long", "force": 200}
    assert list(fake.MADE[0].configuration["scene"]["objects"]) == ["z", "a"], "their order is that of the state"
    Calvin(shared / "data" / "calvin_sample" / "training", scene="B", use_egl=True, render_mode="rgb_array").reset(seed=0)
    made = fake.MADE[1]
    assert made.configuration["env"]["use_egl"] is True
    assert set(made.configuration["cameras"]) == {"static", "gripper"}
    assert made.letter == "B"
    with pytest.raises(ValueError, match=r"no .hydra/merged_config.yaml"):
        Calvin(tmp_path)


def test_simulators_live_as_long_as_the_process(fake):
    first, second = Calvin(observations=("state",)), Calvin(observations=("state",))
    first.reset(seed=0)
    second.reset(seed=0)
    assert len(fake.MADE) == 2, "instances at the same time do not share a simulator"
    first.close()
    del second
    gc.collect()
    for _ in range(3):
        third = Calvin(observations=("state",))
        third.reset(seed=0)
        third.close()
    assert len(fake.MADE) == 2
    assert not any(simulator.closed for simulator in fake.MADE)


def test_the_original_info_becomes_ours(shared):
    """The golden snapshots, put into the simulator's form, come back as they were."""
    golden = json.loads((shared / "golden" / "calvin_oracle.json").read_text())
    uids = {name: number for number, name in enumerate(golden["bodies"])}
    for snapshot in golden["snapshots"].values():

        def contacts(pairs, own=0):
            return tuple((0, own, uids[body], -1, link) for body, link in [*pairs, *pairs])

        raw = {
            "robot_info": {"uid": uids["robot"], "contacts": contacts(snapshot["robot_contacts"])},
            "scene_info": {
                "fixed_objects": {"table": {"uid": uids["table"]}},
                "movable_objects": {
                    name: {
                        "uid": uids[name],
                        "current_pos": block["pos"],
                        "current_orn": block["quat"],
                        "current_lin_vel": block["lin_vel"],
                        "current_ang_vel": block["ang_vel"],
                        "contacts": contacts(block["contacts"]),
                    }
                    for name, block in snapshot["blocks"].items()
                },
                "doors": {name: {"current_state": value} for name, value in snapshot["doors"].items()},
                "lights": {name: {"logical_state": value} for name, value in snapshot["lights"].items()},
            },
        }
        assert json.loads(json.dumps(convert_info(raw))) == snapshot


@pytest.mark.parametrize("action", [[0] * 6, [0, np.nan, 0, 0, 0, 0, 1], [0, 50, 0, 0, 0, 0, 1]])
def test_impossible_actions_are_refused(fake, action):
    env = Calvin(observations=("state",))
    env.reset(seed=0)
    with pytest.raises(ActionOutOfBounds, match="un-normalised"):
        env.step(action)


def test_wrong_arguments_are_refused(fake):
    for arguments, message in (
        ({"scene": "E"}, "scene: 'E'"),
        ({"observations": ("state", "smell")}, "smell"),
        ({"task": "fly"}, "no task 'fly'"),
        ({"camera_sizes": {"top": 3}}, "top"),
    ):
        with pytest.raises(ValueError, match=message):
            Calvin(**arguments)
    with pytest.raises(ValueError, match="reset has no option taks"):
        Calvin(observations=("state",)).reset(options={"taks": "open_drawer"})


@pytest.mark.skipif(not REAL, reason="the original simulator calvin_env is not importable here")
@pytest.mark.parametrize(
    ("split", "first", "last", "task"),
    [
        ("training", 3120, 3138, "open_drawer"),
        ("training", 3154, 3160, "turn_on_led"),
        ("training", 3160, 3172, "push_red_block_right"),
        ("validation", 3139, 3153, "move_slider_left"),
    ],
)
def test_the_original_replays_its_recordings(shared, split, first, last, task):
    folder = shared / "data" / "calvin_sample" / split
    frames = [dict(np.load(folder / f"episode_{number:07d}.npz")) for number in range(first, last + 1)]
    start = {"task": task, "robot_obs": frames[0]["robot_obs"], "scene_obs": frames[0]["scene_obs"]}
    for actions, key in (("relative", "rel_actions"), ("absolute", "actions")):
        env = Calvin(observations=("state",), actions=actions, check_oracle=True)
        env.reset(seed=0, options=start)
        assert any(env.step(frame[key])[2] for frame in frames)
        env.close()


@pytest.mark.skipif(not REAL, reason="the original simulator calvin_env is not importable here")
def test_the_play_tables_experts_solve_the_original():
    env = Calvin(observations=("state",), check_oracle=True)
    for task in BLOCK_FREE_TASKS:
        env.reset(seed=0, options={"task": task})
        expert = env.expert()
        assert any(env.step(expert.act())[2] for _ in range(100)), task
