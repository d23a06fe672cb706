"""CALVIN's original simulator (``calvin_env``, PyBullet) behind the same interface as the play table.

Policies, evaluation and metrics do not notice which of the two they act in. The simulator itself is not part of this package
and needs an environment of its own: see `MissingCalvin`.

Source: "CALVIN: A Benchmark for Language-Conditioned Policy Learning for Long-Horizon Robot Manipulation Tasks" (Mees et al.,
2022), https://github.com/mees/calvin_env.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import string
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from lightning_robot.envs import calvin_tasks
from lightning_robot.envs.checks import ActionOutOfBounds, CameraSizes, among, finite_vector, noted_sizes, picture_sizes
from lightning_robot.envs.play_table_model import SCENES
from lightning_robot.envs.play_table_starts import known_task, sample_scene
from lightning_robot.features import Features, calvin_features
from lightning_robot.geometry import Camera, calvin_gripper_pose, look_at
from lightning_robot.points import CloudRecipe, cloud_from_depth

OBSERVATIONS = ("state", "point_cloud", "depth", "images", "environment_state")
NATIVE_SIZES = {"static": (200, 200), "gripper": (84, 84)}
PIXEL_OFFSETS = {"tiny": (0.0, 1.0), "egl": (0.5, 0.5)}  # where each renderer samples a pixel
START = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0),
)
"""`robot_obs` that CALVIN's evaluation begins with."""


class MissingCalvin(ImportError):
    """The original simulator is not importable."""

    def __init__(self) -> None:
        super().__init__(
            "lightning_robot/Calvin-v0 needs the original simulator, and no module calvin_env is importable here. It wants "
            "numpy below 2 and the old gym, so give it a virtual environment of its own: install this package there together "
            "with 'numpy<2', 'gym==0.26.2', pybullet, hydra-core, numpy-quaternion, gitpython, scipy, pandas and "
            "'opencv-python<4.12', and put a clone of https://github.com/mees/calvin_env on PYTHONPATH. "
            "lightning_robot/PlayTable-v0 has the same tasks, observations and actions and needs none of this."
        )


class OracleDisagrees(RuntimeError):
    """Our success tests and the original's differ: one of them has changed."""


