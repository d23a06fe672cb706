"""DP3 and Simple DP3: diffusion over action chunks, conditioned on point clouds and robot state (Ze et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lightning_robot.networks.diffusion import SamplerFormula, check_formula
from lightning_robot.networks.observation_encoder import StateEncoder
from lightning_robot.networks.point_encoder import PointNet
from lightning_robot.networks.unet import ConditionalUnet
from lightning_robot.policies.action_diffusion import CLOUD, STATE, ActionDiffusion, check_unet
from lightning_robot.policies.base import check_at_least_one, check_optimizer


class DP3(ActionDiffusion):
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
        time_embedding: size of the embedding of the diffusion step, even.
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
        check_at_least_one(
            observation_steps=observation_steps,
            action_horizon=action_horizon,
            diffusion_steps=diffusion_steps,
            denoising_steps=denoising_steps,
            encoder_size=encoder_size,
            task_size=task_size,
        )
        check_optimizer(self.hparams)
        dims = self.published_dims if down_dims is None else down_dims
        check_unet(dims, kernel_size, action_horizon, groups, time_embedding)
        if diffusion_steps % denoising_steps:
            raise ValueError(f"denoising_steps={denoising_steps} must divide diffusion_steps={diffusion_steps}.")
        check_formula(sampler_formula)
        self.set_horizons(observation_steps, action_horizon, execution_horizon)
        self.uses_task = task_conditioning
        self.normalization = {STATE: state_normalization, CLOUD: cloud_normalization, "action": action_normalization}

    @property
    def observation_keys(self) -> tuple[str, ...]:
        return STATE, CLOUD

    @property
    def denoiser(self) -> ConditionalUnet:
        return self.unet

    def build(self) -> None:
        options = self.hparams
        features = self.network_features
        state_size, action_size = features.observations[STATE].shape[-1], features.action.shape[-1]
        encoder_size = options["encoder_size"]
        self.cloud_encoder = PointNet(
            self._cloud_channels, encoder_size, options["point_layer_norm"], options["final_layer_norm"]
        )
        self.state_encoder = StateEncoder(state_size, (64, 64))
        condition_size = self.observation_steps * (self.cloud_encoder.size + self.state_encoder.size)
        condition_size += self.build_task_encoder(options["task_size"])
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
        self.build_schedule(options["diffusion_steps"], options["denoising_steps"])

    def observed(self, observation: dict[str, Any]) -> list[Tensor]:
        state = self.normalizer.normalize(STATE, observation[STATE])
        cloud = self.normalizer.normalize(CLOUD, observation[CLOUD][..., : self._cloud_channels])
        return [self.cloud_encoder(cloud.flatten(0, 1)), self.state_encoder(state.flatten(0, 1))]


class SimpleDP3(DP3):
    """DP3 with a U-Net of 7.4 million parameters in all: narrower levels of one residual block each.

    Arguments as of `DP3`.
    """

    published_dims = (128, 256, 384)
    blocks_per_level = 1
