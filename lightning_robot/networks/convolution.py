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
UNPACK = 2**17  # see `Convolution.unpack`


class Convolution(nn.Conv1d):
    """`nn.Conv1d`, faster on a CPU.

    Attributes:
        taps: (kernel, out, in) weights for few rows, see `unpack`; None otherwise.
    """

    taps: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.taps is not None:
            return self._sum_of_taps(input, self.taps)
        if input.device.type != "cpu" or _is_small(input):
            return super().forward(input)
        return _to_sequence(
            convolve(_to_image(input), self.weight.unsqueeze(3), self.bias, (*self.stride, 1), (*self.padding, 0))
        )

    def unpack(self, rows: int) -> None:
        """Prepares `taps` for repeated calls with B = `rows`, where that pays.

        With few rows a convolution is reading its weights, and oneDNN first copies them into its own order at every call.
        Copied once, one matrix per tap, they can be used as they are. The number of steps is not known here; where many
        megabytes of weights meet a few rows, it is small.
        """
        many = 4 * rows * UNPACK <= self.weight.numel()
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.float32 and self.stride == (1,) and many:
            self.taps = self.weight.permute(2, 0, 1).contiguous()

    def _sum_of_taps(self, input: Tensor, taps: Tensor) -> Tensor:
        length, rows = input.shape[2], len(input)
        steps = input.permute(2, 0, 1).contiguous()  # (L, B, in)
        assert self.bias is not None
        result = self.bias.repeat(length, rows, 1)  # (L, B, out)
        for shift, tap in enumerate(taps, start=-(len(taps) // 2)):
            first, last = max(0, -shift), min(length, length - shift)
            if first < last:  # the tap falls on more than padding
                result[first:last].flatten(0, 1).addmm_(steps[first + shift : last + shift].flatten(0, 1), tap.t())
        return result.permute(1, 2, 0)


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
    plain = image.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and ONEDNN and not torch.compiler.is_compiling():
        return torch.mkldnn_convolution(image, weight, bias, padding, stride, (1, 1), 1)
    return F.conv2d(image, weight, bias, stride, padding)


def _is_small(x: Tensor) -> bool:
    """Whether the backward pass of `convolve` would not be oneDNN's (that of a batch of sequences is)."""
    return torch.is_grad_enabled() and x.numel() <= SMALL


def _to_image(x: Tensor) -> Tensor:
    """(B, C, L) -> (1, C, L, B)."""
    return x.permute(1, 2, 0).unsqueeze(0)


def _to_sequence(x: Tensor) -> Tensor:
    """(1, C, L, B) -> (B, C, L)."""
    return x.squeeze(0).permute(2, 0, 1)
