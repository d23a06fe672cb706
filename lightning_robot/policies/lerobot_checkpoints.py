"""Checkpoints of LeRobot's ACT and Diffusion Policy: read into our policies, and written from them.

A checkpoint is a folder: ``config.json``, ``model.safetensors`` and the files of two processors (`lerobot_normalizers` knows
those, `lerobot_translation` the names). LeRobot loads the tensors that fit and logs the rest; here each must be there and used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_robot.console import say
from lightning_robot.features import Feature, Features
from lightning_robot.policies.act import ACT
from lightning_robot.policies.base import Policy
from lightning_robot.policies.diffusion_policy import DiffusionPolicy
from lightning_robot.policies.lerobot_normalizers import (
    IN_WEIGHTS,
    OUR_MODES,
    THEIR_MODES,
    LeRobotCheckpointError,
    Normalization,
    Scaling,
    read_normalization,
    write_processors,
)
from lightning_robot.policies.lerobot_translation import (
    ENVIRONMENT_STATE,
    IMAGES,
    REQUIRED,
    STATE,
    TRANSLATIONS,
    Translation,
    refuse,
)

RENAME_CAMERAS = "lightning_robot.transforms.named.RenameCameras"
COMMON = {  # settings of every policy that change nothing here; the weights go where the user puts the policy
    "type": REQUIRED,
    "n_obs_steps": REQUIRED,
    "input_features": REQUIRED,
    "output_features": REQUIRED,
    "normalization_mapping": None,
    "device": None,
    "use_amp": False,
    "use_peft": False,
    "push_to_hub": False,
    "repo_id": None,
    "private": None,
    "tags": None,
    "license": None,
    "pretrained_path": None,
    "pretrained_revision": None,
}


def load_lerobot_policy(folder: str | Path) -> ACT | DiffusionPolicy:
    """Loads a checkpoint written by LeRobot 0.2 to 0.6: an ACT or a Diffusion Policy with its normalisation.

    Observations are named as everywhere here: pictures ``observation.images.<camera>``, also where LeRobot says
    ``observation.image``. Cameras that the checkpoint renames are renamed by a transform. What actions mean (absolute or
    relative, of which joints) is not in such a checkpoint, so `features` says nothing of it.

    Args:
        folder: with ``config.json``, usually called ``pretrained_model``.

    Returns:
        The policy in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        LeRobotCheckpointError: the checkpoint is of another policy, has settings that are unknown here, lacks statistics, or
            its tensors are not those that its settings ask for; names them.
    """
    folder = Path(folder)
    config, translation = _read_config(folder)
    tensors, statistics = _read_tensors(folder)
    named = {key: _our_key(key, feature) for key, feature in config["input_features"].items()}
    keys = {key: ours for key, ours in named.items() if ours is not None}
    if unread := [key for key in named if key not in keys]:
        say(f"{folder}: LeRobot's {config['type']} does not read {', '.join(unread)}, although its settings list it.")
        config["input_features"] = {key: config["input_features"][key] for key in keys}
    normalization = read_normalization(folder, config, statistics)
    features, transforms = _features(folder, config, keys, normalization)
    modes = {keys.get(key, key): OUR_MODES[mode] for key, mode in normalization.modes.items()}
    arguments = {ours: config[theirs] for theirs, ours in translation.fields.items()}
    arguments |= translation.arguments(config, list(keys.values()), modes)
    if normalization.in_weights and translation.kind == "act":
        arguments["reduction"] = "all"  # as the releases did that stored them so
    try:
        policy: Any = translation.policy_class(**arguments, transforms=transforms or None, features=features.to_dict())
        policy.configure_model()
    except (ValueError, TypeError) as error:
        names = [f"{ours} is {theirs} there" for theirs, ours in translation.fields.items() if ours in str(error)]
        raise LeRobotCheckpointError(
            f"{folder / 'config.json'}: {error}" + (f" ({', '.join(names)})" if names else "")
        ) from error
    _load_tensors(policy, tensors, translation, folder)
    for key, ours in {**keys, "action": "action"}.items():
        scaling = normalization.scalings.get(key)
        if not ours.startswith(IMAGES):
            if scaling is not None:
                policy.normalizer.set_values(ours, scaling.scale, scaling.offset, scaling.center)
            continue
        scaling = scaling or Scaling(
            center=np.zeros(3, np.float32), spread=np.ones(3, np.float32), offset=np.zeros(3, np.float32)
        )
        mean, deviation = translation.image_statistics(policy, translation.cameras(policy).index(ours))
        mean.copy_(torch.from_numpy(scaling.center - scaling.offset * scaling.spread))
        deviation.copy_(torch.from_numpy(scaling.spread))
    return policy.eval()


def export_lerobot_policy(policy: Policy, folder: str | Path) -> None:
    """Writes a policy as a checkpoint that LeRobot 0.4 and newer load (tried with 0.4.4 and 0.6.1).

    The weights are those that the policy has now: after `load_policy` the averaged ones. Cameras renamed by the transform
    `RenameCameras` are renamed by LeRobot's processor. LeRobot keeps no record of units, element names and meaning of actions.

    Args:
        policy: an ACT or a Diffusion Policy with values in its normaliser.
        folder: created if need be; files of an earlier export are replaced.

    Raises:
        LeRobotCheckpointError: LeRobot cannot express the policy; names every reason.
    """
    translation = next((each for each in TRANSLATIONS.values() if type(policy) is each.policy_class), None)
    if translation is None:
        raise LeRobotCheckpointError(
            f"LeRobot knows no {type(policy).__name__}; it has "
            f"{' and '.join(each.policy_class.__name__ for each in TRANSLATIONS.values())}."
        )
    own: Any = policy
    transforms = own.hparams.get("transforms") or []
    names = [step["class_path"] for step in transforms]
    refuse(
        {
            **{f"the transform {name}": name != RENAME_CAMERAS for name in names},
            "two renamings of cameras": names.count(RENAME_CAMERAS) > 1,
            "postprocess": bool(own.postprocess),
            "pictures with depth": any(key.startswith("observation.depth.") for key in own.observation_keys),
        }
    )
    cameras = translation.cameras(own)
    renames = dict(transforms[0]["init_args"]["names"]) if transforms else {}
    offered, source = own.network_features.observations, own.features.source
    keys = {key: source.get(key, key) for key in own.observation_keys}
    types = {key: "VISUAL" if key in cameras else "ENV" if key == ENVIRONMENT_STATE else "STATE" for key in keys}
    inputs = {theirs: {"type": types[key], "shape": list(offered[key].shape)} for key, theirs in keys.items()}
    outputs = {"action": {"type": "ACTION", "shape": list(own.network_features.action.shape)}}
    norm_map, scalings = {}, {}
    for key, mode in own.normalization.items():
        kind = "ACTION" if key == "action" else types[key]
        norm_map[kind] = THEIR_MODES[mode]
        if mode != "identity":
            scalings[keys.get(key, key)] = _scaling_of(own.normalizer, key)
    for number, key in enumerate(cameras):
        norm_map["VISUAL"] = "MEAN_STD"
        mean, deviation = (each.detach().cpu().numpy() for each in translation.image_statistics(own, number))
        scalings[keys[key]] = Scaling(mean, deviation, np.zeros_like(mean))
    if norm_map.get("ENV") == "IDENTITY":
        del norm_map["ENV"]  # LeRobot's own default
    config = {
        "type": translation.kind,
        **{theirs: _plain(own.hparams[ours]) for theirs, ours in translation.fields.items()},
        **{name: default for name, default in COMMON.items() if default is not REQUIRED and name != "pretrained_revision"},
        "device": "cpu",
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": norm_map,
        **translation.config(own),
    }
    tensors = {}
    for name, value in own.state_dict().items():
        if not _is_statistic(name):
            tensors[translation.tensor_name(name, own)] = value.detach().cpu().contiguous()
    tensors |= translation.derived(own)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = {f"{IMAGES}{data}": f"{IMAGES}{name}" for data, name in renames.items()}
    write_processors(folder, inputs, outputs, norm_map, scalings, {data: keys[name] for data, name in raw.items()})
    (folder / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")  # last: the folder is whole


def _read_config(folder: Path) -> tuple[dict[str, Any], Translation]:
    """The settings, complete, and how to translate them."""
    file = folder / "config.json"
    if not file.is_file():
        inner = "pretrained_model/config.json"
        hint = f" There is {inner}: load that folder." if (folder / inner).is_file() else ""
        raise FileNotFoundError(f"No LeRobot checkpoint in {folder}: config.json is missing.{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LeRobotCheckpointError(f"{file} is damaged: {error}.") from error
    translation = TRANSLATIONS.get(config.get("type"))
    if translation is None:
        raise LeRobotCheckpointError(
            f"{file} is of a policy of type {config.get('type')!r}; {' and '.join(TRANSLATIONS)} can be loaded."
        )
    known = {**COMMON, **dict.fromkeys(translation.fields, REQUIRED), **translation.others}
    if unknown := sorted(set(config) - set(known)):
        raise LeRobotCheckpointError(
            f"{file} has settings that are unknown here: {', '.join(f'{name}={config[name]!r}' for name in unknown)}. A newer "
            "LeRobot may mean something by them that the policy here does not do; remove them if they change nothing."
        )
    missing = sorted(name for name, default in known.items() if default is REQUIRED and name not in config)
    if missing:
        raise LeRobotCheckpointError(
            f"{file} lacks {', '.join(missing)}. Releases of LeRobot differ in what they take then: write the values down."
        )
    config = {name: config.get(name, default) for name, default in known.items()}
    if config["use_peft"]:
        raise LeRobotCheckpointError(
            f"{file}: the weights are adapters (use_peft); merge them into the policy in LeRobot first."
        )
    for features in ("input_features", "output_features"):
        if not config[features]:
            raise LeRobotCheckpointError(f"{file}: {features} is empty.")
    if list(config["output_features"]) != ["action"]:
        raise LeRobotCheckpointError(f"{file}: output_features are {', '.join(config['output_features'])}, not action alone.")
    return config, translation


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Tensors by LeRobot's names, without the prefix of compiled networks; and an old release's statistics among them."""
    file = folder / "model.safetensors"
    if not file.is_file():
        beside = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise FileNotFoundError(f"{file} is missing; beside it are {beside}.")
    try:
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dictionary)
            shared = opened.metadata() or {}
    except SafetensorError as error:
        raise LeRobotCheckpointError(f"{file} is damaged: {error}.") from error
    stored |= {name: stored[other] for name, other in shared.items() if other in stored and name not in stored}
    tensors, statistics = {}, {}
    for name, value in stored.items():
        value = value.float() if value.is_floating_point() else value
        if name.startswith(IN_WEIGHTS):
            statistics[name] = value.numpy()
        else:
            tensors[name.replace("_orig_mod.", "")] = value
    return tensors, statistics


