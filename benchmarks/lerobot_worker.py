"""LeRobot's side of lerobot_policies.py; run by LeRobot's Python in a process of its own, which waits for orders on stdin.

Orders are ``step`` (a full training step, as LeRobot's trainer does it), ``chunk`` (an action chunk of one observation) and
``quit``; each answer is the seconds that it took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import lerobot
import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

answers, sys.stdout = sys.stdout, sys.stderr  # LeRobot prints too
folder, device = Path(sys.argv[1]), sys.argv[3]
torch.set_num_threads(int(sys.argv[2]))
kind = json.loads((folder / "config.json").read_text())["type"]
policy = {"act": ACTPolicy, "diffusion": DiffusionPolicy}[kind].from_pretrained(str(folder)).to(device)
overrides = {"preprocessor_overrides": {"device_processor": {"device": device}}}
before, after = make_pre_post_processors(policy.config, str(folder), **overrides)
preset = policy.config.get_optimizer_preset()
optimizer = preset.build(policy.get_optim_params())
stored = load_file(folder / "batch.safetensors")
timesteps, noisy = stored.pop("timesteps"), stored.pop("noisy")


def prepared(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the trainer prepares a batch: pictures to floating point, then the processor."""
    return before({key: value.float() / 255 if value.dtype == torch.uint8 else value for key, value in batch.items()})


def step() -> None:
    policy.train()
    loss, _ = policy.forward(prepared(dict(stored)))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    loss.item(), norm.item()  # for its log, at every step


@torch.no_grad()
def chunk() -> None:
    policy.eval()
    one = prepared({key: value[:1] for key, value in stored.items() if key.startswith("observation")})
    after(policy.predict_action_chunk(one))


@torch.no_grad()
def outputs() -> torch.Tensor:
    """What the network says about the batch: to be compared before anything is timed."""
    policy.eval()
    batch = {key: value for key, value in prepared(dict(stored)).items() if key.startswith("observation")}
    if kind == "act":
        return policy.predict_action_chunk(batch)
    batch["observation.images"] = torch.stack([batch[key] for key in policy.config.image_features], dim=-4)
    condition = policy.diffusion._prepare_global_conditioning(batch)
    return policy.diffusion.unet(noisy.to(device), timesteps.to(device), global_cond=condition)


save_file({"outputs": outputs().cpu().contiguous()}, folder / "outputs.safetensors")
about = {
    "version": lerobot.__version__,
    "torch": torch.__version__,
    "parameters": sum(parameter.numel() for parameter in policy.parameters()),
    "optimizer": type(optimizer).__name__,
    "fused": bool(optimizer.defaults.get("fused")),
}
print(json.dumps(about), file=answers, flush=True)
for order in sys.stdin:
    if order.strip() == "quit":
        break
    start = time.perf_counter()
    {"step": step, "chunk": chunk}[order.strip()]()
    if device == "cuda":
        torch.cuda.synchronize()
    print(time.perf_counter() - start, file=answers, flush=True)
