"""DP3 and Simple DP3: diffusion over action chunks, conditioned on point clouds and robot state (Ze et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robot.console import say
from lightning_robot.features import Features, IncompatibleFeatures
from lightning_robot.networks.diffusion import SamplerFormula, add_noise, check_formula, ddim_step, denoising_plan
from lightning_robot.networks.noise import seeded_integers, seeded_normal
from lightning_robot.networks.point_encoder import PointNet
from lightning_robot.networks.unet import ConditionalUnet
from lightning_robot.policies.base import ImitationPolicy
from lightning_robot.transforms.statistics import Statistics

CLOUD, STATE = "observation.point_cloud", "observation.state"


class DP3(ImitationPolicy):
    """3D Diffusion Policy (arXiv 2403.03954) with its published sizes: 255 million parameters.

    A cloud and a state per observation step become one vector; a U-Net, modulated by it, predicts the clean action chunk from
    a noisy one; ten DDIM steps make noise into a chunk. The chunk's first action belongs to the oldest observation.

    Args:
        observation_steps: T.
        action_horizon: H, a multiple of 2 to the number of levels of the U-Net less one.
        execution_horizon: actions executed per chunk, at most H - T + 1.
        use_colors: read XYZRGB clouds instead of XYZ (of a coloured cloud the XYZ policy reads the first three channels).
        encoder_size: features of a cloud and of a state each.
        point_layer_norm: layer norm in the network on points.
        final_layer_norm: layer norm after the cloud's projection.
        down_dims: channels of the U-Net's levels, at least one; None takes the published ones of the class.
        kernel_size: of the U-Net's convolutions, odd.
        groups: of the U-Net's group norms.
        time_embedding: size of the embedding of the diffusion step.
        diffusion_steps: steps of the noising process.
        denoising_steps: network calls per chunk; divides `diffusion_steps`.
        sampler_formula: ``current`` DDIM, or ``historical``: what diffusers before 0.15 computed, with which checkpoints of
            the original implementation were evaluated. Training is the same.
        task_conditioning: condition on the instruction's sentence vector too (not in the published method).
        task_size: features of the task, where conditioned on it.
        state_normalization: ``limits``, ``mean_std``, ``quantiles`` or ``identity``.
        cloud_normalization: the same; ``identity`` keeps metres (CALVIN, DexArt), ``limits`` is Meta-World's and Adroit's.
        action_normalization: the same; samples are clipped to -1 ... 1, so ``limits`` or ``quantiles``.
        learning_rate: of AdamW, after the warm-up.
        betas: of AdamW.
        epsilon: of AdamW.
        weight_decay: of AdamW, on all parameters.
        warmup_steps: optimizer steps of linear warm-up, before half a cosine to zero. A run so short that the warm-up would
            take more than half of it warms up for a tenth of it instead, and says so.
        transforms: between the data and the networks, in order (`lightning_robot.transforms.named`).
        postprocess: of executed actions, in order (`lightning_robot.transforms.postprocess`).
        features: what the data offers; None takes it from the data module.
        language: table of sentence vectors, where conditioned on the task; None takes it from the data module.
    """

    published_dims: ClassVar[tuple[int, ...]] = (512, 1024, 2048)
    blocks_per_level: ClassVar[int] = 2
    alphas_cumprod: Tensor
    denoising_timesteps: Tensor

    def __init__(
        self,
        observation_steps: int = 2,
        action_horizon: int = 16,
        execution_horizon: int = 8,
        use_colors: bool = False,
        encoder_size: int = 64,
        point_layer_norm: bool = True,
        final_layer_norm: bool = True,
        down_dims: list[int] | None = None,
        kernel_size: int = 5,
        groups: int = 8,
        time_embedding: int = 128,
        diffusion_steps: int = 100,
        denoising_steps: int = 10,
        sampler_formula: SamplerFormula = "current",
        task_conditioning: bool = False,
        task_size: int = 64,
        state_normalization: str = "limits",
        cloud_normalization: str = "identity",
        action_normalization: str = "limits",
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.95, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 1e-6,
        warmup_steps: int = 500,
        transforms: list[dict[str, Any]] | None = None,
        postprocess: list[dict[str, Any]] | None = None,
        features: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        counts = {
            "observation_steps": observation_steps,
            "action_horizon": action_horizon,
            "diffusion_steps": diffusion_steps,
            "denoising_steps": denoising_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        if learning_rate < 0:
            raise ValueError(f"learning_rate={learning_rate} must not be negative.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd: an even one would change the chunk's length.")
        widths = list(self.published_dims if down_dims is None else down_dims)
        if not widths:
            raise ValueError("down_dims=[] names no level of the U-Net; null takes the published ones.")
        if action_horizon % 2 ** (len(widths) - 1):
            raise ValueError(
                f"action_horizon={action_horizon} must be a multiple of {2 ** (len(widths) - 1)}: each of the U-Net's "
                f"{len(widths)} levels but the last halves it."
            )
        if not 1 <= execution_horizon <= action_horizon - observation_steps + 1:
            raise ValueError(
                f"execution_horizon={execution_horizon} must lie between 1 and action_horizon - observation_steps + 1 = "
                f"{action_horizon - observation_steps + 1}."
            )
        if diffusion_steps % denoising_steps:
            raise ValueError(f"denoising_steps={denoising_steps} must divide diffusion_steps={diffusion_steps}.")
        check_formula(sampler_formula)
        self.observation_steps = observation_steps
        self.action_horizon = action_horizon
        self.execution_horizon = execution_horizon
        self.action_offset = 1 - observation_steps
        self.uses_task = task_conditioning
        self.normalization = {STATE: state_normalization, CLOUD: cloud_normalization, "action": action_normalization}

    @property
    def observation_keys(self) -> tuple[str, ...]:
        return STATE, CLOUD

    @property
    def compilable(self) -> list[nn.Module]:
        return [self.unet]

    def select_features(self, offered: Features) -> Features:
        """Without `use_colors`, the first three channels of a cloud are all that is read."""
        selected = super().select_features(offered)
        cloud = selected.observations[CLOUD]
        channels = self._cloud_channels
        if cloud.shape[-1] < channels:
            raise IncompatibleFeatures(
                f"use_colors=True needs clouds of 6 channels, the data offers {cloud.shape[-1]} (XYZ only). Set "
                "model.init_args.use_colors: false, or use data with coloured clouds."
            )
        cut = replace(cloud, shape=(*cloud.shape[:-1], channels), names=cloud.names[:channels], kinds=cloud.kinds[:channels])
        return replace(selected, observations={**selected.observations, CLOUD: cut})

    def select_statistics(self, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
        if CLOUD not in statistics:
            return statistics
        whole, channels = statistics[CLOUD], self._cloud_channels
        cut = {name: getattr(whole, name)[:channels] for name in ("min", "max", "mean", "std", "q01", "q99")}
        return {**statistics, CLOUD: replace(whole, **cut)}

    def build(self) -> None:
        options = self.hparams
        features = self.network_features
        state_size, action_size = features.observations[STATE].shape[-1], features.action.shape[-1]
        encoder_size = options["encoder_size"]
        self.cloud_encoder = PointNet(
            self._cloud_channels, encoder_size, options["point_layer_norm"], options["final_layer_norm"]
        )
        self.state_encoder = nn.Sequential(nn.Linear(state_size, 64), nn.ReLU(), nn.Linear(64, 64))
        condition_size = self.observation_steps * (encoder_size + 64)
        if self.uses_task:
            # Sentence vectors have unit length, so entries of a few hundredths: the norm brings them to the others' size.
            vector_size, task_size = len(options["language"]["embeddings"][0]), options["task_size"]
            self.task_encoder = nn.Sequential(nn.Linear(vector_size, task_size), nn.LayerNorm(task_size))
            condition_size += task_size
        self.unet = ConditionalUnet(
            action_size,
            condition_size,
            down_dims=options["down_dims"] or self.published_dims,
            blocks_per_level=self.blocks_per_level,
            kernel_size=options["kernel_size"],
            groups=options["groups"],
            embedding_size=options["time_embedding"],
            num_timesteps=options["diffusion_steps"],
        )

        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        with torch.device("cpu"):  # whatever the module around is built with
            schedule = DDIMScheduler(
                num_train_timesteps=options["diffusion_steps"],
                beta_schedule="squaredcos_cap_v2",
                clip_sample=True,
                set_alpha_to_one=True,
                steps_offset=0,
                prediction_type="sample",
            )
            schedule.set_timesteps(options["denoising_steps"])
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod, persistent=False)
        self.register_buffer("denoising_timesteps", schedule.timesteps, persistent=False)
        self.denoising_plan = denoising_plan(schedule.alphas_cumprod, schedule.timesteps)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws each row's noise and diffusion step on the CPU, from the run's seed, the epoch and the row's window."""
        if "action" not in batch or "noise" in batch:
            return batch
        seeds = self.window_seeds(batch)
        noise = seeded_normal(seeds, 0, 0, (self.action_horizon, self.network_features.action.shape[-1]))
        timesteps = seeded_integers(seeds, 0, 1, self.hparams["diffusion_steps"])
        return {**batch, "noise": noise, "timesteps": timesteps}

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.on_before_batch_transfer(batch, 0)
        return self._loss(batch, batch["noise"].to(self.device), batch["timesteps"].to(self.device)), {}

    def _loss(self, batch: dict[str, Any], noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of the predicted clean chunk; steps beyond an episode's end count fully, as published.

        Args:
            batch: observation keys and ``action`` (B, H, A), physical units.
            noise: (B, H, A).
            timesteps: (B,) int64.

        Returns:
            Scalar.
        """
        condition = self.encode(batch)
        clean = self.normalizer.normalize("action", batch["action"])
        noisy = add_noise(clean, noise, timesteps, self.alphas_cumprod)
        prediction = self.unet(noisy, self.unet.modulations(timesteps, condition))
        return F.mse_loss(prediction.to(clean.dtype), clean)

    def encode(self, observation: dict[str, Any]) -> Tensor:
        """The vector that the U-Net is conditioned on.

        Args:
            observation: ``observation.state`` (B, T, D), ``observation.point_cloud`` (B, T, N, 3 or 6), and the task where the
                policy is conditioned on it; physical units.

        Returns:
            (B, G): for each observation step the cloud's features, then the state's; then the task's.
        """
        state, cloud = observation[STATE], observation[CLOUD][..., : self._cloud_channels]
        for key, value in ((STATE, state), (CLOUD, cloud)):
            if value.shape[1] != self.observation_steps:
                raise ValueError(f"{key} has {value.shape[1]} observation steps, the policy reads {self.observation_steps}.")
        state = self.normalizer.normalize(STATE, state).flatten(0, 1)  # (B * T, D)
        cloud = self.normalizer.normalize(CLOUD, cloud).flatten(0, 1)  # (B * T, N, 3 or 6)
        steps = torch.cat((self.cloud_encoder(cloud), self.state_encoder(state)), 1)  # (B * T, features)
        condition = steps.view(-1, self.observation_steps * steps.shape[1])  # (B, T * features)
        if self.uses_task:
            condition = torch.cat((condition, self.task_encoder(self.task_embedding(observation))), 1)
        return condition

    @torch.no_grad()
    def _predict(
        self,
        observation: dict[str, Any],
        noise_seeds: Tensor | None,
        num_samples: int,
        guidance: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        if guidance is not None:
            raise ValueError(f"{type(self).__name__} does not support guidance yet; call it with guidance=None.")
        condition = self.encode(observation)
        rows, shape = len(condition), (self.action_horizon, self.network_features.action.shape[-1])
        seeds = torch.randint(2**62, (rows,)) if noise_seeds is None else noise_seeds

        def draw(number: int) -> Tensor:
            samples = [seeded_normal(seeds, sample, number, shape) for sample in range(num_samples)]
            return torch.stack(samples, 1).flatten(0, 1).to(self.device)  # (B * S, H, A)

        chunks = self._sample(condition.repeat_interleave(num_samples, 0), draw)
        actions = self.normalizer.unnormalize("action", chunks).unflatten(0, (rows, num_samples))
        return actions[:, :, self.observation_steps - 1 :]

    def _sample(self, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """Denoises a chunk by DDIM.

        Args:
            condition: (B, G).
            draw: maps the number of a draw to standard normal noise (B, H, A); only number 0 is asked for.

        Returns:
            (B, H, A) in the normaliser's units, within -1 ... 1.
        """
        chunk = draw(0)
        of_time = self.unet.time_modulations(self.denoising_timesteps)  # per block (steps, 2 channels)
        of_condition = self.unet.condition_modulations(condition)  # per block (B, 2 channels)
        with self.unet.repeated():
            for step, (_, alpha, alpha_previous) in enumerate(self.denoising_plan):
                modulations = [time[step] + fixed for time, fixed in zip(of_time, of_condition)]
                prediction = self.unet(chunk, modulations).to(chunk.dtype)
                chunk = ddim_step(chunk, prediction, alpha, alpha_previous, self.hparams["sampler_formula"])
        return chunk

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = self.hparams
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=options["learning_rate"],
            betas=tuple(options["betas"]),
            eps=options["epsilon"],
            weight_decay=options["weight_decay"],
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,  # fp16's scaler forbids clipping with it
        )
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("The learning rate falls to zero over the run: set trainer.max_epochs or trainer.max_steps.")
        warmup = options["warmup_steps"]
        if warmup > total / 2:
            say(f"Warm-up shortened from {warmup} to {int(total) // 10} steps, a tenth of the run's {int(total)}.")
            warmup = int(total) // 10
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _cloud_channels(self) -> int:
        return 6 if self.hparams["use_colors"] else 3


class SimpleDP3(DP3):
    """DP3 with a U-Net of 7.4 million parameters in all: narrower levels of one residual block each.

    Arguments as of `DP3`.
    """

    published_dims = (128, 256, 384)
    blocks_per_level = 1


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate at optimizer step `step` (from 0): linear over `warmup`, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))
