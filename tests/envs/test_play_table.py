"""The play table follows CALVIN: actions, response, joints, lights, starts, infos; its episodes depend on the seed alone."""

import hashlib
import json
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lightning_robot.envs
from lightning_robot.envs import calvin_tasks, opengl
from lightning_robot.envs.calvin_tasks import BLOCK_FREE_TASKS, TASKS
from lightning_robot.envs.checks import ActionOutOfBounds
from lightning_robot.envs.panda import REST
from lightning_robot.envs.play_table import OBSERVATIONS, PlayTable
from lightning_robot.envs.play_table_model import SCENES
from lightning_robot.features import calvin_features, check_compatible
from lightning_robot.geometry import calvin_gripper_pose
from lightning_robot.points import CloudRecipe, cloud_from_depth

ROBOT = np.array([0, 0, 0, 0, 0, 0, 0.08, *REST, 1.0])
HOLD = np.array([0, 0, 0, 0, 0, 0, 1.0])


def scene_vector(slider=0.0, drawer=0.0, button=0.0, switch=0.0, bulb=0, led=0, blocks=None):
    blocks = blocks or [(0.05, -0.05, 0.46, 0, 0, 0), (0.2, -0.05, 0.46, 0, 0, 0), (-0.24, 0.09, 0.461, 0, 0, 0)]
    return np.array([slider, drawer, button, switch, bulb, led, *np.concatenate(blocks)], float)


@pytest.fixture
def table():
    table = PlayTable(observations=("state",), max_steps=10_000)
    table.reset(seed=0, options={"task": "open_drawer", "robot_obs": ROBOT, "scene_obs": scene_vector()})
    return table


def steps(table, action, count):
    result = None
    for _ in range(count):
        result = table.step(np.asarray(action, float))
    return result


# --- interface -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*Box.*")
@pytest.mark.parametrize("arguments", [{}, {"observations": OBSERVATIONS, "actions": "absolute", "cloud": {"colors": True}}])
def test_gymnasium_checker(arguments):
    env = lightning_robot.envs.make_environment("lightning_robot/PlayTable-v0", render_mode="rgb_array", **arguments)
    check_env(env.unwrapped, skip_render_check=False)
    offered = set(env.unwrapped.features.observations)
    assert set(env.observation_space) == offered | {"task"}
    assert check_compatible(env.unwrapped.features, env.unwrapped.features) == []


