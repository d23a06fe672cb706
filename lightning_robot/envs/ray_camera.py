"""Depth, segmentation, flat colours and simple shaded pictures by casting rays: no OpenGL.

A ray through every pixel's centre meets the nearest geom exactly; the ray has length 1 along the optical axis, so the distance
that MuJoCo returns in units of the ray is the depth of the pixel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from lightning_robot.geometry import Camera

# MuJoCo 3.5 and later return surface normals, through one more argument before the number of rays.
_NORMAL = (None,) if "normal" in (mujoco.mj_multiRay.__doc__ or "") else ()
_SEEN, _UNSEEN = 0, 5  # geom groups
_ONLY_SEEN = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)
_TILE = 24  # pixels, about


def camera_mounts(model: mujoco.MjModel, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Where cameras are fixed, as `Features.cameras` tells it: the same whatever the state of the simulation."""
    mounts = {}
    for name in names:
        camera = model.camera(name)
        mounts[name] = {
            "mount": model.body(int(camera.bodyid[0])).name or "world",
            "position": [round(float(value), 6) for value in camera.pos],
            "rotation": [round(float(value), 6) for value in camera.quat],
            "fov": round(float(camera.fovy[0]), 6),
        }
    return mounts


class RayCamera:
    """One camera of a model.

    Geoms of group 0 must never move, those of group 1 may; others are not seen. A camera that is fixed to the world casts
    group 0 only once.

    The picture is cast in tiles, each with the geoms whose bounds reach into it. MuJoCo's own culling is switched off. It
    bounds a geom by the spherical angles of its box's corners: through a wide box near the camera it sees holes (3.3) or
    loses single pixels at edges (3.5). And it bounds a body by a sphere whose centre it adds to the centre of mass without
    turning it (3.3): parts of a body with an inertia of its own vanish while it turns.

    Args:
        model: the compiled model.
        name: of the model's camera; its vertical field of view is taken.
        height, width: pixels.
        near, far: metres, kept in `camera`; a ray that meets nothing has depth `far`.
        lamp: (3,) direction in the world towards a lamp, for `shaded`. Without it the lamp goes along with the camera, and
            normals of surfaces are estimated from the depth.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        name: str,
        height: int,
        width: int,
        near: float = 0.01,
        far: float = 10.0,
        lamp: tuple[float, float, float] | None = None,
    ) -> None:
        self._lamp = np.zeros(3) if lamp is None else np.array(lamp) / np.linalg.norm(lamp)
        self._lamp_is_carried = lamp is None
        self._colors_of = model
        self._model = copy.copy(model)
        self._model.body_bvhadr[:] = -1  # no bounding volumes: nothing is culled
        self._id = model.camera(name).id
        self.camera = Camera(name, width, height, float(model.cam_fovy[self._id]), near, far)
        self._moving = model.geom_group == 1
        self._fixed_geoms = model.geom_group == 0
        self._endless = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        self._corners = model.geom_aabb[:, None, :3] + signs * model.geom_aabb[:, None, 3:]

        rows, columns = np.mgrid[0:height, 0:width].astype(np.float64) + 0.5
        x, y = (columns - width / 2) / self.camera.focal, -(rows - height / 2) / self.camera.focal
        rays = np.stack([x, y, np.full_like(x, -1.0)], axis=-1).reshape(-1, 3)
        self._rays = rays.reshape(height, width, 3)
        pixels = np.arange(height * width).reshape(height, width)
        tiles = [
            part.ravel()
            for band in np.array_split(pixels, max(1, round(height / _TILE)), axis=0)
            for part in np.array_split(band, max(1, round(width / _TILE)), axis=1)
        ]
        self._order = np.concatenate(tiles)  # pixel of each ray, tile after tile
        self._tiled_rays = rays[self._order]
        ends = np.cumsum([len(tile) for tile in tiles])
        self._tiles = [slice(end - len(tile), end) for end, tile in zip(ends, tiles)]
        self._tile_low = np.array([rays[tile, :2].min(axis=0) for tile in tiles])
        self._tile_high = np.array([rays[tile, :2].max(axis=0) for tile in tiles])
        self._directions = np.empty_like(self._tiled_rays)
        self._fixed: tuple[NDArray[np.float64], NDArray[np.int32]] | None = None
        self._is_fixed = model.cam_bodyid[self._id] == 0

    def forget(self) -> None:
        """Has group 0 cast anew at the next picture, because it was placed elsewhere."""
        self._fixed = None

    def pose(self, data: mujoco.MjData) -> NDArray[np.float64]:
        """(4, 4) camera-to-world, OpenGL axes."""
        pose = np.eye(4)
        pose[:3, :3] = data.cam_xmat[self._id].reshape(3, 3)
        pose[:3, 3] = data.cam_xpos[self._id]
        return pose

    def cast(self, data: mujoco.MjData) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """What every pixel sees. The data's positions must be current (`mj_kinematics`, `mj_comPos`, `mj_camlight`).

        Returns:
            Depth (H, W) float32 in metres along the optical axis and geom id (H, W) int32, -1 where the ray meets nothing.
        """
        if not self._is_fixed:
            distance, geom = self._cast(data, self._moving | self._fixed_geoms)
        else:
            if self._fixed is None:
                self._fixed = self._cast(data, self._fixed_geoms)
            distance, geom = self._cast(data, self._moving)
            farther = self._fixed[0] < distance
            distance[farther], geom[farther] = self._fixed[0][farther], self._fixed[1][farther]
        shape = (self.camera.height, self.camera.width)
        depth, seen = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.int32)
        depth.reshape(-1)[self._order] = np.where(geom < 0, self.camera.far, distance)
        seen.reshape(-1)[self._order] = geom
        return depth, seen

    def _cast(self, data: mujoco.MjData, geoms: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Distance (infinite where nothing is met) and geom (-1) of every ray, tile after tile."""
        rotation, position = data.cam_xmat[self._id].reshape(3, 3), data.cam_xpos[self._id]
        np.matmul(self._tiled_rays, rotation.T, out=self._directions)
        directions = self._directions.reshape(-1)
        distance, geom = np.full(len(self._order), np.inf), np.full(len(self._order), -1, dtype=np.int32)
        groups = self._model.geom_group
        for tile, reaches in zip(self._tiles, self._reaching(data, rotation, position) & geoms):
            if reaches.any():
                groups[:] = np.where(reaches, _SEEN, _UNSEEN)
                count = tile.stop - tile.start
                vectors = directions[3 * tile.start : 3 * tile.stop]
                found = (geom[tile], distance[tile], *_NORMAL)
                mujoco.mj_multiRay(self._model, data, position, vectors, _ONLY_SEEN, 1, -1, *found, count, mujoco.mjMAXVAL)
        distance[geom < 0] = np.inf
        return distance, geom

    def _reaching(self, data: mujoco.MjData, rotation: NDArray[np.float64], position: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(tiles, geoms) whether a geom's bounding box may be seen in a tile."""
        axes = data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1) @ rotation
        corners = self._corners @ axes + ((data.geom_xpos - position) @ rotation)[:, None]
        depth = -corners[..., 2]
        behind = depth < 1e-4
        image = corners[..., :2] / np.where(behind, 1.0, depth)[..., None]
        everywhere = (behind.any(axis=1) & ~behind.all(axis=1)) | self._endless
        low, high = image.min(axis=1), image.max(axis=1)
        low[everywhere], high[everywhere] = -np.inf, np.inf
        inside = (low <= self._tile_high[:, None]) & (high >= self._tile_low[:, None])
        return inside.all(axis=2) & ~(behind.all(axis=1) & ~self._endless)

    def colors(self, geom: NDArray[np.int32]) -> NDArray[np.uint8]:
        """(H, W, 3) flat colours of the geoms seen, black where there is none."""
        palette = np.zeros((self._model.ngeom + 1, 3), dtype=np.uint8)
        palette[:-1] = np.round(self._colors_of.geom_rgba[:, :3] * 255).astype(np.uint8)
        return palette[geom]  # -1 is the last row

    def shaded(
        self, data: mujoco.MjData, seen: tuple[NDArray[np.float32], NDArray[np.int32]] | None = None
    ) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 picture: flat colours, darker where the surface turns away from the lamp.

        Args:
            data: as for `cast`.
            seen: what `cast` gave for it, if it is known already.
        """
        depth, geom = self.cast(data) if seen is None else seen
        light = self._lit_from_depth(depth) if self._lamp_is_carried else self._lit(data, depth, geom)
        picture = self.colors(geom) * light
        picture[geom < 0] = 235
        return picture.astype(np.uint8)

    def _lit_from_depth(self, depth: NDArray[np.float32]) -> NDArray[np.float64]:
        """(H, W, 1) light on surfaces whose normals are estimated from neighbouring pixels."""
        points = self._rays * depth[..., None]
        across = np.gradient(points, axis=1)
        down = np.gradient(points, axis=0)
        normal = np.cross(down, across)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-12
        lamp = np.array([-0.35, 0.75, 0.55]) / np.linalg.norm([-0.35, 0.75, 0.55])
        light: NDArray[np.float64] = 0.55 + 0.45 * np.clip(normal @ lamp, 0, 1)
        return light[..., None]

    def _lit(self, data: mujoco.MjData, depth: NDArray[np.float32], geom: NDArray[np.int32]) -> NDArray[np.float64]:
        """(H, W, 1) light on the exact sides of boxes, cylinders and planes; any other shape counts as a sphere."""
        rotation, eye = data.cam_xmat[self._id].reshape(3, 3), data.cam_xpos[self._id]
        flat = geom.reshape(-1)
        level = data.geom_xmat.reshape(-1, 3, 3)[:, :, 2] @ self._lamp * self._endless  # a plane is lit alike everywhere
        facing = np.append(level, 0.0)[flat]  # the last for -1, nothing
        pixels = np.flatnonzero(~np.append(self._endless, True)[flat])
        pixels = pixels[np.argsort(flat[pixels], kind="stable")]  # geom after geom
        points = (self._rays.reshape(-1, 3)[pixels] * depth.reshape(-1)[pixels, None]) @ rotation.T + eye
        ends = np.append(np.flatnonzero(np.diff(flat[pixels])) + 1, len(pixels)).tolist()
        start = 0
        for end in ends if len(pixels) else ():
            part, number = pixels[start:end], int(flat[pixels[start]])
            axes = data.geom_xmat[number].reshape(3, 3)
            place = (points[start:end] - data.geom_xpos[number]) @ axes
            kind, size = self._model.geom_type[number], self._model.geom_size[number]
            facing[part] = _facing(place, self._lamp @ axes, kind, size)
            start = end
        light: NDArray[np.float64] = 0.6 + 0.4 * np.maximum(facing, 0.0)
        return light.reshape(*depth.shape, 1)


def _facing(place: NDArray[np.float64], lamp: NDArray[np.float64], kind: int, size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine between lamp and normal at points (N, 3) of a geom's surface; points and lamp (3,) in its own frame."""
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        side = np.abs(place / size).argmax(axis=1)
        return lamp[side] * np.sign(place[np.arange(len(place)), side])
    around = place * (1.0, 1.0, 0.0) if kind == mujoco.mjtGeom.mjGEOM_CYLINDER else place
    cosine: NDArray[np.float64] = around @ lamp / (np.linalg.norm(around, axis=1) + 1e-12)
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        ends = np.abs(place[:, 2]) > size[1] * (1 - 1e-3)
        cosine[ends] = lamp[2] * np.sign(place[ends, 2])
    return cosine
