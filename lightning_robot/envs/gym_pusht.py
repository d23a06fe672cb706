"""Push-T from the package gym_pusht: push a T-shaped block onto its outline with a disc, in the plane.

Source: "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion" (Chi et al., 2023); the package is LeRobot's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from lightning_robot.envs.adapters import Adapted, MissingPackage
from lightning_robot.envs.checks import among, picture_size
from lightning_robot.features import Features

OBSERVATIONS = ("state", "images", "environment_state")
_STATE_ONLY = "environment_state_agent_pos"


class PushT(Adapted):
    """Push-T at 10 Hz, for 300 steps. Success is a coverage above 95 %; the details of an episode tell the largest coverage.

    The state (2,) is the disc's position, an action (2,) its target, both in pixels of a field of 512. The environment's state
    (16,) are eight corners of the block. Keys are those of the data set lerobot/pusht, whose only camera has no name.

    Args:
        observations: what an observation holds: "state" and one of "images" and "environment_state".
        image_size: pixels of the picture, a number for a square or (height, width).
        camera: name of the camera; None for ``observation.image``.
        max_steps: control steps after which an episode is truncated.
        render_mode: "rgb_array" or None.

    Raises:
        MissingPackage: gym_pusht is not installed.
        ValueError: an argument has a value it cannot have.
    """

    def __init__(
        self,
        observations: Sequence[str] = ("state", "images"),
        image_size: int | Sequence[int] = 96,
        camera: str | None = None,
        max_steps: int = 300,
        render_mode: str | None = None,
    ) -> None:
        if importlib.util.find_spec("gym_pusht") is None:
            raise MissingPackage("gym_pusht", "pusht")
        for name in observations:
            among("observations", name, OBSERVATIONS)
        if {"images", "environment_state"} <= set(observations):
            raise ValueError("observations: gym_pusht offers images or environment_state, not both.")
        self._camera = camera
        height, width = picture_size(image_size)
        super().__init__(
            "gym_pusht/PushT-v0",
            {
                "obs_type": "pixels_agent_pos" if "images" in observations else _STATE_ONLY,
                "observation_height": height,
                "observation_width": width,
                "render_mode": "rgb_array",
            },
            **_places(observations, camera),
            maxima=("coverage",),
            task="push_t",
            sentence="push the T-shaped block onto the T-shaped target",
            action_semantics="absolute; commanded; pixels; no gripper",
            control_rate=10.0,
            max_steps=max_steps,
        )
        self.render_mode = render_mode

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As `Adapted.step`; draws no picture that nobody looks at."""
        self._env.unwrapped.obs_type = _STATE_ONLY if self.skip_observation else self._arguments["obs_type"]
        return super().step(action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `Adapted.reset`, whether or not the last step drew a picture."""
        self._env.unwrapped.obs_type = _STATE_ONLY if self.skip_observation else self._arguments["obs_type"]
        return super().reset(seed=seed, options=options)

    def match(self, features: Features) -> None:
        """Offers what a policy was trained on: its observations, the camera's name and the picture's size.

        Raises:
            ValueError: the policy was trained on an observation, or on several cameras, that Push-T does not have.
        """
        wants, cameras = [], []
        for key, feature in features.observations.items():
            kind, _, camera = key.removeprefix("observation.").partition(".")
            kind = "images" if kind == "image" else kind
            among(f"{key} of the policy", kind, OBSERVATIONS)
            wants.append(kind)
            if kind == "images":
                cameras.append((camera or None, (int(feature.shape[-2]), int(feature.shape[-1]))))
        if len(cameras) > 1:
            raise ValueError(f"The policy reads {len(cameras)} cameras; gym_pusht has one.")
        arguments = dict(self._arguments)
        for self._camera, (height, width) in cameras:
            arguments |= {"observation_height": height, "observation_width": width}
        arguments["obs_type"] = "pixels_agent_pos" if cameras else _STATE_ONLY
        self.close()
        self._open(arguments)
        self._place(**_places(wants, self._camera))


def _places(observations: Sequence[str], camera: str | None) -> dict[str, Any]:
    """Arguments of `Adapted` that say where in gym_pusht's observation is what."""
    pixels: Any = "pixels" if camera is None else {camera: "pixels"}
    return {
        "state": "agent_pos" if "state" in observations else None,
        "environment_state": "environment_state" if "environment_state" in observations else None,
        "images": pixels if "images" in observations else None,
    }
