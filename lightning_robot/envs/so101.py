"""SO-101 pick and place: the arm that hobbyists print, a block, a round bowl, an overhead and a wrist camera, in MuJoCo.

Kinematics, limits, masses and servos are the published ones (`so101_model`), observations and actions have LeRobot's names and
units, control runs at 30 Hz. Grips depend on the command, as real ones do (`so101_model.Physics`): the gripper's servo is soft.
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

from lightning_robot.envs.checks import ActionOutOfBounds, CameraSizes, among, finite_vector, noted_sizes, picture_sizes
from lightning_robot.envs.pick_and_place import Bounds, Progress, Sight
from lightning_robot.envs.ray_camera import RayCamera, camera_mounts
from lightning_robot.envs.so101_experts import Expert
from lightning_robot.envs.so101_kinematics import UNITS, So101Kinematics, from_units, to_units
from lightning_robot.envs.so101_model import (
    BOWL_HEIGHT,
    BOWL_RADIUS,
    JOINTS,
    LAMP,
    LOWER,
    OVERHEAD_CAMERA,
    UPPER,
    WRIST_CAMERA,
    Physics,
    scene_xml,
)
from lightning_robot.features import Feature, Features
from lightning_robot.geometry import matrix_to_quaternion, quaternion_to_matrix
from lightning_robot.points import CloudRecipe, cloud_from_depth

Array = NDArray[np.float64]

CONTROL_RATE = 30.0
SUBSTEPS = 8
FAR = {"overhead": 2.0, "wrist": 2.0}  # m
OBSERVATIONS = ("state", "images", "depth", "point_cloud", "environment_state")
SENTENCE = "put the red block into the blue bowl"
PARAPHRASES = (
    "pick up the red block and place it in the blue bowl",
    "move the block to the bowl",
    "drop the red cube in the bowl",
)
REST = np.array([-13.0, -55.0, 45.0, 75.0, 90.0, 45.0])  # degrees and per cent
_DOWN = np.array([0.5, -0.5, 0.5, 0.5])  # quaternion (w, x, y, z) of a gripper that points down and opens to the left
_CLOUD = {"cameras": ("overhead", "wrist"), "crop": ((0.05, -0.30, 0.005), (0.45, 0.30, 0.40))}
_JOINT_NAMES = tuple(f"{joint}.pos" for joint in JOINTS)
_POSE_NAMES = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")
_SCENE_NAMES = ("block_x", "block_y", "block_z", "block_qw", "block_qx", "block_qy", "block_qz", "bowl_x", "bowl_y")
_POSE_LOW, _POSE_HIGH = np.array([-0.6] * 3 + [-1.0] * 4 + [0.0]), np.array([0.6] * 3 + [1.0] * 4 + [1.0])
_UNSTABLE = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
_MARGIN = 45.0  # degrees or per cent by which a command may exceed a joint's limit, at which it is then held
IK_FAILURE = 0.005  # m of position error from which an end-effector command counts as missed


@dataclasses.dataclass(frozen=True)
class Spawn:
    """Where episodes start; everything is drawn evenly.

    Attributes:
        radius: m from the arm's base to the block, least and most.
        bearing: rad of the block from straight ahead, positive to the left.
        yaw: rad of the block's turn from the direction of its bearing.
        bowl: (x, y) of the bowl's middle place.
        bowl_shift: m by which the bowl is moved from it at most, in x and in y.
        joint_noise: rad by which each arm joint starts beside its rest at most.
    """

    radius: tuple[float, float] = (0.20, 0.27)
    bearing: tuple[float, float] = (0.05, 0.50)
    yaw: tuple[float, float] = (-0.4, 0.4)
    bowl: tuple[float, float] = (0.21, -0.13)
    bowl_shift: float = 0.015
    joint_noise: float = 0.03

    def __post_init__(self) -> None:
        for name in ("radius", "bearing", "yaw", "bowl"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != 2 or not np.isfinite(values).all() or (name != "bowl" and values[0] > values[1]):
                raise ValueError(f"spawn: {name} needs two finite numbers, the lower first; got {values}.")
        if min(self.bowl_shift, self.joint_noise, self.radius[0]) < 0:
            raise ValueError("spawn: radius, bowl_shift and joint_noise are not below 0.")


class SO101PickPlace(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """Pick the block up and put it into the bowl.

    Joint actions are absolute targets (6,) in the order and units of the state: five joints in degrees and the gripper from 0
    (closed) to 100 (open), or all normalised. End-effector actions (8,) are the tool's absolute pose in the base's frame (x, y,
    z in m and a quaternion w, x, y, z) and the gripper from 0 to 1; inverse kinematics turns them into joint targets, as well
    as five joints can.

    The same seed gives the same episode to the last bit, whatever ran before.

    Args:
        actions: "joints" or "end_effector".
        units: of joint angles in state and action: "degrees" or "normalized" (-100 to 100 over the joint's range).
        observations: what an observation holds: "state", "images", "depth", "point_cloud", "environment_state". Only these are
            computed.
        camera_sizes: pixels per camera, or of both: a number for a square, or (height, width).
        cloud: fields of `lightning_robot.points.CloudRecipe`.
        max_steps: control steps after which an episode is truncated.
        renderer: "rays" (needs no OpenGL) or "opengl", for `render` and for "images".
        render_mode: "rgb_array" or None.
        strict: success asks that the block is let go and rests in the bowl; else that it was lifted and is inside.
        spawn: fields of `Spawn`.
        physics: fields of `lightning_robot.envs.so101_model.Physics`.

    Raises:
        ValueError: an argument has a value it cannot have.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    tasks = ("pick_and_place",)
    skip_observation = False  # set it before a step whose observation nobody reads: only the task comes back, and fast

    def __init__(
        self,
        actions: str = "joints",
        units: str = "degrees",
        observations: Sequence[str] = ("state", "images"),
        camera_sizes: CameraSizes | None = None,
        cloud: Mapping[str, Any] | None = None,
        max_steps: int = 300,
        renderer: str = "rays",
        render_mode: str | None = None,
        strict: bool = True,
        spawn: Mapping[str, Any] | None = None,
        physics: Mapping[str, Any] | None = None,
    ) -> None:
        among("actions", actions, ("joints", "end_effector"))
        among("units", units, UNITS)
        among("renderer", renderer, ("rays", "opengl"))
        among("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        if isinstance(observations, str):
            raise ValueError(f"observations is a list; for one, write observations=[{observations!r}].")
        for name in observations:
            among("observations", name, OBSERVATIONS)
        if max_steps < 1:
            raise ValueError(f"max_steps: {max_steps}; an episode has at least one step.")
        self.actions, self.units, self.observations = actions, units, tuple(observations)
        self.max_steps, self.render_mode, self._renderer = max_steps, render_mode, renderer
        self.camera_sizes = dict.fromkeys(FAR, (96, 96)) | picture_sizes(camera_sizes, FAR)
        for name in self.camera_sizes:
            among("camera_sizes", name, FAR)
        self.recipe = CloudRecipe.from_dict({**_CLOUD, **(cloud or {})})
        for name in self.recipe.cameras:
            among("cloud cameras", name, FAR)
        self.spawn = _fields("spawn", Spawn, spawn)
        self.physics = _fields("physics", Physics, physics)
        self.bounds = Bounds(self.physics.block_size / 2, BOWL_RADIUS, BOWL_HEIGHT, strict)

        self._xml = scene_xml(self.physics)
        self._model = mujoco.MjModel.from_xml_string(self._xml)
        self._data = mujoco.MjData(self._model)
        self.kinematics = So101Kinematics()
        self._index_model()
        self.rest = from_units(REST)
        self._targets: Array = np.zeros(6)
        self._progress = Progress(self.bounds, np.zeros(3))
        self._ik_errors: list[float] = []
        self._cameras: dict[tuple[str, int, int], RayCamera] = {}
        self._gl: dict[tuple[int, int], mujoco.Renderer] = {}
        self._declare_spaces()

    # --- what is offered ---------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What this environment offers to a policy."""
        wants, sizes = self.observations, self.camera_sizes
        kinds: tuple[str, ...] = ("scalar",) * 5 + ("gripper",)
        degrees = self.units == "degrees"
        joints = Feature((6,), unit="degrees, %" if degrees else "%", names=_JOINT_NAMES, kinds=kinds)
        offered: dict[str, Feature] = {}
        if "state" in wants:
            offered["observation.state"] = joints
        for kind, shape, dtype, unit in (("images", 3, "uint8", ""), ("depth", 1, "float32", "m")):
            for name in sizes if kind in wants else ():
                offered[f"observation.{kind}.{name}"] = Feature((shape, *sizes[name]), dtype=dtype, unit=unit)
        if "point_cloud" in wants:
            columns = 6 if self.recipe.colors else 3
            offered["observation.point_cloud"] = Feature((self.recipe.points, columns), unit="m", frame="base")
        if "environment_state" in wants:
            kinds = ("position",) * 3 + ("rotation",) * 4 + ("position",) * 2
            offered["observation.environment_state"] = Feature((9,), unit="m", names=_SCENE_NAMES, kinds=kinds, frame="base")
        if self.actions == "joints":
            action = joints
            form = f"joints {self.units}; gripper 0 closed 100 open"
        else:
            kinds = ("position",) * 3 + ("rotation",) * 4 + ("gripper",)
            action = Feature((8,), unit="m, quaternion", names=_POSE_NAMES, kinds=kinds, frame="base")
            form = "base; gripper 0 closed 1 open"
        return Features(
            observations=offered,
            action=action,
            action_semantics=f"absolute; commanded; {form}",
            control_rate=CONTROL_RATE,
            cloud=self.recipe.to_dict() if "point_cloud" in wants else None,
            source=self.fingerprint,
            cameras=camera_mounts(self._model, sorted(sizes)) if {"images", "depth"} & set(wants) else {},
        )

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside the seed, as plain strings."""
        views = {"overhead": OVERHEAD_CAMERA[2], "wrist": WRIST_CAMERA[2]}
        return {
            "simulator": "lightning_robot/SO101PickPlace-v0",
            "model": hashlib.sha256(self._xml.encode()).hexdigest()[:16],
            "mujoco": mujoco.__version__,
            "spawn": ", ".join(f"{name} {value}" for name, value in vars(self.spawn).items()),
            "cameras": ", ".join(f"{name} {height}x{width}" for name, (height, width) in sorted(self.camera_sizes.items())),
            "views": ", ".join(f"{name} {view} degrees" for name, view in sorted(views.items())),
            "renderer": self._renderer,
        }

    @property
    def control_rate(self) -> float:
        """Control steps per second."""
        return CONTROL_RATE

    @property
    def task(self) -> str:
        """Id of the task."""
        return self.tasks[0]

    def task_sentence(self, task: str) -> str:
        """The instruction that the task is evaluated with."""
        among("task", task, self.tasks)
        return SENTENCE

    def task_paraphrases(self, task: str) -> tuple[str, ...]:
        """Other ways to say the instruction, for training."""
        among("task", task, self.tasks)
        return PARAPHRASES

    def expert(self, random: np.random.Generator | None = None) -> Expert:
        """The scripted expert from the present state on; its ``act()`` gives the action for the present step.

        Args:
            random: not needed: the expert is deterministic.
        """
        return Expert(self)

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: its observations, picture sizes, cloud's recipe, action form and units.

        Raises:
            ValueError: the policy was trained on an observation that this environment does not have.
        """
        wants: list[str] = []
        self.camera_sizes |= noted_sizes(features.source.get("cameras", ""), FAR)  # a cloud depends on them, too
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
            for camera in self.recipe.cameras:
                among("cloud camera of the policy", camera, FAR)
        elif "observation.point_cloud" in features.observations:
            points, columns = features.observations["observation.point_cloud"].shape
            self.recipe = dataclasses.replace(self.recipe, points=points, colors=columns == 6)
        if features.action_semantics:
            self.actions = "joints" if "joints" in features.action_semantics else "end_effector"
            for units in UNITS:
                if f"joints {units}" in features.action_semantics:
                    self.units = units
        state = features.observations.get("observation.state")
        if state is not None and "joints" not in features.action_semantics:
            self.units = {"%": "normalized", "degrees, %": "degrees"}.get(state.unit, self.units)
        self.observations = tuple(wants)
        self._declare_spaces()

    def _declare_spaces(self) -> None:
        if self.actions == "joints":
            low, high = to_units(LOWER, self.units), to_units(UPPER, self.units)
        else:
            low, high = _POSE_LOW, _POSE_HIGH
        self.action_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))
        offered: dict[str, spaces.Space] = {"task": spaces.Text(200, charset=string.ascii_letters + string.digits + " ,.'-")}
        for key, feature in self.features.observations.items():
            bottom, top = (0, 255) if feature.dtype == "uint8" else (-np.inf, np.inf)
            offered[key] = spaces.Box(bottom, top, feature.shape, np.dtype(feature.dtype))
        self.observation_space = spaces.Dict(offered)

    # --- episodes ----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes start state and so, with the actions, the whole episode.
            options: ``task``; ``block`` (x, y, yaw), ``bowl`` (x, y) and ``joints`` (6,) radians, each instead of a random one.

        Returns:
            Observation and info (``task``, ``success``, ``failure``).

        Raises:
            ValueError: an unknown option, or a start at which the block lies in the bowl.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := set(options) - {"task", "block", "bowl", "joints"}:
            raise ValueError(f"reset has no option {', '.join(sorted(unknown))}; it has task, block, bowl and joints.")
        among("task", options.get("task") or self.task, self.tasks)
        block, bowl, joints = self._draw_start()
        if options.get("block") is not None:
            block = finite_vector("block", options["block"], 3)
        if options.get("bowl") is not None:
            bowl = finite_vector("bowl", options["bowl"], 2)
        if options.get("joints") is not None:
            joints = finite_vector("joints", options["joints"], 6)
        if math.dist(block[:2], bowl) < self._apart:
            raise ValueError(f"The block at {block[:2].tolist()} would touch the bowl at {bowl.tolist()}.")
        data = self._data
        mujoco.mj_resetData(self._model, data)
        data.qpos[self._joint_qpos] = np.clip(joints, LOWER, UPPER)
        half = block[2] / 2
        data.qpos[self._block_qpos] = (*block[:2], self.bounds.rest_height, math.cos(half), 0, 0, math.sin(half))
        data.mocap_pos[0] = (*bowl, 0)
        self._targets = data.qpos[self._joint_qpos].copy()
        data.ctrl[:] = self._targets
        mujoco.mj_step(self._model, data, SUBSTEPS)  # block and arm come to rest
        mujoco.mj_forward(self._model, data)
        for camera in self._cameras.values():
            camera.forget()
        self._progress = Progress(self.bounds, self.block_pose()[0])
        self._ik_errors = []
        return self._observe(), {"task": self.task, "success": False, "failure": None}

    def _draw_start(self) -> tuple[Array, Array, Array]:
        """Block (x, y, yaw), bowl (x, y) and joints (6,), the block outside the bowl."""
        spawn, draw = self.spawn, self.np_random
        joints = self.rest.copy()
        joints[:5] += draw.uniform(-spawn.joint_noise, spawn.joint_noise, 5)
        for _ in range(1000):
            bowl = np.array(spawn.bowl) + draw.uniform(-spawn.bowl_shift, spawn.bowl_shift, 2)
            radius, bearing, yaw = (draw.uniform(*area) for area in (spawn.radius, spawn.bearing, spawn.yaw))
            block = np.array([radius * math.cos(bearing), radius * math.sin(bearing), bearing + yaw])
            if math.dist(block[:2], bowl) >= self._apart:
                return block, bowl, joints
        raise ValueError("spawn: the block's area lies in the bowl; move one of them.")

    @property
    def _apart(self) -> float:
        """Least distance of block and bowl at the start in m: they do not touch."""
        return BOWL_RADIUS + 0.01 + self.physics.block_size

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step (1/30 s).

        Returns:
            Observation; reward 1.0 on success, else 0.0; whether the task is solved; whether the time is up or the simulation
            broke; info with ``task``, ``success``, ``failure`` (at the end of an unsuccessful episode one of
            `lightning_robot.envs.pick_and_place.OUTCOMES`), with end-effector actions ``ik_error_mm`` (how far the joint
            targets are from the commanded position) and at the end ``details``
            (`lightning_robot.envs.pick_and_place.Progress.details` and what the inverse kinematics missed).

        Raises:
            ActionOutOfBounds: the action is malformed or far outside what the joints can do.
        """
        command = self._checked(action)
        self._targets = self._joints_of(command)
        data = self._data
        data.ctrl[:] = self._targets
        mujoco.mj_step(self._model, data, SUBSTEPS)
        self._progress.see(self._sight())
        success = self._progress.solved
        truncated = not success and (self._progress.out_of_limits or self._progress.steps >= self.max_steps)
        info: dict[str, Any] = {"task": self.task, "success": success, "failure": None}
        if self._ik_errors:
            info["ik_error_mm"] = 1e3 * self._ik_errors[-1]
        if success or truncated:
            info["failure"] = self._progress.outcome if truncated else None
            info["details"] = self._details()
        return self._observe(), float(success), success, truncated, info

    def _checked(self, action: ArrayLike) -> Array:
        command = np.asarray(action, dtype=np.float64)
        names = _JOINT_NAMES if self.actions == "joints" else _POSE_NAMES
        if command.shape != (len(names),):
            raise ActionOutOfBounds(f"An action has shape ({len(names)},): {', '.join(names)}; got {command.shape}.")
        if self.actions == "joints":
            low, high = to_units(LOWER, self.units) - _MARGIN, to_units(UPPER, self.units) + _MARGIN
        else:
            low, high = _POSE_LOW - 0.3, _POSE_HIGH + 0.3
        inside = (command >= low) & (command <= high)  # false for NaN, too
        if not inside.all():
            index = int(np.flatnonzero(~inside)[0])
            form = f"joint actions in {self.units}" if self.actions == "joints" else "end-effector actions"
            raise ActionOutOfBounds(
                f"Action element {index} ({names[index]}) is {command[index]:g}; {form} lie within {low[index]:g} to "
                f"{high[index]:g}. Is the action un-normalised, and of this kind? (actions= and units= choose.)"
            )
        return command

    def _joints_of(self, command: Array) -> Array:
        """(6,) joint targets of a checked action, within the limits."""
        if self.actions == "joints":
            return np.clip(from_units(command, self.units), LOWER, UPPER)
        size = float(np.linalg.norm(command[3:7]))
        if size < 0.1:
            raise ActionOutOfBounds(
                f"The quaternion {command[3:7].tolist()} of the action has no direction: its length is {size:g}."
            )
        rotation = quaternion_to_matrix(command[[4, 5, 6, 3]] / size)
        joints = self.kinematics.inverse(command[:3], rotation, self._targets)
        self._ik_errors.append(self.kinematics.error)
        share = min(1.0, max(0.0, command[7]))
        return np.array([*joints, LOWER[5] + (UPPER[5] - LOWER[5]) * share])

    def action_of(self, joints: Array) -> NDArray[np.float32]:
        """The action that commands these joint targets (6,) in radians."""
        if self.actions == "joints":
            return to_units(joints, self.units).astype(np.float32)
        self.kinematics.forward(joints)
        x, y, z, w = matrix_to_quaternion(self.kinematics.matrix)
        quaternion = np.array([w, x, y, z])
        if quaternion @ _DOWN < 0:  # of the two signs the same for all grips from above
            quaternion = -quaternion
        share = (joints[5] - LOWER[5]) / (UPPER[5] - LOWER[5])
        return np.array([*self.kinematics.position, *quaternion, share], dtype=np.float32)

    # --- state -------------------------------------------------------------------------------------------------------------

    @property
    def joint_targets(self) -> Array:
        """(6,) radians that the servos are heading for, a copy."""
        return self._targets.copy()

    def joints(self) -> Array:
        """(6,) joint angles in radians."""
        return self._data.qpos[self._joint_qpos].copy()

    def block_pose(self) -> tuple[Array, Array]:
        """Centre (3,) and rotation (3, 3) of the block."""
        place = self._data.qpos[self._block_qpos]
        return place[:3].copy(), quaternion_to_matrix(place[[4, 5, 6, 3]])

    @property
    def bowl_position(self) -> Array:
        """(2,) the bowl's centre on the table."""
        return self._data.mocap_pos[0, :2].copy()

    def state_fingerprint(self) -> str:
        """Digest of the simulation's whole state."""
        data = self._data
        parts = (data.time, data.qpos, data.qvel, data.act, data.ctrl, data.mocap_pos, data.qacc_warmstart)
        return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()

    def _sight(self) -> Sight:
        data = self._data
        touched = {False: False, True: False}
        for first, second in data.contact.geom[: data.ncon].tolist():
            if self._block_geom in (first, second):
                jaw = self._jaw_of_geom[second if first == self._block_geom else first]
                if jaw >= 0:
                    touched[bool(jaw)] = True
        speed = float(np.linalg.norm(data.qvel[self._block_qvel]))
        block = data.qpos[self._block_qpos]
        broken = any(data.warning[kind].number for kind in _UNSTABLE)
        tool = data.site_xpos[self._site][:2]
        closing = self._targets[5] < self._narrow
        return Sight(block[:3].copy(), speed, self.bowl_position, tool, touched[False], touched[True], bool(closing), broken)

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = self._progress.details()
        if self._ik_errors:
            errors = np.array(self._ik_errors)
            details["ik_calls"] = len(errors)
            details["ik_failures"] = int((errors > IK_FAILURE).sum())
            details["ik_failure_rate"] = details["ik_failures"] / len(errors)
            details["ik_error_mean_mm"] = float(errors.mean() * 1e3)
            details["ik_error_max_mm"] = float(errors.max() * 1e3)
        return details

    # --- observations ------------------------------------------------------------------------------------------------------

    def _observe(self) -> dict[str, Any]:
        wants = self.observations
        observation: dict[str, Any] = {"task": SENTENCE}
        if self.skip_observation:
            return observation
        if "state" in wants:
            observation["observation.state"] = to_units(self._data.qpos[self._joint_qpos], self.units).astype(np.float32)
        if "environment_state" in wants:
            place = self._data.qpos[self._block_qpos]
            observation["observation.environment_state"] = np.array([*place, *self.bowl_position], dtype=np.float32)
        if not {"images", "depth", "point_cloud"} & set(wants):
            return observation
        self._update_poses()
        views = {name: self._camera(name) for name in self.camera_sizes}
        casts = {}
        if self._renderer == "rays" or {"depth", "point_cloud"} & set(wants):
            casts = {name: view.cast(self._data) for name, view in views.items()}
        for name, size in self.camera_sizes.items():
            if "images" in wants:
                picture = views[name].shaded(self._data, casts[name]) if self._renderer == "rays" else self._draw(name, *size)
                observation[f"observation.images.{name}"] = np.ascontiguousarray(picture.transpose(2, 0, 1))
            if "depth" in wants:
                observation[f"observation.depth.{name}"] = casts[name][0][None]
        if "point_cloud" in wants:
            names = self.recipe.cameras
            observation["observation.point_cloud"] = cloud_from_depth(
                {name: casts[name][0] for name in names},
                {name: views[name].camera for name in names},
                {name: views[name].pose(self._data) for name in names},
                {name: views[name].colors(casts[name][1]) for name in names} if self.recipe.colors else None,
                self.recipe,
            )
        return observation

    def render(self) -> NDArray[np.uint8] | None:
        """A picture of arm and table, (240, 320, 3) uint8."""
        if self.render_mode is None:
            return None
        self._update_poses()
        if self._renderer == "rays":
            return self._camera("overview", 240, 320).shaded(self._data)
        return self._draw("overview", 240, 320)

    def close(self) -> None:
        """Frees OpenGL's contexts, if any were made."""
        for renderer in self._gl.values():
            renderer.close()
        self._gl.clear()

    def _draw(self, name: str, height: int, width: int) -> NDArray[np.uint8]:
        from lightning_robot.envs.opengl import make_renderer

        if (height, width) not in self._gl:
            self._gl[height, width] = make_renderer(self._model, height, width)
        self._gl[height, width].update_scene(self._data, name)
        return self._gl[height, width].render()

    def _camera(self, name: str, height: int | None = None, width: int | None = None) -> RayCamera:
        if height is None or width is None:
            height, width = self.camera_sizes[name]
        if (name, height, width) not in self._cameras:
            self._cameras[name, height, width] = RayCamera(self._model, name, height, width, far=FAR.get(name, 5.0), lamp=LAMP)
        return self._cameras[name, height, width]

    def _update_poses(self) -> None:
        """Brings bodies and cameras up to date: after a physics step they are those of the step before."""
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _index_model(self) -> None:
        model = self._model
        self._joint_qpos = np.array([model.jnt_qposadr[model.joint(joint).id] for joint in JOINTS])  # by name: order may differ
        block = model.joint("block").id
        start, speed = int(model.jnt_qposadr[block]), int(model.jnt_dofadr[block])
        self._block_qpos, self._block_qvel = slice(start, start + 7), slice(speed, speed + 3)
        self._block_geom = model.geom("block").id
        self._site = model.site("gripperframe").id
        jaws = {model.body("gripper").id: 0, model.body("moving_jaw").id: 1}
        self._jaw_of_geom = [jaws.get(int(body), -1) for body in model.geom_bodyid]
        # Opening against angle: 0.0755 m per rad near the tips, 0.0158 m at 0.
        self._narrow = (self.physics.block_size - 0.0158) / 0.0755


def _fields(name: str, kind: type, values: Mapping[str, Any] | None) -> Any:
    given = dict(values or {})
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := set(given) - set(known):
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}.")
    return kind(**given)
