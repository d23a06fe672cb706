"""Training step and inference of ACT and Diffusion Policy at LeRobot's default sizes, against LeRobot itself.

python benchmarks/lerobot_environment.py ENVIRONMENT
python benchmarks/lerobot_policies.py ENVIRONMENT/bin/python [--policies act diffusion] [--threads 2] [--rounds 10]
    [--chunk-rounds 5] [--batch 8] [--denoising-steps 100] [--device cpu]

One policy with random weights is written as a LeRobot checkpoint; LeRobot loads it in a process of its own. Before anything is
timed the numbers of parameters must be equal, and the networks' outputs for one batch equal to 1e-4. Then both sides do the
same in turns, ours, theirs, ours ...: while one works the other waits. A training step begins with a batch in memory (pictures
as uint8) and ends with updated weights: normalisation, forward, backward, clipping, optimizer. An inference is one action chunk
of one observation. The floor is the arithmetic (counted by torch) at this machine's best rate for matrix products, plus the
bytes that the optimizer must move.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from training_step import machine_rates

import lightning_robot  # noqa: F401  (before lightning)
from lightning_robot.callbacks.host_memory import keep_freed_memory
from lightning_robot.features import Feature, Features
from lightning_robot.networks.diffusion import add_noise
from lightning_robot.policies.act import ACT
from lightning_robot.policies.diffusion_policy import DiffusionPolicy
from lightning_robot.policies.lerobot_checkpoints import export_lerobot_policy

WORKER = Path(__file__).parent / "lerobot_worker.py"
PARAMETERS = {"act": 51_597_190, "diffusion": 262_952_742}
STATE, CAMERAS = "observation.state", {"act": ("front", "wrist"), "diffusion": ("front",)}


def build(kind: str, denoising_steps: int) -> Any:
    """ACT or Diffusion Policy with LeRobot 0.6.1's defaults: 96-pixel cameras, state and action of size 6, random weights."""
    torch.manual_seed(0)
    pictures = {f"observation.images.{name}": Feature((3, 96, 96), dtype="uint8") for name in CAMERAS[kind]}
    features = Features({STATE: Feature((6,)), **pictures}, Feature((6,))).to_dict()
    policy: Any
    if kind == "act":
        policy = ACT(pretrained=False, features=features)
    else:
        policy = DiffusionPolicy(
            action_horizon=64,
            execution_horizon=32,
            backbone_norm="batch",
            crop=None,
            denoising_steps=denoising_steps,
            optimizer="adam",
            features=features,
        )
    policy.configure_model()
    for key in (STATE, "action"):
        policy.normalizer.set_values(key, torch.full((6,), 0.5), torch.zeros(6))
    # What configure_optimizers and window_seeds ask of a trainer.
    policy._trainer = SimpleNamespace(
        current_epoch=0, estimated_stepping_batches=100_000, precision_plugin=None, datamodule=None, world_size=1
    )
    return policy


def make_batch(kind: str, policy: Any, size: int) -> dict[str, torch.Tensor]:
    """A batch with the windows of LeRobot: ACT's without an axis of observation steps."""
    steps = () if kind == "act" else (policy.observation_steps,)
    batch = {STATE: torch.randn(size, *steps, 6)}
    for name in CAMERAS[kind]:
        batch[f"observation.images.{name}"] = torch.randint(256, (size, *steps, 3, 96, 96), dtype=torch.uint8)
    batch["action"] = torch.rand(size, policy.action_horizon, 6) * 2 - 1
    batch["action_is_pad"] = torch.zeros(size, policy.action_horizon, dtype=torch.bool)
    return batch


