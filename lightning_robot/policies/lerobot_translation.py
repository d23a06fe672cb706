"""How LeRobot's ACT and Diffusion Policy are called and named here: settings, tensors, and what cannot be said in both."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_robot.networks.observation_encoder import keypoint_grid
from lightning_robot.policies.act import ACT
from lightning_robot.policies.base import ImitationPolicy
from lightning_robot.policies.diffusion_policy import DiffusionPolicy
from lightning_robot.policies.lerobot_normalizers import LeRobotCheckpointError

STATE, ENVIRONMENT_STATE, IMAGES = "observation.state", "observation.environment_state", "observation.images."
REQUIRED = object()
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # the same in timm and torchvision


class Translation(ABC):
    """One policy in both languages.

    Attributes:
        kind: LeRobot's name of the policy.
        policy_class: ours.
        fields: LeRobot's setting → our constructor's argument, where the values are the same.
        others: LeRobot's further settings and what they are where they are missing: the value that leaves the function as it
            was before the setting existed, or `REQUIRED`.
    """

    kind: str
    policy_class: type[ImitationPolicy]
    fields: ClassVar[dict[str, str]]
    others: ClassVar[dict[str, Any]]

    @abstractmethod
    def arguments(self, config: dict[str, Any], keys: list[str], modes: dict[str, str]) -> dict[str, Any]:
        """Constructor arguments besides those in `fields`.

        Args:
            config: LeRobot's settings, complete.
            keys: our names of the observations that are read, in LeRobot's order.
            modes: our modes of normalisation of these and of ``action``.
        """

    @abstractmethod
    def cameras(self, policy: Any) -> list[str]:
        """Our keys of the pictures that a policy reads, in its order."""

    @abstractmethod
    def image_statistics(self, policy: Any, camera: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation (3,) of a camera in the policy's own memory; cameras are numbered as in `cameras`."""

    @abstractmethod
    def config(self, policy: Any) -> dict[str, Any]:
        """LeRobot's settings for a policy, besides those in `fields`.

        Raises:
            LeRobotCheckpointError: LeRobot cannot express the policy; says what.
        """

    @abstractmethod
    def tensor_name(self, name: str, policy: Any) -> str:
        """LeRobot's name of a tensor of our network."""

    @abstractmethod
    def derived(self, policy: Any) -> dict[str, Tensor]:
        """Tensors that LeRobot stores though they follow from the settings."""


