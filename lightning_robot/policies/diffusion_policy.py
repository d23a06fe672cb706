"""Diffusion Policy: diffusion over action chunks, conditioned on cameras, robot state or point clouds (Chi et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_robot.features import Features
from lightning_robot.networks.diffusion import Prediction
from lightning_robot.networks.diffusion_transformer import DiffusionTransformer
from lightning_robot.networks.image_backbone import image_backbone, load_imagenet_weights
from lightning_robot.networks.noise import seeded_integers
from lightning_robot.networks.observation_encoder import IMAGE_STATISTICS, ImageEncoder
from lightning_robot.networks.point_encoder import PointNet
from lightning_robot.networks.unet import ConditionalUnet
from lightning_robot.policies.action_diffusion import CLOUD, STATE, ActionDiffusion, check_unet
from lightning_robot.policies.base import check_at_least_one, check_dropout, check_optimizer

ENVIRONMENT_STATE = "observation.environment_state"


class DiffusionPolicy(ActionDiffusion):
    """Diffusion Policy (arXiv 2303.04137) with its published settings for images.

    What each observation step shows becomes one vector: the state, keypoints of each camera's picture, the environment's state
    and a cloud, in this order. A U-Net or a transformer, conditioned on the vectors of all steps, predicts the noise in an
    action chunk; 100 steps of DDPM, or fewer of DDIM, make noise into a chunk. Its first action belongs to the oldest
    observation. The weights that act are averages of those trained (the run's ``ema``).

    LeRobot 0.6.1 has other defaults; a policy like its is this one with ``action_horizon: 64``, ``execution_horizon: 32``,
    ``pretrained: true``, ``backbone_norm: batch``, ``image_normalization: imagenet``, ``crop: null``,
    ``environment_normalization: identity``, ``optimizer: adam``, and ``trainer.gradient_clip_val: 10``.

    Args:
        network: ``unet`` or ``transformer``. Arguments that are None below take the values published for it.
        observations: keys to read. None reads the state and, of cameras, point cloud and environment state, the first that
            the data offer.
        observation_steps: T.
        action_horizon: H; U-Net 16 (a multiple of 2 to the number of its levels less one), transformer 10.
        execution_horizon: actions executed per chunk, at most H - T + 1.
        backbone: name of a ResNet of timm.
        backbone_width: share of its channels, where the ResNet's name ends in t.
        backbone_norm: ``group`` (group norm over 16 channels), ``batch`` or ``frozen_batch``.
        backbone_stages: of the ResNet's four; fewer are cheaper and see finer.
        pretrained: ImageNet's weights; not with ``group``.
        separate_encoders: one image encoder per camera; else all share one, and pictures must have one size.
        resize: height and width that pictures are brought to first.
        crop: what the backbone sees: a share of height and width (published for 96 pixels: 84), or height and width; None all.
        random_crop: crop anywhere in training, each picture elsewhere; acting crops the centre.
        keypoints: of the spatial softmax, per camera; None takes the mean of each feature map instead.
        image_normalization: ``range`` to -1 ... 1, ``imagenet`` or ``data``: by mean and deviation of either.
        encoder_size: features of a point cloud.
        use_colors: read XYZRGB clouds instead of XYZ (of a coloured cloud the first three channels are read).
        down_dims: U-Net: channels of its levels.
        kernel_size: U-Net: of its convolutions, odd.
        groups: U-Net: of its group norms; the last block's has 8.
        time_embedding: U-Net: size of the embedding of the diffusion step, even.
        film_scale: U-Net: scale and shift the features, or shift them alone.
        layers: transformer: of the decoder.
        heads: transformer: of the attention.
        width: transformer: of its tokens.
        condition_layers: transformer: attention layers on time step and observations; 0 is an MLP.
        attention_dropout: transformer.
        embedding_dropout: transformer.
        causal: transformer: attend to no later step.
        sampler: ``ddpm``, or ``ddim``, which needs fewer steps.
        diffusion_steps: of the noising process.
        denoising_steps: network calls per chunk; None for all `diffusion_steps`.
        prediction: the network predicts the noise (``epsilon``) or the clean chunk (``sample``).
        beta_schedule: of the noising process, by diffusers' name.
        beta_start: of the noising process, where the schedule has it.
        beta_end: likewise.
        clip_range: bound of the estimated clean chunk while denoising, in normalised units; None for none.
        mask_padding: leave steps beyond an episode's end out of the loss (published: they count).
        task_conditioning: condition on the instruction's sentence vector too (not in the published method).
        task_size: features of the task, where conditioned on it.
        state_normalization: ``limits``, ``mean_std``, ``quantiles`` or ``identity``.
        environment_normalization: the same, of the environment's state (LeRobot: ``identity``).
        cloud_normalization: the same, of clouds.
        action_normalization: the same; `clip_range` 1 wants ``limits`` or ``quantiles``.
        optimizer: ``adamw``, or ``adam``, which adds the decay to the gradient.
        learning_rate: after the warm-up.
        betas: U-Net (0.95, 0.999), transformer (0.9, 0.95).
        epsilon: of the optimizer.
        weight_decay: of all parameters; of the transformer's own see the next.
        transformer_weight_decay: of the transformer's matrices (its biases, norms and positions have none).
        warmup_steps: optimizer steps of linear warm-up before half a cosine to zero; U-Net 500, transformer 1000. Shortened,
            with a word, where it would take more than half of the run.
        transforms: between the data and the networks, in order (`lightning_robot.transforms.named`).
        postprocess: of executed actions, in order (`lightning_robot.transforms.postprocess`).
        features: what the data offers; None takes it from the data module.
        language: table of sentence vectors, where conditioned on the task; None takes it from the data module.
    """

    def __init__(
        self,
        network: Literal["unet", "transformer"] = "unet",
        observations: list[str] | None = None,
        observation_steps: int = 2,
        action_horizon: int | None = None,
        execution_horizon: int = 8,
        backbone: str = "resnet18",
        backbone_width: float = 1.0,
        backbone_norm: Literal["group", "batch", "frozen_batch"] = "group",
        backbone_stages: int = 4,
        pretrained: bool = False,
        separate_encoders: bool = True,
        resize: tuple[int, int] | None = None,
        crop: float | tuple[int, int] | None = 0.875,
        random_crop: bool = True,
        keypoints: int | None = 32,
        image_normalization: Literal["range", "imagenet", "data"] = "range",
        encoder_size: int = 64,
        use_colors: bool = False,
        down_dims: list[int] | None = None,
        kernel_size: int = 5,
        groups: int = 8,
        time_embedding: int = 128,
        film_scale: bool = True,
        layers: int = 8,
        heads: int = 4,
        width: int = 256,
        condition_layers: int = 0,
        attention_dropout: float = 0.3,
        embedding_dropout: float = 0.0,
        causal: bool = True,
        sampler: Literal["ddpm", "ddim"] = "ddpm",
        diffusion_steps: int = 100,
        denoising_steps: int | None = None,
        prediction: Prediction = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_range: float | None = 1.0,
        mask_padding: bool = False,
        task_conditioning: bool = False,
        task_size: int = 64,
        state_normalization: str = "limits",
        environment_normalization: str = "limits",
        cloud_normalization: str = "identity",
        action_normalization: str = "limits",
        optimizer: Literal["adamw", "adam"] = "adamw",
        learning_rate: float = 1e-4,
        betas: tuple[float, float] | None = None,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-6,
        transformer_weight_decay: float = 1e-3,
        warmup_steps: int | None = None,
        transforms: list[dict[str, Any]] | None = None,
        postprocess: list[dict[str, Any]] | None = None,
        features: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        unet = network == "unet"
        action_horizon = (16 if unet else 10) if action_horizon is None else action_horizon
        down_dims = [512, 1024, 2048] if down_dims is None else down_dims
        denoising_steps = diffusion_steps if denoising_steps is None else denoising_steps
        self.hparams.update(
            action_horizon=action_horizon,
            down_dims=list(down_dims),
            denoising_steps=denoising_steps,
            betas=list(betas or ((0.95, 0.999) if unet else (0.9, 0.95))),
            warmup_steps=(500 if unet else 1000) if warmup_steps is None else warmup_steps,
        )
        allowed = {
            "network": (network, ("unet", "transformer")),
            "sampler": (sampler, ("ddpm", "ddim")),
            "prediction": (prediction, ("epsilon", "sample")),
            "optimizer": (optimizer, ("adamw", "adam")),
            "image_normalization": (image_normalization, ("range", "imagenet", "data")),
        }
        for name, (chosen, values) in allowed.items():
            if chosen not in values:
                raise ValueError(f"{name}={chosen!r}; use {' or '.join(values)}.")
        check_at_least_one(
            diffusion_steps=diffusion_steps,
            denoising_steps=denoising_steps,
            keypoints=1 if keypoints is None else keypoints,
            encoder_size=encoder_size,
            task_size=task_size,
        )
        check_optimizer(self.hparams)
        if beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise ValueError(f"beta_schedule={beta_schedule!r}; use linear, scaled_linear or squaredcos_cap_v2.")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start={beta_start}, beta_end={beta_end}: shares of noise above 0 and below 1, rising.")
        if resize is not None and min(resize) < 1:
            raise ValueError(f"resize={tuple(resize)}: height and width are at least 1 pixel.")
        wrong = crop is not None and (not 0 < crop <= 1 if isinstance(crop, (int, float)) else min(crop) < 1)
        if wrong:
            raise ValueError(f"crop={crop}: a share of the picture above 0 and at most 1, or height and width, or null.")
        if denoising_steps > diffusion_steps:
            raise ValueError(f"denoising_steps={denoising_steps} must not exceed diffusion_steps={diffusion_steps}.")
        if pretrained and backbone_norm == "group":
            raise ValueError("pretrained: true needs the batch norm that the weights belong to: set backbone_norm: batch.")
        if clip_range is not None and clip_range <= 0:
            raise ValueError(f"clip_range={clip_range} must be positive, or null.")
        if unet:
            check_unet(down_dims, kernel_size, action_horizon, groups, time_embedding)
        else:
            check_at_least_one(layers=layers, heads=heads)
            if condition_layers < 0:
                raise ValueError(f"condition_layers={condition_layers} must not be negative.")
            check_dropout(attention_dropout=attention_dropout, embedding_dropout=embedding_dropout)
            if width < 4 or width % 2 or width % heads:
                raise ValueError(f"width={width} must be even, at least 4 and a multiple of heads={heads}.")
        self.set_horizons(observation_steps, action_horizon, execution_horizon)
        self.prediction, self.sampler, self.clip, self.mask_padding = prediction, sampler, clip_range, mask_padding
        self.uses_task = task_conditioning
        self.normalization = {}  # known with the features

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """State, cameras, environment state, cloud: the order of their features. Empty until the data have been seen."""
        if hasattr(self, "network_features"):
            return self.choose_keys(self.network_features)
        return tuple(self.hparams["observations"] or ())

    def choose_keys(self, offered: Features) -> tuple[str, ...]:
        chosen = self.hparams["observations"]
        if chosen is None:
            cameras = [key for key in offered.observations if is_picture(key)]
            kinds = [keys for keys in (cameras, [CLOUD], [ENVIRONMENT_STATE]) if {*keys} & {*offered.observations}]
            chosen = [key for key in (STATE, *(kinds[0] if kinds else ())) if key in offered.observations]
        cameras = [key for key in chosen if is_picture(key)]
        if unknown := {*chosen} - {STATE, *cameras, ENVIRONMENT_STATE, CLOUD}:
            raise ValueError(f"observations: Diffusion Policy has no encoder for {', '.join(sorted(unknown))}.")
        if not chosen:
            raise ValueError("Diffusion Policy finds nothing to observe: name keys in model.init_args.observations.")
        return tuple(key for key in (STATE, *cameras, ENVIRONMENT_STATE, CLOUD) if key in chosen)

    @property
    def cameras(self) -> list[str]:
        """Keys of the pictures; `image_encoders` has one for each in this order, or one for all."""
        return [key for key in self.observation_keys if is_picture(key)]

    @property
    def denoiser(self) -> ConditionalUnet | DiffusionTransformer:
        return self.unet if self.hparams["network"] == "unet" else self.transformer

    def build(self) -> None:
        options, offered = self.hparams, self.network_features.observations
        keys, action_size = self.observation_keys, self.network_features.action.shape[-1]
        modes = {STATE: "state", ENVIRONMENT_STATE: "environment", CLOUD: "cloud", "action": "action"}
        self.normalization = {key: options[f"{modes[key]}_normalization"] for key in (*keys, "action") if key in modes}
        step_size = sum(offered[key].shape[-1] for key in (STATE, ENVIRONMENT_STATE) if key in keys)
        self.image_encoders = nn.ModuleList(self._image_encoders())
        step_size += sum(encoder.size for encoder in self.image_encoders)  # type: ignore[misc]
        if CLOUD in keys:
            self.cloud_encoder = PointNet(self._cloud_channels, options["encoder_size"])
            step_size += self.cloud_encoder.size
        task_size = self.build_task_encoder(options["task_size"])
        if options["network"] == "unet":
            self.unet = ConditionalUnet(
                action_size,
                self.observation_steps * step_size + task_size,
                down_dims=options["down_dims"],
                kernel_size=options["kernel_size"],
                groups=options["groups"],
                embedding_size=options["time_embedding"],
                num_timesteps=options["diffusion_steps"],
                scales=options["film_scale"],
            )
        else:
            self.transformer = DiffusionTransformer(
                action_size,
                self.action_horizon,
                self.observation_steps,
                step_size,
                task_size,
                layers=options["layers"],
                heads=options["heads"],
                width=options["width"],
                condition_layers=options["condition_layers"],
                attention_dropout=options["attention_dropout"],
                embedding_dropout=options["embedding_dropout"],
                causal=options["causal"],
                num_timesteps=options["diffusion_steps"],
            )
        self.build_schedule(
            options["diffusion_steps"],
            options["denoising_steps"],
            options["beta_schedule"],
            options["beta_start"],
            options["beta_end"],
        )

    def _image_encoders(self) -> list[ImageEncoder]:
        options = self.hparams
        sizes = [self.network_features.observations[key].shape[-2:] for key in self.cameras]
        groups = [[size] for size in sizes] if options["separate_encoders"] else [sizes] * bool(sizes)
        resize = None if options["resize"] is None else tuple(options["resize"])
        encoders = []
        for group in groups:
            backbone = image_backbone(
                options["backbone"],
                norm=options["backbone_norm"],
                last_stage=options["backbone_stages"],
                width=options["backbone_width"],
            )
            crop = _crop_size(options["crop"], resize or group[0])
            encoder = ImageEncoder(backbone, group, options["keypoints"], resize, crop)
            if (known := IMAGE_STATISTICS.get(options["image_normalization"])) is not None:
                encoder.set_statistics(*known)
            encoders.append(encoder)
        return encoders

    def fit_normalization(self, data: Any) -> None:
        super().fit_normalization(data)
        if self.hparams["pretrained"]:  # once: a checkpoint has its own weights
            loaded = [load_imagenet_weights(encoder.backbone) for encoder in self.image_encoders]
            self.hparams["pretrained"] = all(loaded)
        if self.hparams["image_normalization"] == "data" and self.cameras:
            sources = [self.transforms.sources((key,))[0] for key in self.cameras]
            found = data.statistics(tuple(sources))
            for camera, key in enumerate(sources):
                shared = not self.hparams["separate_encoders"]
                encoder: Any = self.image_encoders[0 if shared else camera]
                # A camera that shows one colour would be divided by next to nothing: a hundredth of white at least.
                encoder.set_statistics(found[key].mean, found[key].std.clip(min=0.01), camera if shared else 0)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws noise and diffusion step as its base does, and where each picture of a training batch is cropped."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if "action" not in batch or "crop_offsets" in batch or not (self.training and self.hparams["random_crop"]):
            return batch
        bounds = [bound for encoder in self.image_encoders for bound in encoder.offset_bounds()]  # type: ignore[operator]
        if all(bound == (1, 1) for bound in bounds):
            return batch
        seeds, steps = self.window_seeds(batch), self.observation_steps
        drawn = [
            seeded_integers(seeds, 0, 2 + number, bound)  # draws 0 and 1 are noise and diffusion step
            for number, bound in enumerate([bound for _ in range(steps) for pair in bounds for bound in pair])
        ]
        return {**batch, "crop_offsets": torch.stack(drawn, 1).view(-1, steps, len(bounds), 2)}

    def observed(self, observation: dict[str, Any]) -> list[Tensor]:
        def normal(key: str, value: Tensor) -> Tensor:
            return self.normalizer.normalize(key, value).flatten(0, 1)

        keys, features = self.observation_keys, []
        if STATE in keys:
            features.append(normal(STATE, observation[STATE]))
        images = [observation[key].flatten(0, 1) for key in self.cameras]
        offsets = observation["crop_offsets"].flatten(0, 1).to(self.device) if "crop_offsets" in observation else None
        if len(self.image_encoders) == len(images):
            for camera, (encoder, image) in enumerate(zip(self.image_encoders, images)):
                features.append(encoder(image, offsets=None if offsets is None else offsets[:, camera : camera + 1]))
        else:
            features.append(self.image_encoders[0](*images, offsets=offsets))
        if ENVIRONMENT_STATE in keys:
            features.append(normal(ENVIRONMENT_STATE, observation[ENVIRONMENT_STATE]))
        if CLOUD in keys:
            features.append(self.cloud_encoder(normal(CLOUD, observation[CLOUD][..., : self._cloud_channels])))
        return features

    def optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.hparams["optimizer"] == "adamw" else torch.optim.Adam
        if self.hparams["network"] == "unet":
            return self.fused_optimizer(kind, [{"params": list(self.parameters())}])
        bare = {id(parameter) for parameter in self.transformer.undecayed()}
        own = {id(parameter) for parameter in self.transformer.parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.transformer.parameters() if id(p) not in bare]},
            {"params": [p for p in self.transformer.parameters() if id(p) in bare], "weight_decay": 0.0},
            {"params": [p for p in self.parameters() if id(p) not in own]},
        ]
        groups[0]["weight_decay"] = self.hparams["transformer_weight_decay"]
        return self.fused_optimizer(kind, [group for group in groups if group["params"]])


def is_picture(key: str) -> bool:
    """Whether an observation's key is that of a camera; some data with one camera call it ``observation.image``."""
    return key.startswith("observation.images.") or key == "observation.image"


def _crop_size(crop: float | Sequence[int] | None, size: Sequence[int]) -> tuple[int, int] | None:
    """(height, width) of a crop, given as such or as a share, of pictures of `size`."""
    if crop is None:
        return None
    if isinstance(crop, (int, float)):
        return max(1, int(size[0] * crop)), max(1, int(size[1] * crop))
    return int(crop[0]), int(crop[1])