def _our_key(key: str, feature: Mapping[str, Any]) -> str | None:
    """Our name of an observation; None where LeRobot's policies do not read it."""
    if feature["type"] == "VISUAL":
        return IMAGES + key.removeprefix("observation.").removeprefix("images.")
    return key if key in (STATE, ENVIRONMENT_STATE) else None


def _features(
    folder: Path, config: Mapping[str, Any], keys: Mapping[str, str], normalization: Normalization
) -> tuple[Features, list[dict[str, Any]]]:
    """What the data of the policy offer, and the transform that renames their cameras where the checkpoint does."""
    visual = {key: feature for key, feature in config["input_features"].items() if feature["type"] == "VISUAL"}
    if odd := [f"{key} {feature['shape']}" for key, feature in visual.items() if feature["shape"][0] != 3]:
        raise LeRobotCheckpointError(f"{folder}: pictures of other than 3 channels: {', '.join(odd)}.")
    names: dict[str, str] = {}
    for data, target in normalization.renames.items():
        if target in visual and data.startswith("observation.image"):
            old, new = (_our_key(key, visual[target]).removeprefix(IMAGES) for key in (data, target))  # type: ignore[union-attr]
            names |= {old: new} if old != new else {}
        elif data != target and target in keys:
            say(f"{folder}: LeRobot reads {data} as {target}; give it as {keys[target]} here.")
    if len(set(names.values())) < len(names):
        raise LeRobotCheckpointError(f"{folder}: several cameras are renamed to one: {names}.")
    back = {new: old for old, new in names.items()}
    observations, source = {}, {"checkpoint": f"LeRobot {config['type']}"}
    for key, ours in keys.items():
        shape = tuple(config["input_features"][key]["shape"])
        name = ours.removeprefix(IMAGES)
        data = f"{IMAGES}{back[name]}" if ours.startswith(IMAGES) and name in back else ours
        observations[data] = Feature(shape, dtype="uint8" if key in visual else "float32")
        if key != ours:
            source[ours] = key
    action = Feature(tuple(config["output_features"]["action"]["shape"]))
    transforms = [{"class_path": RENAME_CAMERAS, "init_args": {"names": names}}] if names else []
    return Features(observations, action, source=source), transforms


