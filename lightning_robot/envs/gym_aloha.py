"""Two arms hand over a cube or insert a peg, from the package gym_aloha.

The package draws three pictures of 480 by 640 pixels with shadows at every step, of which one is used. Here only the cameras
asked for are drawn, at the size asked for, without shadows unless they are asked for, and none where nobody looks.

Source: "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (Zhao et al., 2023); the package is LeRobot's.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from lightning_robot.envs.adapters import Adapted, MissingPackage
from lightning_robot.envs.checks import CameraSizes, among, picture_sizes
from lightning_robot.envs.gym_aloha_expert import Expert
from lightning_robot.envs.opengl import make_renderer
from lightning_robot.features import Features

TASKS = {
    "transfer_cube": ("AlohaTransferCube", "pick up the cube with the right arm and hand it over to the left arm"),
    "insertion": ("AlohaInsertion", "pick up peg and socket and insert the peg into the socket"),
}
CAMERAS = ("top", "angle", "front_close", "left_pillar", "right_pillar")
OBSERVATIONS = ("state", "images", "environment_state")
_NAMES = tuple(
    f"{arm}_{joint}"
    for arm in ("left", "right")
    for joint in ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
)


class Aloha(Adapted):
    """Bimanual tasks at 50 Hz. Success is the package's reward 4; the details of an episode tell the largest reward.

    State and action (14,) are, for the left and then the right arm, six joint angles in radians and the gripper from 0 (closed)
    to 1 (open); actions are absolute targets. The package declares them within -1 to 1, which the joints are not: the box
    offered here has the joints' own limits. The environment's state are position and quaternion of the cube (7,), or of peg and
    socket (14,).

    Args:
        task: "transfer_cube" or "insertion".
        observations: what an observation holds, of "state", "images" and "environment_state".
        camera_sizes: pixels per camera, or of ``top``: a number for a square or (height, width). ``top`` at 480 by 640, as in
            the data sets of LeRobot, when None. Other cameras: angle, front_close, left_pillar and right_pillar.
        max_steps: control steps after which an episode is truncated: 400 as in the paper, where the package has 300.
        shadows: draw as the package does, with shadows, reflections and multisampling (0.1 s instead of 0.013 s per picture of
            480 by 640): for policies trained on pictures drawn so, such as those of LeRobot's data sets.
        render_mode: "rgb_array" or None.

    Raises:
        MissingPackage: gym_aloha is not installed.
        ValueError: an argument has a value it cannot have.
    """

    def __init__(
        self,
        task: str = "transfer_cube",
        observations: Sequence[str] = ("state", "images"),
        camera_sizes: CameraSizes | None = None,
        max_steps: int = 400,
        shadows: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if importlib.util.find_spec("gym_aloha") is None:
            raise MissingPackage("gym_aloha", "aloha")
        among("task", task, TASKS)
        for name in observations:
            among("observations", name, OBSERVATIONS)
        self.camera_sizes = picture_sizes(camera_sizes, ("top",), (480, 640))
        for name in self.camera_sizes:
            among("camera_sizes", name, CAMERAS)
        self.observations, self._shadows = tuple(observations), shadows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dm_control looks for a display first, and says when there is none
            super().__init__(
                f"gym_aloha/{TASKS[task][0]}-v0",
                {"obs_type": "pixels_agent_pos", "render_mode": "rgb_array"},
                maxima=("reward",),
                task=task,
                sentence=TASKS[task][1],
                state="agent_pos",
                state_names=_NAMES,
                action_names=_NAMES,
                action_semantics="absolute; commanded; joints radians; gripper 0 closed 1 open",
                action_bounds=_LIMITS,
                control_rate=50.0,
                max_steps=max_steps,
            )
        self.render_mode = render_mode
        self._inner: Any = self._env.unwrapped
        self._physics = self._inner._env.physics
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        if not shadows:
            quality = self._physics.model.ptr.vis.quality
            quality.offsamples, quality.shadowsize = 0, 0
        self._inner._env.task.get_observation = self._look
        self._inner._format_raw_obs = self._as_it_is
        self._declare_own()

    def _declare_own(self) -> None:
        """Has the package's environment offer what `_look` gives it."""
        pictures: dict[str, spaces.Space] = {
            name: spaces.Box(0, 255, (*size, 3), np.uint8) for name, size in self.camera_sizes.items()
        }
        size = 7 if self.task == "transfer_cube" else 14
        self._inner.observation_space = spaces.Dict(
            {
                "qpos": spaces.Box(-np.inf, np.inf, (14,), np.float64),
                "env_state": spaces.Box(-np.inf, np.inf, (size,), np.float64),
                "images": spaces.Dict(pictures),
            }
        )
        self._place(**_places(self.observations, self.camera_sizes))

    def _look(self, physics: Any) -> dict[str, Any]:
        task = self._inner._env.task
        seen: dict[str, Any] = {"qpos": task.get_qpos(physics), "env_state": task.get_env_state(physics), "images": {}}
        if "images" in self.observations and not self.skip_observation:
            for name, (height, width) in self.camera_sizes.items():
                seen["images"][name] = self._draw(name, height, width)
        return seen

    def _draw(self, name: str, height: int, width: int) -> NDArray[np.uint8]:
        if (height, width) not in self._renderers:
            renderer = make_renderer(self._physics.model.ptr, height, width)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION) if self._shadows else ():
                renderer.scene.flags[flag] = 1
            self._renderers[height, width] = renderer
        self._renderers[height, width].update_scene(self._physics.data.ptr, name)
        return self._renderers[height, width].render()

    @staticmethod
    def _as_it_is(seen: dict[str, Any]) -> dict[str, Any]:
        return seen

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: its observations and the sizes of its pictures.

        Raises:
            ValueError: the policy was trained on an observation or a camera that the package does not have.
        """
        wants, sizes = [], {}
        for key, feature in features.observations.items():
            kind, _, camera = key.removeprefix("observation.").partition(".")
            among(f"{key} of the policy", kind, OBSERVATIONS)
            if camera:
                among(f"{key} of the policy", camera, CAMERAS)
                sizes[camera] = (int(feature.shape[-2]), int(feature.shape[-1]))
            wants.append(kind)
        self.observations, self.camera_sizes = tuple(dict.fromkeys(wants)), sizes or self.camera_sizes
        self._declare_own()

    def expert(self, random: np.random.Generator | None = None) -> Expert:
        """The scripted expert for the task; its ``act()`` gives the action (14,) for the present step.

        Args:
            random: not needed: the expert is deterministic.
        """
        return Expert(self._physics.model.ptr, self._physics.data.ptr, self.task)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What episodes depend on beside the seed, as plain strings."""
        sizes = ", ".join(f"{name} {height}x{width}" for name, (height, width) in sorted(self.camera_sizes.items()))
        return {**super().fingerprint, "mujoco": mujoco.__version__, "cameras": sizes, "shadows": str(self._shadows)}

    def close(self) -> None:
        """Closes the environment and OpenGL's contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        super().close()

    def render(self) -> NDArray[np.uint8] | None:
        """A picture from above, (240, 320, 3) uint8."""
        return None if self.render_mode is None else self._draw("top", 240, 320)


def _places(observations: Sequence[str], cameras: Iterable[str]) -> dict[str, Any]:
    """Arguments of `Adapted` that say where in the package's observation is what."""
    return {
        "state": "qpos" if "state" in observations else None,
        "environment_state": "env_state" if "environment_state" in observations else None,
        "images": {name: f"images.{name}" for name in cameras} if "images" in observations else None,
    }


_ARM = ((-3.14158, 3.14158), (-1.85005, 1.25664), (-1.76278, 1.6057), (-3.14158, 3.14158), (-1.8675, 2.23402))
_LIMITS = np.array([*_ARM, (-3.14158, 3.14158), (0.0, 1.0)] * 2).T
"""(2, 14) least and greatest command: the joints' limits, and the gripper's range."""
