"""Crop before choosing, determinism, and agreement of every sampler."""

import sys
import types

import numpy as np
import pytest
import torch

from lightning_robot import points as module
from lightning_robot.geometry import (
    CALVIN_GRIPPER,
    CALVIN_STATIC,
    CALVIN_STATIC_POSE,
    Camera,
    back_project,
    calvin_gripper_pose,
)
from lightning_robot.points import CloudRecipe, EmptyCloud, build_cloud, cloud_from_depth, farthest_points

BOX = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def random_points(count=3000, seed=0):
    return np.random.default_rng(seed).random((count, 3), dtype=np.float32)


def greedy(points, count, first):
    """Farthest-point sampling by its definition, in float64."""
    chosen = [first]
    distances = ((points.astype(np.float64) - points[first]) ** 2).sum(1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, ((points.astype(np.float64) - points[chosen[-1]]) ** 2).sum(1))
    return chosen


def test_every_sampler_follows_the_definition(monkeypatch):
    points = random_points()
    fast = farthest_points(points, 200, 0)
    assert fast.tolist() == greedy(points, 200, fast[0])
    assert module._farthest_points_numpy(points, 200, 7).tolist() == greedy(points, 200, 7)
    batch = torch.from_numpy(np.stack([points, random_points(seed=1)]))
    chosen = module.farthest_points_torch(batch, 200, start_index=7)
    assert chosen[0].tolist() == greedy(points, 200, 7)
    assert chosen[1].tolist() == greedy(batch[1].numpy(), 200, 7)
    monkeypatch.setattr(module, "fpsample", None)
    assert farthest_points(points, 200, 7).tolist() == greedy(points, 200, 7)


def test_choice_does_not_depend_on_the_run():
    points = random_points(20000)
    first = farthest_points(points, 500, 3, 5)
    for _ in range(3):
        np.testing.assert_array_equal(farthest_points(points.copy(), 500, 3, 5), first)
    assert len(set(first)) == 500


@pytest.mark.parametrize("size", [1, 2, 31, 33, 64])
def test_few_points(size):
    points = random_points(size)
    repeated = farthest_points(points, 100)
    assert repeated.tolist() == [index % size for index in range(100)]
    fewer = farthest_points(points, max(1, size - 1), height=9)
    assert len(set(fewer.tolist())) == max(1, size - 1)


def test_crop_comes_before_the_choice():
    """With the choice first, nearly all points would go to the far outliers."""
    near = random_points(500)
    far = random_points(500, 1) * 50 + 10
    recipe = CloudRecipe(cameras=("a",), points=100, crop=BOX)
    cloud = build_cloud({"a": np.concatenate([far, near])}, None, recipe)
    assert cloud.shape == (100, 3)
    assert cloud.dtype == np.float32
    assert module.inside(cloud, BOX).all()
    assert len(np.unique(cloud, axis=0)) == 100


def test_points_that_are_not_finite_fall_out():
    points = random_points(50)
    points[:10] = np.nan
    points[10:20] = np.inf
    cloud = build_cloud({"a": points}, None, CloudRecipe(cameras=("a",), points=60, crop=BOX))
    np.testing.assert_array_equal(cloud, points[20 + np.arange(60) % 30])


def test_an_empty_workspace_is_an_error_that_names_the_box():
    with pytest.raises(EmptyCloud, match=r"x 0\.\.1, y 0\.\.1, z 0\.\.1"):
        build_cloud({"a": random_points() + 5}, None, CloudRecipe(cameras=("a",), points=8, crop=BOX))


def test_colors_follow_their_points_and_lie_in_0_to_1():
    points = random_points(400)
    colors = np.round(points * 255).astype(np.uint8)
    recipe = CloudRecipe(cameras=("a",), points=64, crop=BOX, colors=True)
    cloud = build_cloud({"a": points}, {"a": colors}, recipe)
    assert cloud.shape == (64, 6)
    np.testing.assert_allclose(cloud[:, 3:], cloud[:, :3], atol=0.51 / 255)
    np.testing.assert_array_equal(build_cloud({"a": points}, {"a": colors / np.float32(255)}, recipe), cloud)
    with pytest.raises(ValueError, match="colours"):
        build_cloud({"a": points}, None, recipe)


def test_shares_per_camera():
    recipe = CloudRecipe(cameras=("a", "b"), points=101, crop=((0, 0, 0), (1, 1, 3)), per_camera=True)
    clouds = {"a": random_points(900), "b": random_points(200, 1) + np.float32([0, 0, 2])}
    cloud = build_cloud(clouds, None, recipe)
    assert [(cloud[:, 2] < 1.5).sum(), (cloud[:, 2] > 1.5).sum()] == [51, 50]
    clouds["b"] += 10  # nothing left of the second camera: the first one gives all
    assert (build_cloud(clouds, None, recipe)[:, 2] < 1.5).all()


def test_recipe_round_trip_and_unknown_names():
    recipe = CloudRecipe(points=512, colors=True, per_camera=True, pixel_offset=(0, 1))
    assert CloudRecipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="no number"):
        CloudRecipe.from_dict({"number": 3})
    with pytest.raises(ValueError, match="lower corner"):
        CloudRecipe(crop=((0, 0, 0), (1, -1, 1)))
    with pytest.raises(ValueError, match="two corners of three numbers"):
        CloudRecipe(crop=(0, 0, 0, 1, 1, 1))


