"""Draws docs/play_table.png: a checkpoint solving tasks of the play table, seen at the start, midway and at the end.

    python docs/make_picture.py runs/latest/checkpoints/best.ckpt

Rays draw it: neither a display nor OpenGL is needed.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lightning_robot.envs import make_environment
from lightning_robot.evaluation.controller import Controller
from lightning_robot.evaluation.rollout import REPORTING_SEEDS
from lightning_robot.policies.base import load_policy

TASKS = ("open_drawer", "close_drawer", "move_slider_left", "move_slider_right")


def frames_of_success(policy, task):
    """RGB frames (240, 320, 3) of the first scene, from the reporting seeds on, in which the policy solves the task."""
    env = make_environment("lightning_robot/PlayTable-v0", render_mode="rgb_array")
    env.unwrapped.match(policy.features)
    controller = Controller(policy)
    for seed in range(REPORTING_SEEDS, REPORTING_SEEDS + 20):
        observation, _ = env.reset(seed=seed, options={"task": task})
        controller.reset([0], [seed])
        frames, over, elapsed = [env.render()], False, 0
        while not over:
            (action,) = controller.act([observation], [elapsed])
            observation, _, terminated, truncated, info = env.step(action)
            frames.append(env.render())
            over, elapsed = terminated or truncated, elapsed + 1
        if info["success"]:
            return frames
    raise SystemExit(f"{task}: not solved in 20 scenes.")


def main(checkpoint: str) -> None:
    policy = load_policy(checkpoint)
    figure, axes = plt.subplots(3, len(TASKS), figsize=(12, 6.9))
    for column, task in enumerate(TASKS):
        frames = frames_of_success(policy, task)
        for row, step in enumerate((0, len(frames) // 2, len(frames) - 1)):
            axes[row, column].imshow(frames[step][30:, 20:290])
            axes[row, column].set_axis_off()
            axes[row, column].text(4, 200, f"{step / 30:.1f} s", fontsize=8, color="0.3")
        axes[0, column].set_title(task.replace("_", " "), fontsize=11)
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name("play_table.png"), dpi=80)


if __name__ == "__main__":
    main(sys.argv[1])
