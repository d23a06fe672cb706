"""A policy for the point of `fake_expert_env`, as a module that a checkpoint can name."""

import torch
from fake_expert_env import ReachEnv
from lightning.pytorch import LightningModule

from lightning_robot.policies.base import Policy


class WalkRight(Policy, LightningModule):
    """Walks to the right, whatever it is asked for, with noise from the seeds; the speed is its only weight."""

    observation_keys = ("observation.state",)
    observation_steps, action_horizon, execution_horizon = 1, 4, 3
    trained_tasks = ("right",)

    def __init__(self, noise=0.3):
        super().__init__()
        self.noise, self.features = noise, ReachEnv().features
        self.speed = torch.nn.Parameter(torch.tensor(0.8))

    def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
        position = observation["observation.state"][:, -1]
        toward = torch.tensor([1.0, 0.0]) - position
        steps = []
        for seed in noise_seeds.tolist():
            steps.append(self.noise * torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)))
        moves = (self.speed * toward[:, None] + torch.stack(steps)).clamp(-1, 1)
        return torch.cat([moves, torch.ones(len(moves), 4, 1)], dim=2)[:, None]


def save(path, noise=0.3, speed=0.8):
    policy = WalkRight(noise)
    policy.speed.data.fill_(speed)
    checkpoint = {"format": 1, "class_path": "fake_walking_policy.WalkRight", "hyper_parameters": {"noise": noise}}
    torch.save({**checkpoint, "state_dict": policy.state_dict()}, path)
    return path
