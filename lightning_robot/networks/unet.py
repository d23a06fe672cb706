"""The one-dimensional U-Net over an action chunk, modulated feature by feature (FiLM) by time step and observation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robot.networks.convolution import Convolution, TransposedConvolution


class ConditionalUnet(nn.Module):
    """Predicts from a noisy action chunk the clean one (or the noise), as in Diffusion Policy, DP3 and Simple DP3.

    Levels go down by strided and up by transposed convolutions; skips join at every level but the first. All residual blocks
    see the same vector, the time embedding joined with the condition g, each through its own linear map of Mish(g). What that
    map gives is multiplied with and added to the features: by the scale itself, not by one plus it.

    Sources: Chi et al. 2023 (Diffusion Policy); Ze et al. 2024 (DP3).

    Args:
        action_size: A.
        condition_size: G.
        down_dims: channels of each level; multiples of `groups`, the first one of 8 as well.
        blocks_per_level: residual blocks at each level and in the middle (DP3: 2, Simple DP3: 1).
        kernel_size: odd.
        groups: of the group normalisation; the last block always has 8, as published.
        embedding_size: d of the time embedding, even.
        num_timesteps: time steps are integers below it.
        scales: whether blocks are scaled and shifted (published), or shifted alone.
    """

    sinusoids: Tensor

    def __init__(
        self,
        action_size: int,
        condition_size: int,
        down_dims: Sequence[int] = (512, 1024, 2048),
        blocks_per_level: int = 2,
        kernel_size: int = 5,
        groups: int = 8,
        embedding_size: int = 128,
        num_timesteps: int = 100,
        scales: bool = True,
    ) -> None:
        super().__init__()
        if down_dims[0] % 8 or any(width % groups for width in down_dims):
            raise ValueError(f"down_dims must be multiples of groups={groups} and the first one of 8, got {list(down_dims)}.")
        self.embedding_size = embedding_size
        self.register_buffer("sinusoids", sinusoids(num_timesteps, embedding_size), persistent=False)
        self.time_encoder = nn.Sequential(
            nn.Linear(embedding_size, 4 * embedding_size), nn.Mish(), nn.Linear(4 * embedding_size, embedding_size)
        )

        def residual_blocks(channels_in: int, channels_out: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResidualBlock(
                    channels_in if index == 0 else channels_out,
                    channels_out,
                    embedding_size + condition_size,
                    kernel_size,
                    groups,
                    scales,
                )
                for index in range(blocks_per_level)
            )

        last = len(down_dims) - 1
        self.down = nn.ModuleList()
        for level, (below, width) in enumerate(zip((action_size, *down_dims), down_dims)):
            halve = Convolution(width, width, 3, stride=2, padding=1) if level < last else nn.Identity()
            self.down.append(Level(residual_blocks(below, width), halve))
        self.middle = residual_blocks(down_dims[-1], down_dims[-1])
        self.up = nn.ModuleList()
        for width, above in zip(down_dims[-2::-1], down_dims[:0:-1]):
            double = TransposedConvolution(width, width, 4, stride=2, padding=1)
            self.up.append(Level(residual_blocks(2 * above, width), double))
        self.final = ConvolutionBlock(down_dims[0], down_dims[0], kernel_size, groups=8)
        self.output = Convolution(down_dims[0], action_size, 1)

    def forward(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The convolutions, given what time step and condition ask of them.

        Args:
            x: (B, H, A) noisy normalised actions; H a multiple of 2 to the number of levels less one.
            modulations: from `conditioning` or `conditioning_per_step`.

        Returns:
            (B, H, A).
        """
        remaining = iter(modulations)
        x = x.transpose(1, 2)  # (B, A, H)
        skips = []
        for level in self.down:
            x = level(x, remaining)
            skips.append(x)
            x = level.resample(x)  # type: ignore[operator]
        for block in self.middle:
            x = block(x, next(remaining))
        for level in self.up:
            x = _join_channels(x, skips.pop())
            x = level.resample(level(x, remaining))  # type: ignore[operator]
        return self.output(self.final(x)).transpose(1, 2)

    def residual_blocks(self) -> list[ResidualBlock]:
        """All blocks that are modulated, in the order in which `forward` passes them."""
        levels = [*(level.blocks for level in self.down), self.middle, *(level.blocks for level in self.up)]
        return [block for blocks in levels for block in blocks]  # type: ignore[union-attr]

    def conditioning(self, timesteps: Tensor, condition: Tensor) -> list[Tensor]:
        """Scales and shifts of all residual blocks, as in training.

        Args:
            timesteps: (B,) int64.
            condition: (B, G).

        Returns:
            For each of `residual_blocks` (B, 2 channels): scales, then shifts (or (B, channels) shifts).
        """
        joined = F.mish(torch.cat((self.embed_time(timesteps), condition), 1))
        return [block.film(joined) for block in self.residual_blocks()]

    def conditioning_per_step(self, timesteps: Tensor, condition: Tensor) -> Iterable[list[Tensor]]:
        """`conditioning` of all rows at one time step after the other, as in denoising.

        Args:
            timesteps: (K,) int64.
            condition: (B, G).
        """
        of_time, of_condition = self.time_modulations(timesteps), self.condition_modulations(condition)
        for step in range(len(timesteps)):
            yield [time[step] + fixed for time, fixed in zip(of_time, of_condition)]

    def condition_modulations(self, condition: Tensor) -> list[Tensor]:
        """The condition's part of `conditioning`: the same for every denoising step, so computed once per chunk.

        With g = [e, c], W·Mish(g) + b = W_e·Mish(e) + (W_c·Mish(c) + b).

        Args:
            condition: (B, G).

        Returns:
            For each of `residual_blocks` (B, 2 channels).
        """
        active, size = F.mish(condition), self.embedding_size
        return [F.linear(active, block.film.weight[:, size:], block.film.bias) for block in self.residual_blocks()]

    def time_modulations(self, timesteps: Tensor) -> list[Tensor]:
        """The time's part of `conditioning`: for each of `residual_blocks` (K, 2 channels), for (K,) int64 `timesteps`."""
        active, size = F.mish(self.embed_time(timesteps)), self.embedding_size
        return [F.linear(active, block.film.weight[:, :size]) for block in self.residual_blocks()]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Inside the block `forward` is called many times, without gradient and with the same weights: they are packed once."""
        convolutions = [module for module in self.modules() if isinstance(module, Convolution)]
        try:
            for convolution in convolutions:
                convolution.packed = {}
            yield
        finally:
            for convolution in convolutions:
                convolution.packed = None

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """(K,) int64 -> (K, d)."""
        return self.time_encoder(self.sinusoids[timesteps])


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next one, which the caller takes."""

    def __init__(self, blocks: nn.ModuleList, resample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.resample = blocks, resample

    def forward(self, x: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        """The blocks alone: (B, channels_in, L) -> (B, channels_out, L); takes a modulation for each."""
        for block in self.blocks:
            x = block(x, next(modulations))
        return x


class ResidualBlock(nn.Module):
    """Two convolution blocks with a modulation between them, and a shortcut."""

    def __init__(
        self, channels_in: int, channels_out: int, condition_size: int, kernel_size: int, groups: int, scales: bool = True
    ) -> None:
        super().__init__()
        self.scales = scales
        self.first = ConvolutionBlock(channels_in, channels_out, kernel_size, groups)
        self.second = ConvolutionBlock(channels_out, channels_out, kernel_size, groups)
        self.film = nn.Linear(condition_size, (2 if scales else 1) * channels_out)  # of Mish(g)
        self.shortcut = Convolution(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(B, channels_in, L) and (B, 2 channels_out), or shifts alone, -> (B, channels_out, L)."""
        between, modulation = self.first(x), modulation.unsqueeze(2)
        if self.scales:
            scale, shift = modulation.chunk(2, 1)
            between = between * scale + shift
        else:
            between = between + modulation
        return self.second(between) + self.shortcut(x)


class ConvolutionBlock(nn.Module):
    """Convolution, group normalisation, Mish."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.convolution = Convolution(channels_in, channels_out, kernel_size, padding=kernel_size // 2)
        self.norm = GroupNorm(groups, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, L) -> (B, channels_out, L)."""
        return F.mish(self.norm(self.convolution(x)))


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that keeps the strides on a CPU, where the native one copies to (B, C, L) order and back."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        if input.dtype in (torch.bfloat16, torch.float16):
            input = input.float()  # as under autocast
        groups = input.unflatten(1, (self.num_groups, -1))  # (B, groups, C / groups, L)
        centred = groups - groups.mean((2, 3), keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), normal.flatten(1, 2), self.weight.unsqueeze(1))


def _join_channels(x: Tensor, y: Tensor) -> Tensor:
    """Concatenates (B, C, L) tensors on C; on a CPU it keeps channels or batch innermost, where `torch.cat` reorders."""
    if x.device.type != "cpu":
        return torch.cat((x, y), 1)
    if x.stride(1) == y.stride(1) == 1:
        return torch.cat((x.permute(2, 0, 1), y.permute(2, 0, 1)), 2).permute(1, 2, 0)
    return torch.cat((x.permute(1, 2, 0), y.permute(1, 2, 0)), 0).permute(2, 0, 1)


def sinusoids(count: int, size: int) -> Tensor:
    """(count, size) float32: sines, then cosines, of 0 ... count - 1 at wavelengths from 2 pi to 20000 pi."""
    half = size // 2
    steps = torch.arange(max(count, half), dtype=torch.float32, device="cpu")  # whatever the module around is built with
    frequencies = torch.exp(steps[:half] * -(math.log(10000) / (half - 1)))
    angles = steps[:count].unsqueeze(1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1)