def test_registered_by_import():
    assert isinstance(gymnasium.make("lightning_robot/PlayTable-v0", observations=("state",)).unwrapped, PlayTable)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scene": "E"}, "scene: 'E' is not among A, B, C, D"),
        ({"task": "open_door"}, "no task 'open_door'"),
        ({"observations": ("pointcloud",)}, "'pointcloud' is not among state, point_cloud"),
        ({"actions": "joint"}, "relative, absolute"),
        ({"cloud": {"point": 3}}, "no point"),
        ({"camera_sizes": {"front": 84}}, "'front' is not among static, gripper"),
        ({"camera_sizes": {"static": (84, 84, 3)}}, "pixels of a square, or height and width"),
        ({"tasks": "open_drawer"}, "write task='open_drawer'"),
        ({"max_steps": 0}, "at least one step"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlayTable(**arguments)


def test_wrong_reset_options(table):
    with pytest.raises(ValueError, match="no option tsk"):
        table.reset(options={"tsk": "open_drawer"})
    with pytest.raises(ValueError, match="scene_obs has 24 finite numbers"):
        table.reset(options={"scene_obs": np.zeros(23)})
    with pytest.raises(ValueError, match="starts with a block in the gripper"):
        table.reset(options={"task": "place_in_drawer"})


def test_only_what_is_asked_for_is_computed(table):
    observation, *_ = table.step(HOLD)
    assert set(observation) == {"observation.state", "task"}
    assert table._cameras == {}


def test_cloud_is_the_builders(table):
    recipe = {"points": 256, "crop": ((-0.4, -0.5, 0.3), (0.4, 0.2, 0.7))}
    table = PlayTable(observations=("point_cloud", "depth", "state"), cloud=recipe, camera_sizes={"static": 50, "gripper": 40})
    observation, _ = table.reset(seed=3)
    recipe = CloudRecipe.from_dict(recipe)
    names = ("static", "gripper")
    views = {name: table._camera(name) for name in names}
    depths = {name: observation[f"observation.depth.{name}"][0] for name in names}
    poses = {"static": views["static"].pose(table._data), "gripper": calvin_gripper_pose(table.robot_obs())}
    cloud = cloud_from_depth(depths, {name: views[name].camera for name in names}, poses, None, recipe)
    assert observation["observation.point_cloud"] == pytest.approx(cloud, abs=1e-5)
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    assert (low >= recipe.crop[0]).all()
    assert (high <= recipe.crop[1]).all()


def test_coloured_cloud_shows_the_led():
    table = PlayTable(observations=("point_cloud",), cloud={"colors": True, "points": 2048})

    def green(led):
        observation, _ = table.reset(seed=0, options={"robot_obs": ROBOT, "scene_obs": scene_vector(led=led)})
        colors = observation["observation.point_cloud"][:, 3:]
        assert colors.min() >= 0
        assert colors.max() <= 1
        return (np.abs(colors - (0, 1, 0)).max(axis=1) < 0.01).sum()

    assert green(1) > 3
    assert green(0) == 0


def test_match_follows_the_policy():
    recipe = CloudRecipe(points=300, colors=True, pixel_offset=(0, 1), crop=((-0.4, -0.5, 0.3), (0.4, 0.2, 0.7)))
    trained = calvin_features(
        300, True, recipe.to_dict(), relative=False, depth_cameras={"gripper": (30, 40)}, source={"cameras": "static 60x50"}
    )
    table = PlayTable()
    table.match(trained)
    observation, _ = table.reset(seed=0)
    assert observation["observation.point_cloud"].shape == (300, 6)
    assert observation["observation.depth.gripper"].shape == (1, 30, 40)
    assert table.camera_sizes["static"] == (60, 50)
    assert table.recipe.crop == recipe.crop
    assert table.recipe.pixel_offset == (0.5, 0.5)  # its own renderer's
    assert not table.relative
    check_compatible(trained, table.features)
    with pytest.raises(ValueError, match="'tactile' is not among"):
        table.match(calvin_features(cameras={"tactile": (8, 8)}))


def test_render_and_close():
    table = PlayTable(observations=("state",), render_mode="rgb_array")
    table.reset(seed=0)
    picture = table.render()
    assert picture.shape == (240, 320, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10
    table.close()


def test_opengl_missing_is_explained(monkeypatch):
    def fail(*_):
        raise AttributeError("module has no GLContext")

    monkeypatch.setattr(opengl.mujoco, "Renderer", fail)
    table = PlayTable(observations=("images",), renderer="opengl")
    with pytest.raises(opengl.NoOpenGL, match="apt-get install libegl1"):
        table.reset(seed=0)


def test_opengl_pictures_resemble_ray_cast_ones():
    pictures = {}
    for renderer in ("rays", "opengl"):
        table = PlayTable(observations=("images",), renderer=renderer)
        try:
            observation, _ = table.reset(seed=0)
        except opengl.NoOpenGL as error:
            pytest.skip(str(error).splitlines()[0])
        pictures[renderer] = observation["observation.images.static"].astype(float)
        table.close()
    assert pictures["rays"].shape == (3, 84, 84)
    assert np.abs(pictures["rays"] - pictures["opengl"]).mean() < 40


# --- actions ---------------------------------------------------------------------------------------------------------------

X = "0.03562 0.05068 0.06816 0.08669 0.10562 0.12464 0.14364 0.16249 0.18115 0.19954 0.21138 0.21739 0.22053 0.22220"
Z = "0.56108 0.54545 0.52746 0.50847 0.48910 0.46961 0.45996 0.45559 0.45360 0.45268"
YAW = "1.52212 1.56377 1.61054 1.65913 1.70852 1.75824 1.80812 1.85805 1.90801 1.95798 1.98189 1.99219 1.99662 1.99853"


@pytest.mark.parametrize(
    ("element", "value", "count", "measured", "tolerance"),
    [(0, 1, 10, X, 0.0105), (2, -1, 6, Z, 0.005), (5, 1, 10, YAW, 0.004)],
)
def test_step_response_is_like_calvins(table, element, value, count, measured, tolerance):
    """Coordinates measured in CALVIN after each step; its inverse kinematics lags along x, ours does not (half a step)."""
    expected = np.array(measured.split(), float)
    action = HOLD.copy()
    action[element] = value
    got = []
    for index in range(len(expected)):
        table.step(action if index < count else HOLD)
        got.append(table.robot_obs()[element])
    assert got == pytest.approx(expected, abs=tolerance)


def test_gripper_closes_in_three_steps_and_thresholds_at_zero(table):
    widths = []
    for _ in range(5):
        table.step([0, 0, 0, 0, 0, 0, -0.2])
        widths.append(table.robot_obs()[6])
    assert widths == pytest.approx([0.0344, 0.0148, 0.0064, 0.0027, 0.0012], abs=0.02)
    assert widths[3] < 0.008
    assert table.robot_obs()[14] == -1
    steps(table, [0, 0, 0, 0, 0, 0, 0.1], 10)
    assert table.robot_obs()[6] == pytest.approx(0.08, abs=2e-3)
    assert table.robot_obs()[14] == 1


def test_relative_actions_accumulate_on_the_target(table):
    start_position, start_euler = table.target_pose
    assert start_position == pytest.approx(table.robot_obs()[:3])
    steps(table, [2, 0, 0, 0, 0, 1, 1], 40)  # beyond 1 is not clipped, an angle not wrapped
    position, euler = table.target_pose
    assert position - start_position == pytest.approx([1.6, 0, 0])
    assert euler[2] - start_euler[2] == pytest.approx(2.0)
    assert table.robot_obs()[0] < 0.7  # out of reach: the target runs ahead, as in CALVIN
    assert np.isfinite(table.robot_obs()).all()


def test_absolute_actions_go_there():
    table = PlayTable(observations=("state",), actions="absolute")
    table.reset(seed=0, options={"robot_obs": ROBOT, "scene_obs": scene_vector()})
    steps(table, [0.1, -0.15, 0.6, 3.05, -0.1, 1.6, 1], 25)
    assert table.robot_obs()[:6] == pytest.approx([0.1, -0.15, 0.6, 3.05, -0.1, 1.6], abs=2e-3)
    with pytest.raises(ActionOutOfBounds, match=r"element 2 \(z\) is -0.2; absolute actions lie within 0 to 1.5"):
        table.step([0.1, -0.15, -0.2, 3.05, -0.1, 1.6, 1])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"shape \(7,\).*got \(6,\)"),
        (np.zeros((1, 7)), r"got \(1, 7\)"),
        ([0, np.nan, 0, 0, 0, 0, 1], r"element 1 \(y\) is nan"),
        ([0, 0, 0, 0, np.inf, 0, 1], r"element 4 \(pitch\) is inf"),
        ([0, 0, 0, 0, 0, -10.5, 1], r"element 5 \(yaw\) is -10.5; relative actions lie within -10 to 10.*un-normalised"),
    ],
)
def test_impossible_actions_are_refused(table, action, message):
    before = table.robot_obs()
    with pytest.raises(ActionOutOfBounds, match=message):
        table.step(action)
    assert np.array_equal(before, table.robot_obs())