def test_pictures_have_their_cameras_size():
    camera = Camera("a", 20, 10, 60.0, 0.01, 10.0)
    recipe = CloudRecipe(cameras=("a",), points=4, colors=True, crop=((-9, -9, -9), (9, 9, 9)))
    depth, colors = np.ones((10, 20), np.float32), np.zeros((10, 20, 3), np.uint8)
    assert cloud_from_depth({"a": depth}, {"a": camera}, {"a": np.eye(4)}, {"a": colors}, recipe).shape == (4, 6)
    with pytest.raises(ValueError, match="depth picture"):
        cloud_from_depth({"a": depth[::2, ::2]}, {"a": camera}, {"a": np.eye(4)}, {"a": colors}, recipe)
    with pytest.raises(ValueError, match="colour picture"):
        cloud_from_depth({"a": depth}, {"a": camera}, {"a": np.eye(4)}, {"a": colors[:5]}, recipe)


def test_cloud_of_a_real_frame(shared):
    with np.load(shared / "data/calvin_sample/training/episode_0003120.npz") as frame:
        depths = {name: frame[f"depth_{name}"] for name in ("static", "gripper")}
        rgbs = {name: frame[f"rgb_{name}"] for name in ("static", "gripper")}
        poses = {"static": CALVIN_STATIC_POSE, "gripper": calvin_gripper_pose(frame["robot_obs"])}
    cameras = {"static": CALVIN_STATIC, "gripper": CALVIN_GRIPPER}
    recipe = CloudRecipe(points=2048, colors=True, pixel_offset=(0, 1))
    kept = {name: module.inside(back_project(depths[name], cameras[name], poses[name]), recipe.crop).sum() for name in depths}
    assert 26_000 < kept["static"] < 33_000
    assert 2_500 < kept["gripper"] < 7_000
    cloud = cloud_from_depth(depths, cameras, poses, rgbs, recipe)
    assert cloud.shape == (2048, 6)
    assert module.inside(cloud, recipe.crop).all()
    assert (np.abs(cloud[:, 2] - 0.44) < 2e-3).mean() > 0.1  # the table top
    np.testing.assert_array_equal(cloud, cloud_from_depth(depths, cameras, poses, rgbs, recipe))
    depths["gripper"] = np.zeros_like(depths["gripper"])  # not points at the camera's own place, which lies in the workspace
    blind = cloud_from_depth(depths, cameras, poses, rgbs, recipe)
    assert not (np.linalg.norm(blind[:, :3] - poses["gripper"][:3, 3], axis=1) < 1e-3).any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_neighbours_and_farthest_points_on_devices(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    generator = torch.Generator().manual_seed(0)
    queries, points = torch.rand(2, 300, 3, generator=generator), torch.rand(2, 500, 3, generator=generator)
    squared, indices = module.nearest_neighbours(queries.to(device), points.to(device), 4)
    brute = (queries[:, :, None].double() - points[:, None].double()).square().sum(-1)
    want, order = brute.topk(4, largest=False)
    assert torch.equal(indices.cpu(), order)
    torch.testing.assert_close(squared.cpu(), want.float(), rtol=1e-6, atol=1e-9)
    chosen = module.farthest_points_torch(points.to(device), 100)
    assert chosen[0].tolist() == greedy(points[0].numpy(), 100, 0)


def test_neighbours_pass_gradients():
    queries = torch.rand(1, 5, 3, requires_grad=True)
    squared, _ = module.nearest_neighbours(queries, torch.rand(1, 9, 3), 2)
    squared.sum().backward()
    assert torch.isfinite(queries.grad).all()


@pytest.mark.parametrize("able", [True, False])
def test_pytorch3d_is_used_only_when_it_is_able(monkeypatch, able):
    """A stand-in for the library: present, and able or not."""
    calls = []

    def sample_farthest_points(points, K):
        calls.append(("farthest", points.device.type))
        if not able:
            raise RuntimeError("Not compiled with GPU support")
        return points[:, :K], torch.arange(K).expand(len(points), K)

    def knn_points(queries, points, K):
        calls.append(("neighbours", points.device.type))
        return types.SimpleNamespace(idx=torch.cdist(queries, points).topk(K, largest=False).indices)

    package, operations = types.ModuleType("pytorch3d"), types.ModuleType("pytorch3d.ops")
    operations.sample_farthest_points, operations.knn_points, package.ops = sample_farthest_points, knn_points, operations
    monkeypatch.setitem(sys.modules, "pytorch3d", package)
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", operations)
    monkeypatch.setenv("PYTORCH3D_FORCE_CPU", "1")
    module._pytorch3d.cache_clear()
    try:
        points = torch.rand(2, 50, 3)
        chosen = module.farthest_points_torch(points, 5)
        module.nearest_neighbours(points, points, 2)
        assert (chosen[0].tolist() == [0, 1, 2, 3, 4]) == able
        assert len(calls) == (4 if able else 2)
        if points.device.type == "cpu":
            assert module._library_device(points) == "cpu"
        assert module._library_device(torch.empty(0, device="meta")) == "cpu"
    finally:
        module._pytorch3d.cache_clear()
