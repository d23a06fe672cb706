"""Draws docs/play_table.png or docs/so101.png: a checkpoint solving its tasks, at the start, midway and at the end.

    python docs/make_picture.py runs/dp3_calvin_debug/latest/checkpoints/best.ckpt
    python docs/make_picture.py runs/act_so101/latest/checkpoints/best.ckpt

Rays draw it: neither a display nor OpenGL is needed.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lightning_robot.envs import make_environment
from lightning_robot.evaluation.controller import Controller
from lightning_robot.evaluation.rollout import REPORTING_SEEDS
from lightning_robot.policies.base import load_policy

TASKS = ("open_drawer", "close_drawer", "move_slider_left", "move_slider_right")


def frames_of_success(policy, environment, task=None, scenes=20):
    """(RGB picture, observation) of every step of the first scene, from the reporting seeds on, that the policy solves."""
    env = make_environment(environment, render_mode="rgb_array")
    env.unwrapped.match(policy.features)
    controller = Controller(policy)
    for seed in range(REPORTING_SEEDS, REPORTING_SEEDS + scenes):
        observation, _ = env.reset(seed=seed, options={"task": task} if task else None)
        controller.reset([0], [seed])
        frames, over, elapsed = [(env.render(), observation)], False, 0
        while not over:
            (action,) = controller.act([observation], [elapsed])
            observation, _, terminated, truncated, info = env.step(action)
            frames.append((env.render(), observation))
            over, elapsed = terminated or truncated, elapsed + 1
        if info["success"]:
            return frames
    raise SystemExit(f"{task or environment}: not solved in {scenes} scenes.")


def draw_play_table(policy) -> plt.Figure:
    figure, axes = plt.subplots(3, len(TASKS), figsize=(12, 6.9))
    for column, task in enumerate(TASKS):
        frames = frames_of_success(policy, "lightning_robot/PlayTable-v0", task)
        for row, step in enumerate((0, len(frames) // 2, len(frames) - 1)):
            axes[row, column].imshow(frames[step][0][30:, 20:290])
            axes[row, column].text(4, 200, f"{step / 30:.1f} s", fontsize=8, color="0.3")
        axes[0, column].set_title(task.replace("_", " "), fontsize=11)
    return figure


def draw_arm(policy) -> plt.Figure:
    """The scene above, what the two cameras see below."""
    frames = frames_of_success(policy, "lightning_robot/SO101PickPlace-v0")
    steps = [round(share * (len(frames) - 1)) for share in (0, 0.33, 0.5, 0.7, 1)]
    figure, axes = plt.subplots(3, len(steps), figsize=(12, 6.2), height_ratios=(1.1, 1, 1))
    for column, step in enumerate(steps):
        picture, observation = frames[step]
        axes[0, column].imshow(picture[10:200, 50:290])
        axes[0, column].text(4, 184, f"{step / 30:.1f} s", fontsize=8, color="0.3")
        for row, camera in enumerate(("overhead", "wrist"), 1):
            axes[row, column].imshow(np.moveaxis(observation[f"observation.images.{camera}"], 0, -1))
    for row, title in enumerate(("scene", "overhead camera", "wrist camera")):
        axes[row, 0].set_title(title, fontsize=10, loc="left")
    return figure


def main(checkpoint: str) -> None:
    policy = load_policy(checkpoint)
    arm = "SO101" in policy.features.source["simulator"]
    figure = draw_arm(policy) if arm else draw_play_table(policy)
    for axis in figure.axes:
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name("so101.png" if arm else "play_table.png"), dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
