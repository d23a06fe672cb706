"""The transformer over an action chunk that Diffusion Policy offers beside its U-Net."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robot.networks.unet import sinusoids


class DiffusionTransformer(nn.Module):
    """Predicts from a noisy action chunk the noise (or the clean chunk): a pre-norm decoder over the chunk's steps.

    It attends to a memory of tokens: the time step, every observation step, and the task where there is one. With `causal` an
    action sees the actions up to itself and the observations up to its own step; chunk and observations begin at one step.

    Source: Chi et al. 2023 (Diffusion Policy, transformer variant of minGPT's kind).

    Args:
        action_size: A.
        horizon: H.
        observation_steps: T.
        step_size: features of an observation step; the condition is (B, T * step_size + task_size).
        task_size: features of the task; 0 for none.
        layers: of the decoder.
        heads: of every attention; divides `width`.
        width: of the tokens, even.
        condition_layers: of the encoder of the memory; 0 is an MLP on each token (published).
        attention_dropout: within decoder and encoder layers.
        embedding_dropout: of tokens.
        causal: see above.
        num_timesteps: time steps are integers below it.
    """

    sinusoids: Tensor
    action_mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self,
        action_size: int,
        horizon: int,
        observation_steps: int,
        step_size: int,
        task_size: int = 0,
        layers: int = 8,
        heads: int = 4,
        width: int = 256,
        condition_layers: int = 0,
        attention_dropout: float = 0.3,
        embedding_dropout: float = 0.0,
        causal: bool = True,
        num_timesteps: int = 100,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width={width} must be even and a multiple of heads={heads}.")
        self.observation_steps, self.step_size, self.task_size = observation_steps, step_size, task_size
        tokens = 1 + observation_steps + (task_size > 0)
        self.register_buffer("sinusoids", sinusoids(num_timesteps, width), persistent=False)
        self.action_embedding = nn.Linear(action_size, width)
        self.observation_embedding = nn.Linear(step_size, width)
        self.task_embedding = nn.Linear(task_size, width) if task_size else None
        self.action_positions = nn.Parameter(torch.empty(1, horizon, width))
        self.memory_positions = nn.Parameter(torch.empty(1, tokens, width))
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.memory_mlp = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)) if not condition_layers else None
        )
        self.memory_layers = nn.ModuleList(
            TransformerLayer(width, heads, attention_dropout, crosses=False) for _ in range(condition_layers)
        )
        self.layers = nn.ModuleList(TransformerLayer(width, heads, attention_dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_size)
        action_mask = memory_mask = None
        if causal:
            steps, seen = torch.arange(horizon, device="cpu").unsqueeze(1), torch.arange(tokens, device="cpu")
            action_mask = steps >= torch.arange(horizon, device="cpu")
            memory_mask = (steps >= seen - 1) | (seen > observation_steps)  # time step and task are always seen
        self.register_buffer("action_mask", action_mask, persistent=False)
        self.register_buffer("memory_mask", memory_mask, persistent=False)
        self.apply(_initialise)
        for positions in (self.action_positions, self.memory_positions):
            nn.init.normal_(positions, std=0.02)

    def forward(self, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """The decoder, given what it attends to.

        Args:
            x: (B, H, A) noisy normalised actions.
            memory: from `conditioning` or `conditioning_per_step`.

        Returns:
            (B, H, A).
        """
        x = self.embedding_dropout(self.action_embedding(x) + self.action_positions)
        for layer, keys_values in zip(self.layers, memory):
            x = layer(x, self.action_mask, keys_values, self.memory_mask)
        return self.output(self.norm(x))

    def conditioning(self, timesteps: Tensor, condition: Tensor) -> list[Tensor]:
        """What each layer's attention reads of time step and condition.

        Args:
            timesteps: (B,) int64.
            condition: (B, G).

        Returns:
            For each layer (B, tokens, 2 width): keys, then values.
        """
        return self._keys_values(self._memory(torch.cat((self._time_tokens(timesteps), self._condition_tokens(condition)), 1)))

    def conditioning_per_step(self, timesteps: Tensor, condition: Tensor) -> Iterable[list[Tensor]]:
        """`conditioning` of all rows at one time step after the other, as in denoising.

        Without attention within the memory a token's part is its own: those of the condition are computed once.

        Args:
            timesteps: (K,) int64.
            condition: (B, G).
        """
        if self.memory_layers:
            for timestep in timesteps:
                yield self.conditioning(timestep.expand(len(condition)), condition)
            return
        of_time = self._keys_values(self._memory(self._time_tokens(timesteps)))  # per layer (K, 1, 2 width)
        of_condition = self._keys_values(self._memory(self._condition_tokens(condition)))  # per layer (B, tokens - 1, 2 width)
        for step in range(len(timesteps)):
            yield [torch.cat((time[step].expand(len(fixed), 1, -1), fixed), 1) for time, fixed in zip(of_time, of_condition)]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Nothing to prepare for many calls: the counterpart of `ConditionalUnet.repeated`."""
        yield

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay, as published: biases, norms and positions."""
        decayed = {id(module.weight) for module in self.modules() if isinstance(module, nn.Linear)}
        return [parameter for parameter in self.parameters() if id(parameter) not in decayed]

    def _time_tokens(self, timesteps: Tensor) -> Tensor:
        """(K,) int64 to (K, 1, width)."""
        return self.sinusoids[timesteps].unsqueeze(1) + self.memory_positions[:, :1]

    def _condition_tokens(self, condition: Tensor) -> Tensor:
        """(B, G) to (B, tokens - 1, width)."""
        observed, task = condition.split((self.observation_steps * self.step_size, self.task_size), 1)
        tokens = self.observation_embedding(observed.unflatten(1, (self.observation_steps, self.step_size)))
        if self.task_embedding is not None:
            tokens = torch.cat((tokens, self.task_embedding(task).unsqueeze(1)), 1)
        return tokens + self.memory_positions[:, 1:]

    def _memory(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        tokens = self.embedding_dropout(tokens)
        if self.memory_mlp is not None:
            return self.memory_mlp(tokens)
        for layer in self.memory_layers:
            tokens = layer(tokens, None)
        return tokens

    def _keys_values(self, memory: Tensor) -> list[Tensor]:
        return [layer.cross.keys_values(memory) for layer in self.layers]  # type: ignore[union-attr,operator]


class TransformerLayer(nn.Module):
    """Attention to oneself, attention to a memory, and an MLP of four times the width, each after a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float, crosses: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if crosses else 2))
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout) if crosses else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, keys_values: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L, width) to the same; `keys_values` (B, M, 2 width); masks (L, L) and (L, M) are true where one sees."""
        normal = self.norms[0](x)
        x = x + self.attention(normal, self.attention.keys_values(normal), mask)
        if self.cross is not None:
            assert keys_values is not None
            x = x + self.cross(self.norms[1](x), keys_values, memory_mask)
        return x + self.mlp(self.norms[-1](x))


class Attention(nn.Module):
    """Attention of several heads, whose keys and values are computed apart."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, width) and (B, M, 2 width) to (B, L, width); `mask` (L, M) is true where a key is seen."""
        keys, values = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in keys_values.chunk(2, 2))
        queries = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        return F.dropout(self.output(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)


def _initialise(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases, as published."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
