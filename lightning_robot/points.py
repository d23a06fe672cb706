"""Point clouds: crop, farthest points, nearest neighbours, and the one cloud builder of data and environments.

numpy for one cloud at a time (conversion, simulation), torch for batches on any device. torch and pytorch3d are imported
only by the functions that take tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_robot.geometry import Camera, back_project

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

try:
    import fpsample
except ImportError:  # an optional speed-up: `_farthest_points_numpy` serves without it
    fpsample = None


class EmptyCloud(ValueError):
    """No point lies inside the workspace."""


@dataclass(frozen=True)
class CloudRecipe:
    """How a cloud is made of depth pictures. It is recorded with data and policies; an environment follows it.

    Attributes:
        cameras: names, in the order in which their points are joined.
        points: number of points of a cloud.
        colors: whether columns 3 to 5 hold red, green and blue in 0 to 1.
        crop: lower and upper corner of the workspace in metres, world frame; applied before points are chosen.
        per_camera: an equal share of the points from each camera instead of all cameras' points pooled.
        pixel_offset: see `lightning_robot.geometry.back_project`.
        start_index: where farthest-point sampling starts; an index into its tree's order, not into the points.
        height: height of the sampling tree. The chosen points depend on both, not on the run.
    """

    cameras: tuple[str, ...] = ("static", "gripper")
    points: int = 1024
    colors: bool = False
    crop: tuple[tuple[float, float, float], tuple[float, float, float]] = ((-0.5, -0.6, 0.25), (0.5, 0.25, 0.80))
    per_camera: bool = False
    pixel_offset: tuple[float, float] = (0.5, 0.5)
    start_index: int = 0
    height: int = 5

    def __post_init__(self) -> None:
        try:
            lower, upper = (tuple(float(value) for value in corner) for corner in self.crop)
        except (TypeError, ValueError) as error:
            raise ValueError(f"crop: needs two corners of three numbers, [[x, y, z], [x, y, z]]; got {self.crop}.") from error
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "crop", (lower, upper))
        object.__setattr__(self, "pixel_offset", tuple(float(value) for value in self.pixel_offset))
        if len(lower) != 3 or len(upper) != 3 or any(low >= high for low, high in zip(lower, upper)):
            raise ValueError(f"crop: needs a lower corner below an upper one, three numbers each; got {lower} and {upper}.")
        if not self.cameras or self.points < len(self.cameras):
            raise ValueError(f"A cloud needs a camera and a point per camera; got {self.points} points of {self.cameras}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, fit for JSON."""
        values = asdict(self)
        return values | {
            "cameras": list(self.cameras),
            "crop": [list(corner) for corner in self.crop],
            "pixel_offset": list(self.pixel_offset),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CloudRecipe:
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            names = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"A cloud recipe has no {', '.join(sorted(unknown))}; it has {names}.")
        return cls(**values)


def cloud_from_depth(
    depths: Mapping[str, NDArray[np.floating]],
    cameras: Mapping[str, Camera],
    poses: Mapping[str, NDArray[np.float64]],
    rgbs: Mapping[str, NDArray[np.uint8]] | None,
    recipe: CloudRecipe,
) -> NDArray[np.float32]:
    """The cloud of one instant: every camera back-projected, then `build_cloud`. Conversion and simulation both call this.

    Args:
        depths: per camera (H, W) metres along the optical axis; pixels of 0 or less, and not finite ones, give no point.
        cameras: per camera its intrinsics.
        poses: per camera (4, 4) camera-to-world.
        rgbs: per camera (H, W, 3) uint8, needed if the recipe has colours.
        recipe: which cameras, how many points, crop, colours.

    Returns:
        (points, 3) or (points, 6) float32, world frame.

    Raises:
        EmptyCloud: nothing lies inside the crop.
        KeyError: a camera of the recipe is not given.
        ValueError: a picture has not its camera's size.
    """
    points, colors = {}, {}
    for name in recipe.cameras:
        size = (cameras[name].height, cameras[name].width)
        for kind, pictures in (("depth", depths), ("colour", rgbs if recipe.colors else None)):
            if pictures is not None and pictures[name].shape[:2] != size:
                raise ValueError(f"Camera {name!r} has {size} pixels, its {kind} picture {pictures[name].shape[:2]}.")
        depth = np.where(depths[name] > 0, depths[name], np.float32(np.nan))  # 0 is how some cameras say "nothing seen"
        points[name] = back_project(depth, cameras[name], poses[name], recipe.pixel_offset)
        if recipe.colors and rgbs is not None:
            colors[name] = rgbs[name].reshape(-1, 3)
    return build_cloud(points, colors or None, recipe)