class Calvin(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """The original CALVIN environment.

    Actions, observations, `info` and `match` are those of `lightning_robot.envs.play_table.PlayTable`; the gripper's command is
    thresholded to the exact -1 or +1 that the simulator insists on. The robot starts where CALVIN's evaluation starts; the seed
    draws the scene, such that the task can be done.

    The same seed gives the same episode to the last bit, whatever ran before, also with several instances in one process.

    Args:
        folder: a split of a CALVIN data set: its ``.hydra/merged_config.yaml`` configures robot and cameras. The
            simulator's own defaults, which are the same, when None.
        scene: "A", "B", "C" or "D".
        tasks: task ids from which `reset` draws; the eight that move no block when None.
        task: one task id, the same as ``tasks=(task,)``.
        actions: "relative" or "absolute".
        observations: what an observation holds, of "state", "point_cloud", "depth", "images" and "environment_state".
        cloud: fields of `lightning_robot.points.CloudRecipe`; the pixel offset follows the renderer unless named.
        camera_sizes: pixels per camera, or of both: a number or (height, width); CALVIN's own 200 and 84 by default.
        max_steps: control steps after which an episode is truncated; CALVIN's evaluation allows 360.
        render_mode: "rgb_array" (the static camera) or None.
        use_egl: OpenGL pictures (needs a GPU driver) instead of the software renderer's.
        check_oracle: compare every success test with the original's at every step.

    Raises:
        MissingCalvin: says how to set it up.
        ValueError: an argument has a value it cannot have.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    control_rate = 30.0

    def __init__(
        self,
        folder: str | Path | None = None,
        scene: str = "D",
        tasks: Sequence[str] | None = None,
        task: str | None = None,
        actions: str = "relative",
        observations: Sequence[str] = ("state", "point_cloud"),
        cloud: Mapping[str, Any] | None = None,
        camera_sizes: CameraSizes | None = None,
        max_steps: int = 360,
        render_mode: str | None = None,
        use_egl: bool = False,
        check_oracle: bool = False,
    ) -> None:
        if importlib.util.find_spec("calvin_env") is None:
            raise MissingCalvin
        for name, value, choices in (
            ("scene", scene, tuple(SCENES)),
            ("actions", actions, ("relative", "absolute")),
            ("render_mode", render_mode, (None, "rgb_array")),
            *(("observations", value, OBSERVATIONS) for value in observations),
        ):
            among(name, value, choices)
        if folder is not None and not (Path(folder) / ".hydra" / "merged_config.yaml").is_file():
            raise ValueError(
                f"{folder} has no .hydra/merged_config.yaml: name a split of a CALVIN data set, such as task_D_D/validation."
            )
        if task is not None and tasks is not None:
            raise ValueError("Give task or tasks, not both.")
        self.tasks = tuple(known_task(name) for name in ((task,) if task else tasks or calvin_tasks.BLOCK_FREE_TASKS))
        self.folder, self.scene, self.max_steps, self.render_mode = folder, scene, max_steps, render_mode
        self.relative = actions == "relative"
        self.observations = tuple(observations)
        self.renderer = "egl" if use_egl else "tiny"
        self.recipe = CloudRecipe.from_dict({"pixel_offset": PIXEL_OFFSETS[self.renderer], **(cloud or {})})
        self.camera_sizes = NATIVE_SIZES | picture_sizes(camera_sizes, NATIVE_SIZES)
        for name in self.camera_sizes:
            among("camera_sizes", name, tuple(NATIVE_SIZES))
        self.check_oracle = check_oracle
        self._simulator: Any = None
        self._give_back: Any = None
        self._task, self._steps = self.tasks[0], 0
        self._start: calvin_tasks.Info = {}
        self._original_start: Any = None
        self._raw: Mapping[str, Any] = {}
        self._declare_spaces()

    # --- what is offered ---------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What this environment offers to a policy."""
        wants, sizes = self.observations, self.camera_sizes
        features = calvin_features(
            self.recipe.points if "point_cloud" in wants else 0,
            self.recipe.colors,
            self.recipe.to_dict(),
            relative=self.relative,
            cameras=sizes if "images" in wants else None,
            depth_cameras=sizes if "depth" in wants else None,
            environment_state="environment_state" in wants,
            source=self.fingerprint,
        )
        if "state" in wants:
            return features
        offered = {key: value for key, value in features.observations.items() if key != "observation.state"}
        return dataclasses.replace(features, observations=offered)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside the seed, as plain strings."""
        return {
            "simulator": "lightning_robot/Calvin-v0",
            "scene": self.scene,
            "calvin_env": _calvin_version(),
            "pybullet": _installed_version("pybullet"),
            "cameras": ", ".join(f"{name} {height}x{width}" for name, (height, width) in sorted(self.camera_sizes.items())),
            "renderer": self.renderer,
        }

    @property
    def task(self) -> str:
        """Id of the task of this episode."""
        return self._task

    def task_sentence(self, task: str) -> str:
        """The instruction that CALVIN evaluates the task with."""
        return calvin_tasks.SENTENCES[known_task(task)]

    def task_paraphrases(self, task: str) -> tuple[str, ...]:
        """Sentences to train with."""
        return calvin_tasks.PARAPHRASES[known_task(task)]

    def expert(self, random: np.random.Generator | None = None) -> Any:
        """The play table's scripted expert for the task of this episode; it needs nothing that CALVIN does not show.

        Raises:
            ValueError: the task has no expert.
        """
        from lightning_robot.envs.play_table_experts import Expert

        return Expert(self, self._task)  # type: ignore[arg-type]

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: its observations, its cloud's recipe (but this renderer's pixel offset), the
        sizes of the pictures, the form of the actions. Call it before the first reset.

        Raises:
            ValueError: the policy was trained on an observation that CALVIN does not have.
        """
        wants = []
        for key, feature in features.observations.items():
            kind, _, camera = key.removeprefix("observation.").partition(".")
            among(f"{key} of the policy", kind, OBSERVATIONS)
            if camera:
                among(f"{key} of the policy", camera, tuple(NATIVE_SIZES))
                self.camera_sizes[camera] = (feature.shape[-2], feature.shape[-1])
            wants.append(kind)
        self.observations = tuple(dict.fromkeys(wants))
        offset = self.recipe.pixel_offset
        if features.cloud is not None:
            self.recipe = dataclasses.replace(CloudRecipe.from_dict(features.cloud), pixel_offset=offset)
        elif (cloud := features.observations.get("observation.point_cloud")) is not None:
            self.recipe = dataclasses.replace(self.recipe, points=cloud.shape[0], colors=cloud.shape[1] == 6)
        self.camera_sizes |= noted_sizes(features.source.get("cameras", ""), NATIVE_SIZES)
        if features.action_semantics:
            self.relative = features.action_semantics.startswith("relative")
        self.close()  # other cameras are another simulator
        self._declare_spaces()

    def _declare_spaces(self) -> None:
        if self.relative:
            self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        else:
            high = np.array([1.5, 1.5, 1.5, 2 * np.pi, 2 * np.pi, 2 * np.pi, 1.0], np.float32)
            self.action_space = spaces.Box(-high, high, dtype=np.float32)
        offered: dict[str, spaces.Space] = {"task": spaces.Text(200, charset=string.ascii_letters + string.digits + " ,.'-")}
        for key, feature in self.features.observations.items():
            low, high_value = (0, 255) if feature.dtype == "uint8" else (-np.inf, np.inf)
            offered[key] = spaces.Box(low, high_value, feature.shape, np.dtype(feature.dtype).type)
        self.observation_space = spaces.Dict(offered)

    # --- episodes ----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes task and start state.
            options: ``task``, ``robot_obs`` (15,) and ``scene_obs`` (24,) in the scene's own order of blocks.

        Returns:
            Observation and info (``task``, ``success``, ``failure``).
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := set(options) - {"task", "robot_obs", "scene_obs"}:
            raise ValueError(f"reset has no option {', '.join(sorted(unknown))}; it has task, robot_obs and scene_obs.")
        drawn = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        task = known_task(options.get("task") or drawn)
        scene = options.get("scene_obs")
        if scene is None:
            scene = sample_scene(SCENES[self.scene], task, self.np_random)
        robot = options.get("robot_obs")
        robot_obs = finite_vector("robot_obs", START if robot is None else robot, 15)
        self._raw = _reset(self._open(), robot_obs, finite_vector("scene_obs", scene, 24))
        self.begin_task(task)
        return self._observe(), {"task": task, "success": False, "failure": None}

    def begin_task(self, task: str) -> None:
        """Makes the present state the start of a task, without a reset (for chains of tasks)."""
        self._task, self._steps = known_task(task), 0
        self._original_start = self._open().get_info()
        self._start = convert_info(self._original_start)

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step (1/30 s).

        Returns:
            Observation; reward 1.0 on success, else 0.0; whether the task is solved; whether the time is up; info with
            ``task``, ``success`` and, at the end of an unsuccessful episode, the name of its ``failure``.

        Raises:
            ActionOutOfBounds: the action is malformed or absurdly large.
        """
        command = self._checked(action)
        gripper = 1 if command[6] > 0 else -1
        if self.relative:
            self._raw, _, _, info = self._open().step(np.append(command[:6], gripper))
        else:
            self._raw, _, _, info = self._open().step((command[:3].copy(), command[3:6].copy(), gripper))
        self._steps += 1
        now = convert_info(info)
        success = bool(calvin_tasks.solved(self._start, now, (self._task,)))
        if self.check_oracle:
            self._compare(info, now)
        truncated = not success and self._steps >= self.max_steps
        result = {"task": self._task, "success": success, "failure": "timeout" if truncated else None}
        return self._observe(), float(success), success, truncated, result

    def info(self) -> calvin_tasks.Info:
        """The whole state as the success tests read it."""
        return convert_info(self._open().get_info())

    def robot_obs(self) -> NDArray[np.float64]:
        """CALVIN's proprioception (15,)."""
        return np.array(self._raw["robot_obs"], np.float64)

    def scene_obs(self) -> NDArray[np.float64]:
        """CALVIN's scene state (24,), blocks in the scene's own order."""
        return np.array(self._raw["scene_obs"], np.float64)

    @property
    def target_pose(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position and Euler angles that the controller is heading for (copies)."""
        robot = self._open().robot
        return np.array(robot.target_pos, np.float64), np.array(robot.target_orn, np.float64)

    def render(self) -> NDArray[np.uint8] | None:
        """The static camera's picture, (H, W, 3) uint8; None without a render mode."""
        if self.render_mode is None:
            return None
        return np.array(self._raw["rgb_obs"]["rgb_static"], np.uint8)

    def close(self) -> None:
        """Leaves the simulator to the next instance; it is never disconnected (see `_take`)."""
        if self._give_back is not None:
            self._give_back()
        self._simulator = self._give_back = None

    def _checked(self, action: ArrayLike) -> NDArray[np.float64]:
        command = np.array(action, dtype=np.float64)  # a copy: old versions of the simulator scale their argument in place
        bound = 10.0 if self.relative else 2 * np.pi
        if command.shape != (7,) or not (np.abs(command) <= bound).all():
            form = "relative" if self.relative else "absolute"
            raise ActionOutOfBounds(
                f"A {form} action has shape (7,) and values within ±{bound:g}; got {np.array2string(command, precision=3)}. "
                f"Is it un-normalised, and of the {form} kind? (actions=... chooses.)"
            )
        return command

    def _compare(self, info: Mapping[str, Any], now: calvin_tasks.Info) -> None:
        ours = calvin_tasks.solved(self._start, now)
        theirs = set(_oracle().get_task_info(self._original_start, info))
        if ours != theirs:
            raise OracleDisagrees(
                f"Step {self._steps} of {self._task}: the original finds {sorted(theirs)} solved, "
                f"lightning_robot.envs.calvin_tasks {sorted(ours)}."
            )

    # --- observations ------------------------------------------------------------------------------------------------------

    @property
    def _needed_cameras(self) -> tuple[str, ...]:
        """Cameras that something is made of: each costs tens of milliseconds."""
        needed = set(self.recipe.cameras) if "point_cloud" in self.observations else set()
        if {"depth", "images"} & set(self.observations):
            needed |= set(self.camera_sizes)
        if self.render_mode is not None:
            needed.add("static")
        return tuple(name for name in NATIVE_SIZES if name in needed)

    def _observe(self) -> dict[str, Any]:
        raw, wants = self._raw, self.observations
        observation: dict[str, Any] = {"task": calvin_tasks.SENTENCES[self._task]}
        if "state" in wants:
            observation["observation.state"] = np.array(raw["robot_obs"], np.float32)
        if "environment_state" in wants:
            scene = np.array(raw["scene_obs"], np.float32)
            blocks = [color for color, _ in SCENES[self.scene].blocks]
            order = [slice(start, start + 6) for start in (6 + 6 * blocks.index(color) for color in ("red", "blue", "pink"))]
            observation["observation.environment_state"] = np.concatenate([scene[:6], *(scene[part] for part in order)])
        if "point_cloud" in wants:
            cameras = self._open().cameras
            observation["observation.point_cloud"] = cloud_from_depth(
                {name: np.asarray(raw["depth_obs"][f"depth_{name}"], np.float32) for name in self.recipe.cameras},
                {camera.name: _camera(camera) for camera in cameras},
                {camera.name: _pose(camera, raw["robot_obs"]) for camera in cameras},
                {name: raw["rgb_obs"][f"rgb_{name}"] for name in self.recipe.cameras} if self.recipe.colors else None,
                self.recipe,
            )
        for name in self.camera_sizes:
            if "depth" in wants:
                observation[f"observation.depth.{name}"] = np.array(raw["depth_obs"][f"depth_{name}"], np.float32)[None]
            if "images" in wants:
                picture = np.asarray(raw["rgb_obs"][f"rgb_{name}"], np.uint8)
                observation[f"observation.images.{name}"] = np.ascontiguousarray(picture.transpose(2, 0, 1))
        return observation

    # --- the simulator -----------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        if self._simulator is None:
            sizes = tuple((name, *self.camera_sizes[name]) for name in self._needed_cameras)
            key = (str(self.folder), self.scene, sizes, self.renderer)
            self._simulator = _take(key, self.folder, self.scene, sizes, self.renderer == "egl")
            self._give_back = weakref.finalize(self, _FREE[key].append, self._simulator)
        return self._simulator


_FREE: dict[Any, list[Any]] = {}
_ALL: list[Any] = []


def _take(key: Any, folder: str | Path | None, scene: str, sizes: tuple[tuple[str, int, int], ...], use_egl: bool) -> Any:
    """A simulator that no other instance uses, made if there is none.

    Simulators are kept for the life of the process: one that is garbage-collected disconnects by client number, and so cuts
    off a newer one that has been given the same number.
    """
    free = _FREE.setdefault(key, [])
    if free:
        return free.pop()
    simulator = _make(folder, scene, sizes, use_egl)
    _ALL.append(simulator)
    return simulator


def _make(folder: str | Path | None, scene: str, sizes: tuple[tuple[str, int, int], ...], use_egl: bool) -> Any:
    import yaml

    module = _calvin_module()
    if folder is None:
        configuration = _default_configuration(Path(module.calvin_env.__file__).parents[1] / "conf")
    else:
        configuration = yaml.safe_load((Path(folder) / ".hydra" / "merged_config.yaml").read_text())
    configuration["env"]["use_egl"] = use_egl  # get_env has no argument for it
    cameras = configuration["cameras"]
    configuration["cameras"] = {
        name: {**cameras[name], "height": height, "width": width, "aspect": width / height} for name, height, width in sizes
    }
    with tempfile.TemporaryDirectory() as copy:
        file = Path(copy) / ".hydra" / "merged_config.yaml"
        file.parent.mkdir()
        # The order of entries is that of the state vector.
        file.write_text(yaml.safe_dump(configuration, sort_keys=False))
        simulator = module.get_env(copy, show_gui=False, scene=f"calvin_scene_{scene}")
    names = [thing.name for thing in simulator.scene.movable_objects]
    expected = [f"block_{color}" for color, _ in SCENES[scene].blocks]
    if names != expected:
        raise RuntimeError(
            f"calvin_env has the blocks of scene {scene} in the order {names}; its state vectors have {expected}."
        )
    return simulator


def _default_configuration(folder: Path) -> dict[str, Any]:
    """What the published data were recorded with, put together from the simulator's own configuration files."""
    import yaml

    if not folder.is_dir():
        raise ValueError(
            f"calvin_env has no {folder} beside it (installed without its repository?): put a clone on PYTHONPATH, or give "
            "folder, a split of a CALVIN data set."
        )

    def read(name: str) -> dict[str, Any]:
        values = yaml.safe_load((folder / f"{name}.yaml").read_text())
        parents = values.pop("defaults", [])
        for parent in parents:
            values = {**read(f"{name.rpartition('/')[0]}/{parent}"), **values}
        return values

    return {
        "cameras": {name: read(f"cameras/cameras/{name}") for name in NATIVE_SIZES},
        "env": read("env/play_table_env"),
        "scene": read("scene/calvin_scene_D"),
        "robot": read("robot/panda_longer_finger"),
        "seed": 0,
        "use_vr": False,
        "data_path": "data",
    }


def _calvin_module() -> Any:
    try:
        module: Any = importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise ImportError(f"calvin_env is here, but does not import: {error}. {MissingCalvin()}") from error
    original = module.get_git_commit_hash
    if not getattr(original, "forgiving", False):

        def commit(path: Path) -> str:  # for a log line alone; fails outside a git checkout
            try:
                return str(original(path))
            except Exception:
                return "unknown"

        commit.forgiving = True  # type: ignore[attr-defined]
        module.get_git_commit_hash = commit
    return module


def _calvin_version() -> str:
    module = _calvin_module()
    return str(module.get_git_commit_hash(Path(module.calvin_env.__file__)))


def _installed_version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _oracle() -> Any:
    """The original's success tests, from its own configuration."""
    import yaml

    module = _calvin_module()
    file = Path(module.calvin_env.__file__).parents[1] / "conf" / "tasks" / "new_playtable_tasks.yaml"
    tasks = yaml.safe_load(file.read_text())["tasks"]
    if set(tasks) != set(calvin_tasks.TASKS):
        different = sorted(set(tasks) ^ set(calvin_tasks.TASKS))
        raise OracleDisagrees(f"The original has other tasks than lightning_robot.envs.calvin_tasks: {', '.join(different)}.")
    return importlib.import_module("calvin_env.envs.tasks").Tasks(tasks)


def _reset(simulator: Any, robot_obs: NDArray[np.float64], scene_obs: NDArray[np.float64]) -> Mapping[str, Any]:
    """Starts from a freshly loaded scene (0.15 s), so that nothing of the episode before is left.

    The simulator's own reset keeps velocities, contacts, the gripper's command and the button's past.
    """
    simulator.seed(0)
    simulator.scene.np_random = simulator.np_random
    robot: Any = importlib.import_module(type(simulator.robot).__module__)
    shared, robot.p = robot.p, simulator.p  # the robot's white base would always go to the process's first simulator
    try:
        simulator.load()
    finally:
        robot.p = shared
    simulator.robot.gripper_action = 1 if robot_obs[14] > 0 else -1
    raw = simulator.reset(robot_obs=robot_obs.copy(), scene_obs=scene_obs.copy())
    for button in simulator.scene.buttons:
        button.prev_is_pressed = button._is_pressed
        if button.light is not None:  # an old version starts at "off" whatever the light is
            button.state = type(button.state)(button.light.get_state())
    return raw


def convert_info(info: Mapping[str, Any]) -> calvin_tasks.Info:
    """The simulator's own info in the form that `lightning_robot.envs.calvin_tasks` reads."""
    scene, robot = info["scene_info"], info["robot_info"]
    names = {robot["uid"]: "robot"}
    for kind in ("fixed_objects", "movable_objects"):
        names.update({thing["uid"]: name for name, thing in scene[kind].items()})

    def touching(contacts: Any) -> list[tuple[str, int]]:
        return sorted({(names.get(contact[2], "plane"), int(contact[4])) for contact in contacts or ()})

    return {
        "blocks": {
            name: {
                "pos": tuple(thing["current_pos"]),
                "quat": tuple(thing["current_orn"]),
                "lin_vel": tuple(thing["current_lin_vel"]),
                "ang_vel": tuple(thing["current_ang_vel"]),
                "contacts": touching(thing["contacts"]),
            }
            for name, thing in scene["movable_objects"].items()
        },
        "robot_contacts": touching(robot["contacts"]),
        "doors": {name: float(door["current_state"]) for name, door in scene["doors"].items()},
        "lights": {name: int(light["logical_state"]) for name, light in scene["lights"].items()},
    }


def _camera(camera: Any) -> Camera:
    return Camera(camera.name, camera.width, camera.height, float(camera.fov), float(camera.nearval), float(camera.farval))


def _pose(camera: Any, robot_obs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Camera-to-world (4, 4): the static camera's from its own settings, the gripper camera's from the robot's state."""
    if camera.name == "gripper":
        return calvin_gripper_pose(robot_obs)
    return look_at(camera.look_from, camera.look_at, camera.up_vector)
