"""Ten-step inference of DP3 and Simple DP3 at published size: normalise, encode, denoise, un-normalise one chunk per row.

python benchmarks/inference.py [--original CLONE] [--policies DP3 SimpleDP3] [--batches 1 16 64] [--points 1024]
    [--threads 2] [--rounds 5] [--device cpu] [--bf16] [--compile]

With a clone of the original (see original_dp3.md) both run in turns in this process; times are those of the fastest round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from training_step import (
    CLASSES,
    ENCODER_GFLOP,
    FORWARD_GFLOP,
    STATE_SIZE,
    STEPS,
    build,
    in_turns,
    machine_rates,
)

from lightning_robot.policies.dp3 import CLOUD, STATE


def our_chunk(name: str, batch_size: int, points: int, device: str, bf16: bool, compile: bool) -> Callable[[], None]:
    policy = build(name, points, device).eval()
    if compile:
        for network in policy.compilable:
            network.compile()
    observation = {
        STATE: torch.rand(batch_size, STEPS, STATE_SIZE, device=device),
        CLOUD: torch.rand(batch_size, STEPS, points, 3, device=device),
    }
    seeds = torch.arange(batch_size)

    def chunk() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            policy.predict_action_chunk(observation, noise_seeds=seeds).cpu()

    return chunk


def original_chunk(clone: Path, name: str, batch_size: int, points: int, device: str, bf16: bool) -> Callable[[], None]:
    from original_dp3 import original_policy

    policy = original_policy(clone, name, points).to(device).eval()
    observation = {
        "point_cloud": torch.rand(batch_size, STEPS, points, 3, device=device),
        "agent_pos": torch.rand(batch_size, STEPS, STATE_SIZE, device=device),
    }

    def chunk() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            policy.predict_action(observation)["action"].cpu()

    return chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="clone of the original implementation")
    parser.add_argument("--policies", nargs="+", default=list(CLASSES), choices=list(CLASSES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
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
            chunks = [our_chunk(name, batch_size, args.points, args.device, args.bf16, args.compile)]
            if args.original:
                chunks.append(original_chunk(args.original, name, batch_size, args.points, args.device, args.bf16))
            seconds = in_turns(chunks, args.rounds, args.device)
            del chunks
            arithmetic = batch_size * (10 * FORWARD_GFLOP[name] + ENCODER_GFLOP * STEPS * args.points) / flops
            weights = 10 * (1.02 if name == "DP3" else 0.03) / bandwidth  # GB of weights, read once per step
            line = f"{name:9} batch {batch_size:3}: {seconds[0] * 1e3:7.1f} ms"
            line += f" (plain arithmetic {arithmetic * 1e3:.0f} ms, reading the weights {weights * 1e3:.0f} ms)"
            if args.original:
                line += f", original {seconds[1] * 1e3:.1f} ms: {seconds[1] / seconds[0]:.2f} times as fast"
            print(line, flush=True)


if __name__ == "__main__":
    main()
