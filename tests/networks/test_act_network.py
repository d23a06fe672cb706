"""ACT's networks: attention, what zero queries make constant, position codes, pictures as tokens."""

import pytest
import torch
from torch import nn

from lightning_robot.networks.act_network import (
    ACTNetwork,
    Attention,
    CameraTokens,
    DecoderLayer,
    Encoder,
    Posterior,
    sinusoid,
    sinusoid_2d,
)
from lightning_robot.networks.image_backbone import image_backbone

LAYER = (16, 4, 32, 0.0, "relu", False)


class Shrink(nn.Module):
    """A backbone whose features are the means of 8 x 8 pixels."""

    channels, stride = 3, 8

    def forward(self, x):
        return nn.functional.avg_pool2d(x[:, :3], 8, ceil_mode=True)


def camera_tokens(sizes, backbone=None):
    torch.manual_seed(0)
    return CameraTokens(backbone or Shrink(), sizes, 16)


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, 0.0), nn.MultiheadAttention(16, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[1, 4:] = True
    mask = torch.zeros(2, 7).masked_fill(padded, -torch.inf)[:, None, None]
    torch.testing.assert_close(ours(query, key, value, mask), theirs(query, key, value, key_padding_mask=padded)[0])
    torch.testing.assert_close(ours(key, key, value), theirs(key, key, value)[0])
    same = value[:, :1].expand_as(value)
    torch.testing.assert_close(ours.of_equal_values(value[:, :1]).expand_as(value), ours(key, key, same))


def test_sizes_and_options_are_checked():
    with pytest.raises(ValueError, match="hidden_size=10 must be a multiple of heads=4"):
        Attention(10, 4, 0.0)
    with pytest.raises(ValueError, match="activation 'tanh'"):
        DecoderLayer(16, 4, 32, 0.0, "tanh", False)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_first_decoder_layer_on_one_row_is_that_on_all(pre_norm):
    """What is left out of the first layer changes nothing: neither the result nor any gradient."""
    torch.manual_seed(0)
    layer = DecoderLayer(16, 4, 32, 0.0, "gelu", pre_norm).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    positions, keys, values = (torch.randn(*shape, 16, dtype=torch.double) for shape in ((6,), (2, 5), (2, 5)))
    gradients, results = [], []
    for rows in (torch.zeros(1, 1, 16), torch.zeros(2, 6, 16)):
        results.append(layer(rows.double(), positions, keys, values))
        gradients.append(torch.autograd.grad(results[-1].square().sum(), list(layer.parameters())))
    torch.testing.assert_close(results[0], results[1])
    for one, all_rows in zip(*gradients):
        torch.testing.assert_close(one, all_rows)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_computes_only_the_tokens_wanted(pre_norm):
    torch.manual_seed(0)
    encoder = Encoder(3, 16, 4, 32, 0.0, "relu", pre_norm)
    x, positions = torch.randn(2, 7, 16), torch.randn(7, 16)
    whole = encoder(x, positions)
    torch.testing.assert_close(encoder(x, positions, outputs=1), whole[:, :1])
    assert isinstance(encoder.norm, nn.LayerNorm if pre_norm else nn.Identity)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_are_those_of_torch(pre_norm):
    """Without positions, a layer is torch's."""
    torch.manual_seed(0)
    ours = Encoder(1, 16, 4, 32, 0.0, "gelu", pre_norm).layers[0].eval()
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=pre_norm).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x, torch.zeros(7, 16)), theirs(x))
    ours = DecoderLayer(16, 4, 32, 0.0, "relu", pre_norm).eval()
    theirs = nn.TransformerDecoderLayer(16, 4, 32, 0.0, "relu", batch_first=True, norm_first=pre_norm).eval()
    theirs.load_state_dict(ours.state_dict())
    memory = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x, torch.zeros(7, 16), memory, memory), theirs(x, memory))


def test_positions_of_sequences():
    table = sinusoid(50, 8)
    assert table.dtype == torch.float32
    angle = torch.tensor(7 / 10000 ** (2 / 8))
    torch.testing.assert_close(table[7, 2:4], torch.stack((angle.sin(), angle.cos())))
    torch.testing.assert_close(table[0], torch.tensor([0.0, 1.0] * 4))


