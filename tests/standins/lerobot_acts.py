"""Run by a Python that has LeRobot: a checkpoint's action chunk for ``inputs.safetensors``, into ``outputs.safetensors``."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")
noise = inputs.pop("noise")
is_act = json.loads((folder / "config.json").read_text())["type"] == "act"
policy = (ACTPolicy if is_act else DiffusionPolicy).from_pretrained(str(folder)).eval()
before, after = make_pre_post_processors(policy.config, str(folder))
batch = {key: value / 255 if value.dtype == torch.uint8 else value for key, value in inputs.items()}
if is_act:
    batch = {key: value[:, 0] for key, value in batch.items()}
batch = {key: value for key, value in before(batch).items() if key.startswith("observation")}
with torch.no_grad():
    if is_act:
        chunk = policy.predict_action_chunk(batch)
    else:
        from diffusers.schedulers import scheduling_ddpm

        draws = iter(noise[1:])
        scheduling_ddpm.randn_tensor = lambda *arguments, **options: next(draws)
        batch["observation.images"] = torch.stack([batch[key] for key in policy.config.image_features], dim=-4)
        chunk = policy.diffusion.generate_actions(batch, noise=noise[0].clone())
save_file({"chunk": after(chunk).contiguous()}, folder / "outputs.safetensors")
