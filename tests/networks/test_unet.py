"""The conditional U-Net, without policy and golden files."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robot.networks.convolution import Convolution
from lightning_robot.networks.unet import (
    ConditionalUnet,
    GroupNorm,
    sinusoids,
)


def small_unet(**arguments):
    torch.manual_seed(0)
    return ConditionalUnet(7, 12, **{"down_dims": (16, 24, 32), "embedding_size": 8} | arguments)


def test_group_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours = GroupNorm(4, 8).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    x = (torch.randn(3, 8, 5, dtype=torch.float64) * 3 + 7).requires_grad_()
    plain = F.group_norm(x, 4, ours.weight, ours.bias)
    torch.testing.assert_close(ours(x), plain)
    torch.testing.assert_close(torch.autograd.grad(ours(x).sin().sum(), x), torch.autograd.grad(plain.sin().sum(), x))


def test_the_batch_stays_innermost_on_a_cpu():
    """Otherwise every block copies, and the gain is lost."""
    seen = []
    unet = small_unet()
    for module in unet.modules():
        if isinstance(module, Convolution):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    unet(torch.randn(300, 16, 7), unet.conditioning(torch.arange(300) % 100, torch.randn(300, 12)))
    assert len(seen) > 20
    assert all(x.permute(1, 2, 0).is_contiguous() for x in seen if x.shape[1] != 7)  # 7: the caller's chunk


def test_rows_do_not_mix():
    unet = small_unet()
    x, t, c = torch.randn(5, 16, 7), torch.arange(5), torch.randn(5, 12)
    together = unet(x, unet.conditioning(t, c))
    for row in range(5):
        one = slice(row, row + 1)
        torch.testing.assert_close(unet(x[one], unet.conditioning(t[one], c[one])), together[one], rtol=0, atol=1e-5)


def test_modulations_separate():
    unet = small_unet()
    t, c = torch.arange(5), torch.randn(5, 12)
    for joint, time, condition in zip(unet.conditioning(t, c), unet.time_modulations(t), unet.condition_modulations(c)):
        torch.testing.assert_close(joint, time + condition, rtol=0, atol=1e-6)


def test_conditioning_per_step():
    unet = small_unet()
    timesteps, c = torch.tensor([90, 40, 0]), torch.randn(5, 12)
    for t, found in zip(timesteps, unet.conditioning_per_step(timesteps, c), strict=True):
        for a, b in zip(found, unet.conditioning(t.expand(5), c), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_shifts_alone():
    """Without scales the modulation is added: LeRobot's use_film_scale_modulation: false."""
    unet = small_unet(scales=False)
    block, x, shift = unet.middle[0], torch.randn(2, 32, 4), torch.randn(2, 32)
    expected = block.second(block.first(x) + shift.unsqueeze(2)) + block.shortcut(x)
    torch.testing.assert_close(block(x, shift), expected)
    t, c = torch.tensor([3, 99]), torch.randn(2, 12)
    assert [part.shape[1] for part in unet.conditioning(t, c)][:3] == [16, 16, 24]
    assert unet(torch.randn(2, 16, 7), unet.conditioning(t, c)).shape == (2, 16, 7)


def test_compiles_as_one_graph():
    unet = small_unet()
    x, modulations = torch.randn(2, 16, 7), unet.conditioning(torch.tensor([3, 99]), torch.randn(2, 12))
    names = list(unet.state_dict())
    expected = unet(x, modulations)
    unet.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(unet(x, modulations), expected)
    assert list(unet.state_dict()) == names


def test_bfloat16_autocast_follows_float32():
    unet = small_unet()
    x, t, c = torch.randn(2, 16, 7), torch.tensor([3, 99]), torch.randn(2, 12)
    expected = unet(x, unet.conditioning(t, c))
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(x, unet.conditioning(t, c))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


def test_every_parameter_gets_a_gradient():
    unet = small_unet(blocks_per_level=1)
    unet(torch.randn(2, 16, 7), unet.conditioning(torch.tensor([0, 50]), torch.randn(2, 12))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in unet.parameters())


def test_widths_are_checked():
    with pytest.raises(ValueError, match=r"multiples of groups=8.*\[16, 20\]"):
        small_unet(down_dims=[16, 20])


def test_sinusoids():
    table = sinusoids(100, 8)
    assert table.shape == (100, 8)
    angles = 37 * 10000.0 ** -(torch.arange(4) / 3)
    torch.testing.assert_close(table[37], torch.cat((angles.sin(), angles.cos())))


@torch.no_grad()
def test_repeated_calls_pack_their_weights():
    torch.manual_seed(0)
    unet = small_unet(down_dims=(16, 64))
    middle = unet.middle[0].first.convolution
    for rows in (1, 5):
        x, modulations = torch.randn(rows, 16, 7), unet.conditioning(torch.tensor([3] * rows), torch.randn(rows, 12))
        expected = unet(x, modulations)
        with unet.repeated():
            assert middle.packed == {}
            torch.testing.assert_close(unet(x, modulations), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(unet(x, modulations), expected, rtol=0, atol=1e-5)
            assert len(middle.packed) == 1
        assert middle.packed is None
    with pytest.raises(RuntimeError, match="inside"), unet.repeated():
        raise RuntimeError("inside")
    assert middle.packed is None
