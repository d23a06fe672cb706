"""An arm with two cameras, its expert, and wrappers that spoil it: what users do to environments.

`fake_arm:fault/Arm-v0` and its siblings are registered when this module is imported, in worker processes too.
"""

import dataclasses
import hashlib

import gymnasium
import numpy as np

from lightning_robot.features import Feature, Features

LOW, HIGH = np.array([-90.0, 20.0, 0.0]), np.array([60.0, 140.0, 100.0])  # degrees, gripper in percent
MOUNTS = {
    "overhead": {"mount": "world", "position": [0.0, 0.0, 1.0], "rotation": [1.0, 0.0, 0.0, 0.0], "fov": 45.0},
    "wrist": {"mount": "hand", "position": [0.0, 0.05, 0.0], "rotation": [0.0, 1.0, 0.0, 0.0], "fov": 60.0},
}


class Arm(gymnasium.Env):
    """Follows its commands towards a pose that the overhead picture tells: red the pan, green the lift."""

    metadata = {"render_modes": [], "render_fps": 30}  # noqa: RUF012
    action_space = gymnasium.spaces.Box(-180, 180, (3,))
    tasks = ("turn",)

    def __init__(self, max_steps=20, control_rate=30.0, exchanged=False, solved_at_reset=()):
        self.max_steps, self.control_rate, self.solved_at_reset = max_steps, control_rate, solved_at_reset
        self.exchanged = exchanged  # the cameras were screwed on the wrong way round
        self.fingerprint = {"simulator": "arm 1", "scene": "desk", "renderer": "painted"}
        images = {f"observation.images.{name}": Feature((3, 8, 8), dtype="uint8") for name in MOUNTS}
        mounts = {"overhead": MOUNTS["wrist"], "wrist": MOUNTS["overhead"]} if exchanged else MOUNTS
        self.features = Features(
            observations={"observation.state": Feature((3,), unit="degrees"), **images},
            action=Feature((3,), unit="degrees", names=("pan", "lift", "gripper")),
            action_semantics="absolute; commanded; joints; gripper 100 open",
            control_rate=control_rate,
            source=self.fingerprint,
            cameras=mounts,
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_, self.count = seed, 0
        self.goal = self.np_random.uniform([-80, 30], [50, 130])
        self.pose = np.array([0.0, 80.0, 50.0]) + self.np_random.uniform(-5, 5, 3)
        return self.observe(), self.info()

    def step(self, action):
        self.count += 1
        self.pose = self.pose + 0.5 * (np.asarray(action, np.float64) - self.pose)
        info = self.info()
        return self.observe(), 0.0, info["success"], self.count >= self.max_steps, info

    def info(self):
        near = self.count > 0 and bool(np.abs(self.pose[:2] - self.goal).max() < 3)
        return {"success": near or self.seed_ in self.solved_at_reset}

    def observe(self):
        overhead = np.zeros((3, 8, 8), np.uint8)
        overhead[:2] = (255 * (self.goal - LOW[:2]) / (HIGH - LOW)[:2])[:, None, None].round()
        wrist = np.zeros((3, 8, 8), np.uint8)
        wrist[2], wrist[0, :4] = 200, np.uint8(abs(self.pose[2]) % 255)
        if self.exchanged:
            overhead, wrist = wrist, overhead
        return {
            "observation.state": self.pose.astype(np.float32),
            "observation.images.overhead": overhead,
            "observation.images.wrist": wrist,
            "task": "turn to the goal",
        }

    def state_fingerprint(self):
        return hashlib.sha256(np.concatenate([self.pose, self.goal, [self.count]]).tobytes()).hexdigest()

    def expert(self, rng):
        return Expert(self)


class Expert:
    def __init__(self, env):
        self.env = env

    def act(self):
        return np.append(self.env.goal, 100.0 if self.env.count < 2 else 0.0)


# What users wrap around it.


class Unchanged(gymnasium.Wrapper):
    """Harmless: the twin of every other wrapper."""


class OneMore(gymnasium.ObservationWrapper):
    """One state dimension too many."""

    def observation(self, observation):
        return observation | {"observation.state": np.append(observation["observation.state"], np.float32(0))}


class Depth(gymnasium.ObservationWrapper):
    """Depth where the overhead camera's colours are expected: metres, or painted grey."""

    def __init__(self, env, painted):
        super().__init__(env)
        self.painted = painted

    def observation(self, observation):
        depth = np.repeat(np.linspace(0.5, 1.5, 64, dtype=np.float32).reshape(1, 8, 8), 3, axis=0)
        return observation | {"observation.images.overhead": (100 * depth).astype(np.uint8) if self.painted else depth}


class Continues(gymnasium.Wrapper):
    """No reset between episodes."""

    began = False

    def reset(self, *, seed=None, options=None):
        if self.began:
            return self.unwrapped.observe(), {"success": False}
        self.began = True
        return self.env.reset(seed=seed, options=options)


class OneStart(gymnasium.Wrapper):
    """The same start state in every episode."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=7, options=options)


class Swapped(gymnasium.ObservationWrapper):
    """Pictures exchanged on the way, under right names."""

    def observation(self, observation):
        overhead, wrist = (f"observation.images.{name}" for name in MOUNTS)
        return observation | {overhead: observation[wrist], wrist: observation[overhead]}


class OldActions(gymnasium.Wrapper):
    """A queue of actions that no reset empties: the arm executes at last what was commanded two steps before."""

    def __init__(self, env):
        super().__init__(env)
        self.queue = []

    def step(self, action):
        self.queue.append(action)
        return self.env.step(self.queue.pop(0) if len(self.queue) > 2 else np.zeros(3))


class StaysBehind(gymnasium.Wrapper):
    """Begins anew unless an episode took long: what a few steps do not move is not put back."""

    def reset(self, *, seed=None, options=None):
        moved = getattr(self.unwrapped, "count", 0) > 3
        observation, info = self.env.reset(seed=seed, options=options)
        if moved:
            self.unwrapped.pose[2] += 10
            observation = self.unwrapped.observe()
        return observation, info


class Repeats(gymnasium.Wrapper):
    """Executes each action three times, and says so or not."""

    def step(self, action):
        for _ in range(3):
            last = self.env.step(action)
        return last


class Slower(Repeats):
    control_rate = 10.0


class Announces(gymnasium.Wrapper):
    """Says of itself what it offers: here another control rate."""

    @property
    def features(self):
        return dataclasses.replace(self.unwrapped.features, control_rate=10.0)


class CutShort(gymnasium.Wrapper):
    """Ends episodes after three steps; the arm underneath names twenty."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated or self.unwrapped.count >= 3, info


class SolvedAtOnce(gymnasium.Wrapper):
    """Does not say at the reset that the task is solved, which it is."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info | {"success": True}


def wrapped(name, **arguments):
    """The arm in one of the wrappers above."""
    painted = {"painted": name == "Painted"} if name in ("Depth", "Painted") else {}
    return {"Painted": Depth}.get(name, globals().get(name))(Arm(**arguments), **painted)


gymnasium.register("fault/Arm-v0", entry_point=Arm)
SIMPLE = ("Unchanged", "OneMore", "Continues", "OneStart", "Swapped", "OldActions", "StaysBehind", "Repeats", "Slower")
for wrapper in (*SIMPLE, "Announces", "CutShort", "SolvedAtOnce", "Depth", "Painted"):
    gymnasium.register(f"fault/{wrapper}-v0", entry_point=wrapped, kwargs={"name": wrapper})