# --- the table -------------------------------------------------------------------------------------------------------------


def test_parts_stay_where_they_are_left_and_the_button_returns(table):
    table.reset(options={"robot_obs": ROBOT, "scene_obs": scene_vector(slider=0.13, drawer=0.1, button=0.02, switch=0.05)})
    steps(table, HOLD, 60)
    assert table.scene_obs()[:4] == pytest.approx([0.13, 0.1, 0.0, 0.05], abs=1.5e-3)


def test_led_flips_on_the_rising_edge(table):
    position = table._part_qpos[2]

    def lamp(depth):
        table._data.qpos[position] = depth
        table._switch_lights()
        return table.scene_obs()[5]

    assert [lamp(depth) for depth in (0.005, 0.011, 0.02, 0.009, 0.012, 0.0)] == [0, 1, 1, 1, 0, 0]


def test_lamps_after_a_reset_are_calvins(table):
    def after(steps_, **state):
        table.reset(options={"robot_obs": ROBOT, "scene_obs": scene_vector(**state)})
        steps(table, HOLD, steps_)
        return table.scene_obs()[4]

    assert after(0, switch=0.088, bulb=0) == 0
    assert after(1, switch=0.088, bulb=0) == 1  # the level counts, from the first step on
    assert after(5, switch=0.0, bulb=1) == 1  # until the switch has gone up and down
    assert after(5, switch=0.088, bulb=1) == 1


