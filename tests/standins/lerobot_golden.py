"""Completes LeRobot's golden checkpoints, whose backbones follow a formula (facts/lerobot.md §2.9)."""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


def backbone_tensor(name: str, shape: list[int]) -> np.ndarray:
    """The values of a tensor by its full name."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    h = (np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())).astype(np.uint32)
    h ^= h >> 16
    h *= np.uint32(0x7FEB352D)
    h ^= h >> 15
    h *= np.uint32(0x846CA68B)
    h ^= h >> 16
    u = h / 2**32
    if len(shape) == 4:
        values = math.sqrt(6 / math.prod(shape[1:])) * (2 * u - 1)
    elif name.endswith("running_var"):
        values = 0.75 + 0.5 * u
    elif name.endswith(("running_mean", "bias")):
        values = 0.2 * (u - 0.5)
    else:
        values = 0.5 + 0.5 * u
    return values.astype(np.float32).reshape(shape)


def complete_folder(golden: Path, target: Path) -> Path:
    """Copies a golden checkpoint with every tensor in its ``model.safetensors``."""
    target.mkdir(parents=True)
    for file in golden.iterdir():
        if file.name not in ("model.safetensors", "io.safetensors", "README.md", "state_dict_index.json"):
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(golden / "model.safetensors")
    with safe_open(golden / "model.safetensors", "np") as opened:
        metadata = opened.metadata()
    for entry in json.loads((golden / "state_dict_index.json").read_text())["full_state_dict"]:
        if ".backbone." in entry["name"]:
            tensors[entry["name"]] = backbone_tensor(entry["name"], entry["shape"])
    save_file(tensors, target / "model.safetensors", metadata=metadata)
    return target


def copy_folder(folder: Path, target: Path) -> Path:
    """A copy to damage; the weights are hard links until they are rewritten."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name == "model.safetensors":
            (target / file.name).hardlink_to(file)
        else:
            shutil.copyfile(file, target / file.name)
    return target