def build_cloud(
    points_by_camera: Mapping[str, NDArray[np.float32]],
    colors_by_camera: Mapping[str, NDArray[Any]] | None,
    recipe: CloudRecipe,
) -> NDArray[np.float32]:
    """Crops world points to the workspace, then chooses farthest points.

    Args:
        points_by_camera: per camera (P, 3) metres; points that are not finite fall out.
        colors_by_camera: per camera (P, 3) uint8 or 0 to 1; needed if the recipe has colours.
        recipe: which cameras, how many points, crop, colours.

    Returns:
        (points, 3) or (points, 6) float32. Fewer points than wanted are repeated in turn.

    Raises:
        EmptyCloud: nothing lies inside the crop.
    """
    if recipe.colors and colors_by_camera is None:
        raise ValueError("The recipe asks for colours: give the pictures, or set colors to false.")
    parts = []  # per camera with points inside: name, rows inside, points inside
    for name in recipe.cameras:
        rows = np.flatnonzero(inside(points_by_camera[name], recipe.crop))
        if len(rows):
            parts.append((name, rows, points_by_camera[name].take(rows, axis=0).astype(np.float32, copy=False)))
    if not parts:
        lower, upper = recipe.crop
        raise EmptyCloud(
            f"No point of {' and '.join(recipe.cameras)} lies inside the crop box x {lower[0]:g}..{upper[0]:g}, "
            f"y {lower[1]:g}..{upper[1]:g}, z {lower[2]:g}..{upper[2]:g} (metres): check the depth's unit or widen the box."
        )
    sizes = [len(rows) for _, rows, _ in parts]
    ends = np.cumsum(sizes)
    pooled = parts[0][2] if len(parts) == 1 else np.concatenate([points for _, _, points in parts])
    if recipe.per_camera:
        shares = [len(share) for share in np.array_split(np.arange(recipe.points), len(parts))]
        chosen = np.concatenate(
            [
                end - size + farthest_points(pooled[end - size : end], share, recipe.start_index, recipe.height)
                for end, size, share in zip(ends, sizes, shares, strict=True)
            ]
        )
    else:
        chosen = farthest_points(pooled, recipe.points, recipe.start_index, recipe.height)
    if not recipe.colors or colors_by_camera is None:
        return pooled.take(chosen, axis=0)
    cloud = np.empty((recipe.points, 6), dtype=np.float32)
    cloud[:, :3] = pooled[chosen]
    for (name, rows, _), end, size in zip(parts, ends, sizes, strict=True):
        own = (chosen >= end - size) & (chosen < end)
        colors = colors_by_camera[name][rows[chosen[own] - (end - size)]]
        cloud[own, 3:] = colors / np.float32(255) if np.issubdtype(colors.dtype, np.integer) else colors
    return cloud


def inside(points: NDArray[np.floating], crop: tuple[tuple[float, ...], tuple[float, ...]]) -> NDArray[np.bool_]:
    """(P,) whether points (P, 3) lie in the closed box of two corners; points that are not finite do not."""
    lower, upper = crop
    kept = np.ones(len(points), dtype=bool)
    for axis in range(3):
        column = points[:, axis]
        kept &= (column >= lower[axis]) & (column <= upper[axis])
    return kept


def farthest_points(points: NDArray[np.floating], count: int, start_index: int = 0, height: int = 5) -> NDArray[np.int64]:
    """Indices of `count` points, each the farthest from those before it.

    The result depends on the arguments alone, not on the run. With fpsample (bucket method on a tree) `start_index` counts
    in the tree's order; without it, in the order of the points.

    Args:
        points: (P, 3), P >= 1.
        count: number of points; where P is smaller, all indices are repeated in turn.
        start_index: first point.
        height: height of the tree, speed only matters: 5 suits 10,000 to 30,000 points.

    Returns:
        (count,) int64.
    """
    size = len(points)
    if size <= count:
        return np.arange(count) % size
    if not 0 <= start_index < size:
        raise ValueError(f"start_index {start_index} is outside the {size} points.")
    points = np.ascontiguousarray(points, dtype=np.float32)
    if fpsample is None:
        return _farthest_points_numpy(points, count, start_index)
    height = min(height, size.bit_length() - 1)  # fpsample wants 2**height <= points
    return fpsample.bucket_fps_kdline_sampling(points, count, height, start_index).astype(np.int64)


