"""What every policy is: the acting protocol, and the LightningModule that learns from demonstrations."""

from __future__ import annotations

import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_robot.console import say
from lightning_robot.features import Features, check_compatible
from lightning_robot.networks.noise import mix_seeds
from lightning_robot.transforms.named import Transforms
from lightning_robot.transforms.normalizer import Normalizer, fingerprint_of
from lightning_robot.transforms.postprocess import build_postprocess
from lightning_robot.transforms.statistics import Statistics
from lightning_robot.transforms.text import HashedTextEncoder

CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class Window:
    """The slice of an episode that a policy trains on.

    Attributes:
        observation_steps: T, the newest observation included.
        action_horizon: H, steps of the action chunk.
        action_offset: step of the chunk's first action relative to the newest observation: DP3's chunk starts at the
            window's first observation, ``-(T - 1)``; ACT's at the newest one, 0.
        keys: observation keys that the policy reads.
        pad_before: steps that a window may begin before its episode (the first frame is repeated).
        pad_after: steps that a window may end after its episode (the last frame is repeated).
    """

    observation_steps: int
    action_horizon: int
    action_offset: int
    keys: tuple[str, ...]
    pad_before: int
    pad_after: int


class Policy(ABC):
    """Maps a short history of observations to a chunk of actions; keeps no state between calls.

    History, chunk queue and resets belong to `lightning_robot.evaluation.controller.Controller`.

    Attributes:
        observation_steps: T, observations per query.
        action_horizon: H, actions that the network predicts.
        execution_horizon: actions executed before the next query, unless the controller is told otherwise.
        action_offset: see `Window`.
        ensembling: ``coefficient`` and ``direction`` of temporal ensembling, where the policy is meant to be ensembled.
        postprocess: steps that the controller applies to every action (`lightning_robot.transforms.postprocess`).
        features: what the policy was trained on; set once the networks are built.
        demonstrations: what its checkpoint records of the demonstrations (`lightning_robot.data.recorded_facts`) and, as
            ``statistics``, the fingerprint of the normaliser that was fitted to them. None or without a fact where it is not
            known, as in older checkpoints.
        averaged_weights: ``used``, ``left`` (the checkpoint has some, raw ones were asked for) or ``missing`` (it has none any
            more); None where training averaged none, or the policy does not come from a checkpoint.
    """

    observation_steps: int
    action_horizon: int
    execution_horizon: int
    action_offset: int = 0
    ensembling: dict[str, Any] | None = None
    features: Features
    demonstrations: dict[str, Any] | None = None
    averaged_weights: Literal["used", "left", "missing"] | None = None

    @property
    @abstractmethod
    def observation_keys(self) -> tuple[str, ...]:
        """Keys of the observation that the policy reads."""

    @property
    def postprocess(self) -> list[dict[str, Any]]:
        return []

    @property
    def window(self) -> Window:
        return Window(
            observation_steps=self.observation_steps,
            action_horizon=self.action_horizon,
            action_offset=self.action_offset,
            keys=self.observation_keys,
            pad_before=self.observation_steps - 1,
            pad_after=self.execution_horizon - 1,
        )

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        """Ids of the tasks that the policy was conditioned on in training; empty where it reads no task."""
        return ()

    @abstractmethod
    def predict_action_chunk(
        self,
        observation: dict[str, Any],
        *,
        noise_seeds: Tensor | None = None,
        num_samples: int = 1,
        guidance: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Predicts actions in physical units.

        Args:
            observation: batch keys with axes (B, T, ...), T = `observation_steps`; ``task`` is a list of B strings.
            noise_seeds: (B,) int64. The same seed and observation give the same row, whatever else is in the batch and
                whatever the device. None draws seeds from torch's global generator.
            num_samples: S, samples per row.
            guidance: cost on the predicted actions that steers sampling, for policies that support it.

        Returns:
            (B, S, H', A) float32 with H' = `action_horizon` + `action_offset`; element 0 acts on the newest observation.
        """


class ImitationPolicy(Policy, LightningModule):
    """A policy that learns from demonstrations: batch in, loss out; Lightning does the rest.

    A subclass sets the horizons, calls ``self.save_hyperparameters(logger=False)`` in its own ``__init__`` (with the arguments
    ``transforms``, ``postprocess``, ``features`` and ``language``, all None unless given), and implements `observation_keys`,
    `build`, `compute_loss` and `_predict`. These four know only what is there *after* the transforms. The networks are built
    in `configure_model`, when the features are known: from the data module at the first fit, from the hyper-parameters
    afterwards, so that a checkpoint alone is enough to act.

    Attributes:
        normalization: mode of the normaliser for each key: ``limits``, ``mean_std``, ``quantiles`` or ``identity``.
        uses_task: whether the policy reads ``task_embedding``.
        features: what data and environments offer, as far as the policy reads it.
        network_features: the same after the transforms: what the networks see.
        normalizer: physical units to the network's and back; float32 whatever the precision.
    """

    normalization: dict[str, str]
    uses_task: bool = False
    network_features: Features
    normalizer: Normalizer

    @abstractmethod
    def build(self) -> None:
        """Creates the networks; `self.network_features` is known."""

    @abstractmethod
    def compute_loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a transformed batch: a scalar, and its named parts (detached scalars, may be empty)."""

    @abstractmethod
    def _predict(
        self,
        observation: dict[str, Any],
        noise_seeds: Tensor | None,
        num_samples: int,
        guidance: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """`predict_action_chunk` between the transforms: of a transformed observation, before the inverse transforms."""

    def predict_action_chunk(
        self,
        observation: dict[str, Any],
        *,
        noise_seeds: Tensor | None = None,
        num_samples: int = 1,
        guidance: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        actions = self._predict(self.transforms.apply(observation), noise_seeds, num_samples, guidance)
        return self.transforms.invert(actions, observation)

    @cached_property
    def transforms(self) -> Transforms:
        return Transforms(self.hparams.get("transforms") or ())

    @property
    def postprocess(self) -> list[dict[str, Any]]:
        return self.hparams.get("postprocess") or []

    @property
    def window(self) -> Window:
        return replace(super().window, keys=self.transforms.sources(self.observation_keys))

    def choose_keys(self, offered: Features) -> tuple[str, ...]:
        """Which of the offered observation keys (after the transforms) the policy reads; `observation_keys` by itself."""
        return self.observation_keys

    def select_features(self, offered: Features) -> Features:
        """What the policy keeps of the data's features: the keys it reads.

        Raises:
            KeyError: something that it reads is not offered.
        """
        keys = self.transforms.sources(self.choose_keys(self.transforms.features(offered)))
        missing = [key for key in keys if key not in offered.observations]
        if missing:
            raise KeyError(
                f"{type(self).__name__} reads {', '.join(missing)}, which the data does not offer. It offers "
                f"{', '.join(offered.observations)}."
            )
        return replace(offered, observations={key: offered.observations[key] for key in keys})

    def select_statistics(self, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
        """What the policy keeps of the data's statistics, where `select_features` keeps a part of a feature."""
        return statistics

    @property
    def trained_tasks(self) -> tuple[str, ...]:
        return tuple((self.hparams.get("language") or {}).get("trained_tasks", ()))

    @property
    def compilable(self) -> list[torch.nn.Module]:
        """Networks that `torch.compile` may compile in place."""
        return []

    def configure_model(self) -> None:
        if hasattr(self, "normalizer"):
            return  # Lightning calls this again at validate, test and predict
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        fresh = self.hparams["features"] is None
        if fresh:
            if data is None or getattr(data, "features", None) is None:
                raise RuntimeError(
                    f"{type(self).__name__} does not know its features. Fit it with a data module that offers them, or load "
                    "a checkpoint with lightning_robot.policies.base.load_policy(path)."
                )
            self.hparams["features"] = self.select_features(data.features).to_dict()
            if self.uses_task:
                if data.language is None:
                    raise ValueError(
                        f"{type(self).__name__} is conditioned on the task, but the data names no task. Use language segments "
                        "(data.init_args.segments: true), or switch the conditioning off."
                    )
                self.hparams["language"] = data.language
        self.features = Features.from_dict(self.hparams["features"])
        if data is not None and not fresh:
            for note in check_compatible(self.features, data.features, tuple(self.features.observations)):
                say(note)
        self.network_features = self.transforms.features(self.features)
        build_postprocess(self.postprocess, self.features)  # refuses here what the controller would refuse after training
        self.build()
        if fresh:
            self.fit_normalization(data)
            facts: dict[str, Any] = getattr(data, "recorded_facts", dict)()
            self.demonstrations = {
                **facts,
                "statistics": self.normalizer.fingerprint,
                "execution_horizon": self.execution_horizon,
            }
        else:
            self.normalizer = Normalizer.from_features(self.network_features, self.normalization)

    def fit_normalization(self, data: Any) -> None:
        """Makes the normaliser from the data's statistics after the transforms; called once, when the networks are built.

        Args:
            data: the data module, with `statistics(keys)`.
        """
        needed = tuple(key for key, mode in self.normalization.items() if mode != "identity")
        if self.transforms.change_vectors:
            statistics = data.statistics(needed, self.transforms.apply)
        else:
            statistics = data.statistics(needed)
        names = {key: feature.names for key, feature in self.network_features.observations.items()}
        names["action"] = self.network_features.action.names
        self.normalizer = Normalizer(self.select_statistics(statistics), self.normalization, names)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._logged_loss(batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._logged_loss(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self._logged_loss(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.predict_action_chunk(batch, noise_seeds=self.window_seeds(batch))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            # Lightning refuses fused optimizers in every mixed precision, though without a scaler (bf16) nothing is scaled.
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _logged_loss(self, batch: dict[str, Any], stage: Literal["train", "val", "test"]) -> Tensor:
        loss, parts = self.compute_loss(self.transforms.apply(batch))
        values = {f"{stage}/loss": loss.detach()} | {f"{stage}/{name}": part for name, part in parts.items()}
        if stage == "train" and self.trainer.world_size > 1:
            # Not by sync_dist: it would make the host wait for the device in every step.
            shared = torch.stack(list(values.values())) / self.trainer.world_size
            torch.distributed.all_reduce(shared)
            values = dict(zip(values, shared))
        # Times the ranks: the mean over them, rows / ranks, stays a whole number. Lightning cuts off what is behind the point.
        rows = len(batch["action"]) * self.trainer.world_size
        self.log_dict(values, batch_size=rows, on_step=stage == "train", sync_dist=stage != "train")
        return loss

    def mean_over_rows(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean of `values` (B, ...), to be averaged over the ranks and batches of an optimizer step.

        Where the batch says of how many rows it is a part (``mean_rows``), the average is that of all rows, whether or not the
        batches have equally many.
        """
        return values.mean() * (len(values) / batch["mean_rows"]) if "mean_rows" in batch else values.mean()

    def mean_over_valid_steps(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean of `values` (B, H, A) over the steps within the episode, to be averaged as `mean_over_rows` is.

        Where the batch has ``mean_steps`` the average is that over all such steps of the optimizer step, however they are
        spread over ranks and batches.
        """
        valid = ~batch["action_is_pad"]
        total = (values * valid.unsqueeze(2)).sum()
        if batch.get("mean_steps") is not None:
            return total / (batch["mean_steps"] * values.shape[2] or 1.0)
        return total / (valid.sum() * values.shape[2]).clamp_min(1)

    def window_seeds(self, batch: dict[str, Any]) -> Tensor:
        """(B,) int64 seeds from the run's seed, the epoch and each row's window: nothing hangs on a generator's state.

        Outside training the epoch counts as 0, so that validation losses of different epochs compare.
        """
        epoch = self.trainer.current_epoch + 1 if self.training else 0
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        return mix_seeds(seed, epoch, batch["episode_index"], batch["segment_index"], batch["frame_index"])

    def task_embedding(self, observation: dict[str, Any]) -> Tensor:
        """(B, E) float32: the batch's ``task_embedding``, or the saved table's vectors for its ``task`` sentences.

        Raises:
            KeyError: a sentence is not in the table, and the table's encoder cannot be run here.
        """
        if "task_embedding" in observation:
            return observation["task_embedding"]
        if "task" not in observation:
            raise KeyError(f"{type(self).__name__} is conditioned on the task: give it 'task' or 'task_embedding'.")
        language = self.hparams["language"]
        rows = {text: row for row, text in enumerate(language["texts"])}
        vectors = []
        for text in observation["task"]:
            if text in rows:
                vectors.append(torch.as_tensor(language["embeddings"][rows[text]], dtype=torch.float32))
            elif language["encoder"] == HashedTextEncoder.name:
                vectors.append(torch.from_numpy(HashedTextEncoder().encode([text])[0]))
            else:
                raise KeyError(
                    f"No sentence vector for {text!r}: the checkpoint's table holds {len(rows)} sentences of the encoder "
                    f"{language['encoder']!r}. Use one of them, or pass 'task_embedding'."
                )
        return torch.stack(vectors).to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["format"] = CHECKPOINT_FORMAT
        checkpoint["class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
        if self.demonstrations is not None:
            checkpoint["demonstrations"] = self.demonstrations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        if checkpoint.get("class_path", own) != own:
            raise ValueError(f"The checkpoint is of {checkpoint['class_path']}, the model here is {own}.")
        check_statistics(checkpoint, "The checkpoint")
        self.demonstrations = checkpoint.get("demonstrations")


def check_at_least_one(**counts: int) -> None:
    """Raises ValueError for a count below 1, by its name."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")


def check_dropout(**shares: float) -> None:
    """Raises ValueError for a share that is not below 1, by its name."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share} must be at least 0 and below 1.")


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Raises ValueError, by its name, for a setting that Adam and its schedule cannot work with.

    Args:
        options: the policy's ``learning_rate``, ``betas``, ``epsilon``, ``weight_decay``, ``warmup_steps`` and, where it has
            them, ``backbone_learning_rate`` and ``transformer_weight_decay``.
    """
    for name in ("learning_rate", "backbone_learning_rate", "weight_decay", "transformer_weight_decay", "warmup_steps"):
        if (options.get(name) or 0) < 0:
            raise ValueError(f"{name}={options[name]} must not be negative.")
    if not options["epsilon"] > 0:
        raise ValueError(f"epsilon={options['epsilon']} must be positive.")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas={tuple(options['betas'])} must each be at least 0 and below 1.")


def check_statistics(checkpoint: dict[str, Any], name: str | Path) -> None:
    """Refuses a checkpoint whose normaliser is not the one that was fitted to its demonstrations.

    Args:
        checkpoint: its content; one that records no fingerprint of its statistics is taken as it is.
        name: of the file, for the message.

    Raises:
        ValueError: the statistics are of another dataset, or were changed.
    """
    recorded = (checkpoint.get("demonstrations") or {}).get("statistics")
    for part in ("state_dict", "ema_state_dict") if recorded is not None else ():
        buffers = {
            key.removeprefix("normalizer."): value
            for key, value in (checkpoint.get(part) or {}).items()
            if key.startswith("normalizer.")
        }
        found = fingerprint_of(buffers)
        if buffers and found != recorded:
            raise ValueError(
                f"{name}: its statistics are not those of the demonstrations that it was trained on (fingerprint {found}, "
                f"recorded {recorded}): they were taken from another dataset or changed by hand, and its actions would come "
                "out in a wrong scale. Use the checkpoint as training wrote it, or train anew."
            )


def load_policy(path: str | Path, weights: Literal["ema", "raw"] | None = None, device: str | torch.device = "cpu") -> Policy:
    """Loads a policy from a checkpoint alone: no data, no configuration.

    Args:
        path: a checkpoint written by this project's training, or a folder with a LeRobot checkpoint (``config.json``).
        weights: averaged or raw weights; None takes the averaged ones where there are any.
        device: where the policy goes.

    Returns:
        The policy in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file; names what lies beside it.
        ValueError: the file is no checkpoint of this project, or of another format, or lacks the wanted weights.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        from lightning_robot.policies.lerobot_checkpoints import load_lerobot_policy

        return load_lerobot_policy(path).to(device).eval()
    if not path.is_file():
        beside = sorted(item.name for item in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"No checkpoint at {path}." + (f" There is: {', '.join(beside)}." if beside else ""))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is damaged: it was not loaded. Checkpoints of the original "
            "DP3 load with lightning_robot.policies.original_dp3.load_original_dp3(path)."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}.")
    if "class_path" not in checkpoint or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of format {CHECKPOINT_FORMAT} of this project (it holds "
            f"{', '.join(sorted(checkpoint)[:8])}). Checkpoints of the original DP3 load with "
            "lightning_robot.policies.original_dp3.load_original_dp3(path)."
        )
    module, _, name = checkpoint["class_path"].rpartition(".")
    try:
        policy_class = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{path} is of the policy {checkpoint['class_path']}, which cannot be imported here ({error}). Install what holds "
            "it, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(policy_class, type) and issubclass(policy_class, Policy)):
        raise ValueError(f"{path} names the class {checkpoint['class_path']}, which is no policy.")
    arguments = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
    try:
        policy: Any = policy_class(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{path} does not fit {checkpoint['class_path']} as it is here ({error}): it is of another version, or was changed."
        ) from error
    policy.configure_model()
    state = dict(checkpoint["state_dict"])
    averaged = checkpoint.get("ema_state_dict")
    if weights == "ema" and averaged is None:
        raise ValueError(f"{path} holds no averaged weights; load it with weights='raw'.")
    if averaged is not None and weights != "raw":
        trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        if lacking := trained - averaged.keys():
            raise ValueError(f"{path}: its averaged weights lack {', '.join(sorted(lacking)[:3])}; it was changed.")
        state.update(averaged)
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        first, *others = str(error).split("\n\t")
        told = "; ".join(line.strip().rstrip(".") for line in others[:3]) or first
        raise ValueError(f"{path}: its weights do not fit {checkpoint['class_path']} as it is here: {told}.") from error
    check_statistics(checkpoint, path)
    if averaged is not None:
        policy.averaged_weights = "left" if weights == "raw" else "used"
    elif "ema_updates" in checkpoint:
        policy.averaged_weights = "missing"
    policy.demonstrations = checkpoint.get("demonstrations")
    return policy.to(device).eval()