@pytest.mark.parametrize("scene", "ABCD")
def test_reset_to_a_state(scene):
    table = PlayTable(scene=scene, observations=("state",))
    blocks = [(0.05, -0.05, 0.46, 0, 0, 0.4), (0.2, -0.1, 0.46, 0, 0, -1.2), (0.1, 0.09, 0.461, 0, 0, 2.0)]
    vector = scene_vector(0.2, 0.1, 0, 0.088, 1, 1, blocks)
    robot = ROBOT.copy()
    robot[14] = -1
    table.reset(seed=0, options={"robot_obs": robot, "scene_obs": vector})
    assert table.scene_obs() == pytest.approx(vector, abs=1e-3)
    assert table.robot_obs()[7:14] == pytest.approx(REST, abs=1e-4)
    assert table.robot_obs()[14] == -1
    first = SCENES[scene].blocks[0][0]  # the state's order of blocks is the scene's
    assert table.info()["blocks"][f"block_{first}"]["pos"][:2] == pytest.approx([0.05, -0.05], abs=1e-3)


def test_calvins_chain_starts_rest(shared):
    golden = json.loads((shared / "golden/calvin_chains.json").read_text())
    table = PlayTable(observations=("state",))
    for state in golden["states"][::24]:
        table.reset(seed=0, options={"robot_obs": golden["robot_obs"], "scene_obs": state["scene_obs"]})
        assert table.robot_obs() == pytest.approx(golden["robot_obs"], abs=1e-3)
        steps(table, HOLD, 30)
        assert table.scene_obs() == pytest.approx(state["scene_obs"], abs=3e-3)


def test_info_is_the_oracles(shared):
    """The same state gives the contacts that CALVIN's simulator reports, so the published tests can judge it."""
    snapshots = json.loads((shared / "golden/calvin_oracle.json").read_text())["snapshots"]
    table = PlayTable(observations=("state",))
    for name in ("rest", "red_on_blue", "red_in_drawer", "blue_on_plank", "slider_left", "bulb_on"):
        want = snapshots[name]
        blocks = [(*want["blocks"][f"block_{color}"]["pos"], 0, 0, 0) for color in ("red", "blue", "pink")]
        slider, drawer = want["doors"]["base__slide"], want["doors"]["base__drawer"]
        bulb, led = want["lights"]["lightbulb"], want["lights"]["led"]
        vector = scene_vector(max(0, slider), drawer, 0, 0.088 * bulb, bulb, led, blocks)
        table.reset(seed=0, options={"robot_obs": ROBOT, "scene_obs": vector})
        steps(table, HOLD, 2)
        info = table.info()
        assert info.keys() == want.keys()
        for block, values in want["blocks"].items():
            assert info["blocks"][block].keys() == values.keys()
            assert [list(contact) for contact in info["blocks"][block]["contacts"]] == values["contacts"], (name, block)
            assert info["blocks"][block]["pos"] == pytest.approx(values["pos"], abs=3e-3)
        assert [list(contact) for contact in info["robot_contacts"]] == []
        assert info["lights"] == want["lights"]
        assert info["doors"] == pytest.approx(want["doors"], abs=1e-3)


def move_to(table, position, yaw, gripper):
    for _ in range(60):
        target_position, target_euler = table.target_pose
        way = np.concatenate([(position - target_position) / 0.02, (np.array([3.04, 0, yaw]) - target_euler) / 0.05])
        table.step([*(way / max(1, np.abs(way).max())), gripper])
        if np.linalg.norm(table.robot_obs()[:3] - position) < 0.004:
            break


