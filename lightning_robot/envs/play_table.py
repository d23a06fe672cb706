"""The play table: CALVIN's table, robot, cameras, actions and tasks in MuJoCo, built from primitives.

Differences from CALVIN: MuJoCo instead of PyBullet at four steps of 1/120 s per control step, shapes from boxes and capsules,
depth by ray casting. State vectors, geometry, 30 Hz control, target-relative actions, lights and success tests follow it
("CALVIN: A Benchmark for Language-Conditioned Policy Learning for Long-Horizon Robot Manipulation Tasks", 2022).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from lightning_robot.envs import calvin_tasks
from lightning_robot.envs.checks import ActionOutOfBounds, CameraSizes, among, finite_vector, noted_sizes, picture_sizes
from lightning_robot.envs.panda import FINGER_OPEN, PandaKinematics
from lightning_robot.envs.play_table_experts import Expert
from lightning_robot.envs.play_table_model import LIGHT_COLORS, POSITION_UNIT, ROTATION_UNIT, SCENES, play_table_xml
from lightning_robot.envs.play_table_starts import known_task, sample_scene, sample_tool_pose
from lightning_robot.envs.ray_camera import RayCamera, camera_mounts
from lightning_robot.features import Feature, Features, calvin_features
from lightning_robot.geometry import euler_to_matrix, matrix_to_euler, matrix_to_quaternion, quaternion_to_matrix
from lightning_robot.points import CloudRecipe, cloud_from_depth

Array = NDArray[np.float64]

CONTROL_RATE = 30.0
SUBSTEPS = 4
FAR = {"static": 10.0, "gripper": 2.0}  # m, CALVIN's
OBSERVATIONS = ("state", "point_cloud", "depth", "segmentation", "images", "environment_state")
SEGMENTS = (
    *("background", "table", "button", "switch", "slider", "drawer", "led", "lightbulb", "plank", "robot"),
    *("block_red", "block_blue", "block_pink"),
)
"""Classes of a segmentation picture by number."""
_SLIDER, _DRAWER, _BUTTON, _SWITCH = range(4)
_JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
_PARTS = {"slider": _SLIDER, "drawer": _DRAWER, "button": _BUTTON, "switch": _SWITCH}
# Part that the task moves, and the sign of its joint's motion.
_GOALS = {
    "open_drawer": ("drawer", 1),
    "close_drawer": ("drawer", -1),
    "move_slider_left": ("slider", 1),
    "move_slider_right": ("slider", -1),
    "turn_on_led": ("button", 1),
    "turn_off_led": ("button", 1),
    "turn_on_lightbulb": ("switch", 1),
    "turn_off_lightbulb": ("switch", -1),
}
# MuJoCo goes back to its initial state by itself when one of these happens.
_UNSTABLE = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_RELATIVE_BOUND = np.array([10.0] * 7)
_ABSOLUTE_LOW = np.array([-1.3, -1.4, 0.0, -2 * math.pi, -2 * math.pi, -2 * math.pi, -1.0])
_ABSOLUTE_HIGH = np.array([1.3, 1.3, 1.5, 2 * math.pi, 2 * math.pi, 2 * math.pi, 1.0])


class PlayTable(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """CALVIN's play table.

    Relative actions (x, y, z, roll, pitch, yaw, gripper) move the *target* pose by 0.02 m and 0.05 rad per unit; nothing is
    clipped, as in CALVIN, so a policy may exceed 1 a little. Beyond 10 an action is taken for a mistake of units and refused.
    Absolute actions are the target pose itself (m, rad). A gripper value above 0 opens, any other closes.

    The same seed gives the same episode to the last bit, whatever ran before. What random starts vary is told in
    `lightning_robot.envs.play_table_starts`.

    Args:
        scene: "A", "B", "C" or "D".
        tasks: task ids from which `reset` draws; the eight that move no block when None.
        task: one task id, the same as ``tasks=(task,)``.
        actions: "relative" or "absolute".
        observations: what an observation holds: "state", "point_cloud", "depth", "segmentation", "images" (with
            `camera_sizes`) and "environment_state". Only these are computed.
        cloud: fields of `lightning_robot.points.CloudRecipe`.
        camera_sizes: pixels per camera, or of both: a number for a square, or (height, width). CALVIN's are 200 and 84.
        max_steps: control steps after which an episode is truncated.
        render_mode: "rgb_array" or None.
        renderer: "rays" (flat shading, needs no OpenGL) or "opengl", for `render` and for "images".

    Raises:
        ValueError: an argument has a value it cannot have.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    skip_observation = False  # set it before a step whose observation nobody reads: only the task comes back, and fast

    def __init__(
        self,
        scene: str = "D",
        tasks: Sequence[str] | None = None,
        task: str | None = None,
        actions: str = "relative",
        observations: Sequence[str] = ("state", "point_cloud"),
        cloud: Mapping[str, Any] | None = None,
        camera_sizes: CameraSizes | None = None,
        max_steps: int = 120,
        render_mode: str | None = None,
        renderer: str = "rays",
    ) -> None:
        among("scene", scene, SCENES)
        among("actions", actions, ("relative", "absolute"))
        among("renderer", renderer, ("rays", "opengl"))
        among("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        for name in observations:
            among("observations", name, OBSERVATIONS)
        if task is not None and tasks is not None:
            raise ValueError("Give task or tasks, not both.")
        if isinstance(tasks, str):
            raise ValueError(f"tasks is a list of task ids; for one, write task={tasks!r}.")
        if max_steps < 1:
            raise ValueError(f"max_steps: {max_steps}; an episode has at least one step.")
        self.tasks = tuple(known_task(name) for name in ((task,) if task else tasks or calvin_tasks.BLOCK_FREE_TASKS))
        self.scene, self.max_steps, self.render_mode, self._renderer = scene, max_steps, render_mode, renderer
        self.relative = actions == "relative"
        self.observations = tuple(observations)
        self.recipe = CloudRecipe.from_dict(cloud or {})
        self.camera_sizes = picture_sizes(camera_sizes, ("static", "gripper"), 84)
        for name in (*self.camera_sizes, *self.recipe.cameras):
            among("camera_sizes" if name in self.camera_sizes else "cloud cameras", name, FAR)

        self._scene = SCENES[scene]
        self._xml = play_table_xml(self._scene)
        self._model = mujoco.MjModel.from_xml_string(self._xml)
        self._data = mujoco.MjData(self._model)
        self._arm = PandaKinematics()
        self._index_model()
        self._cameras: dict[tuple[str, int, int], RayCamera] = {}
        self._gl: dict[tuple[int, int], mujoco.Renderer] = {}
        self._target_position, self._target_euler = np.zeros(3), np.zeros(3)
        self._joint_target = np.zeros(7)
        self._gripper = 1.0
        self._lights = {"lightbulb": 0, "led": 0}
        self._pressed = self._switched = False
        self._task, self._steps = self.tasks[0], 0
        self._start: calvin_tasks.Info = {}
        self._touched, self._forward, self._backward = False, 0.0, 0.0
        self._joint_start: Array = np.zeros(4)
        self._declare_spaces()

    # --- what is offered ---------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What this environment offers to a policy."""
        wants = self.observations
        sizes = self.camera_sizes
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
        offered = dict(features.observations)
        if "state" not in wants:
            del offered["observation.state"]
        if "segmentation" in wants:
            for name, size in sizes.items():
                offered[f"observation.segmentation.{name}"] = Feature((1, *size), dtype="uint8")
        mounts = camera_mounts(self._model, sorted(sizes)) if {"images", "depth"} & set(wants) else {}
        return dataclasses.replace(features, observations=offered, cameras=mounts)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside the seed, as plain strings."""
        return {
            "simulator": "lightning_robot/PlayTable-v0",
            "scene": self.scene,
            "model": hashlib.sha256(self._xml.encode()).hexdigest()[:16],
            "mujoco": mujoco.__version__,
            "cameras": ", ".join(f"{name} {height}x{width}" for name, (height, width) in sorted(self.camera_sizes.items())),
            "renderer": self._renderer,
        }

    @property
    def control_rate(self) -> float:
        """Control steps per second."""
        return CONTROL_RATE

    @property
    def task(self) -> str:
        """Id of the task of this episode."""
        return self._task

    def task_sentence(self, task: str) -> str:
        """The instruction that CALVIN evaluates the task with."""
        return calvin_tasks.SENTENCES[known_task(task)]

    def task_paraphrases(self, task: str) -> tuple[str, ...]:
        """Other ways to say the instruction, for training."""
        return calvin_tasks.PARAPHRASES[known_task(task)]

    def expert(self, random: np.random.Generator | None = None) -> Expert:
        """The scripted expert for the task of this episode; its ``act()`` gives the action (7,) for the present state.

        Args:
            random: not needed by these experts, which are deterministic.

        Raises:
            ValueError: the task has no expert.
        """
        return Expert(self, self._task)

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: the observations it has, its cloud's recipe, picture sizes, action form.

        Raises:
            ValueError: the policy was trained on an observation that the play table does not have.
        """
        wants: list[str] = []
        for key, feature in features.observations.items():
            kind, _, camera = key.removeprefix("observation.").partition(".")
            among(f"{key} of the policy", kind, OBSERVATIONS)
            if camera:
                among(f"{key} of the policy", camera, FAR)
                self.camera_sizes[camera] = (feature.shape[-2], feature.shape[-1])
            if kind not in wants:
                wants.append(kind)
        if features.cloud is not None:
            # Where in a pixel a ray passes is this renderer's own affair: its centre.
            self.recipe = dataclasses.replace(CloudRecipe.from_dict(features.cloud), pixel_offset=(0.5, 0.5))
        elif "observation.point_cloud" in features.observations:
            points, columns = features.observations["observation.point_cloud"].shape
            self.recipe = dataclasses.replace(self.recipe, points=points, colors=columns == 6)
        self.camera_sizes |= noted_sizes(features.source.get("cameras", ""), FAR)
        if features.action_semantics:
            self.relative = features.action_semantics.startswith("relative")
        self.observations = tuple(wants)
        self._declare_spaces()

    def _declare_spaces(self) -> None:
        for name in self.recipe.cameras:
            self.camera_sizes.setdefault(name, (84, 84))
        if self.relative:
            self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        else:
            self.action_space = spaces.Box(_ABSOLUTE_LOW.astype(np.float32), _ABSOLUTE_HIGH.astype(np.float32))
        offered: dict[str, spaces.Space] = {"task": spaces.Text(200, charset=string.ascii_letters + string.digits + " ,.'-")}
        for key, feature in self.features.observations.items():
            low, high = (0, 255) if feature.dtype == "uint8" else (-np.inf, np.inf)
            offered[key] = spaces.Box(low, high, feature.shape, np.dtype(feature.dtype))
        self.observation_space = spaces.Dict(offered)

    # --- episodes ----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes task, start state and so, with the actions, the whole episode.
            options: ``task``, ``robot_obs`` (15,) and ``scene_obs`` (24,), each instead of a random one.

        Returns:
            Observation and info (``task``, ``success``, ``failure``).
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := set(options) - {"task", "robot_obs", "scene_obs"}:
            raise ValueError(f"reset has no option {', '.join(sorted(unknown))}; it has task, robot_obs and scene_obs.")
        drawn = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        self._task = known_task(options.get("task") or drawn)
        position, euler = sample_tool_pose(self.np_random)
        robot, scene = options.get("robot_obs"), options.get("scene_obs")
        mujoco.mj_resetData(self._model, self._data)
        if robot is None:
            joints = self._arm.inverse(position, euler, self._arm.rest, iterations=60)
            self._place_robot(joints, 2 * FINGER_OPEN, 1.0)
        else:
            robot = finite_vector("robot_obs", robot, 15)
            self._place_robot(robot[7:14], float(robot[6]), 1.0 if robot[14] > 0 else -1.0)
        if scene is None:
            scene = sample_scene(self._scene, self._task, self.np_random)
        self._place_scene(finite_vector("scene_obs", scene, 24))
        mujoco.mj_step(self._model, self._data)
        mujoco.mj_forward(self._model, self._data)  # contacts of a block that was placed exactly on a surface
        self._arm.forward(self._data.qpos[self._arm_qpos])
        self._target_position[:], self._target_euler[:] = self._arm.position, self._arm.euler()
        self._joint_target[:] = self._data.ctrl[self._arm_control]
        self.begin_task(self._task)
        return self._observe(), {"task": self._task, "success": False, "failure": None}

    def state_fingerprint(self) -> str:
        """Digest of the simulation's whole state, lights included."""
        data = self._data
        parts = (data.time, data.qpos, data.qvel, data.act, data.ctrl, data.qacc_warmstart, tuple(self._lights.values()))
        return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()

    def begin_task(self, task: str) -> None:
        """Makes the present state the start of a task, without a reset (for chains of tasks)."""
        self._task, self._steps = known_task(task), 0
        self._start = calvin_tasks.copy_info(self.info())
        self._joint_start = self._data.qpos[self._part_qpos].copy()
        self._touched, self._forward, self._backward = False, 0.0, 0.0

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step (1/30 s).

        Returns:
            Observation; reward 1.0 on success, else 0.0; whether the task is solved; whether the time is up; info with
            ``task``, ``success`` and, at the end of an unsuccessful episode, the name of its ``failure``.

        Raises:
            ActionOutOfBounds: the action is malformed or absurdly large.
        """
        command = self._checked(action)
        if self.relative:
            self._target_position += POSITION_UNIT * command[:3]
            self._target_euler += ROTATION_UNIT * command[3:6]
        else:
            self._target_position[:], self._target_euler[:] = command[:3], command[3:6]
        self._gripper = 1.0 if command[6] > 0 else -1.0
        data = self._data
        self._joint_target = self._arm.inverse(self._target_position, self._target_euler.tolist(), self._joint_target)
        data.ctrl[self._arm_control] = self._joint_target
        data.ctrl[self._finger_control] = FINGER_OPEN if self._gripper > 0 else 0.0
        mujoco.mj_step(self._model, data, SUBSTEPS)
        self._arm.forward(data.qpos[self._arm_qpos])
        self._switch_lights()
        self._steps += 1
        self._watch()
        success = self._is_solved()
        unstable = any(data.warning[kind].number for kind in _UNSTABLE)
        success = success and not unstable
        truncated = unstable or (not success and self._steps >= self.max_steps)
        failure = "simulation_unstable" if unstable else self._name_failure() if truncated else None
        info = {"task": self._task, "success": success, "failure": failure}
        return self._observe(), float(success), success, truncated, info

    def _checked(self, action: ArrayLike) -> Array:
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (7,):
            raise ActionOutOfBounds(f"An action has shape (7,): {', '.join(_NAMES)}; got {command.shape}.")
        low, high = (-_RELATIVE_BOUND, _RELATIVE_BOUND) if self.relative else (_ABSOLUTE_LOW, _ABSOLUTE_HIGH)
        if ((command >= low) & (command <= high)).all():  # false for NaN, too
            return command
        index = int(np.flatnonzero(~((command >= low) & (command <= high)))[0])
        form = "relative" if self.relative else "absolute"
        raise ActionOutOfBounds(
            f"Action element {index} ({_NAMES[index]}) is {command[index]:g}; {form} actions lie within {low[index]:g} to "
            f"{high[index]:g}. Is the action un-normalised, and of the {form} kind? (PlayTable(actions=...) chooses.)"
        )

    # --- state -------------------------------------------------------------------------------------------------------------

    def robot_obs(self) -> Array:
        """CALVIN's proprioception (15,): TCP pose, gripper width, seven joints, gripper command."""
        state = np.empty(15)
        state[:3] = self._arm.position
        state[3:6] = self._arm.euler()
        qpos = self._data.qpos
        state[6] = qpos[self._finger_qpos[0]] + qpos[self._finger_qpos[1]]
        state[7:14] = qpos[self._arm_qpos]
        state[14] = self._gripper
        return state

    def scene_obs(self) -> Array:
        """CALVIN's scene state (24,), blocks in the scene's own order."""
        return self._scene_state([color for color, _ in self._scene.blocks])

    def _scene_state(self, colors: Sequence[str]) -> Array:
        state = np.empty(24)
        state[:4] = self._data.qpos[self._part_qpos]
        state[4], state[5] = self._lights["lightbulb"], self._lights["led"]
        for index, color in enumerate(colors):
            place = self._data.qpos[self._block_qpos[color]]
            start = 6 + 6 * index
            state[start : start + 3] = place[:3]
            state[start + 3 : start + 6] = matrix_to_euler(quaternion_to_matrix(place[[4, 5, 6, 3]]))
        return state

    @property
    def target_pose(self) -> tuple[Array, Array]:
        """Position and Euler angles that the controller is heading for (copies)."""
        return self._target_position.copy(), self._target_euler.copy()

    def info(self) -> calvin_tasks.Info:
        """The whole state as the success tests read it; contacts are those of the last physics step."""
        blocks = {}
        touching = self._touching()
        for color in ("red", "blue", "pink"):
            name = f"block_{color}"
            place = self._data.qpos[self._block_qpos[color]]
            speed = self._data.qvel[self._block_qvel[color]]
            rotation = quaternion_to_matrix(place[[4, 5, 6, 3]])
            blocks[name] = {
                "pos": place[:3].copy(),
                "quat": place[[4, 5, 6, 3]],
                "lin_vel": speed[:3].copy(),
                "ang_vel": rotation @ speed[3:],  # MuJoCo's is in the body's frame
                "contacts": sorted(touching.get(name, ())),
            }
        return {"blocks": blocks, "robot_contacts": sorted(touching.get("robot", ())), **self._doors_and_lights()}

    def _doors_and_lights(self) -> calvin_tasks.Info:
        slider, drawer = self._data.qpos[self._part_qpos[:2]].tolist()
        return {"doors": {"base__slide": slider, "base__drawer": drawer}, "lights": dict(self._lights)}

    def _touching(self) -> dict[str, set[tuple[str, int]]]:
        """Per body name, the (body, link) pairs it touches."""
        touching: dict[str, set[tuple[str, int]]] = {}
        for first, second in self._data.contact.geom[: self._data.ncon].tolist():
            a, b = self._contact_names[first], self._contact_names[second]
            touching.setdefault(a[0], set()).add(b)
            touching.setdefault(b[0], set()).add(a)
        return touching

    def _is_solved(self) -> bool:
        now = self._doors_and_lights() if self._task in _GOALS else self.info()
        return bool(calvin_tasks.solved(self._start, now, (self._task,)))

    def _switch_lights(self) -> None:
        """CALVIN's logic: the button's rising edge flips the LED, the bulb follows the switch."""
        pressed = bool(self._data.qpos[self._part_qpos[_BUTTON]] > 0.010)
        if pressed and not self._pressed:
            self._set_light("led", 1 - self._lights["led"])
        self._pressed = pressed
        switched = bool(self._data.qpos[self._part_qpos[_SWITCH]] > 0.044)
        if switched != self._switched:
            self._set_light("lightbulb", int(switched))
        self._switched = switched

    def _set_light(self, name: str, state: int) -> None:
        self._lights[name] = state
        self._model.geom_rgba[self._light_geoms[name]] = LIGHT_COLORS[name if state else "off"]

    def _place_scene(self, scene: Array) -> None:
        qpos = self._data.qpos
        qpos[self._part_qpos] = scene[:4]
        self._set_light("lightbulb", int(scene[4] > 0.5))
        self._set_light("led", int(scene[5] > 0.5))
        self._pressed, self._switched = bool(scene[5] > 0.5), False  # CALVIN's logical states after a reset
        for index, (color, _) in enumerate(self._scene.blocks):
            place = scene[6 + 6 * index : 12 + 6 * index]
            quaternion = matrix_to_quaternion(euler_to_matrix(place[3:]))
            qpos[self._block_qpos[color]] = [*place[:3], *quaternion[[3, 0, 1, 2]]]

    def _place_robot(self, joints: Array, width: float, gripper: float) -> None:
        self._data.qpos[self._arm_qpos] = joints
        self._data.qpos[self._finger_qpos] = np.clip(width / 2, 0.0, FINGER_OPEN)
        self._data.ctrl[self._arm_control] = joints
        self._data.ctrl[self._finger_control] = FINGER_OPEN if gripper > 0 else 0.0
        self._gripper = gripper

    # --- failures ----------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Follows what names a failure: whether the robot has touched the task's part and how far that has moved."""
        goal = _GOALS.get(self._task)
        if goal is None:
            return
        part = _PARTS[goal[0]]
        moved = goal[1] * float(self._data.qpos[self._part_qpos[part]] - self._joint_start[part])
        self._forward, self._backward = max(self._forward, moved), max(self._backward, -moved)
        if not self._touched and self._data.ncon:
            geoms = self._data.contact.geom[: self._data.ncon]
            robot, parts = self._is_robot[geoms], self._part_of_geom[geoms] == part
            self._touched = bool((robot[:, 0] & parts[:, 1]).any() or (robot[:, 1] & parts[:, 0]).any())

    def _name_failure(self) -> str:
        """Why the episode failed, from privileged state.

        ``timeout`` for tasks with blocks; else ``<part>_not_touched``, ``wrong_direction`` (the part went the other way by
        more than a centimetre and farther than the right one), ``handle_missed`` or ``button_not_pressed`` (touched but not
        moved), ``stopped_short``.
        """
        goal = _GOALS.get(self._task)
        if goal is None:
            return "timeout"
        if not self._touched:
            return f"{goal[0]}_not_touched"
        if self._backward > max(0.01, self._forward):
            return "wrong_direction"
        if goal[0] == "button":
            return "button_not_pressed"
        return "handle_missed" if self._forward < 0.005 else "stopped_short"

    # --- observations ------------------------------------------------------------------------------------------------------

    def _observe(self) -> dict[str, Any]:
        wants = self.observations
        observation: dict[str, Any] = {"task": calvin_tasks.SENTENCES[self._task]}
        if self.skip_observation:
            return observation
        state = self.robot_obs()
        if "state" in wants:
            observation["observation.state"] = state.astype(np.float32)
        if "environment_state" in wants:
            scene = self._scene_state(("red", "blue", "pink"))
            observation["observation.environment_state"] = scene.astype(np.float32)
        pictures = [name for name in ("depth", "segmentation", "images") if name in wants]
        if "point_cloud" not in wants and not pictures:
            return observation
        self._update_poses()
        names = list(self.camera_sizes) if pictures else list(self.recipe.cameras)
        views = {name: self._camera(name) for name in names}
        casts = {name: view.cast(self._data) for name, view in views.items()}
        if "point_cloud" in wants:
            observation["observation.point_cloud"] = cloud_from_depth(
                {name: casts[name][0] for name in self.recipe.cameras},
                {name: views[name].camera for name in self.recipe.cameras},
                {name: views[name].pose(self._data) for name in self.recipe.cameras},
                {name: views[name].colors(casts[name][1]) for name in self.recipe.cameras} if self.recipe.colors else None,
                self.recipe,
            )
        for name in self.camera_sizes if pictures else ():
            depth, geom = casts[name]
            if "depth" in wants:
                observation[f"observation.depth.{name}"] = depth[None]
            if "segmentation" in wants:
                observation[f"observation.segmentation.{name}"] = self._segment_of_geom[geom][None]
            if "images" in wants:
                picture = self._picture(name, *self.camera_sizes[name])
                observation[f"observation.images.{name}"] = np.ascontiguousarray(picture.transpose(2, 0, 1))
        return observation

    def render(self) -> NDArray[np.uint8] | None:
        """A picture of the whole table, (240, 320, 3) uint8."""
        if self.render_mode is None:
            return None
        self._update_poses()
        return self._picture("overview", 240, 320)

    def close(self) -> None:
        """Frees OpenGL's contexts, if any were made."""
        for renderer in self._gl.values():
            renderer.close()
        self._gl.clear()

    def _picture(self, name: str, height: int, width: int) -> NDArray[np.uint8]:
        if self._renderer == "rays":
            return self._camera(name, height, width).shaded(self._data)
        from lightning_robot.envs.opengl import make_renderer

        if (height, width) not in self._gl:
            self._gl[height, width] = make_renderer(self._model, height, width)
        self._gl[height, width].update_scene(self._data, name)
        return self._gl[height, width].render()

    def _camera(self, name: str, height: int | None = None, width: int | None = None) -> RayCamera:
        if height is None or width is None:
            height, width = self.camera_sizes[name]
        if (name, height, width) not in self._cameras:
            self._cameras[name, height, width] = RayCamera(self._model, name, height, width, far=FAR.get(name, 10.0))
        return self._cameras[name, height, width]

    def _update_poses(self) -> None:
        """Brings bodies and cameras up to date: after a physics step they are those of the step before."""
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    # --- the model's indices -----------------------------------------------------------------------------------------------

    def _index_model(self) -> None:
        model = self._model

        def position(joint: str) -> int:
            return int(model.jnt_qposadr[model.joint(joint).id])

        self._arm_qpos = _range([position(f"arm_{index}") for index in range(1, 8)])
        self._finger_qpos = np.array([position("finger_1"), position("finger_2")])
        self._part_qpos = np.array([position(name) for name in _JOINTS])
        self._arm_control, self._finger_control = slice(0, 7), slice(7, 9)
        colors = [color for color, _ in self._scene.blocks]
        self._block_qpos = {color: slice(position(f"block_{color}"), position(f"block_{color}") + 7) for color in colors}
        self._block_qvel = {}
        for color in colors:
            start = int(model.jnt_dofadr[model.joint(f"block_{color}").id])
            self._block_qvel[color] = slice(start, start + 6)
        self._light_geoms = {name: model.geom(name).id for name in ("led", "lightbulb")}
        links = calvin_tasks.TABLE_LINKS
        self._contact_names: list[tuple[str, int]] = []
        for geom in range(model.ngeom):
            body, name = model.body(model.geom_bodyid[geom]).name, model.geom(geom).name
            if body.startswith("block_"):
                self._contact_names.append((body, -1))
            elif body in links:
                self._contact_names.append(("table", links[body]))
            elif body == "world":
                fixed = {"plane": ("plane", -1), "led": ("table", links["led"]), "lightbulb": ("table", links["light"])}
                fixed |= {"plank": ("table", links["plank"]), "pedestal": ("robot", -1)}
                self._contact_names.append(fixed.get(name, ("table", links["base"])))
            else:
                self._contact_names.append(("robot", _ROBOT_LINKS[name]))
        self._is_robot = np.array([body == "robot" for body, _ in self._contact_names])
        by_link = {links[part]: index for part, index in _PARTS.items()}
        self._part_of_geom = np.array([by_link.get(link, -1) if body == "table" else -1 for body, link in self._contact_names])
        segment = {"table": 1, "robot": 9, "block_red": 10, "block_blue": 11, "block_pink": 12, "plane": 0}
        numbers = [link + 2 if body == "table" and link >= 0 else segment[body] for body, link in self._contact_names]
        self._segment_of_geom = np.array([*numbers, 0], dtype=np.uint8)  # the last for -1, nothing


_ROBOT_LINKS = {f"arm_{index}": index - 1 for index in range(8)} | {
    "hand": 8,
    "finger_1": 9,
    "pad_1": 10,
    "finger_2": 11,
    "pad_2": 12,
}
"""CALVIN's link number of each of the robot's geoms."""


def _range(indices: list[int]) -> slice:
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    return slice(indices[0], indices[0] + len(indices))