class ACTTranslation(Translation):
    """LeRobot's ``act``."""

    kind = "act"
    policy_class = ACT
    fields: ClassVar[dict[str, str]] = {
        "chunk_size": "action_horizon",
        "n_action_steps": "execution_horizon",
        "replace_final_stride_with_dilation": "dilate_backbone",
        "pre_norm": "pre_norm",
        "dim_model": "hidden_size",
        "n_heads": "heads",
        "dim_feedforward": "feedforward_size",
        "feedforward_activation": "activation",
        "n_encoder_layers": "encoder_layers",
        "n_decoder_layers": "decoder_layers",
        "use_vae": "use_vae",
        "latent_dim": "latent_size",
        "n_vae_encoder_layers": "posterior_layers",
        "dropout": "dropout",
        "kl_weight": "kl_weight",
        "optimizer_lr": "learning_rate",
        "optimizer_weight_decay": "weight_decay",
        "optimizer_lr_backbone": "backbone_learning_rate",
    }
    others: ClassVar[dict[str, Any]] = {
        "vision_backbone": REQUIRED,
        "pretrained_backbone_weights": None,  # only where the weights once began
        "temporal_ensemble_coeff": None,
    }

    def arguments(self, config: dict[str, Any], keys: list[str], modes: dict[str, str]) -> dict[str, Any]:
        if config["feedforward_activation"] not in ("relu", "gelu"):
            raise LeRobotCheckpointError(
                f"feedforward_activation={config['feedforward_activation']!r} halves what LeRobot's next layer expects whole: "
                "no such policy can run."
            )
        if config["n_obs_steps"] != 1:
            raise LeRobotCheckpointError(f"n_obs_steps={config['n_obs_steps']}: ACT reads one observation, in LeRobot too.")
        coefficient = config["temporal_ensemble_coeff"]
        direction = "oldest" if coefficient is None or coefficient >= 0 else "newest"
        return {
            "cameras": [key.removeprefix(IMAGES) for key in keys if key.startswith(IMAGES)],
            "use_state": STATE in keys,
            "use_environment_state": ENVIRONMENT_STATE in keys,
            "backbone": config["vision_backbone"],
            "backbone_norm": "frozen_batch",
            "pretrained": False,  # the checkpoint has the weights
            "dilate_backbone": bool(config["replace_final_stride_with_dilation"]),
            "ensembling": None if coefficient is None else {"coefficient": abs(coefficient), "direction": direction},
            "image_normalization": "data",
            "state_normalization": modes.get(STATE, "identity"),
            "environment_normalization": modes.get(ENVIRONMENT_STATE, "identity"),
            "action_normalization": modes["action"],
        }

    def cameras(self, policy: ACT) -> list[str]:
        return policy.image_keys

    def image_statistics(self, policy: ACT, camera: int) -> tuple[Tensor, Tensor]:
        cameras: Any = policy.network.cameras
        return cameras.image_mean[camera], cameras.image_std[camera]

    def config(self, policy: ACT) -> dict[str, Any]:
        options, keys = policy.hparams, policy.observation_keys
        pictures = bool(policy.image_keys)
        dilates = pictures and options["dilate_backbone"]
        name = torchvision_name(options["backbone"]) if pictures else "resnet18"
        refuse(
            {
                "observations without a camera and without observation.environment_state": keys == (STATE,),
                "use_depth": bool(options["use_depth"]),
                f"backbone_stages: {options['backbone_stages']}": pictures and options["backbone_stages"] != 4,
                f"backbone_norm: {options['backbone_norm']}": pictures and options["backbone_norm"] != "frozen_batch",
                f"dilate_backbone with {name}": dilates and name in ("resnet18", "resnet34"),
            }
        )
        ensembling, coefficient = policy.ensembling, None
        if ensembling is not None:
            sign = -1 if ensembling.get("direction", "oldest") == "newest" else 1
            coefficient = sign * ensembling.get("coefficient", 0.01)
        lr = options["backbone_learning_rate"]
        return {
            "n_obs_steps": 1,
            "n_action_steps": policy.execution_horizon if ensembling is None else 1,
            "vision_backbone": name,
            "pretrained_backbone_weights": None,
            "temporal_ensemble_coeff": coefficient,
            "optimizer_lr_backbone": options["learning_rate"] if lr is None else lr,
        }

    def tensor_name(self, name: str, policy: ACT) -> str:
        for ours, theirs in _ACT_NAMES.items():
            if name.startswith(ours):
                return f"model.{theirs}{name.removeprefix(ours)}"
        return f"model.{name.removeprefix('network.')}"

    def derived(self, policy: ACT) -> dict[str, Tensor]:
        posterior = policy.network.posterior
        return {} if posterior is None else {"model.vae_encoder_pos_enc": posterior.positions.cpu()[None].clone()}


_ACT_NAMES = {
    "network.posterior.encoder.": "vae_encoder.",
    "network.posterior.token": "vae_encoder_cls_embed.weight",
    "network.posterior.state.": "vae_encoder_robot_state_input_proj.",
    "network.posterior.action.": "vae_encoder_action_input_proj.",
    "network.posterior.distribution.": "vae_encoder_latent_output_proj.",
    "network.cameras.backbone.": "backbone.",
    "network.cameras.projection.": "encoder_img_feat_input_proj.",
    "network.latent.": "encoder_latent_input_proj.",
    "network.state.": "encoder_robot_state_input_proj.",
    "network.environment.": "encoder_env_state_input_proj.",
    "network.positions": "encoder_1d_feature_pos_embed.weight",
    "network.queries": "decoder_pos_embed.weight",
    "network.action.": "action_head.",
}


