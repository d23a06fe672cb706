"""One simulator of Meta-World and what its cameras see: by rays, or through OpenGL."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from lightning_robot.envs.ray_camera import RayCamera
from lightning_robot.geometry import Camera

CAMERAS = ("topview", "corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV")
FAR = 10.0  # m, depth where nothing is seen
_ENDLESS = 10**9
_HIDDEN = 5  # a geom group that rays do not meet


@dataclass(frozen=True)
class Marker:
    """The marker of a goal: a sphere without a body.

    Attributes:
        position: (3,) of its centre in the world.
        radius: m.
        color: (3,) 0 to 1.
    """

    position: NDArray[np.float64]
    radius: float
    color: NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """What a camera sees at one instant; what OpenGL draws is drawn when it is asked for.

    Attributes:
        camera: its intrinsics.
        pose: (4, 4) camera-to-world, OpenGL axes.
        depth: gives (H, W) float32 metres along the optical axis; `FAR` where nothing is.
        colors: gives (H, W, 3) uint8 colours of what is seen, flat where rays see.
        picture: gives a picture (H, W, 3) uint8.
    """

    camera: Camera
    pose: NDArray[np.float64]
    depth: Callable[[], NDArray[np.float32]]
    colors: Callable[[], NDArray[np.uint8]]
    picture: Callable[[], NDArray[np.uint8]]


class Scene:
    """The simulator of one task.

    Meta-World's environment is made directly: through `gymnasium.make` it draws goals from its own list, and its `reset`
    ignores the seed. Seeded as here, an episode depends on the seed alone, also in a simulator that was used before.

    Args:
        task: id of the task, without version.
        positions: (x, y, z) per camera that is moved.
        markers: show where the goal is.
        opengl: draw through OpenGL; by rays otherwise.
    """

    def __init__(self, task: str, positions: Mapping[str, tuple[float, ...]], markers: bool, opengl: bool) -> None:
        classes: Any = importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
        simulator: Any = classes[f"{task}-v3"]()
        simulator._partially_observable = False  # experts read the goal
        simulator.__dict__.pop("sawyer_observation_space", None)  # computed before, for hidden goals
        simulator._freeze_rand_vec, simulator.seeded_rand_vec, simulator._set_task_called = False, True, True
        simulator.max_path_length = _ENDLESS
        self._simulator, self._markers, self._opengl = simulator, markers, opengl
        self.model: mujoco.MjModel = simulator.model
        self.data: mujoco.MjData = simulator.data
        self.state: NDArray[np.float64] = np.zeros(39)
        for name, place in positions.items():
            self.model.cam_pos[self.model.camera(name).id] = place
        self.model.vis.quality.offsamples, self.model.vis.quality.shadowsize = 0, 0
        self._hand = self.model.body("hand").id
        self._fingers = [self.model.site(name).id for name in ("rightEndEffector", "leftEndEffector")]
        self._goals = [self.model.site(name).id for name, _ in self._target_sites()] if markers else []
        self._colors = self._site_colors()
        self._visible = self._visible_model()
        self._cameras: dict[tuple[str, int, int], RayCamera] = {}
        self._renderers: dict[tuple[int, int, bool], mujoco.Renderer] = {}

    def reset(self, seed: int) -> None:
        """Starts the episode of a seed."""
        self._simulator.seed(seed)
        state, _ = self._simulator.reset()
        self.state = np.asarray(state, dtype=np.float64)
        for camera in self._cameras.values():
            camera.forget()  # resets move what is fixed to the world

    def step(self, action: NDArray[np.float32]) -> tuple[float, dict[str, Any]]:
        """One control step with an action within -1 to 1.

        Returns:
            Meta-World's reward and info.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state, reward, _, _, info = self._simulator.step(action)
        self.state = np.asarray(state, dtype=np.float64)
        return float(reward), info

    def hand_and_fingers(self) -> NDArray[np.float64]:
        """(9,) positions of hand, right and left finger: DP3's state."""
        return np.concatenate([self.data.xpos[self._hand], *self.data.site_xpos[self._fingers]])

    def markers(self) -> list[Marker]:
        """The goal's markers; one far away is hidden."""
        found = []
        for site, (_, position) in zip(self._goals, self._target_sites()):
            found.append(Marker(np.array(position), float(self.model.site_size[site, 0]), self._colors[site]))
        return found

    def look(self, name: str, height: int, width: int) -> View:
        """What a camera sees now."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        view = self._camera(name, height, width)
        pose = view.pose(self.data)
        if self._opengl:
            for site, marker in zip(self._goals, self.markers()):
                self.data.site_xpos[site] = marker.position

            def measured() -> NDArray[np.float32]:
                return np.minimum(self._draw(name, height, width, depth=True), FAR).astype(np.float32)

            def picture() -> NDArray[np.uint8]:
                return self._draw(name, height, width, depth=False)

            return View(view.camera, pose, measured, picture, picture)
        depth, geom = view.cast(self.data)
        marked = np.full(depth.shape, -1)
        markers = self.markers()
        for number, marker in enumerate(markers):
            _see_sphere(marker, number, view.camera, pose, depth, marked)

        def colored(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
            for number, marker in enumerate(markers):
                picture[marked == number] = np.round(255 * marker.color)
            return picture

        return View(
            view.camera,
            pose,
            lambda: depth,
            lambda: colored(view.colors(geom)),
            lambda: colored(view.shaded(self.data, (depth, geom))),
        )

    def close(self) -> None:
        """Frees OpenGL's contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _target_sites(self) -> list[tuple[str, NDArray[np.float64]]]:
        """Name and true position of the goal's sites; the simulation itself leaves some of them elsewhere."""
        if self._simulator._target_pos is None:  # before the first reset
            self._simulator.seed(0)
            self._simulator.reset()
        return list(self._simulator._target_site_config)

    def _site_colors(self) -> NDArray[np.float64]:
        """(sites, 3) colours; in the model all sites but the goal's become invisible."""
        colors = self.model.site_rgba[:, :3].astype(np.float64)
        shown = np.zeros(self.model.nsite, dtype=bool)
        shown[self._goals] = True
        self.model.site_rgba[~shown, 3] = 0
        return colors

    def _visible_model(self) -> mujoco.MjModel:
        """A copy in whose groups are, as `RayCamera` has it: 0 what is fixed, 1 what moves, 5 what is not seen."""
        model, visible = self.model, copy.copy(self.model)
        moves = model.body_weldid != 0
        for body in range(1, model.nbody):  # a mocap body is fixed only by name, and so is what hangs from it
            moves[body] |= model.body_mocapid[body] >= 0 or moves[model.body_parentid[body]]
        colors = model.geom_rgba.copy()
        plain = (model.geom_matid >= 0) & (colors == np.array([0.5, 0.5, 0.5, 1], np.float32)).all(axis=1)
        colors[plain] = model.mat_rgba[model.geom_matid[plain]]
        seen = (model.geom_group < 3) & (colors[:, 3] > 0)
        visible.geom_rgba[:] = colors
        visible.geom_group[:] = np.where(seen, moves[model.geom_bodyid], _HIDDEN)
        return visible

    def _camera(self, name: str, height: int, width: int) -> RayCamera:
        if (name, height, width) not in self._cameras:
            self._cameras[name, height, width] = RayCamera(self._visible, name, height, width, far=FAR)
        return self._cameras[name, height, width]

    def _draw(self, name: str, height: int, width: int, depth: bool) -> NDArray[Any]:
        from lightning_robot.envs.opengl import make_renderer

        if (height, width, depth) not in self._renderers:
            renderer = make_renderer(self.model, height, width)
            if depth:
                renderer.enable_depth_rendering()
            self._renderers[height, width, depth] = renderer
        self._renderers[height, width, depth].update_scene(self.data, name)
        return self._renderers[height, width, depth].render()


