"""A new run that starts from the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_robot.callbacks.checkpoints import read_checkpoint
from lightning_robot.console import say
from lightning_robot.features import Features, check_compatible, other_rate
from lightning_robot.policies.base import ImitationPolicy, check_statistics


class InitialWeights(Callback):
    """Copies a checkpoint's weights, averaged ones where there are any, into the networks before training begins.

    The normaliser comes along: the weights fit its units. Optimizer, schedule and counters start afresh.

    Args:
        path: the checkpoint, None for none.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is None or trainer.ckpt_path is not None:
            return
        checkpoint = read_checkpoint(self.path)
        require_class(checkpoint, class_path_of(pl_module), self.path)
        trained, offered = checkpoint.get("hyper_parameters", {}).get("features"), getattr(pl_module, "features", None)
        if trained and isinstance(offered, Features):
            trained = Features.from_dict(trained)
            for note in check_compatible(replace(trained, control_rate=0.0), offered):  # a new rate can be learnt
                say(note)
            if other_rate(trained.control_rate, offered.control_rate):
                say(f"The weights were trained at {trained.control_rate:g} Hz; the data are of {offered.control_rate:g} Hz.")
        check_statistics(checkpoint, self.path)
        state = dict(checkpoint["state_dict"])
        state.update(checkpoint.get("ema_state_dict") or {})
        pl_module.load_state_dict(state)
        if isinstance(pl_module, ImitationPolicy) and pl_module.demonstrations is not None:
            pl_module.demonstrations = {**pl_module.demonstrations, "statistics": pl_module.normalizer.fingerprint}
        which = "averaged" if checkpoint.get("ema_state_dict") else "raw"
        say(f"Starting from the {which} weights of {self.path} (step {checkpoint['global_step']}), its normaliser included.")


def class_path_of(pl_module: LightningModule) -> str:
    """The module's class as configurations and checkpoints name it."""
    return f"{type(pl_module).__module__}.{type(pl_module).__qualname__}"


def require_class(checkpoint: dict[str, Any], class_path: str, path: str) -> None:
    """Refuses a checkpoint of another policy.

    Raises:
        ValueError: names both classes.
    """
    theirs = checkpoint.get("class_path")
    if theirs != class_path:
        raise ValueError(f"{path} is a checkpoint of {theirs or 'an unknown class'}; the model here is {class_path}.")
