"""Builds the original DP3 from a clone, for comparison. See original_dp3.md for how to get one."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch

DOWN_DIMS = {"DP3": [512, 1024, 2048], "SimpleDP3": [128, 256, 384]}


def original_policy(clone: Path, name: str, points: int) -> Any:
    """The original's DP3 or SimpleDP3 at published size (state 15, action 7), with an identity normaliser.

    Args:
        clone: of YanjieZe/3D-Diffusion-Policy.
        name: ``DP3`` or ``SimpleDP3``.
        points: per cloud.
    """
    source = clone / "3D-Diffusion-Policy"
    if not (source / "diffusion_policy_3d").is_dir():
        raise FileNotFoundError(f"{source} holds no diffusion_policy_3d; see benchmarks/original_dp3.md.")
    if "pytorch3d" not in sys.modules and importlib.util.find_spec("pytorch3d") is None:
        # imported at the top of the original's policies, used by none of their methods
        sys.modules["pytorch3d"], sys.modules["pytorch3d.ops"] = ModuleType("pytorch3d"), ModuleType("pytorch3d.ops")
        sys.modules["pytorch3d"].ops = sys.modules["pytorch3d.ops"]  # type: ignore[attr-defined]
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    from diffusers import DDIMScheduler
    from diffusion_policy_3d.model.common.normalizer import LinearNormalizer, SingleFieldLinearNormalizer
    from diffusion_policy_3d.policy import dp3, simple_dp3

    def leaf(*shape: int) -> Any:
        return MappingProxyType({"shape": list(shape)})  # the original walks plain dicts too far

    with contextlib.redirect_stdout(open(os.devnull, "w")):
        policy = {"DP3": dp3.DP3, "SimpleDP3": simple_dp3.SimpleDP3}[name](
            shape_meta={"obs": {"point_cloud": leaf(points, 3), "agent_pos": leaf(15)}, "action": leaf(7)},
            noise_scheduler=DDIMScheduler(
                num_train_timesteps=100,
                beta_schedule="squaredcos_cap_v2",
                clip_sample=True,
                set_alpha_to_one=True,
                steps_offset=0,
                prediction_type="sample",
            ),
            horizon=16,
            n_action_steps=8,
            n_obs_steps=2,
            num_inference_steps=10,
            diffusion_step_embed_dim=128,
            down_dims=DOWN_DIMS[name],
            encoder_output_dim=64,
            pointcloud_encoder_cfg=_Settings(
                in_channels=3, out_channels=64, use_layernorm=True, final_norm="layernorm", normal_channel=False
            ),
        )
    normalizer = LinearNormalizer()
    for key in ("point_cloud", "agent_pos", "action"):
        normalizer[key] = SingleFieldLinearNormalizer.create_identity()
    policy.set_normalizer(normalizer)
    return policy


def original_ema(model: torch.nn.Module) -> Any:
    """The original's averaging, of its policy `model`."""
    import copy

    from diffusion_policy_3d.model.diffusion.ema_model import EMAModel

    return EMAModel(copy.deepcopy(model), power=0.75)


class _Settings(dict):
    """A dictionary that is read by attribute too, as the original's configuration objects are."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
