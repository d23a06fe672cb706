"""Checkpoints of the original DP3 implementation (YanjieZe/3D-Diffusion-Policy), read without running what they hold."""

from __future__ import annotations

import collections
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robot.features import Feature, Features
from lightning_robot.networks.diffusion import SamplerFormula
from lightning_robot.policies.dp3 import CLOUD, DP3, STATE, SimpleDP3
from lightning_robot.unpickling import ForbiddenPickle, Inert, RestrictedUnpickler, plain_values

ORIGINAL_KEYS = {STATE: "agent_pos", CLOUD: "point_cloud", "action": "action"}

# Applied in this order to the names of the original's parameters.
_RENAMES = (
    (r"^obs_encoder\.extractor\.final_projection\.(weight|bias)$", r"cloud_encoder.projection.0.\1"),
    (r"^obs_encoder\.extractor\.final_projection\.", "cloud_encoder.projection."),
    (r"^obs_encoder\.extractor\.mlp\.", "cloud_encoder.mlp."),
    (r"^obs_encoder\.state_mlp\.", "state_encoder."),
    (r"^model\.diffusion_step_encoder\.1\.", "unet.time_encoder.0."),
    (r"^model\.diffusion_step_encoder\.3\.", "unet.time_encoder.2."),
    (r"^model\.mid_modules\.", "unet.middle."),
    (r"^model\.(down|up)_modules\.(\d+)\.\d+\.conv\.", r"unet.\1.\2.resample."),
    (r"^model\.(down|up)_modules\.(\d+)\.(\d+)\.", r"unet.\1.\2.blocks.\3."),
    (r"^model\.final_conv\.0\.block\.0\.", "unet.final.convolution."),
    (r"^model\.final_conv\.0\.block\.1\.", "unet.final.norm."),
    (r"^model\.final_conv\.1\.", "unet.output."),
    (r"\.blocks\.0\.block\.0\.", ".first.convolution."),
    (r"\.blocks\.0\.block\.1\.", ".first.norm."),
    (r"\.blocks\.1\.block\.0\.", ".second.convolution."),
    (r"\.blocks\.1\.block\.1\.", ".second.norm."),
    (r"\.cond_encoder\.1\.", ".film."),
    (r"\.residual_conv\.", ".shortcut."),
)


def load_original_dp3(
    path: str | Path, weights: Literal["ema", "model"] = "ema", *, sampler_formula: SamplerFormula = "current"
) -> DP3 | SimpleDP3:
    """Loads a ``.ckpt`` of the original DP3 or Simple DP3; neither dill nor omegaconf is needed, and no code in it is run.

    Args:
        path: ``<run>/checkpoints/latest.ckpt`` or one of the best ones.
        weights: averaged (``ema``, with which the original evaluates) or raw (``model``).
        sampler_formula: ``historical`` for the samples that the original computes in its pinned environment (diffusers
            0.11.1), ``current`` for those of diffusers 0.15 and later.

    Returns:
        The policy in evaluation mode, normaliser included. Observations are named as everywhere here:
        ``observation.point_cloud`` (the original's ``point_cloud``) and ``observation.state`` (its ``agent_pos``).

    Raises:
        ForbiddenPickle: the file names a global that such a checkpoint does not need; nothing of it was run.
        ValueError: the file is damaged or no such checkpoint, lacks the wanted weights, or was trained with options that
            none of the published configurations uses.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            payload, read = _read_payload(archive, str(path))
            name = {"ema": "ema_model", "model": "model"}[weights]
            states = payload["state_dicts"]
            if name not in states:
                raise ValueError(f"{path} holds no {name}; it holds {', '.join(states)}. Choose other weights.")
            state = {key: read(stored) for key, stored in states[name].items()}
            settings = _resolved(plain_values(payload["cfg"]))["policy"]
    except ForbiddenPickle:
        raise
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint of the original DP3: {error!r}.") from error
    policy = _policy(settings, state, sampler_formula, path)
    policy.configure_model()
    missing, unexpected = policy.load_state_dict(converted_state(state), strict=False)
    missing = [key for key in missing if not key.startswith("normalizer.")]
    if missing or unexpected:
        raise ValueError(f"{path}: weights do not fit its settings: missing {missing[:4]}, unexpected {unexpected[:4]}.")
    for key, (scale, offset) in normalizer_values(state, policy.features).items():
        if policy.normalization[key] != "identity":
            policy.normalizer.set_values(key, scale, offset)
    return policy.eval()


def converted_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict under our names, without normaliser and its two empty parameters."""
    converted = {}
    for name, value in state.items():
        if name.startswith("normalizer.") or name.endswith("_dummy_variable"):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def normalizer_values(state: Mapping[str, Tensor], features: Features) -> dict[str, tuple[Tensor, Tensor]]:
    """Scale and offset (D,) of each key from the original's state dict; of stored colours that are not read, none."""
    values = {}
    for key, original in ORIGINAL_KEYS.items():
        size = (features.action if key == "action" else features.observations[key]).shape[-1]
        pair = [state[f"normalizer.params_dict.{original}.{part}"] for part in ("scale", "offset")]
        scale, offset = (part.expand(size) if len(part) == 1 else part[:size] for part in pair)
        values[key] = (scale, offset)
    return values


