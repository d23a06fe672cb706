"""A tiny environment with an expert: a point that must reach a place. Registered when the module is imported."""

import errno

import gymnasium
import numpy as np

from lightning_robot.features import Feature, Features


class ReachEnv(gymnasium.Env):
    """The state is the position; the action moves it. Every fourth seed of task ``left`` blocks the way."""

    tasks = ("left", "right")

    def __init__(self, size: int = 3, crash_seed: int | None = None, crash_file: str = "", full_disk: bool = False):
        self.action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
        self.size, self.crash_seed, self.crash_file, self.full_disk = size, crash_seed, crash_file, full_disk
        self.features = Features(
            observations={
                "observation.state": Feature((2,)),
                "observation.point_cloud": Feature((size, 3), unit="m"),
                "observation.images.static": Feature((3, 4, 4), dtype="uint8"),
            },
            action=Feature((3,), kinds=("direction", "direction", "gripper")),
            action_semantics="relative; commanded; world; gripper +1 open -1 closed",
            control_rate=30.0,
        )
        self.fingerprint = {"simulator": "reach 1"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task, self.steps = options["task"], 0
        self.position = self.np_random.normal(size=2) * 0.1
        self.goal = np.array([{"left": -1.0, "right": 1.0}[self.task], 0.0])
        self.blocked = self.task == "left" and seed % 8 == 0
        if seed == self.crash_seed:
            crash(self.crash_file)
        return self._observation(), {"task": self.task, "success": False, "failure": None}

    def step(self, action):
        if self.full_disk:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.steps += 1
        if not self.blocked:
            self.position = self.position + 0.3 * np.asarray(action[:2], np.float64)
        success = bool(np.linalg.norm(self.position - self.goal) < 0.2)
        truncated = self.steps >= 20
        failure = "blocked" if truncated and not success else None
        return self._observation(), 0.0, success, truncated, {"task": self.task, "success": success, "failure": failure}

    def _observation(self):
        image = np.full((3, 4, 4), int(100 + 50 * self.position[0]) % 256, np.uint8)
        cloud = np.tile(np.append(self.position, 0.0), (self.size, 1)).astype(np.float32)
        return {
            "observation.state": self.position.astype(np.float32),
            "observation.point_cloud": cloud,
            "observation.images.static": image,
            "task": self.task_sentence(self.task),
        }

    def task_sentence(self, task):
        return f"go {task}"

    def task_paraphrases(self, task):
        return (f"move to the {task}", f"walk {task}", f"head over to the {task} side")

    def expert(self, rng):
        return Expert(self, rng)


class Expert:
    def __init__(self, env, rng):
        self.env, self.speed = env, rng.uniform(0.5, 1.0)

    def act(self):
        toward = self.env.goal - self.env.position
        return np.append(np.clip(toward, -self.speed, self.speed), 1.0)


def crash(marker: str) -> None:
    """Ends the process like a crash of the simulator would, the first time only if a marker file is named."""
    import os
    from pathlib import Path

    if marker and Path(marker).exists():
        return
    if marker:
        Path(marker).write_text("crashed")
    os._exit(17)


gymnasium.register("Reach-v0", entry_point=lambda **arguments: ReachEnv(**arguments), max_episode_steps=30)
