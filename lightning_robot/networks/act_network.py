"""The networks of ACT: transformer, encoder of the latent style, position codes, and pictures as tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "gelu"]


class Attention(nn.Module):
    """Multi-head attention with the parameters of `torch.nn.MultiheadAttention`, batch first.

    Args:
        size: D of the tokens, a multiple of `heads`.
        heads: of attention.
        dropout: of the attention weights.
    """

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        if size % heads:
            raise ValueError(f"hidden_size={size} must be a multiple of heads={heads}.")
        self.size, self.heads, self.dropout = size, heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))  # of queries, keys and values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = nn.Linear(size, size)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends; queries, keys and values are one projection where they are one tensor.

        Args:
            query: (B or 1, Q, D).
            key: (B, K, D).
            value: (B, K, D).
            mask: (B, 1, 1, K), added to the scores.

        Returns:
            (B, Q, D).
        """
        size = self.size
        if query is key:  # split, not sliced: one gradient is made of the parts', not one per part
            weights, biases = (part.split((2 * size, size)) for part in (self.in_proj_weight, self.in_proj_bias))
            queries, keys = F.linear(query, weights[0], biases[0]).chunk(2, -1)
        else:
            weights, biases = (part.chunk(3) for part in (self.in_proj_weight, self.in_proj_bias))
            queries, keys = F.linear(query, weights[0], biases[0]), F.linear(key, weights[1], biases[1])
        values = F.linear(value, weights[-1], biases[-1])
        attended = F.scaled_dot_product_attention(
            self._by_head(queries.expand(len(keys), -1, -1)),
            self._by_head(keys),
            self._by_head(values),
            attn_mask=None if mask is None else mask.to(queries.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def of_equal_values(self, value: Tensor) -> Tensor:
        """Attention over tokens with one value, whatever the scores: (B, 1, D) to (B, 1, D).

        The projections of queries and keys take part with a gradient of zero, as they do in `forward`.
        """
        return self.out_proj(F.linear(value, self.in_proj_weight, self.in_proj_bias)[..., 2 * self.size :])

    def _by_head(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class _Layer(nn.Module):
    """What the layers of encoder and decoder share."""

    def __init__(
        self, size: int, heads: int, feedforward_size: int, dropout: float, activation: Activation, pre_norm: bool
    ) -> None:
        super().__init__()
        if activation not in ("relu", "gelu"):
            raise ValueError(f"Unknown activation {activation!r} of the transformer; use relu or gelu.")
        self.pre_norm = pre_norm
        self.self_attn = Attention(size, heads, dropout)
        self.linear1 = nn.Linear(size, feedforward_size)
        self.linear2 = nn.Linear(feedforward_size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)
        self.activation = F.relu if activation == "relu" else F.gelu

    def feedforward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward network; positions are added to queries and keys, not to values."""

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, outputs: int | None = None) -> Tensor:
        """One layer.

        Args:
            x: (B, T, D).
            positions: (T, D).
            mask: (B, 1, 1, T), added to the scores.
            outputs: how many leading tokens are wanted; all when None.

        Returns:
            (B, T or `outputs`, D).
        """
        values = self.norm1(x) if self.pre_norm else x
        keys = values + positions
        queries = keys if outputs is None else keys[:, :outputs]
        x = x[:, :outputs] + self.dropout(self.self_attn(queries, keys, values, mask))
        if self.pre_norm:
            return x + self.feedforward(self.norm2(x))
        x = self.norm1(x)
        return self.norm2(x + self.feedforward(x))


class Encoder(nn.Module):
    """A stack of `EncoderLayer`; with a norm at the end only where norms come before.

    Args:
        layers: their number.
        size: D.
        heads: of attention.
        feedforward_size: width of the feed-forward networks.
        dropout: after every part of a layer, and of the attention weights.
        activation: of the feed-forward networks.
        pre_norm: norms before the parts of a layer instead of after them.
    """

    def __init__(
        self, layers: int, size: int, heads: int, feedforward_size: int, dropout: float, activation: Activation, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(size, heads, feedforward_size, dropout, activation, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size) if pre_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, outputs: int | None = None) -> Tensor:
        """Arguments and result as of `EncoderLayer`; the last layer computes only the `outputs` tokens."""
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, positions, mask, outputs if number == len(self.layers) else None)
        return self.norm(x)


class DecoderLayer(_Layer):
    """Self-attention of the queries, attention to the encoder's tokens, a feed-forward network."""

    def __init__(
        self, size: int, heads: int, feedforward_size: int, dropout: float, activation: Activation, pre_norm: bool
    ) -> None:
        super().__init__(size, heads, feedforward_size, dropout, activation, pre_norm)
        self.multihead_attn = Attention(size, heads, dropout)
        self.norm3 = nn.LayerNorm(size)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One layer.

        Args:
            x: (B, K, D); or (1, 1, D) where all rows are equal, as in the first layer, which begins with zeros.
            positions: (K, D), added to the queries.
            keys: (B, T, D), the encoder's tokens and their positions.
            values: (B, T, D), the encoder's tokens.

        Returns:
            (B, K, D).
        """
        inputs = self.norm1(x) if self.pre_norm else x
        if x.shape[1] == 1:
            attended = self.self_attn.of_equal_values(inputs)
            if self.training and self.dropout.p > 0:  # which makes rows differ
                attended = attended.expand(len(keys), len(positions), -1)
        else:
            moved = inputs + positions
            attended = self.self_attn(moved, moved, inputs)
        x = x + self.dropout(attended)
        if not self.pre_norm:
            x = self.norm1(x)
        queries = (self.norm2(x) if self.pre_norm else x) + positions
        x = x + self.dropout(self.multihead_attn(queries, keys, values))
        if self.pre_norm:
            return x + self.feedforward(self.norm3(x))
        x = self.norm2(x)
        return self.norm3(x + self.feedforward(x))


class Decoder(nn.Module):
    """A stack of `DecoderLayer` that begins with zeros, and a norm; arguments as of `Encoder`."""

    def __init__(
        self, layers: int, size: int, heads: int, feedforward_size: int, dropout: float, activation: Activation, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(size, heads, feedforward_size, dropout, activation, pre_norm) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size)

    def forward(self, queries: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """Decodes.

        Args:
            queries: (K, D), learned.
            memory: (B, T, D).
            memory_positions: (T, D).

        Returns:
            (B, K, D).
        """
        keys = memory + memory_positions
        x = queries.new_zeros(1, 1, queries.shape[1])
        for layer in self.layers:
            x = layer(x, queries, keys, memory)
        return self.norm(x)


class Posterior(nn.Module):
    """The encoder of the conditional variational autoencoder: state and actions to the distribution of the latent.

    Used in training alone. Its tokens are a learned one, whose output becomes the distribution, the state, and the actions.

    Args:
        state_size: of the state; None where the policy reads none.
        action_size: of an action.
        action_horizon: K, actions of a chunk.
        latent_size: L.
        encoder: of tokens of D.
        size: D.
    """

    positions: Tensor

    def __init__(
        self, state_size: int | None, action_size: int, action_horizon: int, latent_size: int, encoder: Encoder, size: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.token = nn.Parameter(torch.randn(1, size))
        self.state = None if state_size is None else nn.Linear(state_size, size)
        self.action = nn.Linear(action_size, size)
        self.distribution = nn.Linear(size, 2 * latent_size)
        tokens = action_horizon + (1 if state_size is None else 2)
        self.register_buffer("positions", sinusoid(tokens, size), persistent=False)

    def forward(self, state: Tensor | None, actions: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
        """The latent's distribution.

        Args:
            state: (B, D_state) normalised.
            actions: (B, K, A) normalised.
            is_pad: (B, K) bool: actions that are none.

        Returns:
            Mean and logarithm of the variance, (B, L) each.
        """
        tokens = [self.token.expand(len(actions), 1, -1)]
        if self.state is not None:
            tokens.append(self.state(state).unsqueeze(1))
        actions = self.action(actions)
        leading = len(tokens)
        x = torch.cat([*tokens, actions], 1)
        mask = torch.zeros_like(is_pad, dtype=actions.dtype).masked_fill(is_pad, -math.inf)
        mask = F.pad(mask, (leading, 0))[:, None, None]
        mean, log_variance = self.distribution(self.encoder(x, self.positions, mask, outputs=1)[:, 0]).chunk(2, -1)
        return mean, log_variance


class CameraTokens(nn.Module):
    """Pictures of all cameras to tokens, one for each place of a backbone's feature map: camera by camera, row by row.

    Nothing but what they show tells the tokens of two cameras apart: their positions are the same.

    Args:
        backbone: (N, channels in, height, width) to (N, C, h, w), with attributes ``channels`` (C) and ``stride``; 4 channels
            in where there is depth.
        image_sizes: (height, width) per camera.
        size: D of a token.
        depth_range: metres of depth that become 0 and 1; depth beyond them is clipped.

    Attributes:
        image_mean: (cameras, 3) of values in 0 to 1, a buffer.
        image_std: likewise.
    """

    image_mean: Tensor
    image_std: Tensor
    positions: Tensor

    def __init__(
        self, backbone: Any, image_sizes: Sequence[tuple[int, int]], size: int, depth_range: tuple[float, float] = (0.1, 2.0)
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Conv2d(backbone.channels, size, 1)
        self.image_sizes, self.depth_range = [tuple(pair) for pair in image_sizes], depth_range
        self.register_buffer("image_mean", torch.full((len(image_sizes), 3), 0.5))
        self.register_buffer("image_std", torch.full((len(image_sizes), 3), 0.5))
        maps = [(-(-height // backbone.stride), -(-width // backbone.stride)) for height, width in image_sizes]
        positions = torch.cat([sinusoid_2d(height, width, size).flatten(0, 1) for height, width in maps])
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, images: Sequence[Tensor], depths: Sequence[Tensor] = ()) -> Tensor:
        """Tokens of all cameras.

        Args:
            images: per camera (B, 3, height, width), uint8 or in 0 to 1.
            depths: per camera (B, 1, height, width) in metres, where the backbone reads depth.

        Returns:
            (B, T, D).
        """
        together = len(set(self.image_sizes)) == 1
        groups = [range(len(images))] if together else [[camera] for camera in range(len(images))]
        tokens = []
        for cameras in groups:
            maps = self.projection(self.backbone(self._pictures(images, depths, list(cameras))))  # (B * cameras, D, h, w)
            tokens.append(maps.permute(0, 2, 3, 1).reshape(len(images[0]), -1, maps.shape[1]))
        return tokens[0] if together else torch.cat(tokens, 1)

    def _pictures(self, images: Sequence[Tensor], depths: Sequence[Tensor], cameras: list[int]) -> Tensor:
        """(B * cameras, 3 or 4, height, width), normalised, channels innermost in memory."""
        mean, deviation = self.image_mean[cameras], self.image_std[cameras]
        scale = (1 / deviation)[:, None, None]
        offset = (-mean / deviation)[:, None, None]
        pixels = torch.stack([images[camera].movedim(1, 3) for camera in cameras], 1)  # (B, cameras, height, width, 3)
        if not pixels.is_floating_point():
            scale = scale / 255
        pixels = pixels * scale + offset
        if depths:
            near, far = self.depth_range
            metres = torch.stack([depths[camera].movedim(1, 3) for camera in cameras], 1)
            shares = (metres.nan_to_num(far).clamp(near, far) - near) / (far - near)
            pixels = torch.cat((pixels, shares.to(pixels.dtype)), -1)
        return pixels.flatten(0, 1).permute(0, 3, 1, 2)


class ACTNetwork(nn.Module):
    """Action Chunking with Transformers (Zhao et al. 2023, arXiv 2304.13705), without its CVAE encoder's loss.

    Encoder tokens: the latent, the state, the environment's state, the pictures. The decoder makes of K learned queries K
    actions.

    Args:
        action_size: A.
        action_horizon: K.
        state_size: of the robot's state; None where the policy reads none.
        environment_size: of the environment's state; likewise.
        cameras: encoder of the pictures; None without.
        hidden_size: D.
        heads: of attention.
        feedforward_size: width of the feed-forward networks.
        encoder_layers: of the transformer.
        decoder_layers: of the transformer.
        latent_size: L.
        posterior_layers: of the encoder of state and actions; 0 for none (no CVAE).
        dropout: in all layers.
        activation: ``relu`` or ``gelu``.
        pre_norm: norms before the parts of a layer instead of after them.
    """

    def __init__(
        self,
        action_size: int,
        action_horizon: int = 100,
        state_size: int | None = None,
        environment_size: int | None = None,
        cameras: CameraTokens | None = None,
        hidden_size: int = 512,
        heads: int = 8,
        feedforward_size: int = 3200,
        encoder_layers: int = 4,
        decoder_layers: int = 1,
        latent_size: int = 32,
        posterior_layers: int = 4,
        dropout: float = 0.1,
        activation: Activation = "relu",
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        layer = (hidden_size, heads, feedforward_size, dropout, activation, pre_norm)
        self.latent_size = latent_size
        self.posterior: Posterior | None = None
        if posterior_layers:
            encoder = Encoder(posterior_layers, *layer)
            self.posterior = Posterior(state_size, action_size, action_horizon, latent_size, encoder, hidden_size)
        self.latent = nn.Linear(latent_size, hidden_size)
        self.state = None if state_size is None else nn.Linear(state_size, hidden_size)
        self.environment = None if environment_size is None else nn.Linear(environment_size, hidden_size)
        self.cameras = cameras
        vectors = 1 + (state_size is not None) + (environment_size is not None)
        self.positions = nn.Parameter(torch.randn(vectors, hidden_size))  # of the tokens that are no pictures
        self.encoder = Encoder(encoder_layers, *layer)
        self.decoder = Decoder(decoder_layers, *layer)
        self.queries = nn.Parameter(torch.randn(action_horizon, hidden_size))
        self.action = nn.Linear(hidden_size, action_size)
        for module in (self.encoder, self.decoder):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        latent: Tensor | None = None,
        state: Tensor | None = None,
        environment: Tensor | None = None,
        images: Sequence[Tensor] = (),
        depths: Sequence[Tensor] = (),
    ) -> Tensor:
        """Predicts a chunk.

        Args:
            latent: (B, L), or None for zero, the mean of the prior.
            state: (B, D_state) normalised.
            environment: (B, D_environment) normalised.
            images: see `CameraTokens`.
            depths: likewise.

        Returns:
            (B, K, A) normalised.
        """
        rows = len(next(value for value in (state, environment, *images) if value is not None))
        if latent is None:
            latent = self.queries.new_zeros(1, self.latent_size)
        tokens = [self.latent(latent).expand(rows, -1)]
        for layer, vector in ((self.state, state), (self.environment, environment)):
            if layer is not None:
                tokens.append(layer(vector))
        x: Tensor = torch.stack(tokens, 1)
        positions: Tensor = self.positions
        if self.cameras is not None:
            x = torch.cat((x, self.cameras(images, depths)), 1)
            positions = torch.cat((positions, self.cameras.positions))
        return self.action(self.decoder(self.queries, self.encoder(x, positions), positions))


def sinusoid(count: int, size: int) -> Tensor:
    """(count, size) float32: sines on even channels, cosines on odd ones, of position / 10000^(2 * floor(j / 2) / size)."""
    angles = torch.arange(count, dtype=torch.float64)[:, None] / _wavelengths(size, torch.float64)
    return _alternate(angles).float()


def sinusoid_2d(height: int, width: int, size: int) -> Tensor:
    """(height, width, size) float32: half of the channels for the row, then half for the column.

    Rows and columns count from 1 and are scaled so that the last is a full turn (DETR; Carion et al. 2020).
    """
    half = size // 2

    def turned(count: int) -> Tensor:
        places = torch.arange(1, count + 1, dtype=torch.float32) / (count + 1e-6) * (2 * math.pi)
        return _alternate(places[:, None] / _wavelengths(half, torch.float32))

    rows = turned(height)[:, None].expand(height, width, half)
    columns = turned(width)[None].expand(height, width, half)
    return torch.cat((rows, columns), -1)


def _wavelengths(size: int, dtype: torch.dtype) -> Tensor:
    """(size,): 10000^(2 * floor(j / 2) / size)."""
    pairs = torch.div(torch.arange(size, dtype=dtype), 2, rounding_mode="floor")
    return 10000 ** (2 * pairs / size)


def _alternate(angles: Tensor) -> Tensor:
    """Sines on even channels, cosines on odd ones."""
    even = torch.arange(angles.shape[-1]) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos())
