"""Meta-World's tasks: a Sawyer arm and one object or fixture on a table, with state and point cloud as DP3 sees them.

Clouds, depth and pictures come from casting rays, which needs no OpenGL, or from OpenGL's depth buffer. Rays meet no sites, but
what to reach for is told by a site alone: the goal's marker, a sphere where the task's goal is, is added to what the rays see.

Sources: "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning" (Yu et al., 2019), its package
metaworld; protocol of "3D Diffusion Policy" (Ze et al., 2024): 200 steps at 80 Hz, camera ``corner2`` moved near the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import string
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from lightning_robot.envs.adapters import MissingPackage
from lightning_robot.envs.checks import ActionOutOfBounds, CameraSizes, among, noted_sizes, picture_sizes
from lightning_robot.envs.metaworld_scene import CAMERAS, Scene
from lightning_robot.features import Feature, Features
from lightning_robot.points import CloudRecipe, cloud_from_depth

CONTROL_RATE = 80.0
OBSERVATIONS = ("state", "point_cloud", "depth", "images", "environment_state")
DP3_CAMERA = {"corner2": (0.6, 0.295, 0.8)}
"""Where DP3 moved Meta-World's camera, which keeps its direction."""
_CLOUD = {"cameras": ("corner2",), "points": 512, "crop": ((-0.6, 0.2, 0.01), (0.6, 1.0, 1.0))}
_STATE_NAMES = tuple(f"{part}_{axis}" for part in ("hand", "right_finger", "left_finger") for axis in "xyz")
_ACTION_NAMES = ("x", "y", "z", "gripper")
_BOUND = 10.0  # beyond it an action is taken for a mistake of units; the simulator clips at 1
_UNSTABLE = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)