def _policy(settings: dict[str, Any], state: Mapping[str, Tensor], formula: SamplerFormula, path: Path) -> DP3 | SimpleDP3:
    """The policy that the original's ``cfg.policy`` describes, with features but without weights."""
    schedule, cloud_settings, shapes = settings["noise_scheduler"], settings["pointcloud_encoder_cfg"], settings["shape_meta"]
    expected = {
        "condition_type": (settings.get("condition_type"), "film"),
        "use_down_condition": (settings.get("use_down_condition", True), True),
        "use_mid_condition": (settings.get("use_mid_condition", True), True),
        "use_up_condition": (settings.get("use_up_condition", True), True),
        "obs_as_global_cond": (settings.get("obs_as_global_cond", True), True),
        "pointnet_type": (settings.get("pointnet_type"), "pointnet"),
        "noise_scheduler.beta_schedule": (schedule["beta_schedule"], "squaredcos_cap_v2"),
        "noise_scheduler.prediction_type": (schedule["prediction_type"], "sample"),
        "noise_scheduler.clip_sample": (schedule["clip_sample"], True),
        "noise_scheduler.set_alpha_to_one": (schedule["set_alpha_to_one"], True),
        "noise_scheduler.steps_offset": (schedule["steps_offset"], 0),
        "observations": (sorted(shapes["obs"]), ["agent_pos", "point_cloud"]),
    }
    for option, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{path} was trained with {option}={found!r}; only {wanted!r} can be loaded.")
    action_size = 1
    for size in shapes["action"]["shape"]:  # two hands: (2, A)
        action_size *= size
    points, channels = shapes["obs"]["point_cloud"]["shape"][0], 6 if settings["use_pc_color"] else 3
    features = Features(
        observations={
            STATE: Feature(shape=tuple(shapes["obs"]["agent_pos"]["shape"])),
            CLOUD: Feature(shape=(points, channels)),
        },
        action=Feature(shape=(action_size,)),
    )
    modes = {
        key: "identity" if bool((scale == 1).all() and (offset == 0).all()) else "limits"
        for key, (scale, offset) in normalizer_values(state, features).items()
    }
    policy_class = SimpleDP3 if settings["_target_"].endswith(".SimpleDP3") else DP3
    return policy_class(
        observation_steps=settings["n_obs_steps"],
        action_horizon=settings["horizon"],
        execution_horizon=settings["n_action_steps"],
        use_colors=settings["use_pc_color"],
        encoder_size=settings["encoder_output_dim"],
        point_layer_norm=cloud_settings["use_layernorm"],
        final_layer_norm=cloud_settings["final_norm"] == "layernorm",
        down_dims=settings["down_dims"],
        kernel_size=settings["kernel_size"],
        groups=settings["n_groups"],
        time_embedding=settings["diffusion_step_embed_dim"],
        diffusion_steps=schedule["num_train_timesteps"],
        denoising_steps=settings["num_inference_steps"],
        sampler_formula=formula,
        state_normalization=modes[STATE],
        cloud_normalization=modes[CLOUD],
        action_normalization=modes["action"],
        features=features.to_dict(),
    )


def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """Replaces plain references ``${a.b}`` by what they name. Others (``${eval:...}`` runs code in the original) stay text."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            found: Any = tree
            for part in match[1].split("."):
                found = resolve(found)[part] if isinstance(found, str) else found[part]
            return resolve(found)
        return value

    return {"policy": resolve(tree["policy"])}


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies in the archive; the optimizer's, twice the size of the policy, are never read."""

    storage: tuple[Any, ...]  # ("storage", dtype, name, device, elements)
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _CheckpointUnpickler(RestrictedUnpickler):
    def persistent_load(self, identity: Any) -> Any:
        return identity


def _read_payload(archive: zipfile.ZipFile, source: str) -> tuple[dict[str, Any], Any]:
    """The pickled dictionary with tensors unread, and a function that reads one of them."""
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{source} is no file of torch.save: it holds {len(pickles)} entries named data.pkl.")
    root = pickles[0].removesuffix("data.pkl")
    with archive.open(pickles[0]) as file:
        payload = _CheckpointUnpickler(file, _ALLOWED, source).load()  # type: ignore[arg-type]

    def read(stored: _StoredTensor) -> Tensor:
        _, dtype, name, _, elements = stored.storage
        values = (
            torch.frombuffer(bytearray(archive.read(f"{root}data/{name}")), dtype=dtype, count=elements)
            if elements
            else (torch.empty(0, dtype=dtype))
        )
        return values.as_strided(stored.size, stored.stride, stored.offset)

    return payload, read


def _rebuild_tensor(storage: tuple[Any, ...], offset: int, size: Any, stride: Any, *_: Any) -> _StoredTensor:
    return _StoredTensor(storage, offset, tuple(size), tuple(stride))


def _load_type(name: str) -> type:
    """dill's way to name a builtin type."""
    types = {"dict": dict, "list": list, "int": int, "str": str, "float": float, "bool": bool, "tuple": tuple, "object": object}
    if name not in types:
        raise ForbiddenPickle(f"the checkpoint asks dill for the type {name!r}, which does not belong into such a file")
    return types[name]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode` as pickle's old protocols use it for bytes."""
    if encoding not in ("latin1", "utf-8", "ascii"):
        raise ForbiddenPickle(f"the checkpoint asks for the codec {encoding!r}")
    return text.encode(encoding)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("typing", "Any"): None,
    ("_codecs", "encode"): _encode,
    ("dill._dill", "_load_type"): _load_type,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "BoolStorage"): torch.bool,
    ("omegaconf.dictconfig", "DictConfig"): Inert,
    ("omegaconf.listconfig", "ListConfig"): Inert,
    ("omegaconf.nodes", "AnyNode"): Inert,
    ("omegaconf.base", "ContainerMetadata"): Inert,
    ("omegaconf.base", "Metadata"): Inert,
}
