"""One recorded CALVIN frame -> the rows of a store: what is kept, how it is cut, and the cloud made of its depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_robot.data.calvin_files import CalvinError, DamagedFrame
from lightning_robot.features import Features, calvin_features
from lightning_robot.geometry import (
    CALVIN_GRIPPER,
    CALVIN_STATIC,
    CALVIN_STATIC_POSE,
    back_project,
    calvin_gripper_pose,
)
from lightning_robot.points import CloudRecipe, EmptyCloud, cloud_from_depth, inside

CAMERAS = {"static": CALVIN_STATIC, "gripper": CALVIN_GRIPPER}
TABLE_HEIGHT = 0.44
# The recordings order the blocks as their scene's configuration does; here red, blue, pink (positions in the recording).
_BLOCKS = {"A": (2, 1, 0), "B": (0, 1, 2), "C": (1, 0, 2), "D": (0, 1, 2)}
_OFFSETS = {"OpenGL, the official data": (0.5, 0.5), "PyBullet's software renderer": (0.0, 1.0)}


@dataclass(frozen=True)
class CalvinSettings:
    """What a conversion keeps of every frame. Recorded in the store.

    Attributes:
        points: points per cloud, 0 for no clouds.
        colors: clouds with red, green, blue in 0 to 1.
        per_camera: half of the points from each camera instead of both cameras' points pooled.
        crop: lower and upper corner of the workspace, metres; points outside fall out before farthest points are chosen.
        pixel_offset: where inside a pixel the renderer sampled, see `lightning_robot.geometry.back_project`.
        rgb, depth: the static camera's pictures, cut to the central `size` rows and columns (160: rows and columns 20 to
            179 of 200). Clouds are always made of the whole pictures.
        size: pixels.
        gripper_rgb, gripper_depth: the gripper camera's pictures, whole (84 x 84).
        scene_obs: the scene's state, blocks by name (red, blue, pink) whatever the scene's own order.
        actions: "relative" (scaled pose differences, `rel_actions`) or "absolute" (the next frame's pose).
        absolute_actions: absolute actions as an array of their own beside the others.
        depth_scale: factor on recorded depth; some old copies need 2.
    """

    points: int = 2048
    colors: bool = True
    per_camera: bool = False
    crop: tuple[tuple[float, float, float], tuple[float, float, float]] = CloudRecipe.crop
    pixel_offset: tuple[float, float] = (0.5, 0.5)
    rgb: bool = True
    depth: bool = True
    size: int = 160
    gripper_rgb: bool = False
    gripper_depth: bool = False
    scene_obs: bool = False
    actions: str = "relative"
    absolute_actions: bool = False
    depth_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.points < 0 or self.points == 1:
            raise CalvinError(f"points: {self.points}; give 0 for no clouds, or 2 and more.")
        if not 1 <= self.size <= CALVIN_STATIC.height:
            raise CalvinError(f"size: {self.size}; pictures are cut out of {CALVIN_STATIC.height} pixels, not enlarged.")
        if self.actions not in ("relative", "absolute"):
            raise CalvinError(f"actions: {self.actions!r}; choose relative or absolute.")
        if not self.depth_scale > 0:
            raise CalvinError(f"depth_scale: {self.depth_scale}; it is a positive factor.")
        _ = self.recipe  # refuses an impossible crop now

    @property
    def recipe(self) -> CloudRecipe:
        """How clouds are made: what an environment needs to make the same."""
        return CloudRecipe(
            points=max(self.points, 2),
            colors=self.colors,
            crop=self.crop,
            per_camera=self.per_camera,
            pixel_offset=self.pixel_offset,
        )

    @property
    def rows(self) -> slice:
        """Rows, and columns, of the static camera's pictures that are kept."""
        start = (CALVIN_STATIC.height - self.size) // 2
        return slice(start, start + self.size)

    @property
    def frame_keys(self) -> tuple[str, ...]:
        """Arrays of a recorded frame that are read."""
        wanted = {
            "robot_obs": True,
            "rel_actions": self.actions == "relative",
            "actions": self.actions == "absolute" or self.absolute_actions,
            "scene_obs": self.scene_obs,
            "rgb_static": self.rgb or (self.points and self.colors),
            "depth_static": self.depth or self.points,
            "rgb_gripper": self.gripper_rgb or (self.points and self.colors),
            "depth_gripper": self.gripper_depth or self.points,
        }
        return tuple(key for key, value in wanted.items() if value)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one frame and dtype per batch key: the store's arrays."""
        size, gripper = self.size, CALVIN_GRIPPER.height
        every: dict[str, tuple[bool, tuple[int, ...], str]] = {
            "observation.state": (True, (15,), "float32"),
            "action": (True, (7,), "float32"),
            "observation.action_absolute": (self.absolute_actions, (7,), "float32"),
            "observation.environment_state": (self.scene_obs, (24,), "float32"),
            "observation.point_cloud": (self.points > 0, (self.points, 6 if self.colors else 3), "float32"),
            "observation.images.static": (self.rgb, (size, size, 3), "uint8"),
            "observation.depth.static": (self.depth, (size, size), "float32"),
            "observation.images.gripper": (self.gripper_rgb, (gripper, gripper, 3), "uint8"),
            "observation.depth.gripper": (self.gripper_depth, (gripper, gripper), "float32"),
        }
        return {key: (shape, dtype) for key, (kept, shape, dtype) in every.items() if kept}

    def features(self, source: dict[str, str]) -> Features:
        """What the converted store offers."""
        gripper = (CALVIN_GRIPPER.height, CALVIN_GRIPPER.width)
        sizes = {"static": (self.size, self.size), "gripper": gripper}
        return calvin_features(
            self.points,
            self.colors,
            self.recipe.to_dict(),
            relative=self.actions == "relative",
            provenance="achieved",
            cameras={name: sizes[name] for name, kept in (("static", self.rgb), ("gripper", self.gripper_rgb)) if kept},
            depth_cameras={
                name: sizes[name] for name, kept in (("static", self.depth), ("gripper", self.gripper_depth)) if kept
            },
            environment_state=self.scene_obs,
            # The pictures that clouds come from: a simulator that follows them offers clouds of the same density.
            source=source
            | {"cameras": ", ".join(f"{name} {item.height}x{item.width}" for name, item in sorted(CAMERAS.items()))},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalvinSettings:
        """The settings that `to_dict` made plain."""
        (low, high), (column, row) = values["crop"], values["pixel_offset"]
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        return cls(**{**known, "crop": (tuple(low), tuple(high)), "pixel_offset": (column, row)})

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, with the rows and columns that `size` stands for."""
        values = asdict(self)
        return values | {
            "crop": [list(corner) for corner in self.crop],
            "pixel_offset": list(self.pixel_offset),
            "kept_rows_and_columns": [self.rows.start, self.rows.stop - 1],
        }


def convert_frame(frame: dict[str, NDArray[Any]], settings: CalvinSettings, scene: str = "D") -> dict[str, NDArray[Any]]:
    """One frame's rows by batch key.

    A gripper value of 0 or less becomes -1 (old copies say 0 for closed). The roll of the state stays as recorded: it
    flips between -pi and pi.

    Args:
        frame: arrays named by `CalvinSettings.frame_keys`.
        settings: what to keep.
        scene: A, B, C or D: the order of the blocks in `scene_obs`.

    Raises:
        DamagedFrame: no point lies in the workspace.
    """
    rows = {"observation.state": _with_gripper(frame["robot_obs"])}
    rows["action"] = _with_gripper(frame["rel_actions" if settings.actions == "relative" else "actions"])
    if settings.absolute_actions:
        rows["observation.action_absolute"] = _with_gripper(frame["actions"])
    if settings.scene_obs:
        blocks = frame["scene_obs"][6:].reshape(3, 6)[list(_BLOCKS[scene])]
        rows["observation.environment_state"] = np.concatenate([frame["scene_obs"][:6], blocks.ravel()]).astype(np.float32)
    depths = {name: _scaled(frame[f"depth_{name}"], settings) for name in CAMERAS if f"depth_{name}" in frame}
    if settings.points:
        poses = {"static": CALVIN_STATIC_POSE, "gripper": calvin_gripper_pose(frame["robot_obs"])}
        rgbs = {name: frame[f"rgb_{name}"] for name in CAMERAS} if settings.colors else None
        try:
            rows["observation.point_cloud"] = cloud_from_depth(depths, CAMERAS, poses, rgbs, settings.recipe)
        except EmptyCloud as error:
            raise DamagedFrame(str(error)) from error
    kept = settings.rows
    if settings.rgb:
        rows["observation.images.static"] = frame["rgb_static"][kept, kept]
    if settings.depth:
        rows["observation.depth.static"] = depths["static"][kept, kept]
    if settings.gripper_rgb:
        rows["observation.images.gripper"] = frame["rgb_gripper"]
    if settings.gripper_depth:
        rows["observation.depth.gripper"] = depths["gripper"]
    return rows


def check_frame(frame: dict[str, NDArray[Any]], settings: CalvinSettings) -> None:
    """Looks for what `convert_frame` would stumble over later, at a fraction of its cost.

    Raises:
        DamagedFrame: no point lies in the workspace, or a relative action is out of bounds.
    """
    if "rel_actions" in frame and np.abs(frame["rel_actions"]).max() > 1 + 1e-6:
        raise DamagedFrame(f"rel_actions reach {np.abs(frame['rel_actions']).max():g}; they lie between -1 and 1")
    if not settings.points:
        return
    depths = {name: _scaled(frame[f"depth_{name}"], settings) for name in CAMERAS}
    thinned = back_project(depths["static"][::8, ::8], CALVIN_STATIC, CALVIN_STATIC_POSE, settings.pixel_offset, stride=8)
    if not inside(thinned, settings.crop).any():  # rarely: then all points are looked at
        convert_frame(frame, settings)


def _with_gripper(vector: NDArray[np.floating]) -> NDArray[np.float32]:
    vector = vector.astype(np.float32)
    if vector[-1] <= 0:
        vector[-1] = -1
    return vector


def _scaled(depth: NDArray[np.floating], settings: CalvinSettings) -> NDArray[np.float32]:
    return (
        depth.astype(np.float32, copy=False) if settings.depth_scale == 1 else depth.astype(np.float32) * settings.depth_scale
    )


def check_depth(pictures: Iterable[NDArray[np.float32]], settings: CalvinSettings) -> tuple[str, str]:
    """Looks for the table top, a plane 0.44 m high, in pictures of the static camera's depth.

    Args:
        pictures: (200, 200) metres as recorded, several.
        settings: gives the depth's factor and the pixel offset in use.

    Returns:
        (note, damage): a note if another pixel offset fits better, damage if no table is found; '' where there is none.

    Raises:
        CalvinError: the depth is off by a factor of 2.
    """
    depths = [_scaled(picture, settings) for picture in pictures]
    if not depths:
        return "", ""
    found = _table(depths, 1.0, settings.pixel_offset)
    if found is None:
        for factor in (2.0, 0.5):
            if _table(depths, factor, settings.pixel_offset) is not None:
                raise CalvinError(
                    f"Depth is off by a factor: the table top lies at 0.44 m only after multiplying depth by {factor:g} (old "
                    f"copies have this defect). Add --depth-scale {settings.depth_scale * factor:g}."
                )
        return "", "no table top 0.44 m high in the static camera's depth: its unit, camera or precision is not CALVIN's"
    for name, offset in _OFFSETS.items():
        other = _table(depths, 1.0, offset)
        if other is not None and other < 0.5 * found:
            return (
                f"note: the table top is off by {found * 1e3:.2f} mm with the pixel offset {settings.pixel_offset}, by "
                f"{other * 1e3:.2f} mm with that of {name}: consider --pixel-offset {offset[0]:g} {offset[1]:g} (in fit "
                f"--data.convert.pixel_offset '[{offset[0]:g},{offset[1]:g}]')."
            ), ""
    return "", ""


def _table(depths: list[NDArray[np.float32]], factor: float, offset: tuple[float, float]) -> float | None:
    """Median distance of table points from the table's height in metres; None if there is no such plane."""
    medians = []
    for depth in depths:
        points = back_project(depth * np.float32(factor), CALVIN_STATIC, CALVIN_STATIC_POSE, offset)
        over = (np.abs(points[:, 0]) < 0.45) & (points[:, 1] > -0.42) & (points[:, 1] < 0.1)
        distances = np.abs(points[over, 2] - TABLE_HEIGHT)
        near = distances[distances < 0.006]
        if len(near) > 1000 and len(near) > 0.25 * (distances < 0.05).sum():
            medians.append(float(np.median(near)))
    return float(np.median(medians)) if len(medians) >= math.ceil(len(depths) / 2) else None
