"""PointNet encoders of DP3, trained through the few points of a cloud that decide its maximum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_robot.networks.convolution import PointLinear

POINTS_PER_SLICE = 4096  # of the pass without gradient: its activations stay in the cache (measured 1.5 times as fast)


class PointNet(nn.Module):
    """A network on each point, the maximum over the points, and a projection, as published with DP3 (Ze et al. 2024).

    The maximum hands its gradient to one point per channel. So a first pass over all points, without gradient, finds these
    critical points, and a second one repeats them alone with gradient: outputs and gradients are those of the plain network
    (gradients up to the order of summation) at about a third of the cost. On ties the first point counts, as in `torch.max`.

    Args:
        channels: 3 (XYZ: widths 64, 128, 256) or 6 (XYZRGB: the same and a last linear layer to 512).
        feature_size: of the result.
        layer_norm: normalise after the linear layers of the network on points (published: True).
        final_norm: normalise after the projection (published: True).
    """

    def __init__(self, channels: int = 3, feature_size: int = 64, layer_norm: bool = True, final_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size_in, size_out in ((channels, 64), (64, 128), (128, 256)):
            layers += [PointLinear(size_in, size_out), nn.LayerNorm(size_out) if layer_norm else nn.Identity(), nn.ReLU()]
        if channels == 6:
            layers.append(PointLinear(256, 512))
        elif channels != 3:
            raise ValueError(f"A point has 3 channels (XYZ) or 6 (XYZRGB), not {channels}.")
        self.mlp = nn.Sequential(*layers)
        self.size = feature_size
        self.pooled_size = 512 if channels == 6 else 256
        self.projection = nn.Sequential(nn.Linear(self.pooled_size, feature_size))
        if final_norm:
            self.projection.append(nn.LayerNorm(feature_size))

    def forward(self, clouds: Tensor) -> Tensor:
        """(C, N, 3 or 6) clouds -> (C, feature_size)."""
        return self.projection(self.pool(clouds))

    def pool(self, clouds: Tensor) -> Tensor:
        """(C, N, 3 or 6) -> (C, pooled_size): the maximum over the points of each channel."""
        if not torch.is_grad_enabled():
            return torch.cat([self.mlp(part).amax(1) for part in self._slices(clouds)])
        critical = self.critical_points(clouds)  # (C, pooled_size)
        count, points = clouds.shape[:2]
        rows = critical + points * torch.arange(count, device=clouds.device).unsqueeze(1)
        if clouds.device.type == "cpu":  # a point decides two to three channels on average; elsewhere fixed shapes pay more
            rows, positions = torch.unique(rows, return_inverse=True)
            rows = nn.functional.pad(rows, (0, -len(rows) % _granule(len(rows))))
        else:
            positions = torch.arange(rows.numel(), device=clouds.device).view_as(rows)
        features = self.mlp(clouds.flatten(0, 1)[rows.flatten()])  # (R, pooled_size)
        return features.gather(0, positions)

    @torch.no_grad()
    def critical_points(self, clouds: Tensor) -> Tensor:
        """(C, N, 3 or 6) -> (C, pooled_size) int64: for each channel the first point of the cloud with the largest value."""
        return torch.cat([self.mlp(part).max(1).indices for part in self._slices(clouds)])

    def _slices(self, clouds: Tensor) -> tuple[Tensor, ...]:
        if clouds.device.type != "cpu":
            return (clouds,)
        return clouds.split(max(1, POINTS_PER_SLICE // clouds.shape[1]))


def _granule(rows: int) -> int:
    """What a number of rows is rounded up to: a sixteenth to a thirty-second of it.

    oneDNN compiles and keeps a kernel for every shape that it meets, up to a thousand of them. Critical points are another
    number in every step; unrounded, that costs 10 MB a step until then.
    """
    return 2 ** max(6, rows.bit_length() - 5)
