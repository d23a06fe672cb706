"""Encoders of observations, without policy and golden files."""

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from lightning_robot.networks.observation_encoder import ImageEncoder, StateEncoder, encode_steps, keypoint_grid


class Backbone(nn.Conv2d):
    """Cells of 4 pixels, and what it was given."""

    def __init__(self):
        super().__init__(3, 6, 4, stride=4)
        self.channels = 6

    def forward(self, images):
        self.seen = images
        return super().forward(images)


def encoder(sizes=((16, 20),), **arguments):
    torch.manual_seed(0)
    return ImageEncoder(Backbone(), sizes, **{"keypoints": 5} | arguments)


def pictures(rows=3, size=(16, 20), seed=0):
    return torch.randint(0, 256, (rows, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_steps_are_joined_in_order():
    state, cloud = torch.arange(8.0).view(4, 2), 10 * torch.arange(4.0).view(4, 1)  # two windows of two steps
    assert encode_steps([state, cloud], 2).tolist() == [[0, 1, 0, 2, 3, 10], [4, 5, 20, 6, 7, 30]]


def test_state_encoder():
    assert [type(layer).__name__ for layer in StateEncoder(3, (64, 32))] == ["Linear", "ReLU", "Linear"]
    assert StateEncoder(3, (64, 32)).size == 32
    plain = StateEncoder(3)
    assert plain.size == 3
    assert torch.equal(plain(torch.ones(2, 3)), torch.ones(2, 3))


def test_pictures_are_normalised_and_keep_channels_innermost():
    made, images = encoder(), pictures()
    made.set_statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert made(images).shape == (3, 10)
    expected = (images / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(made.backbone.seen, expected)
    torch.testing.assert_close(made(images / 255), made(images))
    stored = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as the data module gives them
    made(stored)
    assert made.backbone.seen.is_contiguous(memory_format=torch.channels_last)


def test_crops():
    images = pictures()
    made = encoder(crop=(8, 12))
    assert made.offset_bounds() == [(9, 9)]
    made.set_statistics([0, 0, 0], [1, 1, 1])
    made(images)
    torch.testing.assert_close(made.backbone.seen, images[:, :, 4:12, 4:16] / 255)
    corners = torch.tensor([[[0, 0]], [[8, 3]], [[2, 8]]])
    made(images, offsets=corners)
    for row, (top, left) in enumerate(corners[:, 0].tolist()):
        torch.testing.assert_close(made.backbone.seen[row], images[row, :, top : top + 8, left : left + 12] / 255)
    assert encoder(crop=(8, 13)).offset_bounds() == [(9, 8)]
    with pytest.raises(ValueError, match="A crop of 8 x 24 does not fit into pictures of 16 x 20"):
        encoder(crop=(8, 24))


def test_an_odd_margin_is_halved_as_torchvision_does():
    images = pictures(size=(15, 18))
    made = encoder(sizes=[(15, 18)], crop=(8, 13))
    made.set_statistics([0, 0, 0], [1, 1, 1])
    made(images)
    torch.testing.assert_close(made.backbone.seen, v2.functional.center_crop(images, [8, 13]) / 255)


def test_resizing():
    images = pictures()
    made = encoder(resize=(8, 12))
    made.set_statistics([0, 0, 0], [1, 1, 1])
    made(images)
    torch.testing.assert_close(made.backbone.seen, v2.functional.resize(images / 255, [8, 12], antialias=True))


def test_cameras_that_share_an_encoder():
    """Each camera's statistics and crops are its own; the features stand camera by camera."""
    made = encoder(sizes=[(16, 20), (12, 16)], crop=(8, 12))
    one, two = pictures(seed=1), pictures(size=(12, 16), seed=2)
    made.set_statistics([0.1] * 3, [0.2] * 3, 0)
    made.set_statistics([0.5] * 3, [0.4] * 3, 1)
    offsets = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [1, 0]], [[8, 8], [4, 4]]])
    both = made(one, two, offsets=offsets)
    assert both.shape == (3, 20)
    assert made.size == 20
    for camera, image in enumerate((one, two)):
        alone = encoder(sizes=[image.shape[2:]], crop=(8, 12))
        alone.set_statistics(made.image_mean[camera], made.image_std[camera])
        expected = alone(image, offsets=offsets[:, camera : camera + 1])
        torch.testing.assert_close(both[:, 10 * camera : 10 * camera + 10], expected)
    with pytest.raises(ValueError, match=r"need pictures of one size.*set resize, or separate_encoders"):
        encoder(sizes=[(16, 20), (12, 16)])


def test_keypoints_are_where_the_weight_is():
    assert keypoint_grid(3, 3)[:5].tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 0], [0, 0]]
    assert keypoint_grid(1, 1).tolist() == [[-1, -1]]
    made = encoder(keypoints=2)
    with torch.no_grad():
        made.keypoint_maps.weight.zero_()
        made.keypoint_maps.bias.zero_()
        made.keypoint_maps.weight[0, 0] = 1
    features = torch.zeros(1, 6, 3, 5)
    features[0, 0, 2, 1] = 50
    torch.testing.assert_close(made.keypoints(features), torch.tensor([[[-0.5, 1.0], [0.0, 0.0]]]))


def test_the_mean_of_feature_maps():
    made = encoder(keypoints=None)
    assert made.size == 6
    assert made(pictures()).shape == (3, 6)