SENTENCES = {
    "assembly": "put the ring over the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "move the block from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "press the button on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "push the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail into the wall",
    "hand-insert": "put the hand into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg sideways",
    "peg-unplug-side": "pull the peg out sideways",
    "pick-out-of-hole": "take the puck out of the hole",
    "pick-place": "bring the puck to the marker",
    "pick-place-wall": "bring the puck over the wall to the marker",
    "plate-slide": "slide the plate into the goal",
    "plate-slide-back": "slide the plate back",
    "plate-slide-back-side": "slide the plate back to the side",
    "plate-slide-side": "slide the plate into the goal at the side",
    "push": "push the puck to the marker",
    "push-back": "pull the puck back to the marker",
    "push-wall": "push the puck around the wall to the marker",
    "reach": "reach the marker",
    "reach-wall": "reach the marker behind the wall",
    "shelf-place": "put the block onto the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}
"""Instruction per task."""


class MetaWorld(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """Meta-World's 50 tasks.

    Actions (x, y, z, gripper) move the hand by 0.01 m per unit and set the gripper's force, -1 to open and 1 to close; the
    simulator clips them to -1 ... 1. The state is DP3's: positions of hand, right and left finger.

    The same seed gives the same episode to the last bit, whatever ran before. Meta-World itself ignores the seed of a reset.

    Args:
        tasks: task ids from which `reset` draws, such as "drawer-open"; all when None.
        task: one task id, the same as ``tasks=(task,)``.
        observations: what an observation holds: "state", "point_cloud", "depth" and "images" (with `camera_sizes`),
            "environment_state" (Meta-World's own 39 numbers, goal included). Only these are computed.
        cloud: fields of `lightning_robot.points.CloudRecipe`.
        camera_sizes: pixels per camera, a number for a square or (height, width), of Meta-World's seven cameras; or of
            ``corner2`` alone. The four at the corners hang upside down, and so are their pictures.
        camera_positions: (x, y, z) of a camera moved from its place; DP3's for ``corner2``, {} for none.
        max_steps: control steps after which an episode is truncated.
        success_steps: steps on which the task must have been solved before it counts; DP3's demonstrations ask for 5.
        markers: show the goal's marker, which some tasks cannot be solved without.
        renderer: "rays" or "opengl", for pictures, depth and clouds.
        render_mode: "rgb_array" or None.

    Raises:
        MissingPackage: metaworld is not installed.
        ValueError: an argument has a value it cannot have.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012
    control_rate = CONTROL_RATE
    skip_observation = False  # set it before a step whose observation nobody reads: only the task comes back, and fast

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        task: str | None = None,
        observations: Sequence[str] = ("state", "point_cloud"),
        cloud: Mapping[str, Any] | None = None,
        camera_sizes: CameraSizes | None = None,
        camera_positions: Mapping[str, Sequence[float]] | None = None,
        max_steps: int = 200,
        success_steps: int = 1,
        markers: bool = True,
        renderer: str = "rays",
        render_mode: str | None = None,
    ) -> None:
        if importlib.util.find_spec("metaworld") is None:
            raise MissingPackage("metaworld", "metaworld")
        among("renderer", renderer, ("rays", "opengl"))
        among("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        if task is not None and tasks is not None:
            raise ValueError("Give task or tasks, not both.")
        for name, value in (("observations", observations), ("tasks", tasks)):
            if isinstance(value, str):
                raise ValueError(f"{name} is a list; for one, write {name}=[{value!r}].")
        for name in observations:
            among("observations", name, OBSERVATIONS)
        if max_steps < 1 or success_steps < 1:
            raise ValueError(f"max_steps is {max_steps}, success_steps {success_steps}; both are at least 1.")
        self.tasks = tuple(_known_task(name) for name in ((task,) if task else tasks or SENTENCES))
        self.observations, self.max_steps, self.success_steps = tuple(observations), max_steps, success_steps
        self.markers, self.render_mode, self._renderer = markers, render_mode, renderer
        self.recipe = CloudRecipe.from_dict({**_CLOUD, **(cloud or {})})
        self.camera_sizes = picture_sizes(camera_sizes, ("corner2",), 128)
        positions = DP3_CAMERA if camera_positions is None else camera_positions
        self.camera_positions = {name: tuple(float(value) for value in place) for name, place in positions.items()}
        for name in (*self.camera_sizes, *self.camera_positions, *self.recipe.cameras):
            among("cameras", name, CAMERAS)
        self._scenes: dict[str, Scene] = {}
        self._task, self._steps, self._solved = self.tasks[0], 0, 0
        self._seen: dict[str, bool] = {}
        self._declare_spaces()

    # --- what is offered ---------------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What this environment offers to a policy."""
        wants = self.observations
        offered: dict[str, Feature] = {}
        if "state" in wants:
            offered["observation.state"] = Feature((9,), unit="m", names=_STATE_NAMES, kinds=("position",) * 9, frame="world")
        for kind, channels, dtype, unit in (("images", 3, "uint8", ""), ("depth", 1, "float32", "m")):
            for name, size in self.camera_sizes.items() if kind in wants else ():
                offered[f"observation.{kind}.{name}"] = Feature((channels, *size), dtype=dtype, unit=unit)
        if "point_cloud" in wants:
            columns = 6 if self.recipe.colors else 3
            offered["observation.point_cloud"] = Feature((self.recipe.points, columns), unit="m", frame="world")
        if "environment_state" in wants:
            offered["observation.environment_state"] = Feature((39,), unit="mixed", frame="world")
        return Features(
            observations=offered,
            action=Feature((4,), names=_ACTION_NAMES, kinds=("direction",) * 3 + ("gripper",), frame="world"),
            action_semantics="relative; commanded; world; gripper +1 closed -1 open",
            control_rate=CONTROL_RATE,
            cloud=self.recipe.to_dict() if "point_cloud" in wants else None,
            source=self.fingerprint,
        )

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside seed and task, as plain strings."""
        return {
            "simulator": "lightning_robot/MetaWorld-v0",
            "metaworld": importlib.metadata.version("metaworld"),
            "mujoco": mujoco.__version__,
            "cameras": ", ".join(f"{name} {height}x{width}" for name, (height, width) in sorted(self.camera_sizes.items())),
            "positions": ", ".join(f"{name} {place}" for name, place in sorted(self.camera_positions.items())),
            "markers": str(self.markers),
            "renderer": self._renderer,
        }

    @property
    def task(self) -> str:
        """Id of the task of this episode."""
        return self._task

    def task_sentence(self, task: str) -> str:
        """The instruction of the task."""
        return SENTENCES[_known_task(task)]

    def expert(self, random: np.random.Generator | None = None) -> Expert:
        """Meta-World's scripted policy for the task of this episode; its ``act()`` gives the action (4,), within -1 to 1.

        Args:
            random: not needed: the expert is deterministic.
        """
        return Expert(self._scene(), self._task)

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: the observations it has, its cloud's recipe and picture sizes.

        Raises:
            ValueError: the policy was trained on an observation that Meta-World does not have.
        """
        wants: list[str] = []
        self.camera_sizes |= noted_sizes(features.source.get("cameras", ""), CAMERAS)
        for key, feature in features.observations.items():
            kind, _, camera = key.removeprefix("observation.").partition(".")
            among(f"{key} of the policy", kind, OBSERVATIONS)
            if camera:
                among(f"{key} of the policy", camera, CAMERAS)
                self.camera_sizes[camera] = (feature.shape[-2], feature.shape[-1])
            if kind not in wants:
                wants.append(kind)
        if features.cloud is not None:
            self.recipe = dataclasses.replace(CloudRecipe.from_dict(features.cloud), pixel_offset=(0.5, 0.5))
            for camera in self.recipe.cameras:
                among("cloud camera of the policy", camera, CAMERAS)
        elif "observation.point_cloud" in features.observations:
            points, columns = features.observations["observation.point_cloud"].shape
            self.recipe = dataclasses.replace(self.recipe, points=points, colors=columns == 6)
        self.observations = tuple(wants)
        self._declare_spaces()

    def _declare_spaces(self) -> None:
        for name in self.recipe.cameras:
            self.camera_sizes.setdefault(name, (128, 128))
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        offered: dict[str, spaces.Space] = {"task": spaces.Text(200, charset=string.ascii_letters + " -")}
        for key, feature in self.features.observations.items():
            low, high = (0, 255) if feature.dtype == "uint8" else (-np.inf, np.inf)
            offered[key] = spaces.Box(low, high, feature.shape, np.dtype(feature.dtype))
        self.observation_space = spaces.Dict(offered)

    # --- episodes ----------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: fixes task, start and goal and so, with the actions, the whole episode.
            options: ``task`` instead of a random one.

        Returns:
            Observation and info (``task``, ``success``, ``failure``).
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := set(options) - {"task"}:
            raise ValueError(f"reset has no option {', '.join(sorted(unknown))}; it has task.")
        drawn = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        task = _known_task(options.get("task") or drawn)
        if task != self._task and self._task in self._scenes:
            self._scenes[self._task].close()
        self._task, self._steps, self._solved = task, 0, 0
        self._seen = {"was_near": False, "was_grasped": False}
        self._scene().reset(int(self.np_random.integers(2**31)))
        return self._observe(), {"task": task, "success": False, "failure": None}

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step (1/80 s).

        Returns:
            Observation; Meta-World's reward; whether the task is solved; whether the time is up or the simulation broke; info
            with ``task``, ``success``, at the end of an unsuccessful episode ``failure``, at an end ``details`` (whether the
            object was near and grasped, its last distance to the goal).

        Raises:
            ActionOutOfBounds: the action is malformed or absurdly large.
        """
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (4,):
            raise ActionOutOfBounds(f"An action has shape (4,): {', '.join(_ACTION_NAMES)}; got {command.shape}.")
        if not (np.abs(command) <= _BOUND).all():  # false for NaN, too
            raise ActionOutOfBounds(
                f"The action {command.tolist()} is not within -{_BOUND:g} to {_BOUND:g}. Is it un-normalised? (1 is 0.01 m.)"
            )
        scene = self._scene()
        reward, told = scene.step(np.clip(command, -1, 1).astype(np.float32))
        self._steps += 1
        self._solved += bool(told.get("success"))
        self._seen["was_near"] |= bool(told.get("near_object"))
        self._seen["was_grasped"] |= bool(told.get("grasp_success"))
        unstable = any(scene.data.warning[kind].number for kind in _UNSTABLE)
        success = self._solved >= self.success_steps and not unstable
        truncated = unstable or self._steps >= self.max_steps
        info: dict[str, Any] = {"task": self._task, "success": success, "failure": None}
        if success or truncated:
            if not success:
                info["failure"] = "simulation_unstable" if unstable else "timeout" if not self._solved else "not_held"
            info["details"] = {**self._seen, "final_distance": float(told.get("obj_to_target", np.nan))}
        return self._observe(), reward, success, truncated, info

    def state_fingerprint(self) -> str:
        """Digest of the simulation's whole state; resets move drawers, doors and goals in the model itself."""
        scene = self._scene()
        data, model = scene.data, scene.model
        moved = (model.body_pos, model.body_quat, model.site_pos, scene.state)
        parts = (data.time, data.qpos, data.qvel, data.act, data.ctrl, data.mocap_pos, data.qacc_warmstart, *moved)
        return hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in parts)).hexdigest()

    def _scene(self) -> Scene:
        if self._task not in self._scenes:
            self._scenes[self._task] = Scene(self._task, self.camera_positions, self.markers, self._renderer == "opengl")
        return self._scenes[self._task]

    def _observe(self) -> dict[str, Any]:
        wants, scene = self.observations, self._scene()
        observation: dict[str, Any] = {"task": SENTENCES[self._task]}
        if self.skip_observation:
            return observation
        if "state" in wants:
            observation["observation.state"] = scene.hand_and_fingers().astype(np.float32)
        if "environment_state" in wants:
            observation["observation.environment_state"] = scene.state.astype(np.float32)
        if not {"images", "depth", "point_cloud"} & set(wants):
            return observation
        pictured = {"images", "depth"} & set(wants)
        names = self.camera_sizes if pictured else self.recipe.cameras
        views = {name: scene.look(name, *self.camera_sizes[name]) for name in names}
        for name, view in views.items() if pictured else ():
            if "images" in wants:
                observation[f"observation.images.{name}"] = np.ascontiguousarray(view.picture().transpose(2, 0, 1))
            if "depth" in wants:
                observation[f"observation.depth.{name}"] = view.depth()[None]
        if "point_cloud" in wants:
            chosen = {name: views[name] for name in self.recipe.cameras}
            observation["observation.point_cloud"] = cloud_from_depth(
                {name: view.depth() for name, view in chosen.items()},
                {name: view.camera for name, view in chosen.items()},
                {name: view.pose for name, view in chosen.items()},
                {name: view.colors() for name, view in chosen.items()} if self.recipe.colors else None,
                self.recipe,
            )
        return observation

    def render(self) -> NDArray[np.uint8] | None:
        """A picture of table and arm, the right way up, (240, 320, 3) uint8."""
        if self.render_mode is None:
            return None
        return np.ascontiguousarray(self._scene().look("corner2", 240, 320).picture()[::-1, ::-1])

    def close(self) -> None:
        """Frees the simulators."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()


class Expert:
    """Meta-World's scripted policy for a task, at the state that its scene is in.

    Args:
        scene: the simulator.
        task: id of the task.
    """

    def __init__(self, scene: Scene, task: str) -> None:
        self._scene = scene
        self._policy = importlib.import_module("metaworld.policies").ENV_POLICY_MAP[f"{task}-v3"]()

    def act(self) -> NDArray[np.float32]:
        """(4,) the action for the present state."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these policies warn that they exceed the bounds
            command = self._policy.get_action(self._scene.state)
        return np.clip(np.asarray(command, dtype=np.float32), -1.0, 1.0)


def _known_task(task: str) -> str:
    name = task.removesuffix("-v3")
    among("task", name, SENTENCES)
    return name
