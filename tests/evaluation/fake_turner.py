"""A policy for the arm of `fake_arm` that reads its goal from the overhead picture, and two that were written carelessly."""

import torch
from fake_arm import HIGH, LOW

from lightning_robot.policies.base import ImitationPolicy


class Turner(ImitationPolicy):
    """Predicts four steps, of which two are executed. Its one weight learns nothing and does nothing.

    Args:
        execution_horizon: see `ImitationPolicy`.
        transforms: see `ImitationPolicy`.
        postprocess: see `ImitationPolicy`.
        features: see `ImitationPolicy`.
        language: see `ImitationPolicy`.
    """

    normalization = {"observation.state": "limits", "action": "limits"}  # noqa: RUF012
    observation_keys = ("observation.state", "observation.images.overhead", "observation.images.wrist")

    def __init__(
        self,
        execution_horizon: int = 2,
        transforms: list | None = None,
        postprocess: list | None = None,
        features: dict | None = None,
        language: dict | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.observation_steps, self.action_horizon, self.execution_horizon = 1, 4, execution_horizon

    def build(self):
        self.weight = torch.nn.Parameter(torch.ones(1))

    def compute_loss(self, batch):
        return (self.weight * self.normalizer.normalize("action", batch["action"])).square().mean(), {}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _network(self, observation):
        picture = observation["observation.images.overhead"][:, -1].float().mean(dim=(2, 3)) / 255
        command = torch.as_tensor(LOW).float() + picture * torch.as_tensor(HIGH - LOW).float()
        return self.normalizer.normalize("action", command)[:, None, None].repeat(1, 1, 4, 1)

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        return self.normalizer.unnormalize("action", self._network(observation))


class Forgetful(Turner):
    """Actions leave it normalised."""

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        return self._network(observation)


class Queueing(Turner):
    """Keeps a queue of its own: what is left of one episode is executed in the next."""

    queue = None

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        left, self.queue = self.queue, super()._predict(observation, noise_seeds, num_samples, guidance)
        return self.queue if left is None else torch.cat([left[:, :, 2:] - 1, self.queue[:, :, :2]], dim=2)
