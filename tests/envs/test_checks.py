"""Sizes of pictures, as environments are given them."""

import pytest

from lightning_robot.envs.checks import noted_sizes, picture_sizes
from lightning_robot.envs.play_table import PlayTable
from lightning_robot.envs.so101 import SO101PickPlace

CAMERAS = ("near", "far")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (64, {"near": (64, 64), "far": (64, 64)}),
        ([48, 64], {"near": (48, 64), "far": (48, 64)}),
        ({"far": 20}, {"far": (20, 20)}),
        (None, {"near": (84, 84), "far": (84, 84)}),
    ],
)
def test_one_size_is_that_of_all_cameras(given, expected):
    assert picture_sizes(given, CAMERAS, 84) == expected


@pytest.mark.parametrize("environment", [PlayTable, SO101PickPlace])
def test_environments_take_one_size(environment):
    assert set(environment(camera_sizes=32, observations=["images"]).camera_sizes.values()) == {(32, 32)}


def test_sizes_are_read_from_an_environments_note():
    assert noted_sizes("far 20x30, gone 4x4, near 8x8", CAMERAS) == {"far": (20, 30), "near": (8, 8)}
    assert noted_sizes("", CAMERAS) == noted_sizes("far unknown", CAMERAS) == {}
