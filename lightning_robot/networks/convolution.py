"""Convolutions over short sequences and linear maps over many points, arranged for the kernels that a CPU is fast with.

On other devices these are torch's own layers. On a CPU sequences of 4 to 16 steps are too short to fill a vector register, and
up to half of a kernel falls on the padding. So the convolution runs over an image of height L and width B: the batch lies
innermost in memory, and rows of padding are left out. Shapes are (B, C, L) everywhere; only the strides tell. Measured on two
cores for 2048 channels and L = 4, forward and backward: 1.3 times as fast at batch 16, twice at batch 64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ONEDNN = torch.backends.mkldnn.is_available()
SMALL = 20480  # entries: with one image of at most so many torch leaves oneDNN for its own, slower kernels
PACKS = ONEDNN and hasattr(torch.ops.mkldnn, "_convolution_pointwise")  # see `Convolution.packed`


class Convolution(nn.Conv1d):
    """`nn.Conv1d`, faster on a CPU.

    Attributes:
        packed: where many calls without gradient follow one another, the weights in oneDNN's own order by the shape that they
            were packed for; None elsewhere. Otherwise oneDNN copies them into that order at every call, which for the few
            rows of a denoising step takes as long as the arithmetic, or several times as long.
    """

    packed: dict[torch.Size, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        packs = self.packed is not None and PACKS and not torch.is_grad_enabled()
        if input.device.type != "cpu" or (not packs and _is_small(input)):
            return super().forward(input)
        image, weight = _to_image(input), self.weight.unsqueeze(3)
        stride, padding = (*self.stride, 1), (*self.padding, 0)
        if packs and _is_plain(image, weight):
            return _to_sequence(self._convolve_packed(image, weight, stride, padding))
        return _to_sequence(convolve(image, weight, self.bias, stride, padding))

    def _convolve_packed(self, image: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        """As `convolve`; the operators are those that torch.compile emits for frozen weights."""
        assert self.packed is not None
        arguments = (padding, stride, (1, 1), 1)
        if image.shape not in self.packed:
            self.packed[image.shape] = torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments, image.shape)
        packed = self.packed[image.shape]
        return torch.ops.mkldnn._convolution_pointwise(image, packed, self.bias, *arguments, "none", [], "")


class TransposedConvolution(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d`, faster on a CPU."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if input.device.type != "cpu" or input.numel() <= SMALL:
            return super().forward(input, output_size)
        stride, padding = (*self.stride, 1), (*self.padding, 0)
        return _to_sequence(F.conv_transpose2d(_to_image(input), self.weight.unsqueeze(3), self.bias, stride, padding))


class PointLinear(nn.Linear):
    """`nn.Linear` for many rows and few columns.

    On a CPU it runs as a convolution of size one over an image of one row, which is a view: oneDNN's kernel for it is up to
    twice as fast as the matrix product behind `F.linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        rows = input.flatten(0, -2)  # (R, in)
        image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)  # (1, in, 1, R), channels innermost in memory
        result = convolve(image, self.weight.view(*self.weight.shape, 1, 1), self.bias, (1, 1), (0, 0))  # (1, out, 1, R)
        return result.permute(0, 2, 3, 1).view(*input.shape[:-1], self.out_features)


def convolve(image: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """`F.conv2d` on a CPU; in float32 by oneDNN, which torch passes over for single threads and for single small images.

    Args:
        image: (1, in, height, width).
        weight: (out, in, kernel height, kernel width).
        bias: (out,).
        stride: of height and width.
        padding: of height and width.

    Returns:
        (1, out, height', width').
    """
    if ONEDNN and _is_plain(image, weight):
        return torch.mkldnn_convolution(image, weight, bias, padding, stride, (1, 1), 1)
    return F.conv2d(image, weight, bias, stride, padding)


def _is_plain(image: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may be called directly: in float32, outside autocast and torch.compile."""
    in_float32 = image.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return in_float32 and not torch.compiler.is_compiling()


def _is_small(x: Tensor) -> bool:
    """Whether the backward pass of `convolve` would not be oneDNN's (that of a batch of sequences is)."""
    return torch.is_grad_enabled() and x.numel() <= SMALL


def _to_image(x: Tensor) -> Tensor:
    """(B, C, L) -> (1, C, L, B)."""
    return x.permute(1, 2, 0).unsqueeze(0)


def _to_sequence(x: Tensor) -> Tensor:
    """(1, C, L, B) -> (B, C, L)."""
    return x.squeeze(0).permute(2, 0, 1)