def our_batch(kind: str, batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """The same with an axis of observation steps, and the numbers that name its windows."""
    ours = {
        key: (value.unsqueeze(1) if kind == "act" and key.startswith("observation") else value).to(device)
        for key, value in batch.items()
    }
    numbers = torch.arange(len(batch["action"]))
    return {**ours, "episode_index": numbers, "segment_index": numbers, "frame_index": numbers}


def our_work(kind: str, policy: Any, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Our training step and our inference, as `fit` and the controller do them."""
    optimizer = policy.configure_optimizers()["optimizer"]
    one = {key: value[:1] for key, value in batch.items() if key.startswith("observation")}

    def step() -> None:
        policy.train()
        loss, _ = policy.compute_loss(policy.transforms.apply(policy.on_before_batch_transfer(batch, 0)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    def chunk() -> None:
        policy.eval()
        policy.predict_action_chunk(one, noise_seeds=torch.tensor([1]))

    return {"step": step, "chunk": chunk}


@torch.no_grad()
def our_outputs(kind: str, policy: Any, batch: dict[str, torch.Tensor], noisy: torch.Tensor, timesteps: torch.Tensor) -> Any:
    """What our network says about the batch, normalised: as `outputs` of the worker."""
    policy.eval()
    if kind == "act":
        return policy.network(None, **policy.observed(batch))
    return policy.denoiser(noisy, policy.denoiser.conditioning(timesteps, policy.encode(batch)))


class LeRobot:
    """LeRobot's process."""

    def __init__(self, python: str, folder: Path, threads: int, device: str) -> None:
        command = [python, str(WORKER), str(folder), str(threads), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        self.about = json.loads(self._answer())

    def seconds(self, order: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.communicate("quit\n")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"LeRobot's process ended with code {self.process.wait()}; its messages are above.")
        return line


def in_turns(
    ours: Callable[[], None], theirs: Callable[[], float], rounds: int, warm_up: int, device: str
) -> list[list[float]]:
    """Seconds of every round but the first `warm_up`: ours and theirs."""
    times: list[list[float]] = [[], []]
    for number in range(rounds + warm_up):
        start = time.perf_counter()
        ours()
        if device == "cuda":
            torch.cuda.synchronize()
        pair = (time.perf_counter() - start, theirs())
        if number >= warm_up:
            for kept, seconds in zip(times, pair):
                kept.append(seconds)
    return times


def compare(kind: str, args: argparse.Namespace, flops: float, bandwidth: float) -> None:
    policy = build(kind, args.denoising_steps)
    batch = make_batch(kind, policy, args.batch)
    timesteps, noise = torch.arange(args.batch) * 90 // args.batch, torch.randn(args.batch, policy.action_horizon, 6)
    noisy = noise if kind == "act" else add_noise(batch["action"] * 0.5, noise, timesteps, policy.alphas_cumprod)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_lerobot_policy(policy, folder)
        save_file({**batch, "timesteps": timesteps, "noisy": noisy.contiguous()}, folder / "batch.safetensors")
        lerobot = LeRobot(args.lerobot, folder, args.threads, args.device)
        try:
            policy.to(args.device)
            ready = our_batch(kind, batch, args.device)
            ours = our_outputs(kind, policy, ready, noisy.to(args.device), timesteps.to(args.device)).cpu()
            difference = (ours - load_file(folder / "outputs.safetensors")["outputs"]).abs().max().item()
            counts = {PARAMETERS[kind], lerobot.about["parameters"], sum(p.numel() for p in policy.parameters())}
            if len(counts) > 1 or not difference < 1e-4:
                raise RuntimeError(f"The policies differ: parameters {counts}, outputs by {difference:.1e}.")
            work = our_work(kind, policy, ready)
            optimizer = f"{lerobot.about['optimizer']} ({'fused' if lerobot.about['fused'] else 'not fused'}; ours is)"
            print(
                f"\n{kind}: {min(counts):,} parameters, outputs equal to {difference:.1e}; LeRobot {lerobot.about['version']}, "
                f"torch {lerobot.about['torch']}, {optimizer}"
            )
            for what, rounds in (("step", args.rounds), ("chunk", args.chunk_rounds)):
                with FlopCounterMode(display=False) as counter:
                    work[what]()
                floor = counter.get_total_flops() / flops / 1e9
                if what == "step":
                    floor += 28 * min(counts) / bandwidth / 1e9  # Adam reads 4 arrays and writes 3
                times = in_turns(work[what], lambda what=what: lerobot.seconds(what), rounds, 2, args.device)
                report(what, args, times, floor)
        finally:
            lerobot.close()


def report(what: str, args: argparse.Namespace, times: list[list[float]], floor: float) -> None:
    texts = [f"{statistics.median(each) * 1e3:.0f} ms ({min(each) * 1e3:.0f}-{max(each) * 1e3:.0f})" for each in times]
    ratios = [statistics.median(times[1]) / statistics.median(times[0]), min(times[1]) / min(times[0])]
    title = f"training step, batch {args.batch}" if what == "step" else "action chunk, batch 1"
    print(
        f"  {title}: ours {texts[0]}, LeRobot {texts[1]}: {ratios[0]:.2f} times as fast (medians; fastest rounds "
        f"{ratios[1]:.2f}); floor {floor * 1e3:.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lerobot", help="Python of an environment with LeRobot")
    parser.add_argument("--policies", nargs="+", default=list(PARAMETERS), choices=list(PARAMETERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="of training steps, after 2 to warm up")
    parser.add_argument("--chunk-rounds", type=int, default=5, help="of inference, after 2 to warm up")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--denoising-steps", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()  # as `fit` does
    flops, bandwidth = machine_rates(args.device)
    print(
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {flops:.0f} GFLOP/s (float32), "
        f"copy {bandwidth:.0f} GB/s"
    )
    for kind in args.policies:
        compare(kind, args, flops, bandwidth)


if __name__ == "__main__":
    main()
