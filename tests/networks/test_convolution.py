"""Layers arranged for a CPU, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from lightning_robot.networks.convolution import SMALL, Convolution, PointLinear, TransposedConvolution


def agree(layer, x, expected):
    """Output and all gradients of `layer` are those of the function `expected`."""
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if x.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    x = x.requires_grad_()
    weights = torch.randn_like(expected(x))
    inputs = (x, *layer.parameters())
    torch.testing.assert_close(layer(x), expected(x), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(x), **tolerance)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, weights), torch.autograd.grad(expected(x), inputs, weights)):
        torch.testing.assert_close(ours, theirs, **tolerance)


SIZES = [(1, 4), (3, 16), (300, 16)]


def test_sizes_cover_both_ways():
    assert {rows * length * 6 > SMALL for rows, length in SIZES} == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "length"), SIZES)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_convolution(rows, length, kernel, stride, padding, dtype):
    torch.manual_seed(0)
    layer = Convolution(6, 8, kernel, stride=stride, padding=padding).to(dtype)
    x = torch.randn(rows, 6, length, dtype=dtype)
    agree(layer, x, lambda x: F.conv1d(x, layer.weight, layer.bias, stride, padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "length"), SIZES)
def test_transposed_convolution(rows, length, dtype):
    torch.manual_seed(0)
    layer = TransposedConvolution(6, 6, 4, stride=2, padding=1).to(dtype)
    x = torch.randn(rows, 6, length, dtype=dtype)
    agree(layer, x, lambda x: F.conv_transpose1d(x, layer.weight, layer.bias, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (5000, 3)])
def test_point_linear(shape, dtype):
    torch.manual_seed(0)
    layer = PointLinear(3, 5).to(dtype)
    if len(shape) == 1:
        shape = (1, 3)
    agree(layer, torch.randn(*shape, dtype=dtype), lambda x: F.linear(x, layer.weight, layer.bias))
    assert layer(torch.randn(*shape, dtype=dtype)).is_contiguous()


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0)])
def test_packed_weights(rows, kernel, stride, padding):
    torch.manual_seed(0)
    layer = Convolution(96, 64, kernel, stride=stride, padding=padding)
    layer.packed = {}
    for length in (4, 16, 4):
        x = torch.randn(rows, 96, length)
        expected = F.conv1d(x, layer.weight, layer.bias, stride, padding)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
        assert len(layer.packed) == (2 if length == 16 or len(layer.packed) == 2 else 1)
    assert not [name for name in layer.state_dict() if "packed" in name]
    agree(layer, torch.randn(rows, 96, 4), lambda x: F.conv1d(x, layer.weight, layer.bias, stride, padding))  # with gradients