class DiffusionTranslation(Translation):
    """LeRobot's ``diffusion``: the convolutional network with cameras, state and environment state."""

    kind = "diffusion"
    policy_class = DiffusionPolicy
    fields: ClassVar[dict[str, str]] = {
        "n_obs_steps": "observation_steps",
        "horizon": "action_horizon",
        "n_action_steps": "execution_horizon",
        "crop_is_random": "random_crop",
        "spatial_softmax_num_keypoints": "keypoints",
        "use_separate_rgb_encoder_per_camera": "separate_encoders",
        "down_dims": "down_dims",
        "kernel_size": "kernel_size",
        "n_groups": "groups",
        "diffusion_step_embed_dim": "time_embedding",
        "use_film_scale_modulation": "film_scale",
        "num_train_timesteps": "diffusion_steps",
        "beta_schedule": "beta_schedule",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "prediction_type": "prediction",
        "do_mask_loss_for_padding": "mask_padding",
        "optimizer_lr": "learning_rate",
        "optimizer_betas": "betas",
        "optimizer_eps": "epsilon",
        "optimizer_weight_decay": "weight_decay",
        "scheduler_warmup_steps": "warmup_steps",
    }
    others: ClassVar[dict[str, Any]] = {
        "vision_backbone": REQUIRED,
        "drop_n_last_frames": None,  # of the data; here it follows from the horizons
        "resize_shape": None,
        "crop_ratio": 1.0,
        "crop_shape": REQUIRED,
        "pretrained_backbone_weights": None,  # only where the weights once began
        "use_group_norm": REQUIRED,
        "gradient_checkpointing": False,
        "noise_scheduler_type": REQUIRED,
        "clip_sample": REQUIRED,
        "clip_sample_range": REQUIRED,
        "num_inference_steps": REQUIRED,
        "compile_model": False,
        "compile_mode": None,
        "scheduler_name": None,
    }

    def arguments(self, config: dict[str, Any], keys: list[str], modes: dict[str, str]) -> dict[str, Any]:
        resize, crop = config["resize_shape"], config["crop_shape"]
        if resize is not None:  # then the ratio alone decides
            ratio = config["crop_ratio"]
            crop = [int(size * ratio) for size in resize] if ratio < 1 else None
        return {
            "network": "unet",
            "backbone": config["vision_backbone"],
            "backbone_norm": "group" if config["use_group_norm"] else "batch",
            "resize": None if resize is None else tuple(resize),
            "crop": None if crop is None else tuple(crop),
            "sampler": config["noise_scheduler_type"].lower(),
            "denoising_steps": config["num_inference_steps"],
            "clip_range": config["clip_sample_range"] if config["clip_sample"] else None,
            "optimizer": "adam",
            "observations": sorted(keys, key=lambda key: (key != STATE, key == ENVIRONMENT_STATE)),
            "image_normalization": "data",
            "state_normalization": modes.get(STATE, "identity"),
            "environment_normalization": modes.get(ENVIRONMENT_STATE, "identity"),
            "action_normalization": modes["action"],
        }

    def cameras(self, policy: DiffusionPolicy) -> list[str]:
        return policy.cameras

    def image_statistics(self, policy: DiffusionPolicy, camera: int) -> tuple[Tensor, Tensor]:
        shared = not policy.hparams["separate_encoders"]
        encoder: Any = policy.image_encoders[0 if shared else camera]
        row = camera if shared else 0
        return encoder.image_mean[row], encoder.image_std[row]

    def config(self, policy: DiffusionPolicy) -> dict[str, Any]:
        options, keys = policy.hparams, policy.observation_keys
        refuse(
            {
                "network: transformer": options["network"] != "unet",
                "point clouds": "observation.point_cloud" in keys,
                "task_conditioning": options["task_conditioning"],
                "keypoints: null (the mean of feature maps)": bool(policy.cameras) and options["keypoints"] is None,
                f"backbone_stages: {options['backbone_stages']}": bool(policy.cameras) and options["backbone_stages"] != 4,
                "backbone_norm: frozen_batch": bool(policy.cameras) and options["backbone_norm"] == "frozen_batch",
                "observations without observation.state": STATE not in keys,
                "observations without a camera and without observation.environment_state": keys == (STATE,),
                f"action_horizon: {policy.action_horizon}, no multiple of 2 to the number of levels": (
                    policy.action_horizon % 2 ** len(options["down_dims"]) != 0
                ),
            }
        )
        sizes = {policy.network_features.observations[key].shape for key in policy.cameras}
        if len(sizes) > 1:
            refuse({f"cameras of different sizes {sorted(sizes)}": True})
        resize, crop, ratio = options["resize"], None, 1.0
        if policy.cameras:
            encoder: Any = policy.image_encoders[0]
            crop = None if encoder.crop in (None, encoder.sizes[0]) else list(encoder.crop)
            if resize is not None and crop is not None:
                ratio = _ratio(resize, crop)
        return {
            "vision_backbone": torchvision_name(options["backbone"]) if policy.cameras else "resnet18",
            "drop_n_last_frames": policy.action_horizon - policy.execution_horizon - policy.observation_steps + 1,
            "resize_shape": None if resize is None else list(resize),
            "crop_ratio": ratio,
            "crop_shape": crop,
            "pretrained_backbone_weights": None,
            "use_group_norm": options["backbone_norm"] == "group",
            "noise_scheduler_type": options["sampler"].upper(),
            "clip_sample": options["clip_range"] is not None,
            "clip_sample_range": 1.0 if options["clip_range"] is None else options["clip_range"],
            "num_inference_steps": options["denoising_steps"],
            "compile_model": False,
            "compile_mode": "reduce-overhead",
            "scheduler_name": "cosine",
        }

    def tensor_name(self, name: str, policy: DiffusionPolicy) -> str:
        for pattern, replacement in _DIFFUSION_NAMES:
            name = re.sub(pattern, replacement, name)
        if not policy.hparams["separate_encoders"]:
            name = name.replace("rgb_encoder.0.", "rgb_encoder.")
        return f"diffusion.{name}"

    @torch.no_grad()
    def derived(self, policy: DiffusionPolicy) -> dict[str, Tensor]:
        grids: dict[str, Tensor] = {}
        for number in range(len(policy.image_encoders)):
            encoder: Any = policy.image_encoders[number]
            height, width = encoder.crop or encoder.sizes[0]
            training = encoder.training
            features = encoder.eval().backbone(torch.zeros(1, 3, height, width, device=policy.device))
            encoder.train(training)
            name = f"image_encoders.{number}.pool.pos_grid"
            grids[self.tensor_name(name, policy)] = keypoint_grid(*features.shape[2:])
        return grids


