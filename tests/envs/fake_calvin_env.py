"""A stand-in for the original simulator's interface: no physics, but its manners and its traps."""

import copy
import sys
import types
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import yaml

BLOCKS = {
    "A": ("pink", "blue", "red"),
    "B": ("red", "blue", "pink"),
    "C": ("blue", "red", "pink"),
    "D": ("red", "blue", "pink"),
}
MADE: list["Simulator"] = []


class State(Enum):
    ON = 1
    OFF = 0


class Thing:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Light:
    def __init__(self):
        self.on = 0

    def get_state(self):
        return self.on


class Button:
    _is_pressed = False

    def __init__(self, light):
        self.light, self.state, self.prev_is_pressed = light, State.OFF, True


class Robot:
    def __init__(self):
        self.gripper_action, self.target_pos, self.target_orn = -1, np.zeros(3), np.zeros(3)


class Simulator:
    """The drawer follows the y of actions; everything else stays."""

    def __init__(self, configuration, scene):
        self.configuration, self.letter = configuration, scene[-1]
        self.p, self.cid, self.np_random, self.loads, self.closed = object(), 0, None, 0, False
        self.light = Light()
        self.robot = Robot()
        blocks = [Thing(name=f"block_{color}", uid=2 + i) for i, color in enumerate(BLOCKS[self.letter])]
        self.scene = Thing(movable_objects=blocks, buttons=[Button(self.light)], np_random=None)
        self.cameras = [
            Thing(name=name, **{key: values[key] for key in values if key != "name"})
            for name, values in configuration["cameras"].items()
        ]

    def seed(self, seed):
        self.np_random = np.random.default_rng(seed)

    def load(self):
        assert self.scene.np_random is self.np_random
        assert sys.modules["calvin_env.robot"].p is self.p, "the robot must be loaded into this simulator"
        self.loads += 1

    def reset(self, robot_obs, scene_obs):
        self.robot_obs, self.scene_obs = robot_obs, scene_obs
        self.robot.target_pos, self.robot.target_orn = robot_obs[:3].copy(), robot_obs[3:6].copy()
        self.light.on = int(scene_obs[5])
        self.scene.buttons[0].state = State.OFF  # as old versions do
        return self.get_obs()

    def step(self, action):
        if len(action) == 7:
            action[:3] *= 0.02  # as old versions do
            gripper = action[6]
            move = action[1]
        else:
            move, gripper = action[0][1] - self.robot_obs[1], action[2]
        assert gripper in (-1, 1)
        self.robot.gripper_action = gripper
        self.robot_obs[14] = gripper
        self.robot_obs[1] += move
        self.scene_obs[1] -= move
        return self.get_obs(), 0, False, self.get_info()

    def get_obs(self):
        pictures = {camera.name: (camera.height, camera.width) for camera in self.cameras}
        far = {"static": 3.9, "gripper": 0.25}
        return {
            "rgb_obs": {f"rgb_{name}": np.full((*size, 3), 128, np.uint8) for name, size in pictures.items()},
            "depth_obs": {f"depth_{name}": np.full(size, far[name], np.float32) for name, size in pictures.items()},
            "robot_obs": self.robot_obs,
            "scene_obs": self.scene_obs,
        }

    def get_info(self):
        blocks = {}
        for index, block in enumerate(self.scene.movable_objects):
            place = self.scene_obs[6 + 6 * index : 12 + 6 * index]
            blocks[block.name] = {
                "uid": block.uid,
                "current_pos": tuple(place[:3]),
                "current_orn": (0.0, 0.0, 0.0, 1.0),
                "current_lin_vel": (0.0, 0.0, 0.0),
                "current_ang_vel": (0.0, 0.0, 0.0),
                "contacts": ((0, block.uid, 9, -1, -1),),
            }
        return copy.deepcopy(
            {
                "robot_info": {"uid": 0, "contacts": ()},
                "scene_info": {
                    "fixed_objects": {"table": {"uid": 9}},
                    "movable_objects": blocks,
                    "doors": {
                        "base__slide": {"current_state": self.scene_obs[0]},
                        "base__drawer": {"current_state": self.scene_obs[1]},
                    },
                    "lights": {"lightbulb": {"logical_state": 0}, "led": {"logical_state": self.light.on}},
                },
            }
        )

    def close(self):
        self.closed = True


def get_env(folder, show_gui=True, scene=None):
    assert not show_gui
    simulator = Simulator(yaml.safe_load((Path(folder) / ".hydra" / "merged_config.yaml").read_text()), scene)
    MADE.append(simulator)
    return simulator


def get_git_commit_hash(path):
    raise RuntimeError("not a git checkout")


def install(folder: Path, monkeypatch) -> None:
    """Makes ``calvin_env`` importable, with configuration files in `folder`."""
    package = types.ModuleType("calvin_env")
    package.__spec__ = ModuleSpec("calvin_env", None)
    package.__file__ = str(folder / "calvin_env" / "__init__.py")
    package.__path__ = []
    environment = types.ModuleType("calvin_env.envs.play_table_env")
    environment.calvin_env, environment.get_env = package, get_env
    environment.get_git_commit_hash = get_git_commit_hash
    robot = types.ModuleType("calvin_env.robot")
    robot.p = object()
    Robot.__module__ = "calvin_env.robot"
    for module in (package, environment, robot, types.ModuleType("calvin_env.envs")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    static = {"name": "static", "fov": 10, "nearval": 0.01, "farval": 10, "height": 200, "width": 200, "aspect": 1}
    static |= {"look_from": [2.87, -2.17, 2.56], "look_at": [-0.03, -0.03, 0.39], "up_vector": [0.4, 0.23, 0.89]}
    gripper = {**static, "name": "gripper", "fov": 75, "farval": 2, "height": 84, "width": 84}
    files = {
        "cameras/cameras/static": static,
        "cameras/cameras/gripper": gripper,
        "env/play_table_env": {"use_egl": True, "cameras": "${cameras}"},
        "scene/calvin_scene_D": {"objects": {"z": 1, "a": 2}},
        "robot/panda": {"filename": "short", "force": 200},
        "robot/panda_longer_finger": {"defaults": ["panda"], "filename": "long"},
    }
    for name, values in files.items():
        file = folder / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False))