def _load_tensors(policy: Any, tensors: dict[str, Tensor], translation: Translation, folder: Path) -> None:
    """Copies every tensor to its place.

    Raises:
        LeRobotCheckpointError: a table of those that are missing, unexpected or of another shape.
    """
    own = {name: value for name, value in policy.state_dict().items() if not _is_statistic(name)}
    expected = {translation.tensor_name(name, policy): (name, value) for name, value in own.items()}
    derived = translation.derived(policy)
    lines = []
    for name, (_, value) in expected.items():
        if name not in tensors:
            lines.append(("missing", name, tuple(value.shape)))
        elif tensors[name].shape != value.shape:
            lines.append((f"{tuple(tensors[name].shape)}, not", name, tuple(value.shape)))
    for name, value in tensors.items():
        if name in derived:
            if value.shape != derived[name].shape or not torch.allclose(value, derived[name], rtol=0, atol=1e-5):
                lines.append(("not as its settings make it", name, tuple(derived[name].shape)))
        elif name not in expected:
            lines.append(("unexpected", name, tuple(value.shape)))
    if lines:
        listed = "\n".join(f"  {what:12} {name} {shape}" for what, name, shape in lines[:20])
        rest = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise LeRobotCheckpointError(
            f"{folder / 'model.safetensors'}: {len(lines)} of {len(expected)} tensors do not fit config.json:\n{listed}{rest}"
        )
    policy.load_state_dict({ours: tensors[name] for name, (ours, _) in expected.items()}, strict=False)


def _is_statistic(name: str) -> bool:
    """Whether a tensor of ours belongs to the normalisation, which LeRobot stores elsewhere."""
    return name.startswith("normalizer.") or name.endswith((".image_mean", ".image_std"))


def _scaling_of(normalizer: Any, key: str) -> Scaling:
    prefix = key.replace(".", "_")
    buffers = {name: value.cpu().numpy() for name, value in normalizer.named_buffers()}
    scale, offset = buffers[f"{prefix}_scale"], buffers[f"{prefix}_offset"]
    return Scaling.from_scale(scale, offset, buffers.get(f"{prefix}_center", np.zeros_like(offset)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