@pytest.mark.parametrize("color", ["red", "blue", "pink"])
def test_a_block_can_be_lifted_held_and_put_down(color):
    blocks = [(0.0, 0.09, 0.461, 0, 0, 0), (-0.2, 0.09, 0.461, 0, 0, 0), (0.3, -0.05, 0.46, 0, 0, 0)]
    blocks[("red", "blue", "pink").index(color)] = (0.1, -0.08, 0.46, 0, 0, 0)
    table = PlayTable(observations=("state",), max_steps=10_000)
    table.reset(seed=0, options={"task": f"lift_{color}_block_table", "scene_obs": scene_vector(slider=0.28, blocks=blocks)})
    move_to(table, np.array([0.1, -0.08, 0.55]), np.pi, 1)
    move_to(table, np.array([0.1, -0.08, 0.46]), np.pi, 1)
    steps(table, [0, 0, 0, 0, 0, 0, -1], 8)
    move_to(table, np.array([0.1, -0.08, 0.58]), np.pi, -1)
    assert calvin_tasks.solved(table._start, table.info()) == {f"lift_{color}_block_table"}
    height = table.info()["blocks"][f"block_{color}"]["pos"][2]
    steps(table, [0, 0, 0, 0, 0, 0, -1], 60)
    info = table.info()
    assert info["blocks"][f"block_{color}"]["contacts"] == [("robot", 10), ("robot", 12)]
    assert info["robot_contacts"] == [(f"block_{color}", -1)]
    assert info["blocks"][f"block_{color}"]["pos"][2] == pytest.approx(height, abs=2e-3)  # it does not slip
    move_to(table, np.array([0.1, -0.08, 0.465]), np.pi, -1)
    steps(table, HOLD, 10)
    assert table.info()["blocks"][f"block_{color}"]["contacts"] == [("table", -1)]


def test_a_block_can_be_pushed():
    blocks = [(0.05, -0.1, 0.46, 0, 0, 0), (-0.2, 0.09, 0.461, 0, 0, 0), (0.1, 0.09, 0.461, 0, 0, 0)]
    table = PlayTable(task="push_red_block_right", observations=("state",))
    table.reset(seed=0, options={"scene_obs": scene_vector(slider=0.0, blocks=blocks)})
    move_to(table, np.array([-0.04, -0.1, 0.55]), 1.57, -1)
    move_to(table, np.array([-0.04, -0.1, 0.475]), 1.57, -1)
    assert any(table.step([1, 0, 0, 0, 0, 0, -1])[4]["success"] for _ in range(15))


# --- starts and episodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", "ABCD")
def test_random_starts_suit_the_task_and_rest(scene):
    table = PlayTable(scene=scene, observations=("state",))
    starts = set()
    for seed, task in enumerate(task for task in TASKS if not task.startswith("place_in_")):
        _, info = table.reset(seed=seed, options={"task": task})
        assert info == {"task": task, "success": False, "failure": None}
        slider, drawer, _, switch, bulb, led = table.scene_obs()[:6]
        length = SCENES[scene].slider_range
        suits = {
            "open_drawer": drawer < 0.021,
            "close_drawer": drawer > 0.19,
            "move_slider_left": slider < 0.051,
            "move_slider_right": slider > length - 0.051,
            "turn_on_led": led == 0,
            "turn_off_led": led == 1,
            "turn_on_lightbulb": bulb == 0 and switch < 0.001,
            "turn_off_lightbulb": bulb == 1 and switch > 0.087,
        }
        assert suits.get(task, True)
        start = table.info()
        assert start["robot_contacts"] == []
        touching = {body for block in start["blocks"].values() for body, _ in block["contacts"]}
        assert ("block" in str(touching)) == (task == "unstack_block")
        if task.startswith("lift"):
            color, link = task.split("_")[1], {"table": -1, "slider": 6, "drawer": 3}[task.split("_")[3]]
            assert ("table", link) in start["blocks"][f"block_{color}"]["contacts"]
        before = table.scene_obs()
        steps(table, HOLD, 10)
        assert table.scene_obs()[:4] == pytest.approx(before[:4], abs=2e-3)
        for name, block in table.info()["blocks"].items():
            assert np.linalg.norm(block["pos"] - start["blocks"][name]["pos"]) < 5e-3, (task, name)
        starts.add(tuple(np.round(table.robot_obs()[:3], 3)))
    assert len(starts) == 32


def test_a_seed_draws_among_the_tasks():
    table = PlayTable(observations=("state",))
    drawn = {table.reset(seed=seed)[1]["task"] for seed in range(60)}
    assert drawn == set(BLOCK_FREE_TASKS)
    observation, info = table.reset(seed=5)
    assert observation["task"] == calvin_tasks.SENTENCES[info["task"]]
    assert table.task_sentence("open_drawer") == "pull the handle to open the drawer"
    assert set(table.task_paraphrases("open_drawer")) == set(calvin_tasks.PARAPHRASES["open_drawer"])


