"""A small environment and a small policy for the tests of evaluation: real Gymnasium, real torch, nothing to install.

Worker processes import this file by its name: `tests/evaluation` is put on the path by the tests (`sys.path`).
"""

import os
import time

import gymnasium
import numpy as np
import torch

from lightning_robot.features import Feature, Features

STATE = 6
ACTION = 2


def features(shape=(STATE,), semantics="relative; commanded; world; gripper +1 open -1 closed"):
    return Features(
        observations={"observation.state": Feature(shape=shape, names=tuple(f"s{i}" for i in range(shape[0])))},
        action=Feature(shape=(ACTION,), names=("x", "y")),
        action_semantics=semantics,
        control_rate=30.0,
        source={"simulator": "fake 1"},
    )


class Reach(gymnasium.Env):
    """A point in the plane that should come near the origin; the dynamics are chaotic, so that the last digit of an action
    decides the outcome of an episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space = gymnasium.spaces.Dict({"observation.state": gymnasium.spaces.Box(-np.inf, np.inf, (STATE,))})
    action_space = gymnasium.spaces.Box(-1, 1, (ACTION,))
    fingerprint = {"simulator": "fake 1", "renderer": "none"}  # noqa: RUF012
    control_rate = 30.0

    def __init__(
        self, max_steps=20, render_mode=None, raise_at=(), die_at=(), solved_at_reset=(), tasks=("near", "far"), silent=False,
        delay=0.0, renders=True, radius=0.2, shape=(STATE,), carry=False,
        skips=True,
    ):  # fmt: skip
        self.max_steps, self.render_mode, self.raise_at, self.die_at = max_steps, render_mode, raise_at, die_at
        self.solved_at_reset, self.tasks, self.silent, self.delay = solved_at_reset, tasks, silent, delay
        self.renders, self.radius, self.features, self.carry = renders, radius, features(shape), carry
        self.episodes = 0
        if skips:
            self.skip_observation = False
        self.buffer = np.zeros(STATE, dtype=np.float32)  # written in place: whoever keeps observations must copy

    def observe(self):
        if getattr(self, "skip_observation", False):
            return {"task": f"come {self.task}"}
        self.buffer[:2] = self.place
        self.buffer[2:4] = self.velocity
        self.buffer[4] = self.count / self.max_steps
        self.buffer[5] = self.task == "far"
        return {"observation.state": self.buffer, "task": f"come {self.task}"}

    def info(self):
        solved = bool(np.linalg.norm(self.place) < self.radius) or (self.seed_ in self.solved_at_reset)
        failure = None if solved else ("went_away" if np.linalg.norm(self.place) > 3 else None)
        return {"failure": failure} if self.silent else {"success": solved, "failure": failure}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_ = seed
        self.episodes += 1
        if seed in self.die_at:
            os._exit(7)
        self.task = (options or {}).get("task", self.tasks[0] if self.tasks else "near")
        if self.task not in ("near", "far"):
            raise ValueError(f"no task {self.task}")
        reach = 1.0 if self.task == "near" else 1.6
        self.place = self.np_random.uniform(-reach, reach, 2) + (self.episodes if self.carry else 0)
        self.velocity = np.zeros(2)
        self.count = 0
        return self.observe(), self.info()

    def step(self, action):
        time.sleep(self.delay)
        if self.seed_ in self.raise_at and self.count == 0:
            raise ValueError(f"seed {self.seed_} cannot be simulated")
        if np.abs(action).max() > 10:
            raise ValueError("is the action un-normalised?")
        self.count += 1
        self.velocity = 0.5 * self.velocity + 0.2 * action.astype(np.float64)
        self.place = self.place + self.velocity + 0.3 * np.sin(9 * self.place[::-1])
        info = self.info()
        return (
            self.observe(),
            -float(np.linalg.norm(self.place)),
            info.get("success", False),
            self.count >= self.max_steps,
            info,
        )

    def render(self):
        if not self.renders:
            raise RuntimeError("no display")
        image = np.zeros((65, 81, 3), dtype=np.uint8)
        row, column = (np.clip(self.place, -1.5, 1.5) / 3 * 60 + 32).astype(int)
        image[max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = (250, 80, 40)
        return image


class TinyPolicy(torch.nn.Module):
    """A convolution and two linear layers, with noise from the seeds it is given: what a diffusion policy looks like from
    outside."""

    observation_steps = 2
    action_horizon = 5
    execution_horizon = 4
    action_offset = -1
    uses_task = False

    def __init__(self, width=64, noise=0.3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.features = features()
        self.convolution = torch.nn.Conv1d(STATE, width, 2)
        self.hidden = torch.nn.Linear(width, width)
        self.output = torch.nn.Linear(width, 4 * ACTION)
        self.noise = noise
        self.calls = []
        self.bias = 0.0

    @property
    def window(self):
        from lightning_robot.policies.base import Window

        return Window(self.observation_steps, self.action_horizon, self.action_offset, ("observation.state",), 1, 3)

    def predict_action_chunk(self, observation, *, noise_seeds=None, num_samples=1, guidance=None):
        assert not self.training
        state = observation["observation.state"]
        self.calls.append((tuple(state.shape), list(noise_seeds.tolist()), observation.get("task")))
        hidden = torch.relu(self.convolution(state.transpose(1, 2)).flatten(1))
        chunk = self.output(torch.relu(self.hidden(hidden))).view(-1, 4, ACTION)
        noise = torch.stack(
            [torch.randn(4, ACTION, generator=torch.Generator().manual_seed(int(seed))) for seed in noise_seeds]
        )
        goal = -1.5 * state[:, -1, None, :2]
        return (goal + 0.5 * chunk + self.noise * noise + self.bias)[:, None].clamp(-1, 1)
