"""ACT: action chunking with transformers (Zhao et al. 2023, arXiv 2304.13705)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lightning_robot.features import Features
from lightning_robot.networks.act_network import Activation, ACTNetwork, CameraTokens
from lightning_robot.networks.image_backbone import Norm, image_backbone, load_imagenet_weights
from lightning_robot.networks.noise import seeded_normal
from lightning_robot.networks.observation_encoder import IMAGE_STATISTICS
from lightning_robot.policies.action_diffusion import warmup_cosine, warmup_of_run
from lightning_robot.policies.base import ImitationPolicy, Window, check_at_least_one, check_dropout, check_optimizer

STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
IMAGES, DEPTH = "observation.images.", "observation.depth."


class ACT(ImitationPolicy):
    """A transformer that predicts a chunk of actions from one observation, trained as a conditional autoencoder.

    In training a second transformer sees state and actions, and encodes the style of the demonstration in a latent vector; the
    loss is the L1 distance of the actions plus the weighted KL divergence of the latent from a standard normal. Acting, and
    validation, take the latent at zero. Defaults are the published ones (with one decoder layer: the original builds seven and
    returns the first one's output).

    Names of LeRobot's checkpoints, ``model.`` there and ``network.`` here: ``vae_encoder`` → ``posterior.encoder``,
    ``vae_encoder_cls_embed.weight`` → ``posterior.token``, ``vae_encoder_{robot_state_input,action_input,latent_output}_proj``
    → ``posterior.{state,action,distribution}``, ``backbone`` → ``cameras.backbone``, ``encoder_img_feat_input_proj`` →
    ``cameras.projection``, ``encoder_{latent,robot_state,env_state}_input_proj`` → ``latent``, ``state``, ``environment``,
    ``encoder_1d_feature_pos_embed.weight`` → ``positions``, ``decoder_pos_embed.weight`` → ``queries``, ``action_head`` →
    ``action``; the rest are equal. ``vae_encoder_pos_enc`` is the buffer ``posterior.positions[None]``, which we do not save.

    Args:
        action_horizon: K, actions of a chunk.
        execution_horizon: actions executed per chunk, at most K; None for all.
        cameras: names of the cameras in the order of their tokens; None takes all that the data offer, in the data's order;
            [] reads no pictures.
        use_state: read ``observation.state``.
        use_environment_state: read ``observation.environment_state`` (privileged).
        use_depth: read ``observation.depth.<camera>`` of every camera as a fourth channel of its picture.
        depth_range: metres of depth that become 0 and 1; depth beyond them is clipped.
        backbone: a ResNet of timm (`lightning_robot.networks.image_backbone`), shared by the cameras.
        backbone_norm: ``frozen_batch`` (published, with ImageNet weights), ``batch`` or ``group`` (from scratch).
        backbone_stages: 1 to 4, how many groups of blocks of the ResNet; fewer give more tokens.
        backbone_width: share of the published channels, for small backbones (`image_backbone`).
        pretrained: begin with ImageNet weights where they can be had; a sentence says where not.
        dilate_backbone: dilation instead of stride in the last stage (LeRobot's ``replace_final_stride_with_dilation``).
        pre_norm: norms before the parts of a transformer layer instead of after them.
        hidden_size: D, of tokens.
        heads: of attention.
        feedforward_size: width of the feed-forward networks.
        activation: ``relu`` or ``gelu``.
        encoder_layers: of the transformer.
        decoder_layers: of the transformer.
        use_vae: train as a conditional autoencoder; without, the latent is always zero.
        latent_size: L, of the latent.
        posterior_layers: of the transformer that encodes state and actions.
        dropout: of the transformers.
        kl_weight: of the divergence.
        reduction: of the L1 distance: ``valid`` is its mean over the actions within the episode, ``all`` divides the same sum
            by the number of all actions (the original's, and LeRobot's before 0.6).
        image_normalization: ``imagenet``, ``data`` (mean and deviation per camera and channel) or ``range`` (-1 to 1).
        state_normalization: ``mean_std``, ``limits``, ``quantiles`` or ``identity``.
        environment_normalization: the same.
        action_normalization: the same.
        ensembling: ``coefficient`` and ``direction`` (``oldest`` or ``newest``) of temporal ensembling when acting; None
            executes chunks.
        learning_rate: of AdamW.
        backbone_learning_rate: of the backbone; None for the same.
        betas: of AdamW.
        epsilon: of AdamW.
        weight_decay: of AdamW, on all parameters.
        warmup_steps: optimizer steps of linear warm-up. Shortened, with a word, where it would take more than half of the run.
        decay: ``none`` keeps the learning rate, as published; ``cosine`` lets it fall to zero over the run.
        transforms: between the data and the networks, in order (`lightning_robot.transforms.named`).
        postprocess: of executed actions, in order (`lightning_robot.transforms.postprocess`).
        features: what the data offers; None takes it from the data module.
        language: not used.
    """

    def __init__(
        self,
        action_horizon: int = 100,
        execution_horizon: int | None = None,
        cameras: list[str] | None = None,
        use_state: bool = True,
        use_environment_state: bool = False,
        use_depth: bool = False,
        depth_range: tuple[float, float] = (0.1, 2.0),
        backbone: str = "resnet18",
        backbone_norm: Norm = "frozen_batch",
        backbone_stages: int = 4,
        backbone_width: float = 1.0,
        pretrained: bool = True,
        dilate_backbone: bool = False,
        pre_norm: bool = False,
        hidden_size: int = 512,
        heads: int = 8,
        feedforward_size: int = 3200,
        activation: Activation = "relu",
        encoder_layers: int = 4,
        decoder_layers: int = 1,
        use_vae: bool = True,
        latent_size: int = 32,
        posterior_layers: int = 4,
        dropout: float = 0.1,
        kl_weight: float = 10.0,
        reduction: Literal["valid", "all"] = "valid",
        image_normalization: Literal["imagenet", "data", "range"] = "imagenet",
        state_normalization: str = "mean_std",
        environment_normalization: str = "mean_std",
        action_normalization: str = "mean_std",
        ensembling: dict[str, Any] | None = None,
        learning_rate: float = 1e-5,
        backbone_learning_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine"] = "none",
        transforms: list[dict[str, Any]] | None = None,
        postprocess: list[dict[str, Any]] | None = None,
        features: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_at_least_one(
            action_horizon=action_horizon,
            heads=heads,
            hidden_size=hidden_size,
            feedforward_size=feedforward_size,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            latent_size=latent_size,
            posterior_layers=posterior_layers if use_vae else 1,
        )
        check_dropout(dropout=dropout)
        check_optimizer(self.hparams)
        execution_horizon = action_horizon if execution_horizon is None else execution_horizon
        if not 1 <= execution_horizon <= action_horizon:
            raise ValueError(f"execution_horizon={execution_horizon} must lie between 1 and action_horizon={action_horizon}.")
        for name, value, choices in (
            ("reduction", reduction, ("valid", "all")),
            ("image_normalization", image_normalization, (*IMAGE_STATISTICS, "data")),
            ("decay", decay, ("none", "cosine")),
        ):
            if value not in choices:
                raise ValueError(f"Unknown {name} {value!r}; use {', '.join(choices)}.")
        if hidden_size % heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of heads={heads}.")
        if kl_weight < 0:
            raise ValueError(f"kl_weight={kl_weight} must not be negative.")
        if cameras is not None and len(set(cameras)) < len(cameras):
            raise ValueError(f"cameras={cameras}: each is named once.")
        if pretrained and backbone_norm == "group":
            raise ValueError("ImageNet weights belong to batch norm: set pretrained: false with backbone_norm: group.")
        if ensembling is not None and (
            not set(ensembling) <= {"coefficient", "direction"}
            or ensembling.get("direction", "oldest") not in ("oldest", "newest")
            or not isinstance(ensembling.get("coefficient", 0.01), (int, float))
        ):
            raise ValueError(f"ensembling={ensembling}: give a coefficient, and the direction oldest or newest.")
        if not depth_range[0] < depth_range[1]:
            raise ValueError(f"depth_range={depth_range} must be two distances in metres, near and far.")
        self.observation_steps = 1
        self.action_horizon, self.execution_horizon = action_horizon, execution_horizon
        self.ensembling = ensembling
        self.normalization = {"action": action_normalization}
        if use_state:
            self.normalization[STATE] = state_normalization
        if use_environment_state:
            self.normalization[ENVIRONMENT] = environment_normalization

    network: ACTNetwork

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """Before the data are known: what is read of any data."""
        if hasattr(self, "network_features"):
            return tuple(self.network_features.observations)
        cameras = self.hparams["cameras"] or []
        return tuple(self._keys(cameras))

    def choose_keys(self, offered: Features) -> tuple[str, ...]:
        cameras = self.hparams["cameras"]
        if cameras is None:
            cameras = [key.removeprefix(IMAGES) for key in offered.observations if key.startswith(IMAGES)]
        keys = tuple(self._keys(cameras))
        if not keys:
            raise KeyError(
                f"ACT would read nothing: the data offer {', '.join(offered.observations)}. Set use_state or "
                "use_environment_state, or name cameras."
            )
        return keys

    def _keys(self, cameras: list[str]) -> list[str]:
        keys = [key for key in (STATE, ENVIRONMENT) if key in self.normalization]
        keys += [IMAGES + camera for camera in cameras]
        return keys + [DEPTH + camera for camera in cameras if self.hparams["use_depth"]]

    @property
    def window(self) -> Window:
        """Every frame of an episode begins a window, whose last actions may lie beyond the end."""
        return replace(super().window, pad_after=self.action_horizon - 1)

    @property
    def compilable(self) -> list[nn.Module]:
        return [part for part in (self.network.posterior, self.network) if part is not None]

    def build(self) -> None:
        options, features = self.hparams, self.network_features
        observations = features.observations
        self.image_keys = [key for key in observations if key.startswith(IMAGES)]
        self.depth_keys = [key for key in observations if key.startswith(DEPTH)]
        sizes = [(observations[key].shape[1], observations[key].shape[2]) for key in self.image_keys]
        for key, depth_key in zip(self.image_keys, self.depth_keys):
            if observations[depth_key].shape[1:] != observations[key].shape[1:]:
                raise ValueError(
                    f"{depth_key} has {observations[depth_key].shape[1:]} pixels, {key} {observations[key].shape[1:]}: depth "
                    "as a fourth channel needs the same (transforms: lightning_robot.transforms.named.Resize)."
                )
        cameras = None
        if self.image_keys:
            backbone = image_backbone(
                options["backbone"],
                norm=options["backbone_norm"],
                in_channels=4 if self.depth_keys else 3,
                last_stage=options["backbone_stages"],
                dilate_last=options["dilate_backbone"],
                width=options["backbone_width"],
            )
            cameras = CameraTokens(backbone, sizes, options["hidden_size"], tuple(options["depth_range"]))
        self.network = ACTNetwork(
            action_size=features.action.shape[-1],
            action_horizon=self.action_horizon,
            state_size=observations[STATE].shape[-1] if STATE in observations else None,
            environment_size=observations[ENVIRONMENT].shape[-1] if ENVIRONMENT in observations else None,
            cameras=cameras,
            latent_size=options["latent_size"],
            posterior_layers=options["posterior_layers"] if options["use_vae"] else 0,
            **{
                name: options[name] for name in ("hidden_size", "heads", "feedforward_size", "encoder_layers", "decoder_layers")
            },
            **{name: options[name] for name in ("dropout", "activation", "pre_norm")},
        )

    def fit_normalization(self, data: Any) -> None:
        super().fit_normalization(data)
        cameras = self.network.cameras
        if cameras is None:
            return
        if self.hparams["pretrained"]:  # once: a checkpoint has its own weights
            self.hparams["pretrained"] = load_imagenet_weights(cameras.backbone)
        if self.hparams["image_normalization"] == "data":
            sources = tuple(self.transforms.sources(self.image_keys)[: len(self.image_keys)])
            found = data.statistics(sources)
            # A camera that shows one colour would be divided by next to nothing: a hundredth of white at least.
            self.set_image_statistics([found[key].mean for key in sources], [found[key].std.clip(min=0.01) for key in sources])
        else:
            self.set_image_statistics(*IMAGE_STATISTICS[self.hparams["image_normalization"]])

    def set_image_statistics(self, mean: Any, deviation: Any) -> None:
        """Sets what pictures are normalised with: values in 0 to 1, (cameras, 3) each, or (3,) for all cameras."""
        cameras: Any = self.network.cameras
        for buffer, values in ((cameras.image_mean, mean), (cameras.image_std, deviation)):
            buffer.copy_(torch.as_tensor(np.asarray(values)))

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws each row's latent noise on the CPU, from the run's seed, the epoch and the row's window."""
        if not (self.training and self.hparams["use_vae"]) or "action" not in batch or "latent_noise" in batch:
            return batch
        noise = seeded_normal(self.window_seeds(batch), 0, 0, (self.hparams["latent_size"],))
        return {**batch, "latent_noise": noise}

    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.on_before_batch_transfer(batch, 0)
        noise = batch["latent_noise"].to(self.device) if self.training and self.hparams["use_vae"] else None
        actions = self.normalizer.normalize("action", batch["action"])
        divisors: dict[str, Any] = {key: batch[key] for key in ("mean_rows", "mean_steps") if key in batch}
        return self._loss(self.observed(batch), actions, batch["action_is_pad"], noise, divisors)

    def _loss(
        self,
        observed: dict[str, Any],
        actions: Tensor,
        is_pad: Tensor,
        noise: Tensor | None,
        divisors: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of normalised values.

        Args:
            observed: what `observed` returns.
            actions: (B, K, A).
            is_pad: (B, K) bool: steps outside the episode.
            noise: (B, L) standard normal; None takes the latent at zero and leaves out the divergence.
            divisors: the batch's ``mean_rows`` and ``mean_steps``, where it is a part of an optimizer step.

        Returns:
            The loss, and its parts ``l1`` and, with noise, ``kl``.
        """
        latent = divergence = None
        part = {"action_is_pad": is_pad, **(divisors or {})}
        if noise is not None:
            assert self.network.posterior is not None  # the noise is there with `use_vae` alone
            mean, log_variance = (half.to(actions.dtype) for half in self.network.posterior(observed["state"], actions, is_pad))
            latent = mean + (0.5 * log_variance).exp() * noise
            divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
            divergence = self.mean_over_rows(divergence, part)
        error = (actions - self.network(latent, **observed)).abs()
        if self.hparams["reduction"] == "all":
            l1 = self.mean_over_rows(error * ~is_pad.unsqueeze(2), part)
        else:
            l1 = self.mean_over_valid_steps(error, part)
        if divergence is None:
            return l1, {"l1": l1.detach()}
        return l1 + self.hparams["kl_weight"] * divergence, {"l1": l1.detach(), "kl": divergence.detach()}

    def observed(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The network's arguments of the newest observation: vectors normalised, pictures as they are."""
        vectors = {
            name: self.normalizer.normalize(key, observation[key][:, -1]) if key in self.normalization else None
            for name, key in (("state", STATE), ("environment", ENVIRONMENT))
        }
        images = [observation[key][:, -1] for key in self.image_keys]
        return {**vectors, "images": images, "depths": [observation[key][:, -1] for key in self.depth_keys]}

    @torch.no_grad()
    def _predict(
        self,
        observation: dict[str, Any],
        noise_seeds: Tensor | None,
        num_samples: int,
        guidance: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """The latent is zero, the mean of its prior; of several samples the further ones draw it."""
        if guidance is not None:
            raise ValueError("ACT does not sample its actions step by step: guidance has nothing to steer. Use guidance=None.")
        observed = self.observed(observation)
        chunks = [self.network(None, **observed)]
        if num_samples > 1:
            rows = len(chunks[0])
            seeds = torch.randint(2**62, (rows,)) if noise_seeds is None else noise_seeds
            for sample in range(1, num_samples):
                latent = seeded_normal(seeds, sample, 0, (self.hparams["latent_size"],)).to(self.device)
                chunks.append(self.network(latent, **observed))
        return self.normalizer.unnormalize("action", torch.stack(chunks, 1))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options, steps = self.hparams, self.trainer.estimated_stepping_batches
        warmup, falls = warmup_of_run(options["warmup_steps"], steps), options["decay"] == "cosine"
        if falls and math.isinf(steps):
            raise ValueError("decay: cosine falls to zero over the run: set trainer.max_epochs or trainer.max_steps.")
        rates = [options["learning_rate"], options["backbone_learning_rate"]]
        if rates[1] is None:
            rates[1] = rates[0]
        groups: list[dict[str, Any]] = [{"params": [], "lr": rate} for rate in rates]
        for name, parameter in self.named_parameters():
            groups[name.startswith("network.cameras.backbone.")]["params"].append(parameter)
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=tuple(options["betas"]),
            eps=options["epsilon"],
            weight_decay=options["weight_decay"],
            fused=getattr(self.trainer.precision_plugin, "scaler", None) is None,  # fp16's scaler forbids clipping with it
        )

        def factor(step: int) -> float:
            return warmup_cosine(step, warmup, int(steps)) if falls else min(1.0, (step + 1) / max(1, warmup))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
