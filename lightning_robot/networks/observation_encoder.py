"""Encoders of observations: each makes of what one step shows of one kind a vector, and says by `size` how long it is.

`ImageEncoder` here, `StateEncoder` here for states of robot and scene, `PointNet` (networks/point_encoder.py) for clouds:
all take (R, ...) rows and return (R, size). `encode_steps` joins them over the steps of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_STATISTICS = {  # of values in 0 to 1
    "range": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to -1 ... 1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def encode_steps(features: Sequence[Tensor], steps: int) -> Tensor:
    """One vector per window.

    Args:
        features: of each encoder, (B * T, size).
        steps: T.

    Returns:
        (B, T * features): for each step the features of all encoders in their order.
    """
    joined = torch.cat(list(features), 1)
    return joined.view(-1, steps * joined.shape[1])


class StateEncoder(nn.Sequential):
    """Linear layers with ReLU between them; without widths the state itself.

    Args:
        state_size: D.
        widths: of the layers.
    """

    def __init__(self, state_size: int, widths: Sequence[int] = ()) -> None:
        layers: list[nn.Module] = []
        for size_in, size_out in zip((state_size, *widths), widths):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.size = widths[-1] if widths else state_size


class ImageEncoder(nn.Module):
    """Pictures to the places of learned keypoints: crop, normalise, backbone, spatial softmax, one linear layer.

    Sources: Chi et al. 2023 (Diffusion Policy); Levine et al. 2016 (spatial softmax: the expected coordinates under a softmax
    over each feature map).

    Args:
        backbone: (R, 3, height, width) to a feature map (R, `backbone.channels`, h, w); gets its pictures channels-last.
        image_sizes: (height, width) of each camera's pictures.
        keypoints: K, or None for the mean of every channel of the feature map.
        resize: height and width that pictures are brought to first.
        crop: height and width that the backbone sees; None is the whole picture.

    Attributes:
        image_mean: (cameras, 3) of values in 0 to 1, a buffer.
        image_std: likewise.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        image_sizes: Sequence[tuple[int, ...]],
        keypoints: int | None = 32,
        resize: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.resize, self.crop = resize, crop
        self.sizes = [resize or size for size in image_sizes]  # before the crop
        for height, width in self.sizes:
            if crop is not None and (crop[0] > height or crop[1] > width):
                raise ValueError(f"A crop of {crop[0]} x {crop[1]} does not fit into pictures of {height} x {width}.")
        if len({crop or size for size in self.sizes}) > 1:
            raise ValueError(
                f"Cameras that share an encoder need pictures of one size, got {self.sizes}: set resize, or separate_encoders."
            )
        self.backbone = backbone
        channels = int(backbone.channels)  # type: ignore[arg-type]
        self.features_size = channels if keypoints is None else 2 * keypoints  # per camera
        self.size = self.features_size * len(image_sizes)
        self.keypoint_maps = None if keypoints is None else nn.Conv2d(channels, keypoints, 1)
        self.output = nn.Linear(self.features_size, self.features_size)
        self.register_buffer("image_mean", torch.full((len(image_sizes), 3), 0.5))
        self.register_buffer("image_std", torch.full((len(image_sizes), 3), 0.5))

    def forward(self, *images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Encodes the pictures of all cameras of this encoder.

        Args:
            images: for each camera (R, 3, height, width), uint8 or floating point in 0 to 1.
            offsets: (R, cameras, 2) int64, top and left of each crop; None crops the centre.

        Returns:
            (R, size): camera by camera.
        """
        pictures = [
            self._cropped(image, None if offsets is None else offsets[:, camera]) for camera, image in enumerate(images)
        ]
        stacked = pictures[0].unsqueeze(1) if len(pictures) == 1 else torch.stack(pictures, 1)  # (R, cameras, h, w, 3)
        mean, deviation = self.image_mean[:, None, None], self.image_std[:, None, None]
        normal = ((stacked - mean) / deviation).flatten(0, 1).permute(0, 3, 1, 2)  # channels innermost in memory
        return self.output_of(self.backbone(normal)).view(len(stacked), self.size)

    def output_of(self, features: Tensor) -> Tensor:
        """(R, C, h, w) feature maps to (R, `features_size`)."""
        if self.keypoint_maps is None:
            return F.relu(self.output(features.mean((2, 3))))
        return F.relu(self.output(self.keypoints(features).flatten(1)))

    def keypoints(self, features: Tensor) -> Tensor:
        """(R, C, h, w) feature maps to (R, K, 2): x and y in -1 ... 1."""
        assert self.keypoint_maps is not None
        weights = self.keypoint_maps(features).flatten(2).softmax(2)  # (R, K, h * w)
        height, width = features.shape[2:]
        return weights @ keypoint_grid(height, width, weights.device).to(weights.dtype)

    def set_statistics(self, mean: Any, deviation: Any, camera: int | None = None) -> None:
        """Sets `image_mean` and `image_std`, (3,) each, of one camera, or of all."""
        rows = slice(None) if camera is None else camera
        for buffer, values in ((self.image_mean, mean), (self.image_std, deviation)):
            buffer[rows] = torch.as_tensor(values, dtype=buffer.dtype, device=buffer.device)

    def offset_bounds(self) -> list[tuple[int, int]]:
        """For each camera how many tops and lefts a crop can have."""
        return [(h - ch + 1, w - cw + 1) for (h, w) in self.sizes for (ch, cw) in [self.crop or (h, w)]]

    def _cropped(self, image: Tensor, offsets: Tensor | None) -> Tensor:
        """(R, 3, height, width) to (R, h, w, 3); uint8 stays so unless it is resized."""
        if self.resize is not None and tuple(image.shape[-2:]) != tuple(self.resize):
            if not image.is_floating_point():
                image = image.to(self.image_mean.dtype) / 255
            image = F.interpolate(image, self.resize, mode="bilinear", antialias=True)
        pixels = image.permute(0, 2, 3, 1)
        if self.crop is not None and self.crop != tuple(pixels.shape[1:3]):
            (height, width), (crop_height, crop_width) = pixels.shape[1:3], self.crop
            if offsets is None:
                top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
                pixels = pixels[:, top : top + crop_height, left : left + crop_width]
            else:
                device = pixels.device
                number = torch.arange(len(pixels), device=device).view(-1, 1, 1)
                rows = offsets[:, 0].view(-1, 1, 1) + torch.arange(crop_height, device=device).view(1, -1, 1)
                columns = offsets[:, 1].view(-1, 1, 1) + torch.arange(crop_width, device=device)
                pixels = pixels[number, rows, columns]
        return pixels if pixels.is_floating_point() else pixels.to(self.image_mean.dtype).div_(255)


def keypoint_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(height * width, 2) float32: x and y of every cell of a feature map in -1 ... 1, row by row."""
    rows, columns = (torch.linspace(-1, 1, size, dtype=torch.float32, device=device) for size in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), 1)