def _see_sphere(
    marker: Marker,
    number: int,
    camera: Camera,
    pose: NDArray[np.float64],
    depth: NDArray[np.float32],
    marked: NDArray[np.int64],
) -> None:
    """Where the sphere is nearer than what is seen, writes its depth, and its number to `marked`."""
    x, y, z = (marker.position - pose[:3, 3]) @ pose[:3, :3]
    if -z <= marker.radius:
        return
    focal = camera.focal
    reach = 1.5 * focal * marker.radius / (-z - marker.radius) + 1  # pixels, generously
    column, row = camera.width / 2 - focal * x / z, camera.height / 2 + focal * y / z
    rows = slice(max(0, int(row - reach)), max(0, int(row + reach) + 1))
    columns = slice(max(0, int(column - reach)), max(0, int(column + reach) + 1))
    part = depth[rows, columns]
    if not part.size:
        return
    across = (np.arange(camera.width)[columns] + 0.5 - camera.width / 2) / focal
    down = -(np.arange(camera.height)[rows] + 0.5 - camera.height / 2) / focal
    # A ray t (u, v, -1) meets the sphere where its distance to the centre is the radius.
    squared = across**2 + down[:, None] ** 2 + 1
    along = across * x + down[:, None] * y - z
    root = along**2 - squared * (x * x + y * y + z * z - marker.radius**2)
    hit = np.where(root > 0, (along - np.sqrt(np.maximum(root, 0))) / squared, np.inf)
    nearer = hit < part
    part[nearer] = hit[nearer]
    marked[rows, columns][nearer] = number