def test_positions_of_pictures():
    """Values of LeRobot 0.6.1 (facts/lerobot.md §2.4)."""
    table = sinusoid_2d(2, 3, 8)
    first = [1.343e-6, -1.0, 0.03141075, 0.99950653, 0.86602575, -0.49999943, 0.02094241, 0.99978065]
    last = [-2.686e-6, 1.0, 0.06279049, 0.99802673, -1.7325e-6, 1.0, 0.0627905, 0.99802673]
    torch.testing.assert_close(table[0, 0], torch.tensor(first), rtol=0, atol=2e-6)
    torch.testing.assert_close(table[1, 2], torch.tensor(last), rtol=0, atol=2e-6)


def test_tokens_of_cameras_of_one_size_and_of_several():
    pictures = [torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8) for _ in range(2)]
    cameras = camera_tokens([(16, 24), (16, 24)])
    cameras.image_mean.copy_(torch.rand(2, 3))
    cameras.image_std.copy_(torch.rand(2, 3) + 0.5)
    tokens = cameras(pictures)
    assert tokens.shape == (2, 12, 16)
    assert cameras.positions.shape == (12, 16)
    assert torch.equal(cameras.positions[:6], cameras.positions[6:])
    for number, picture in enumerate(pictures):
        normal = (picture / 255 - cameras.image_mean[number].view(3, 1, 1)) / cameras.image_std[number].view(3, 1, 1)
        expected = cameras.projection(cameras.backbone(normal)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[:, 6 * number : 6 * number + 6], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cameras([picture / 255 for picture in pictures]), tokens, rtol=1e-4, atol=1e-5)

    mixed = camera_tokens([(16, 24), (9, 8)])
    tokens = mixed([pictures[0], pictures[1][:, :, :9, :8]])
    assert tokens.shape == (2, 6 + 2, 16)
    assert mixed.positions.shape == (8, 16)


def test_depth_is_clipped_and_scaled():
    seen = []

    class Record(Shrink):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    cameras = CameraTokens(Record(), [(8, 8)], 16, depth_range=(0.5, 1.5))
    depth = torch.full((1, 1, 8, 8), 1.0)
    depth[0, 0, 0, :4] = torch.tensor([0.0, 0.75, torch.inf, torch.nan])
    cameras([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], [depth])
    assert seen[0].shape == (1, 4, 8, 8)
    torch.testing.assert_close(seen[0][0, 3, 0, :5], torch.tensor([0.0, 0.25, 1.0, 1.0, 0.5]))


def test_padded_actions_do_not_count_for_the_latent():
    torch.manual_seed(0)
    posterior = Posterior(4, 3, 6, 5, Encoder(2, *LAYER), 16).eval()
    state, actions = torch.randn(2, 4), torch.randn(2, 6, 3)
    is_pad = torch.arange(6).expand(2, 6) > 3
    mean, log_variance = posterior(state, actions, is_pad)
    assert mean.shape == log_variance.shape == (2, 5)
    other = actions.clone()
    other[:, 4:] = 100.0
    torch.testing.assert_close(posterior(state, other, is_pad)[0], mean)
    other[:, 3] = 100.0
    assert not torch.allclose(posterior(state, other, is_pad)[0], mean)
    assert Posterior(None, 3, 6, 5, Encoder(1, *LAYER), 16)(None, actions, is_pad)[0].shape == (2, 5)


def test_published_size():
    """LeRobot 0.6.1's at its defaults, with any number of cameras."""
    with torch.device("meta"):
        cameras = CameraTokens(image_backbone(), [(96, 96)] * 2, 512)
        network = ACTNetwork(6, state_size=6, cameras=cameras)
    assert sum(parameter.numel() for parameter in network.parameters()) == 51_597_190
    assert sum(parameter.numel() for parameter in network.encoder.parameters()) == 17_332_736
    assert sum(parameter.numel() for parameter in network.decoder.parameters()) == 5_385_856


@pytest.mark.parametrize("pre_norm", [False, True])
def test_network_of_any_inputs(pre_norm):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "heads": 4, "feedforward_size": 32, "encoder_layers": 2, "decoder_layers": 2, "latent_size": 5}
    states = {"state": torch.randn(3, 4), "environment": torch.randn(3, 2)}
    for names in (("state",), ("environment",), ("state", "environment")):
        network = ACTNetwork(3, 6, **{f"{name}_size": states[name].shape[1] for name in names}, **sizes, pre_norm=pre_norm)
        chunk = network(torch.randn(3, 5), **{name: states[name] for name in names})
        assert chunk.shape == (3, 6, 3)
    network = ACTNetwork(3, 6, cameras=camera_tokens([(16, 16)]), **sizes, posterior_layers=0, pre_norm=pre_norm)
    assert network.posterior is None
    assert network(images=[torch.zeros(3, 3, 16, 16, dtype=torch.uint8)]).shape == (3, 6, 3)