# Applied in this order to our names.
_DIFFUSION_NAMES = (
    (r"^image_encoders\.", "rgb_encoder."),
    (r"\.backbone\.conv1\.", ".backbone.0."),
    (r"\.backbone\.bn1\.", ".backbone.1."),
    (r"\.backbone\.layer1\.", ".backbone.4."),
    (r"\.backbone\.layer2\.", ".backbone.5."),
    (r"\.backbone\.layer3\.", ".backbone.6."),
    (r"\.backbone\.layer4\.", ".backbone.7."),
    (r"\.keypoint_maps\.", ".pool.nets."),
    (r"^(rgb_encoder\.\d+)\.output\.", r"\1.out."),
    (r"^unet\.time_encoder\.0\.", "unet.diffusion_step_encoder.1."),
    (r"^unet\.time_encoder\.2\.", "unet.diffusion_step_encoder.3."),
    (r"^unet\.(down|up)\.(\d+)\.resample\.", r"unet.\1_modules.\2.2."),
    (r"^unet\.(down|up)\.(\d+)\.blocks\.", r"unet.\1_modules.\2."),
    (r"^unet\.middle\.", "unet.mid_modules."),
    (r"^unet\.final\.convolution\.", "unet.final_conv.0.block.0."),
    (r"^unet\.final\.norm\.", "unet.final_conv.0.block.1."),
    (r"^unet\.output\.", "unet.final_conv.1."),
    (r"\.first\.convolution\.", ".conv1.block.0."),
    (r"\.first\.norm\.", ".conv1.block.1."),
    (r"\.second\.convolution\.", ".conv2.block.0."),
    (r"\.second\.norm\.", ".conv2.block.1."),
    (r"\.film\.", ".cond_encoder.1."),
    (r"\.shortcut\.", ".residual_conv."),
)


def refuse(reasons: dict[str, Any]) -> None:
    """Raises LeRobotCheckpointError for the reasons whose value is true."""
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise LeRobotCheckpointError(
            f"LeRobot has no counterpart of {'; '.join(found)}: the policy cannot be written as its checkpoint."
        )


def torchvision_name(backbone: str) -> str:
    """The name without its tag of weights, if torchvision, LeRobot's source of backbones, has it."""
    name = backbone.partition(".")[0]
    refuse({f"backbone: {name} (it has {', '.join(RESNETS)})": name not in RESNETS})
    return name


def _ratio(resize: Any, crop: list[int]) -> float:
    """The share from which LeRobot computes `crop`: the integer part of the share of `resize`."""
    low = max(size / whole for size, whole in zip(crop, resize))
    high = min((size + 1) / whole for size, whole in zip(crop, resize))
    for ratio in (low, (low + high) / 2):
        if ratio < 1 and [int(whole * ratio) for whole in resize] == crop:
            return ratio
    refuse({f"a crop of {crop} after resize: {list(resize)} (it crops one share of height and width)": True})
    raise AssertionError


TRANSLATIONS: dict[Any, Translation] = {each.kind: each for each in (ACTTranslation(), DiffusionTranslation())}
