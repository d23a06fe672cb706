"""What Diffusion Policy and DP3 share: noise, loss, sampling, optimizer; a subclass says what is observed and which network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lightning_robot.console import say
from lightning_robot.features import Features, IncompatibleFeatures
from lightning_robot.networks.diffusion import Prediction, add_noise, ddim_step, ddpm_step, denoising_plan
from lightning_robot.networks.noise import seeded_integers, seeded_normal
from lightning_robot.networks.observation_encoder import encode_steps
from lightning_robot.policies.base import ImitationPolicy, check_at_least_one
from lightning_robot.transforms.statistics import Statistics

CLOUD, STATE = "observation.point_cloud", "observation.state"


class ActionDiffusion(ImitationPolicy):
    """Diffusion over action chunks whose first action belongs to the oldest observation (Chi et al. 2023).

    A subclass sets the horizons with `set_horizons` in its constructor, whose arguments include ``diffusion_steps``,
    ``learning_rate``, ``betas``, ``epsilon`` and ``warmup_steps``; in `build` it makes its encoders and its network, and calls
    `build_schedule`.

    Attributes:
        prediction: what the network predicts: the clean chunk (``sample``) or the noise (``epsilon``).
        sampler: ``ddim`` or ``ddpm``.
        clip: bound of the estimated clean chunk while denoising; None for none.
        mask_padding: whether steps beyond an episode's end are left out of the loss.
    """

    prediction: Prediction = "sample"
    sampler: Literal["ddim", "ddpm"] = "ddim"
    clip: float | None = 1.0
    mask_padding: bool = False
    alphas_cumprod: Tensor
    denoising_timesteps: Tensor

    @property
    def denoiser(self) -> Any:
        """The network: `ConditionalUnet` or one with the same methods."""
        raise NotImplementedError

    def observed(self, observation: dict[str, Any]) -> list[Tensor]:
        """What each encoder makes of each step, (B * T, size), in their order."""
        raise NotImplementedError

    def set_horizons(self, observation_steps: int, action_horizon: int, execution_horizon: int) -> None:
        """Checks and sets T, H and the number of actions executed."""
        check_at_least_one(observation_steps=observation_steps, action_horizon=action_horizon)
        if not 1 <= execution_horizon <= action_horizon - observation_steps + 1:
            raise ValueError(
                f"execution_horizon={execution_horizon} must lie between 1 and action_horizon - observation_steps + 1 = "
                f"{action_horizon - observation_steps + 1}."
            )
        self.observation_steps = observation_steps
        self.action_horizon = action_horizon
        self.execution_horizon = execution_horizon
        self.action_offset = 1 - observation_steps

    def build_schedule(
        self,
        diffusion_steps: int,
        denoising_steps: int,
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        """Makes the tables of the noising process and the time steps of denoising."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        with torch.device("cpu"):  # whatever the module around is built with
            schedule = DDIMScheduler(
                num_train_timesteps=diffusion_steps,
                beta_start=beta_start,
                beta_end=beta_end,
                beta_schedule=beta_schedule,
                set_alpha_to_one=True,
                steps_offset=0,
            )
            schedule.set_timesteps(denoising_steps)
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod, persistent=False)
        self.register_buffer("denoising_timesteps", schedule.timesteps, persistent=False)
        self.denoising_plan = denoising_plan(schedule.alphas_cumprod, schedule.timesteps)

    @property
    def compilable(self) -> list[nn.Module]:
        return [self.denoiser]

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
        """Mean squared error of the prediction; without `mask_padding` steps beyond an episode's end count, as published.

        Args:
            batch: observation keys, ``action`` (B, H, A) and for `mask_padding` ``action_is_pad`` (B, H); physical units.
            noise: (B, H, A).
            timesteps: (B,) int64.

        Returns:
            Scalar.
        """
        condition = self.encode(batch)
        clean = self.normalizer.normalize("action", batch["action"])
        noisy = add_noise(clean, noise, timesteps, self.alphas_cumprod)
        output = self.denoiser(noisy, self.denoiser.conditioning(timesteps, condition))
        target = clean if self.prediction == "sample" else noise.to(clean.dtype)
        error = (output.to(clean.dtype) - target).square()
        if not self.mask_padding:
            return self.mean_over_rows(error, batch)
        return self.mean_over_valid_steps(error, batch)

    def encode(self, observation: dict[str, Any]) -> Tensor:
        """The vector that the network is conditioned on.

        Args:
            observation: the keys that the policy reads, (B, T, ...), and the task where the policy is conditioned on it;
                physical units.

        Returns:
            (B, G): for each observation step the features of all encoders in their order; then the task's.
        """
        for key in self.observation_keys:
            if observation[key].shape[1] != self.observation_steps:
                raise ValueError(
                    f"{key} has {observation[key].shape[1]} observation steps, the policy reads {self.observation_steps}."
                )
        condition = encode_steps(self.observed(observation), self.observation_steps)
        if self.uses_task:
            condition = torch.cat((condition, self.task_encoder(self.task_embedding(observation))), 1)
        return condition

    def build_task_encoder(self, size: int) -> int:
        """Makes the encoder of the instruction's sentence vector, where the policy is conditioned on it; returns its size.

        Sentence vectors have unit length, so entries of a few hundredths: the norm brings them to the others' size.
        """
        if not self.uses_task:
            return 0
        vector_size = len(self.hparams["language"]["embeddings"][0])
        self.task_encoder = nn.Sequential(nn.Linear(vector_size, size), nn.LayerNorm(size))
        return size

    def select_features(self, offered: Features) -> Features:
        """Without ``use_colors``, the first three channels of a cloud are all that is read."""
        selected = super().select_features(offered)
        cloud = selected.observations.get(CLOUD)
        if cloud is None:
            return selected
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

    @property
    def _cloud_channels(self) -> int:
        return 6 if self.hparams["use_colors"] else 3

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
        draws = len(self.denoising_plan) if self.sampler == "ddpm" else 1
        noise = torch.stack(  # all draws at once: no denoising step waits for the CPU
            [
                torch.stack([seeded_normal(seeds, sample, draw, shape) for sample in range(num_samples)], 1)
                for draw in range(draws)
            ]
        )
        noise = noise.flatten(1, 2).to(self.device)  # (draws, B * S, H, A)
        chunks = self._sample(condition.repeat_interleave(num_samples, 0), noise.__getitem__)
        actions = self.normalizer.unnormalize("action", chunks).unflatten(0, (rows, num_samples))
        return actions[:, :, self.observation_steps - 1 :]

    def _sample(self, condition: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
        """Denoises a chunk.

        Args:
            condition: (B, G).
            draw: maps the number of a draw to standard normal noise (B, H, A): 0 to begin with, then for DDPM one after each
                step but the last.

        Returns:
            (B, H, A) in the normaliser's units.
        """
        chunk = draw(0)
        denoiser, last = self.denoiser, len(self.denoising_plan) - 1
        formula = self.hparams.get("sampler_formula", "current")
        with denoiser.repeated():
            steps = denoiser.conditioning_per_step(self.denoising_timesteps, condition)
            for number, ((_, alpha, before), conditioning) in enumerate(zip(self.denoising_plan, steps)):
                output = denoiser(chunk, conditioning).to(chunk.dtype)
                if self.sampler == "ddim":
                    chunk = ddim_step(chunk, output, alpha, before, formula, self.prediction, self.clip)
                else:
                    noise = draw(number + 1) if number < last else None
                    chunk = ddpm_step(chunk, output, alpha, before, noise, self.prediction, self.clip)
        return chunk

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters, in one group."""
        return self.fused_optimizer(torch.optim.AdamW, [{"params": list(self.parameters())}])

    def fused_optimizer(self, kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer of torch's Adam family with the policy's settings."""
        options: dict[str, Any] = dict(self.hparams)
        return kind(
            groups,
            lr=options["learning_rate"],
            betas=tuple(options["betas"]),
            eps=options["epsilon"],
            weight_decay=options["weight_decay"],
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,  # fp16's scaler forbids clipping with it
        )  # type: ignore[call-arg]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError("The learning rate falls to zero over the run: set trainer.max_epochs or trainer.max_steps.")
        warmup = warmup_of_run(self.hparams["warmup_steps"], total)
        optimizer = self.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_unet(down_dims: Sequence[int], kernel_size: int, action_horizon: int, groups: int, time_embedding: int) -> None:
    """Raises ValueError where there is no such U-Net, or it would not give back a chunk of the same length."""
    check_at_least_one(groups=groups)
    if time_embedding < 4 or time_embedding % 2:
        raise ValueError(f"time_embedding={time_embedding} must be even and at least 4: sines and cosines of two wavelengths.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd: an even one would change the chunk's length.")
    if not down_dims:
        raise ValueError("down_dims=[] names no level of the U-Net; null takes the published ones.")
    if min(down_dims) < 1 or down_dims[0] % 8 or any(width % groups for width in down_dims):
        raise ValueError(f"down_dims={list(down_dims)} must be multiples of groups={groups} and the first one of 8.")
    if action_horizon % 2 ** (len(down_dims) - 1):
        raise ValueError(
            f"action_horizon={action_horizon} must be a multiple of {2 ** (len(down_dims) - 1)}: each of the U-Net's "
            f"{len(down_dims)} levels but the last halves it."
        )


def warmup_of_run(warmup: int, total: float) -> int:
    """Steps of warm-up in a run of `total` steps: a tenth of the run, and a word, where `warmup` would take more than half."""
    if warmup <= total / 2:
        return warmup
    say(f"Warm-up shortened from {warmup} to {int(total) // 10} steps, a tenth of the run's {int(total)}.")
    return int(total) // 10


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate at optimizer step `step` (from 0): linear over `warmup`, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))
