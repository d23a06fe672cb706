"""Full training step of DP3 and Simple DP3 at published size: noise, forward, backward, AdamW, EMA.

python benchmarks/training_step.py [--original CLONE] [--policies DP3 SimpleDP3] [--batches 16 64] [--points 1024]
    [--threads 2] [--rounds 5] [--device cpu] [--bf16] [--compile]

With a clone of the original (see original_dp3.md) both run in turns in this process; times are those of the fastest round, as
other processes only ever add to them. Data lie in memory: loading is another benchmark. The floor is the arithmetic at this
machine's best rate for such products, plus the bytes that optimizer and average must move.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lightning_robot  # noqa: F401  (before lightning)
from lightning_robot.features import Feature, Features
from lightning_robot.networks.noise import seeded_integers, seeded_normal
from lightning_robot.policies import dp3

CLASSES = {"DP3": dp3.DP3, "SimpleDP3": dp3.SimpleDP3}
STATE_SIZE, ACTION_SIZE, STEPS, HORIZON = 15, 7, 2, 16
FORWARD_GFLOP = {"DP3": 2.347, "SimpleDP3": 0.064}  # U-Net, one sample, every tap of a kernel counted, padding too
ENCODER_GFLOP = 0.169 / 1024 / STEPS  # one point


def build(name: str, points: int, device: str = "cpu") -> dp3.DP3:
    """Our policy with random weights and identity normalisation, as the comparison uses."""
    features = Features(
        observations={dp3.STATE: Feature((STATE_SIZE,)), dp3.CLOUD: Feature((points, 3))}, action=Feature((ACTION_SIZE,))
    )
    policy = CLASSES[name](features=features.to_dict(), state_normalization="identity", action_normalization="identity")
    policy.configure_model()
    return policy.to(device)


def our_step(name: str, batch_size: int, points: int, device: str, bf16: bool, compile: bool) -> Callable[[], None]:
    policy = build(name, points, device).train()
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6, fused=True)
    averages = [parameter.detach().clone() for parameter in parameters]
    batch = {
        dp3.STATE: torch.rand(batch_size, STEPS, STATE_SIZE, device=device),
        dp3.CLOUD: torch.rand(batch_size, STEPS, points, 3, device=device),
        "action": torch.rand(batch_size, HORIZON, ACTION_SIZE, device=device) * 2 - 1,
    }
    if compile:
        for network in policy.compilable:
            network.compile()
    count = 0

    def step() -> None:
        nonlocal count
        seeds = torch.arange(batch_size) + count * batch_size
        noise = seeded_normal(seeds, 0, 0, (HORIZON, ACTION_SIZE)).to(device, non_blocking=True)
        timesteps = seeded_integers(seeds, 0, 1, 100).to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = policy._loss(batch, noise, timesteps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 0.001)
        count += 1

    return step


def original_step(clone: Path, name: str, batch_size: int, points: int, device: str, bf16: bool) -> Callable[[], None]:
    """As in the original's train.py; its batch holds clouds of all 16 steps."""
    from original_dp3 import original_ema, original_policy

    policy = original_policy(clone, name, points).to(device)
    # made before the normaliser was set, there
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=1e-4, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6
    )
    average = original_ema(policy)
    batch = {
        "obs": {
            "point_cloud": torch.rand(batch_size, HORIZON, points, 3, device=device),
            "agent_pos": torch.rand(batch_size, HORIZON, STATE_SIZE, device=device),
        },
        "action": torch.rand(batch_size, HORIZON, ACTION_SIZE, device=device) * 2 - 1,
    }

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = policy.compute_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step(policy)
        loss.item()

    return step


def in_turns(steps: list[Callable[[], None]], rounds: int, device: str) -> list[float]:
    """Seconds of the fastest round of each of `steps`, run A B A B ..., after one round to warm up."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, kept in zip(steps, times):
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if number > 0:
                kept.append(time.perf_counter() - start)
    return [min(kept) for kept in times]


def machine_rates(device: str) -> tuple[float, float]:
    """Best GFLOP/s of a float32 convolution of size one (a matrix product), and GB/s of a copy (read and written)."""
    image, weight = torch.rand(1, 2048, 16, 64, device=device), torch.rand(2048, 2048, 1, 1, device=device)
    values = torch.rand(64 * 2**20, device=device)
    target = torch.empty_like(values)
    with torch.no_grad():
        product, copy = in_turns([lambda: torch.conv2d(image, weight), lambda: target.copy_(values)], 10, device)
    return 2 * 1024 * 2048**2 / product / 1e9, 2 * 4 * values.numel() / copy / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="clone of the original implementation")
    parser.add_argument("--policies", nargs="+", default=list(CLASSES), choices=list(CLASSES))
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net (ours)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    flops, bandwidth = machine_rates(args.device)
    print(f"torch {torch.__version__}, {args.threads} threads, {flops:.0f} GFLOP/s (float32), copy {bandwidth:.0f} GB/s")
    for name in args.policies:
        for batch_size in args.batches:
            steps = [our_step(name, batch_size, args.points, args.device, args.bf16, args.compile)]
            if args.original:
                steps.append(original_step(args.original, name, batch_size, args.points, args.device, args.bf16))
            seconds = in_turns(steps, args.rounds, args.device)
            del steps
            parameters = 255.15e6 if name == "DP3" else 7.44e6
            arithmetic = 3 * batch_size * (FORWARD_GFLOP[name] + ENCODER_GFLOP * STEPS * args.points) / flops
            memory = parameters * 4 * (7 + 3) / bandwidth / 1e9  # AdamW reads 4 and writes 3 arrays, the average 2 and 1
            line = f"{name:9} batch {batch_size:3}: {seconds[0] * 1e3:7.0f} ms"
            line += f" (plain arithmetic {arithmetic * 1e3:.0f} ms, optimizer and average {memory * 1e3:.0f} ms)"
            if args.original:
                line += f", original {seconds[1] * 1e3:.0f} ms: {seconds[1] / seconds[0]:.2f} times as fast"
            print(line, flush=True)


if __name__ == "__main__":
    main()
