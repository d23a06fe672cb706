"""The PointNet that trains through its critical points, against the plain one."""

import pytest
import torch

from lightning_robot.networks.point_encoder import PointNet


def plain(encoder, clouds):
    """The encoder as published: every point with gradient."""
    return encoder.projection(encoder.mlp(clouds).max(1).values)


def distinct_points(clouds):
    """A cloud as the point encoder must take it: many points, some twice."""
    clouds[:, 1::7] = clouds[:, 0::7][:, : clouds[:, 1::7].shape[1]]
    return clouds


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("clouds", [1, 5])
def test_outputs_and_gradients_are_the_plain_ones(channels, clouds):
    torch.manual_seed(0)
    encoder = PointNet(channels).double()
    points = distinct_points(torch.rand(clouds, 700, channels, dtype=torch.float64))
    weights = torch.randn(clouds, 64, dtype=torch.float64)
    found, expected = encoder(points), plain(encoder, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((found * weights).sum(), list(encoder.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(encoder.parameters()))
    for gradient, wanted in zip(ours, theirs):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(encoder(points), expected, rtol=0, atol=1e-12)


def test_gradients_in_float32():
    torch.manual_seed(0)
    encoder, points = PointNet(), torch.rand(8, 1024, 3)
    ours = torch.autograd.grad(encoder(points).square().sum(), list(encoder.parameters()))
    theirs = torch.autograd.grad(plain(encoder, points).square().sum(), list(encoder.parameters()))
    for gradient, wanted in zip(ours, theirs):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_the_first_of_equal_points_counts():
    torch.manual_seed(0)
    encoder = PointNet()
    cloud = torch.rand(1, 20, 3).repeat(1, 3, 1)  # every point three times
    assert encoder.critical_points(cloud).max() < 20
    points = cloud.clone().requires_grad_()
    encoder(points)[:, 0].sum().backward()
    assert points.grad[0, :20].abs().sum() > 0
    assert points.grad[0, 20:].abs().sum() == 0


def test_only_critical_points_are_computed_with_gradient():
    torch.manual_seed(0)
    encoder, rows = PointNet(), []
    encoder.mlp[0].register_forward_hook(lambda _, inputs, output: rows.append((len(inputs[0]), output.requires_grad)))
    encoder(torch.rand(4, 1024, 3))
    assert [count for count, with_gradient in rows if with_gradient] == [rows[-1][0]]
    assert rows[-1][0] < 4 * 256


def test_few_numbers_of_rows_are_met_in_training():
    """Each is a shape that a kernel is compiled and kept for."""
    torch.manual_seed(0)
    encoder, rows, exact = PointNet(6), set(), set()
    encoder.mlp[0].register_forward_hook(lambda _, inputs, output: rows.add(len(inputs[0])) if output.requires_grad else None)
    for _ in range(20):
        clouds = torch.rand(16, 256, 6)
        encoder(clouds)
        exact.add(sum(len(critical.unique()) for critical in encoder.critical_points(clouds)))
    assert len(exact) > 12
    assert len(rows) <= 4
    assert max(rows) < 1.07 * max(exact)


def test_without_norms():
    encoder = PointNet(layer_norm=False, final_norm=False)
    assert len(encoder.projection) == 1
    assert sum(p.numel() for p in encoder.parameters()) == 59_072 - 2 * (64 + 128 + 256 + 64)
    assert encoder(torch.rand(2, 10, 3)).shape == (2, 64)


def test_published_sizes():
    state_network = 15 * 64 + 64 + 64 * 64 + 64  # part of the published counts
    assert sum(p.numel() for p in PointNet(3).parameters()) == 64_256 - state_network
    assert sum(p.numel() for p in PointNet(6).parameters()) == 212_416 - state_network
    with pytest.raises(ValueError, match="3 channels"):
        PointNet(4)
