"""The tiny policy as a module that a checkpoint can name."""

import torch
from fake_reach import TinyPolicy
from lightning.pytorch import LightningModule

from lightning_robot.policies.base import Policy


class SavedReach(TinyPolicy, Policy, LightningModule):
    """Takes its size as hyper-parameter."""

    def __init__(self, width=64):
        super().__init__(width=width)

    @property
    def observation_keys(self):
        return ("observation.state",)

    predict_action_chunk = TinyPolicy.predict_action_chunk
    window = TinyPolicy.window


def save(path, averaged=False, **more):
    """Writes a checkpoint such as training leaves."""
    state = SavedReach().state_dict()
    checkpoint = {
        "format": 1,
        "class_path": "fake_saved_policy.SavedReach",
        "hyper_parameters": {"width": 64},
        "state_dict": state,
        "epoch": 3,
        **more,
    }
    if averaged:
        checkpoint["ema_state_dict"] = {name: 0.5 * value for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path