def _farthest_points_numpy(points: NDArray[np.float32], count: int, start_index: int) -> NDArray[np.int64]:
    columns = np.ascontiguousarray(points.T)
    distances = np.full(len(points), np.inf, dtype=np.float32)
    squared, difference = np.empty_like(distances), np.empty_like(distances)
    chosen = np.empty(count, dtype=np.int64)
    current = start_index
    for step in range(count):
        chosen[step] = current
        np.subtract(columns[0], columns[0, current], out=squared)
        np.square(squared, out=squared)
        for axis in (1, 2):
            np.subtract(columns[axis], columns[axis, current], out=difference)
            np.square(difference, out=difference)
            squared += difference
        np.minimum(distances, squared, out=distances)
        current = int(distances.argmax())
    return chosen


def farthest_points_torch(points: Tensor, count: int, start_index: int = 0) -> Tensor:
    """Farthest points of a batch of clouds on its device: (B, P, 3) -> (B, count) int64 indices, the first `start_index`.

    pytorch3d does it where it is installed and able; the choice is the same up to ties.

    Raises:
        ValueError: fewer than `count` points.
    """
    import torch

    batch, size = points.shape[:2]
    if not (0 < count <= size and 0 <= start_index < size):
        raise ValueError(f"{count} farthest points from index {start_index} of clouds with {size} points.")
    points = points.detach()
    library = _pytorch3d(_library_device(points)) if start_index == 0 and points.dtype == torch.float32 else None
    if library is not None:
        return library.sample_farthest_points(points.to(_library_device(points)), K=count)[1].to(points.device)
    distances = points.new_full((batch, size), float("inf"))
    chosen = torch.empty((batch, count), dtype=torch.int64, device=points.device)
    current = torch.full((batch, 1), start_index, dtype=torch.int64, device=points.device)
    for step in range(count):
        chosen[:, step : step + 1] = current
        center = points.gather(1, current[:, :, None].expand(-1, -1, points.shape[2]))
        distances = torch.minimum(distances, (points - center).square_().sum(dim=2))
        current = distances.argmax(dim=1, keepdim=True)
    return chosen


def nearest_neighbours(queries: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest points of every query, nearest first.

    Args:
        queries: (B, Q, D).
        points: (B, P, D), P >= count.
        count: neighbours per query.

    Returns:
        Squared distances (B, Q, count), differentiable, and indices (B, Q, count) int64. Distances are those of the exact
        differences (no expansion into products), in blocks of queries: memory stays below 2^26 distances.

    Raises:
        ValueError: fewer than `count` points, or sizes that do not match.
    """
    import torch

    batch, size, dimensions = points.shape
    if queries.shape[0] != batch or queries.shape[2] != dimensions or not 0 < count <= size:
        raise ValueError(f"{count} neighbours of queries {tuple(queries.shape)} among points {tuple(points.shape)}.")
    library = _pytorch3d(_library_device(points)) if points.dtype == queries.dtype == torch.float32 else None
    with torch.no_grad():
        if library is not None:
            device = _library_device(points)
            indices = library.knn_points(queries.to(device), points.to(device), K=count).idx.to(points.device)
        else:
            block = max(1, 2**26 // max(1, batch * size))
            parts = [
                torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").topk(count, largest=False).indices
                for part in queries.split(block, dim=1)
            ]
            indices = torch.cat(parts, dim=1)
    rows = torch.arange(batch, device=points.device)[:, None, None]
    return (points[rows, indices] - queries[:, :, None]).square().sum(dim=-1), indices


def _library_device(points: Tensor) -> str:
    """Where pytorch3d computes: on the CPU if PYTORCH3D_FORCE_CPU=1 (for a build without GPU support), else at the data."""
    return "cpu" if os.environ.get("PYTORCH3D_FORCE_CPU") == "1" else str(points.device)


@cache
def _pytorch3d(device: str) -> ModuleType | None:
    """pytorch3d's operations if the package is present and they run on that device (a build may lack GPU support)."""
    import torch

    try:
        from pytorch3d import ops

        cloud = torch.rand(1, 4, 3, device=device)
        ops.knn_points(cloud, cloud, K=1)
        ops.sample_farthest_points(cloud, K=1)
    except (ImportError, OSError, RuntimeError, NotImplementedError):
        return None
    return ops