def digest(seed: int, table: PlayTable) -> str:
    """Everything that an episode of the expert, then of some random actions, shows."""
    total = hashlib.sha256()
    observation, info = table.reset(seed=seed)
    expert, random = table.expert(), np.random.default_rng(seed)
    for index in range(24):
        for key in sorted(observation):
            value = observation[key]
            total.update(value.encode() if isinstance(value, str) else value.tobytes())
        action = expert.act() if index < 14 else random.uniform(-1, 1, 7)
        observation, _, _, _, info = table.step(action)
        total.update(repr((info, table.scene_obs().tolist())).encode())
    return total.hexdigest()


SETTINGS = {"observations": ("state", "point_cloud"), "camera_sizes": {"static": 60, "gripper": 48}, "cloud": {"colors": True}}


def test_episodes_depend_on_the_seed_alone():
    reused = PlayTable(**SETTINGS)
    first = [digest(seed, reused) for seed in range(4)]
    assert len(set(first)) == 4
    again = [digest(seed, reused) for seed in (3, 0, 2, 1)]
    assert again == [first[3], first[0], first[2], first[1]]
    code = (
        f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
        "import test_play_table as here\n"
        "print(here.digest(2, here.PlayTable(**here.SETTINGS)))\n"
    )
    fresh = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert fresh == first[2]


def test_tasks_can_be_chained_without_a_reset():
    table = PlayTable(observations=("state",), max_steps=60)
    table.reset(seed=1, options={"task": "open_drawer"})
    for task in ("open_drawer", "turn_on_led" if table.scene_obs()[5] == 0 else "turn_off_led", "close_drawer"):
        table.begin_task(task)
        expert, done = table.expert(), False
        while not done:
            _, reward, success, truncated, info = table.step(expert.act())
            done = success or truncated
        assert success, task
        assert reward == 1.0
        assert info["task"] == task
        for _ in range(6):  # out of the way first
            table.step([0, -0.3, 1, 0, 0, 0, -1])


def test_failures_have_names():
    def failure(task, policy, seed=0, **state):
        table = PlayTable(task=task, observations=("state",), max_steps=45)
        options = {"robot_obs": ROBOT, "scene_obs": scene_vector(**state)} if state else {}
        table.reset(seed=seed, options=options)
        expert, done = table.expert() if task in BLOCK_FREE_TASKS else None, False
        while not done:
            _, _, success, done, info = table.step(policy(table, expert))
            assert not success
        return info["failure"]

    def stand(table, expert):
        return HOLD

    def weak(table, expert):  # pulls until the part has moved a little
        moved = abs(table.scene_obs()[1] - table._joint_start[1])
        return expert.act() if moved < 0.03 else HOLD

    assert failure("open_drawer", stand) == "drawer_not_touched"
    assert failure("turn_on_led", stand) == "button_not_touched"
    assert failure("turn_off_lightbulb", stand) == "switch_not_touched"
    assert failure("move_slider_left", stand) == "slider_not_touched"
    assert failure("lift_red_block_table", stand) == "timeout"
    assert failure("open_drawer", weak) == "stopped_short"

    def close_instead(table, expert):
        table._task = "close_drawer"
        action = table.expert().act()
        table._task = "open_drawer"
        return action

    assert failure("open_drawer", close_instead, drawer=0.09) == "wrong_direction"

    def touch_the_handle(table, expert):  # comes down on top of the bar
        way = np.array([0.18, -0.25, 0.385]) - table.target_pose[0]
        return [*np.clip(way / 0.02, -1, 1), 0, 0, 0, -1]

    assert failure("open_drawer", touch_the_handle, drawer=0.0) == "handle_missed"


def test_an_unstable_simulation_ends_the_episode(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file
    table._data.qvel[0] = 1e15
    *_, success, truncated, info = table.step(HOLD)
    assert not success
    assert truncated
    assert info["failure"] == "simulation_unstable"
    table.reset(seed=0)
    assert table.step(HOLD)[4]["failure"] is None
